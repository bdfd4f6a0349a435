package replicate

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// fakeFences is a fences with hands instead of raft.
type fakeFences struct {
	fences
	now     atomic.Uint64
	deposed atomic.Bool
	hanging atomic.Bool
	servers []raft.Server
	kicks   int
}

func newFakeFences(voters ...raft.ServerID) *fakeFences {
	f := &fakeFences{}
	f.now.Store(5)
	f.armed = true // check is not called
	for _, id := range voters {
		f.servers = append(f.servers, raft.Server{ID: id})
	}
	f.fences.id = "a"
	f.fences.leadership = func() (uint64, bool) { return f.now.Load(), !f.deposed.Load() }
	f.fences.configuration = func() raft.Configuration { return raft.Configuration{Servers: f.servers} }
	f.fences.hung = f.hanging.Load
	f.fences.kick = func(uint64) { f.kicks++ }
	return f
}

// begun is a fence that the test watches.
type begun struct {
	*testing.T
	outcomes []error
}

func (f *fakeFences) begin(t *testing.T, term uint64) *begun {
	b := &begun{T: t}
	f.fence(term, func(err error) {
		if !f.mu.TryLock() {
			t.Error("called with a lock held")
		} else {
			f.mu.Unlock()
		}
		b.outcomes = append(b.outcomes, err)
	})
	return b
}

func (b *begun) is(want ...error) {
	b.Helper()
	if len(b.outcomes) != len(want) {
		b.Fatalf("outcomes %v, want %v", b.outcomes, want)
	}
	for i := range want {
		if !errors.Is(b.outcomes[i], want[i]) {
			b.Fatalf("outcomes %v, want %v", b.outcomes, want)
		}
	}
}

func TestAFenceOfALoneVoterIsCompleteAtOnce(t *testing.T) {
	f := newFakeFences("a")
	f.servers = append(f.servers, raft.Server{ID: "s", Suffrage: raft.Nonvoter})
	f.begin(t, 5).is(nil)
	f.begin(t, 4).is(ErrNotLeader)
	f.begin(t, 6).is(ErrNotLeader)
	f.deposed.Store(true)
	f.begin(t, 5).is(ErrNotLeader)
	if f.kicks != 0 {
		t.Error("it asked somebody")
	}
}

func TestAFenceCountsOnlyVotersAskedAfterItBegan(t *testing.T) {
	f := newFakeFences("a", "b", "c")
	f.servers = append(f.servers, raft.Server{ID: "s1", Suffrage: raft.Nonvoter}, raft.Server{ID: "s2", Suffrage: raft.Nonvoter})
	old := f.clock.Load()
	one := f.begin(t, 5)
	f.acked("b", 5, old)
	f.acked("c", 5, old)
	one.is()
	now := f.clock.Load()
	f.acked("s1", 5, now)
	f.acked("s2", 5, now)
	f.acked("stranger", 5, now)
	one.is()
	f.acked("b", 4, now) // of an older term
	one.is()
	two := f.begin(t, 5)
	f.acked("c", 5, now) // was asked after the first, before the second
	one.is(nil)
	two.is()
	f.acked("b", 5, f.clock.Load())
	one.is(nil)
	two.is(nil)
	if f.kicks != 2 || f.count.Load() != 0 || len(f.waiting) != 0 {
		t.Errorf("%d kicks, %d waiting", f.kicks, f.count.Load())
	}
}

func TestAFenceNeedsAMajorityOfTheNewestConfiguration(t *testing.T) {
	f := newFakeFences("a", "b", "c")
	one := f.begin(t, 5)
	f.servers = append(f.servers, raft.Server{ID: "d"}, raft.Server{ID: "e"}) // grown meanwhile
	now := f.clock.Load()
	f.acked("b", 5, now)
	one.is()
	f.acked("d", 5, now)
	one.is(nil)

	// A leader that is being removed does not count itself.
	f = newFakeFences("b", "c")
	two := f.begin(t, 5)
	f.acked("b", 5, f.clock.Load())
	two.is()
	f.acked("c", 5, f.clock.Load())
	two.is(nil)
}

func TestAFenceOfATermThatEndsFails(t *testing.T) {
	f := newFakeFences("a", "b", "c")
	one := f.begin(t, 5)
	f.now.Store(6)
	f.acked("b", 5, f.clock.Load()) // a majority, but the term is over
	one.is(ErrNotLeader)
	f.now.Store(5)
	two := f.begin(t, 5)
	f.over(5)
	two.is(ErrNotLeader)
	f.acked("b", 5, f.clock.Load())
	two.is(ErrNotLeader)
	f.begin(t, 5).is(ErrNotLeader) // who leads in 5 no more never will again
	f.now.Store(7)
	three := f.begin(t, 7)
	f.acked("b", 7, f.clock.Load())
	three.is(nil)
}

func TestAFenceNobodyFailsFailsByItself(t *testing.T) {
	for name, lose := range map[string]func(*fakeFences){
		"not leading": func(f *fakeFences) { f.deposed.Store(true) },
		"hung":        func(f *fakeFences) { f.hanging.Store(true) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeFences("a", "b", "c")
				f.armed = false
				one := f.begin(t, 5)
				time.Sleep(10 * fenceCheck)
				synctest.Wait()
				one.is()
				lose(f)
				time.Sleep(2 * fenceCheck)
				synctest.Wait()
				one.is(ErrNotLeader)
				if f.armed {
					t.Error("a timer is left")
				}
			})
		})
	}
}

