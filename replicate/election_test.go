package replicate

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// fakeElections is an elections with hands instead of raft; for use in a bubble.
type fakeElections struct {
	elections
	mu        sync.Mutex
	leads     raft.ServerID
	now       uint64
	follows   bool
	servers   []raft.Server
	dead      []string
	dials     int
	campaigns []time.Duration // when
}

func newFakeElections(id raft.ServerID, voters ...raft.ServerID) *fakeElections {
	f := &fakeElections{leads: "a", now: 7, follows: true}
	for _, v := range voters {
		f.servers = append(f.servers, raft.Server{ID: v})
	}
	start := time.Now()
	locked := func(do func()) { f.mu.Lock(); defer f.mu.Unlock(); do() }
	f.elections = elections{
		id:            id,
		leader:        func() (l raft.ServerID) { locked(func() { l = f.leads }); return l },
		term:          func() (t uint64) { locked(func() { t = f.now }); return t },
		following:     func() (is bool) { locked(func() { is = f.follows }); return is },
		configuration: func() raft.Configuration { return raft.Configuration{Servers: f.servers} },
		last:          func() (uint64, uint64) { return 100, 7 },
		campaign: func() {
			locked(func() {
				f.campaigns = append(f.campaigns, time.Since(start))
				f.follows, f.leads = false, ""
				f.now++
			})
		},
		alive: func(node string) bool { return !slices.Contains(f.dead, node) },
		gone: func(node string) (is bool) {
			time.Sleep(time.Millisecond)
			locked(func() { f.dials++; is = slices.Contains(f.dead, node) })
			return is
		},
		logger:  testLogger(),
		looking: map[string]bool{}, stop: make(chan struct{}), spawn: func(do func()) { go do() },
	}
	return f
}

func (f *fakeElections) is(t *testing.T, dials int, campaigns ...time.Duration) {
	t.Helper()
	time.Sleep(time.Second)
	synctest.Wait()
	if f.dials != dials || !slices.Equal(f.campaigns, campaigns) {
		t.Fatalf("%d dials, campaigns at %v; want %d, %v", f.dials, f.campaigns, dials, campaigns)
	}
}

func TestVotersTryInTheOrderOfTheirIds(t *testing.T) {
	for id, rank := range map[raft.ServerID]time.Duration{"b": 0, "c": 1, "d": 2} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeElections(id, "d", "c", "b", "a")
			f.servers = append(f.servers, raft.Server{ID: "0", Suffrage: raft.Nonvoter})
			f.dead = []string{"a"}
			for range 3 { // all its connections close
				f.ended("a")
			}
			f.is(t, 1, time.Millisecond+rank*electionStep) // a dial takes one
		})
	}
	synctest.Test(t, func(t *testing.T) {
		f := newFakeElections("d", "a", "b", "c", "d")
		f.dead = []string{"a", "b", "c"} // who is not there is not waited for
		f.ended("a")
		f.is(t, 1, time.Millisecond)
	})
}

func TestNoElectionWithoutNeed(t *testing.T) {
	for name, arrange := range map[string]func(f *fakeElections) (dials int){
		"the process lives":         func(f *fakeElections) int { f.dead = nil; return 1 },
		"not the leader's":          func(f *fakeElections) int { f.leads = "b"; return 0 },
		"no leader is known":        func(f *fakeElections) int { f.leads = ""; return 0 },
		"our own":                   func(f *fakeElections) int { f.leads, f.id = "a", "a"; return 0 },
		"we do not vote":            func(f *fakeElections) int { f.servers[2].Suffrage = raft.Nonvoter; return 0 },
		"we are no member any more": func(f *fakeElections) int { f.servers = f.servers[:2]; return 0 },
		"we are a candidate":        func(f *fakeElections) int { f.follows = false; return 1 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeElections("c", "a", "b", "c")
				f.dead = []string{"a"}
				dials := arrange(f)
				f.ended("a")
				f.is(t, dials)
			})
		})
	}
	for name, happens := range map[string]func(f *fakeElections){
		"a newer term was seen":   func(f *fakeElections) { f.now++ },
		"a newer leader was seen": func(f *fakeElections) { f.leads = "b" },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeElections("c", "a", "b", "c")
				f.dead = []string{"a"}
				f.ended("a")
				time.Sleep(20 * time.Millisecond)
				f.mu.Lock()
				happens(f)
				f.mu.Unlock()
				f.is(t, 1)
			})
		})
	}
}

// A connection cut while the process lives, and right after it the process dies.
func TestAConnectionThatClosesWhileWeLookIsLookedIntoToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeElections("b", "a", "b", "c")
		f.ended("a")
		for range 5 {
			f.ended("a")
		}
		time.Sleep(1500 * time.Microsecond) // the first look is over, the second is under way
		f.mu.Lock()
		f.dead = []string{"a"}
		f.mu.Unlock()
		f.is(t, 2, 2*time.Millisecond)
	})
}

