package replicate

import (
	"errors"
	"testing"
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