func TestFencesComplete(t *testing.T) {
	for _, voters := range []int{1, 3, 5} {
		bubble(t, voters, 0, func(c *cluster) {
			leader := c.members[0]
			start := time.Now()
			for range 100 {
				if err := c.outcome(leader.fence()); err != nil {
					c.Fatal(err)
				}
			}
			// In a bubble what needs no waiting takes no time.
			if took := time.Since(start); took > 0 {
				c.Errorf("%d voters: 100 fences waited %v: for raft's own heartbeats", voters, took)
			}
			for _, m := range c.members[1:] {
				if err := c.outcome(m.fence()); !errors.Is(err, ErrNotLeader) {
					c.Errorf("a follower's fence: %v", err)
				}
			}
		})
	}
}

// raft.VerifyLeader says yes here: two non-voters answer.
func TestNoFenceCompletesWithEveryOtherVoterCutOff(t *testing.T) {
	bubble(t, 3, 2, func(c *cluster) {
		leader := c.members[0]
		if err := c.outcome(leader.fence()); err != nil {
			c.Fatal(err)
		}
		term := leader.term()
		c.net.part(true, leader, c.members[1], c.members[2])
		var waiting []<-chan error
		for leader.leads() && leader.term() == term {
			waiting = append(waiting, leader.fence())
			time.Sleep(5 * time.Millisecond)
		}
		if len(waiting) < 10 {
			c.Fatalf("only %d fences began", len(waiting))
		}
		for i, f := range waiting {
			if err := c.outcome(f); !errors.Is(err, ErrNotLeader) {
				c.Fatalf("fence %d: %v", i, err)
			}
		}
	})
}

// The new leader is active while the old one does not know yet: its fences fail, though a standby still answers it.
func TestADeposedLeadersFencesFail(t *testing.T) {
	bubble(t, 3, 1, func(c *cluster) {
		old, b := c.members[0], c.members[1]
		c.net.part(true, old, b, c.members[2])
		b.t.campaign(b.id)
		c.await("a new leader", func() bool { return b.leads() || c.members[2].leads() })
		if !old.leads() {
			c.Fatal("the old leader knows already")
		}
		late := old.fence()
		if err := c.outcome(c.another(old).fence()); err != nil {
			c.Fatal(err)
		}
		select {
		case err := <-late:
			c.Fatalf("answered at once: %v", err)
		default:
		}
		c.net.part(false, old, b, c.members[2])
		if err := c.outcome(late); !errors.Is(err, ErrNotLeader) {
			c.Fatal(err)
		}
	})
}

// A transfer that fails in the middle takes nothing from fences: the leader still leads.
func TestFencesHoldThroughATransferThatFails(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		leader, to := c.members[0], c.members[1]
		c.net.part(true, leader, to)
		transfer := leader.raft.LeadershipTransferToServer(to.id, raft.ServerAddress(to.id))
		for range 20 {
			if err := c.outcome(leader.fence()); err != nil {
				c.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		if transfer.Error() == nil {
			c.Fatal("the transfer succeeded")
		}
		if err := c.outcome(leader.fence()); err != nil {
			c.Fatal(err)
		}
	})
}

// fenceLoad reads and writes as fast as it can on every voter of a cluster.
type fenceLoad struct {
	*cluster
	stop    chan struct{}
	workers sync.WaitGroup
	held    atomic.Int64

	mu     sync.Mutex
	newest uint64 // the highest term in which somebody is known to have led
}

func (l *fenceLoad) until(work func() bool) {
	l.workers.Go(func() {
		for {
			select {
			case <-l.stop:
				return
			default:
			}
			if !work() {
				time.Sleep(time.Millisecond)
			}
		}
	})
}

// read fences once, if m leads. What holds must not be of a term older than one in which a fence held before.
func (l *fenceLoad) read(m *raftMember) (leading bool) {
	term, leading := m.t.leadership()
	if !leading {
		return false
	}
	l.mu.Lock()
	begun := l.newest
	l.mu.Unlock()
	outcome := make(chan error, 1)
	m.t.fences.fence(term, func(err error) { outcome <- err })
	if l.outcome(outcome) != nil {
		return true
	}
	l.held.Add(1)
	if term < begun {
		l.Errorf("term %d held after somebody had led in %d", term, begun)
	}
	l.mu.Lock()
	l.newest = max(l.newest, term)
	l.mu.Unlock()
	return true
}

// Reads and writes at once, and leadership that moves: each fence is answered once, and one that holds never belongs to
// a leader whose successor had begun before.
func TestFencesUnderLoadNeverVouchForADeposedLeader(t *testing.T) {
	c := newCluster(t, 3, 1)
	defer c.close()
	load := &fenceLoad{cluster: c, stop: make(chan struct{})}
	for _, m := range c.members[:3] {
		load.until(func() bool { return load.read(m) })
		load.until(func() bool { return m.raft.Apply([]byte("x"), 0).Error() == nil })
	}
	for i := range 10 {
		to := c.members[(i+1)%3]
		before := to.term()
		to.t.campaign(to.id)
		c.await("a fence of a newer leader", func() bool {
			for _, m := range c.members[:3] { // not always the one that was to be: votes may be split
				if m.leads() && m.term() > before && c.outcome(m.fence()) == nil {
					return true
				}
			}
			return false
		})
	}
	close(load.stop)
	load.workers.Wait()
	t.Logf("fences held by the load: %d", load.held.Load())
	if load.held.Load() == 0 {
		t.Error("no fence held")
	}
}