func TestARefusedCandidateIsFollowedByWhoeverRefusedIt(t *testing.T) {
	behind := func(candidate string, term uint64) *raft.RequestVoteRequest {
		return &raft.RequestVoteRequest{RPCHeader: raft.RPCHeader{ID: []byte(candidate)}, Term: term, LastLogIndex: 99, LastLogTerm: 7, LeadershipTransfer: true}
	}
	for name, c := range map[string]struct {
		arrange func(*fakeElections, *raft.RequestVoteRequest)
		tries   []time.Duration
	}{
		"its log lacks what ours has": {nil, []time.Duration{electionStep}},
		"a stale one is told by term": {func(_ *fakeElections, v *raft.RequestVoteRequest) { v.LastLogIndex, v.LastLogTerm = 200, 6 }, []time.Duration{electionStep}},
		"we had voted for another":    {func(_ *fakeElections, v *raft.RequestVoteRequest) { v.LastLogIndex = 100 }, nil},
		"its log is longer":           {func(_ *fakeElections, v *raft.RequestVoteRequest) { v.LastLogTerm = 8 }, nil},
		"it came by time-out":         {func(_ *fakeElections, v *raft.RequestVoteRequest) { v.LeadershipTransfer = false }, nil},
		"it has won":                  {func(f *fakeElections, _ *raft.RequestVoteRequest) { f.leads = "b" }, nil},
		"an older term":               {func(_ *fakeElections, v *raft.RequestVoteRequest) { v.Term = 6 }, nil},
		"we do not vote":              {func(f *fakeElections, _ *raft.RequestVoteRequest) { f.servers[2].Suffrage = raft.Nonvoter }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeElections("c", "a", "b", "c")
				f.leads, f.dead = "", []string{"zzz"}
				v := behind("b", 7)
				if c.arrange != nil {
					c.arrange(f, v)
				}
				f.voteRefused(v)
				f.voteRefused(v) // a duplicate
				f.is(t, 0, c.tries...)
			})
		})
	}
}

func TestARefusedCandidateThatWinsMeanwhileIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeElections("c", "a", "b", "c")
		f.leads = ""
		f.voteRefused(&raft.RequestVoteRequest{RPCHeader: raft.RPCHeader{ID: []byte("b")}, Term: 7, LastLogIndex: 99, LastLogTerm: 7, LeadershipTransfer: true})
		time.Sleep(electionStep / 2)
		f.mu.Lock()
		f.leads = "b"
		f.mu.Unlock()
		f.is(t, 0)
	})
}

func TestALoneVoterDoesNotWait(t *testing.T) {
	bubble(t, 1, 2, func(c *cluster) {
		start := time.Now()
		m := c.members[0]
		before := m.term()
		m.t.elections(nil, nil, testLogger()).lone()
		c.await("the next term", func() bool { return m.leads() && m.term() > before })
		if took := time.Since(start); took > 10*time.Millisecond {
			c.Errorf("it took %v", took)
		}
	})
	bubble(t, 2, 0, func(c *cluster) {
		m := c.members[1]
		before := m.term()
		m.t.elections(nil, nil, testLogger()).lone()
		time.Sleep(time.Second)
		if m.term() != before {
			c.Error("it campaigned, though it is not alone")
		}
	})
}

// kill ends a member as a killed process ends, and tells the others that its connections have closed.
func (c *cluster) kill(m *raftMember) {
	var others []*elections
	for _, o := range c.members {
		if o != m {
			c.net.part(true, m, o)
			others = append(others, o.t.elections(nil, func(node string) bool { return node == string(m.id) }, testLogger().With("at", o.id)))
		}
	}
	for _, e := range others {
		e.ended(string(m.id))
		e.ended(string(m.id))
	}
}

func TestAKilledLeaderIsReplacedAtOnce(t *testing.T) {
	for voters := 3; voters <= 5; voters++ {
		bubble(t, voters, 2, func(c *cluster) {
			old := c.members[0]
			term := old.term()
			start := time.Now()
			c.kill(old)
			leader := c.another(old)
			took := time.Since(start)
			c.apply(leader)
			if took > 50*time.Millisecond {
				c.Errorf("%d voters: a new leader after %v", voters, took)
			}
			if leader.term() > term+2 {
				c.Errorf("%d voters: from term %d to %d", voters, term, leader.term())
			}
		})
	}
}

// The killed leader had reached only the last in the order: the first cannot win.
func TestAKilledLeaderThatReachedOneOnlyIsReplacedAtOnce(t *testing.T) {
	for i := range 10 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			bubble(t, 3, 0, func(c *cluster) {
				old, first, last := c.members[0], c.members[1], c.members[2]
				c.net.set(c.net.cut, true, link{old.id, first.id})
				time.Sleep(lostAfter) // what was on its way
				index := c.apply(old)
				if first.log.last() >= index || last.log.last() < index {
					c.Fatalf("the logs end at %d and %d", first.log.last(), last.log.last())
				}
				start := time.Now()
				c.kill(old)
				leader := c.another(old)
				if took := time.Since(start); took > 5*electionStep {
					c.Errorf("a new leader after %v", took)
				}
				if leader != last {
					c.Errorf("%s leads, and lacks what was committed", leader.id)
				}
				c.apply(leader)
			})
		})
	}
}

// An alarm about a leader that lives and is heard: an election, and everything goes on.
func TestAFalseAlarmIsSafe(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		start := time.Now()
		for range 20 {
			var leader *raftMember
			c.await("a leader that all know", func() bool {
				for _, m := range c.members {
					if m.leads() {
						leader = m
					}
				}
				for _, m := range c.members {
					if _, id := m.raft.LeaderWithID(); leader == nil || id != leader.id {
						return false
					}
				}
				return true
			})
			index := c.apply(leader)
			for _, o := range c.members {
				if o != leader {
					o.t.elections(nil, func(string) bool { return true }, testLogger()).ended(string(leader.id))
				}
			}
			c.await("the next leader", func() bool {
				for _, m := range c.members {
					if m.leads() && m.term() > leader.term()-1 && m != leader && m.log.last() > index {
						return true
					}
				}
				return leader.leads() && leader.log.last() > index
			})
		}
		t.Logf("20 false alarms cost %v", time.Since(start))
	})
}
