package replicate

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// The disk of the leader hangs: it stops leading, though raft itself would send heartbeats for ever.
func TestALeaderWhoseDiskHangsIsReplaced(t *testing.T) {
	bubble(t, 3, 1, func(c *cluster) {
		old := c.members[0]
		c.await("all are in sync", func() bool { return old.insync(c.members[1]) && old.insync(c.members[2]) })
		term := old.term()
		start := time.Now()
		old.log.shut()
		stuck := old.raft.Apply([]byte("x"), 0)
		time.Sleep(hungAfter / 2)
		if err := c.outcome(old.fence()); err != nil { // it leads, so far, and all know it
			c.Fatal(err)
		}
		leader := c.another(old)
		if took := time.Since(start); took > hungAfter+300*time.Millisecond {
			c.Errorf("a new leader after %v", took)
		}
		if old.term() != term || !old.leads() {
			c.Error("the old one does not believe that it leads: this test is about one that does")
		}
		if err := c.outcome(old.fence()); !errors.Is(err, ErrNotLeader) {
			c.Errorf("a fence of the old leader: %v", err)
		}
		c.apply(leader)

		old.log.open()
		if stuck.Error() == nil {
			c.Error("the stuck entry was committed")
		}
		index := c.apply(leader)
		c.await("the old leader follows", func() bool { return !old.leads() && old.fsm.index.Load() == index })
	})
}

// A follower whose disk hangs changes nothing but the in-sync set.
func TestAFollowerWhoseDiskHangsChangesNothing(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		leader, slow := c.members[0], c.members[2]
		term := leader.term()
		slow.log.shut()
		for range 50 {
			c.apply(leader)
			time.Sleep(100 * time.Millisecond)
			if err := c.outcome(leader.fence()); err != nil {
				c.Fatal(err)
			}
		}
		if leader.term() != term || leader.insync(slow) {
			c.Errorf("term %d after %d; in sync: %v", leader.term(), term, leader.insync(slow))
		}
		slow.log.open()
		c.await("it follows", func() bool { return slow.log.last() == leader.log.last() })
	})
}

// With whoever has stored most unreachable the next is asked.
func TestAnyVoterThatAnswersIsOfferedLeadership(t *testing.T) {
	bubble(t, 5, 0, func(c *cluster) {
		old := c.members[0]
		c.net.part(true, c.members[1], old, c.members[2], c.members[3], c.members[4])
		old.log.shut()
		start := time.Now()
		stuck := old.raft.Apply([]byte("x"), 0)
		leader := c.another(old)
		if took := time.Since(start); took > hungAfter+time.Second {
			c.Errorf("a new leader after %v", took)
		}
		c.apply(leader)
		old.log.open()
		_ = stuck.Error()
	})
}

// handedOver notes whom leadership is offered to.
type handedOver struct {
	*raft.InmemTransport
	to chan raft.ServerID
}

func (h handedOver) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	h.to <- id
	return h.InmemTransport.TimeoutNow(id, target, args, resp)
}

// Of two others one has, besides all that the leader has written, what it is still writing: without that one's vote the
// other cannot be elected.
func TestWhoHasWhatTheLeaderHasNotWrittenIsOfferedLeadershipFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		offered := make(chan raft.ServerID, 2)
		c := startCluster(t, 3, 0, func(c *cluster, m *raftMember) raft.Transport {
			return handedOver{inMemory(c, m).(*raft.InmemTransport), offered}
		})
		defer c.close()
		old, behind, ahead := c.members[0], c.members[1], c.members[2]
		before := c.apply(old)
		c.await("all have it", func() bool { return behind.log.last() == before && ahead.log.last() == before })
		old.log.shut()
		c.net.set(c.net.cut, true, link{old.id, behind.id})
		stuck := old.raft.Apply([]byte("ahead"), 0)
		c.await("one other has it", func() bool { return ahead.log.last() > before })
		c.net.set(c.net.cut, false, link{old.id, behind.id})
		if got := behind.log.last(); got != before {
			c.Fatalf("the other has %d entries, too", got)
		}
		if first := <-offered; first != ahead.id {
			c.Errorf("%s was asked first", first)
		}
		if leader := c.another(old); leader != ahead {
			c.Errorf("%s leads", leader.id)
		}
		old.log.open()
		_ = stuck.Error()
	})
}

type failingLog struct{ *raft.InmemStore }

func (failingLog) StoreLogs([]*raft.Log) error { return errors.New("no") }

func TestWhatWasNotWrittenIsNotLearnt(t *testing.T) {
	s := newInsync(func() raft.Configuration { return raft.Configuration{} }, nil)
	l := &watchedLog{LogStore: failingLog{raft.NewInmemStore()}, insync: s, base: time.Now()}
	if l.StoreLog(&raft.Log{Index: 1}) == nil || s.last != 0 {
		t.Fatalf("last is %d", s.last)
	}
	l.LogStore = raft.NewInmemStore()
	c := raft.Configuration{Servers: []raft.Server{{ID: "a"}}}
	if err := l.StoreLogs([]*raft.Log{{Index: 1}, {Index: 2, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(c)}}); err != nil {
		t.Fatal(err)
	}
	if s.last != 2 || !s.members["a"] || len(s.members) != 1 || l.hung() || l.IsMonotonic() {
		t.Fatalf("last %d, members %v", s.last, s.members)
	}
}
