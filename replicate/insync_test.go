package replicate

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// script drives an insync by hand: replica by replica, on a clock that the test moves.
type script struct {
	*testing.T
	*insync
	now  time.Time
	prev map[raft.ServerID]uint64 // of the newest request
}

func newScript(t *testing.T, members ...raft.ServerID) *script {
	c := raft.Configuration{Servers: []raft.Server{{ID: "leader"}}}
	for _, id := range members {
		c.Servers = append(c.Servers, raft.Server{ID: id})
	}
	s := &script{T: t, insync: newInsync(func() raft.Configuration { return c }, nil), now: time.Unix(1e9, 0), prev: map[raft.ServerID]uint64{}}
	s.stop() // check is called by hand
	s.begin(1)
	return s
}

func (s *script) sleep(d time.Duration) { s.now = s.now.Add(d) }

// write appends entries up to an index.
func (s *script) write(to uint64) {
	for i := s.last + 1; i <= to; i++ {
		s.appended(i, i, s.now)
	}
}

func (s *script) send(id raft.ServerID) { s.prev[id] = s.sending(id, s.term, s.last) }

func (s *script) ack(id raft.ServerID, index uint64) {
	s.acked(id, s.term, index, s.prev[id], s.now)
}

// enter brings a replica in that has stored everything.
func (s *script) enter(id raft.ServerID) {
	s.Helper()
	for range 2 {
		s.send(id)
		s.ack(id, s.last)
	}
	s.in(id, true)
}

func (s *script) in(id raft.ServerID, want bool) {
	s.Helper()
	if r := s.replicas[id]; want != (r != nil && r.in) {
		s.Fatalf("%s in sync: %v", id, !want)
	}
}

func (s *script) is(want uint64) {
	s.Helper()
	if _, got := s.stored(); got != want {
		s.Fatalf("stored up to %d, want %d", got, want)
	}
}

// told says whether the rise of stored was told since the last look.
func (s *script) told(want bool) {
	s.Helper()
	select {
	case <-s.advanced:
		if !want {
			s.Fatal("an advance was told")
		}
	default:
		if want {
			s.Fatal("no advance was told")
		}
	}
}

func TestATermBeginsWithTheLeaderAlone(t *testing.T) {
	s := newScript(t, "b", "c")
	s.write(10)
	s.is(10)
	s.enter("b")
	s.enter("c")
	s.write(12)
	s.is(10)
	s.send("b")
	s.ack("b", 12)
	s.is(10)
	s.told(false)
	s.ack("c", 12)
	s.is(12)
	s.told(true)

	s.begin(2)
	s.in("b", false)
	s.write(13)
	s.is(13)
	s.acked("b", 1, 13, 0, s.now) // an answer to a request of the term before
	s.in("b", false)
	s.begin(1)
	if term, _ := s.stored(); term != 2 {
		t.Fatalf("back in term %d", term)
	}
	s.sending("b", 3, 13) // raft sends in a new term before anybody is told of it
	if term, _ := s.stored(); term != 3 {
		t.Fatalf("still in term %d", term)
	}
}

func TestAReplicaEntersWhenItIsARoundTripBehind(t *testing.T) {
	s := newScript(t, "b")
	s.write(1000)
	s.send("b") // the first: nothing is known of one before
	s.ack("b", 1000)
	s.in("b", false)
	s.write(1100)
	s.send("b")
	s.ack("b", 900) // (an old answer)
	s.in("b", true) // it has had 1000, our last when the request before went out
	s.is(1000)

	// One that has a long way to go gets some of it with each request, and does not enter before it is there.
	s = newScript(t, "b")
	s.write(1000)
	have := uint64(0)
	for have+64 < s.last-20 {
		s.send("b")
		have += 64
		s.write(s.last + 10) // meanwhile the log grows
		s.ack("b", have)
		s.in("b", false)
	}
	s.send("b")
	s.ack("b", s.last-10)
	s.in("b", true)
}

func TestAHeartbeatSaysNothingOfTheLog(t *testing.T) {
	s := newScript(t, "b")
	s.write(5)
	s.enter("b")
	s.write(6)
	for range 5 {
		s.acked("b", 1, 0, noIndex, s.now)
	}
	s.is(5)
	if _, infos := s.infos(); len(infos) != 1 || infos[0].Contact != s.now || infos[0].Match != 5 || !infos[0].InSync {
		t.Fatalf("%+v", infos)
	}
}

func TestAnAnswerLaterThanTheLeaseBeginsAnew(t *testing.T) {
	s := newScript(t, "b")
	s.lease = 250 * time.Millisecond
	s.write(5)
	s.send("b")
	steady := func(want time.Duration) {
		t.Helper()
		s.acked("b", 1, 0, noIndex, s.now)
		if _, infos := s.infos(); infos[0].Steady != want {
			t.Fatalf("steady for %v, not %v", infos[0].Steady, want)
		}
	}
	steady(0)
	for i := range time.Duration(10) {
		s.sleep(s.lease)
		steady((i + 1) * s.lease)
	}
	s.sleep(s.lease + 1)
	steady(0)
	s.sleep(s.lease)
	steady(s.lease)
}

func TestAClosedConnectionTakesAReplicaOutAtOnce(t *testing.T) {
	s := newScript(t, "b", "c")
	s.write(10)
	s.enter("b")
	s.enter("c")
	s.write(11)
	s.send("c")
	s.ack("c", 11)
	s.is(10)
	s.closed("b", 0, s.now) // of another term
	s.in("b", true)
	s.closed("b", 1, s.now)
	s.in("b", false)
	s.is(11)
	s.told(true)
	s.leaving("c", s.now)
	s.in("c", false)
	s.write(12)
	s.is(12)
}

func TestWhoLeavesIsBarredForTwiceAsLongEachTime(t *testing.T) {
	s := newScript(t, "b")
	s.write(10)
	for _, bar := range []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second, 80 * time.Second, 160 * time.Second, 5 * time.Minute, 5 * time.Minute} {
		s.enter("b")
		s.closed("b", s.term, s.now)
		s.closed("b", s.term, s.now) // its other connections
		s.sleep(bar - time.Millisecond)
		s.begin(s.term + 1) // a new term forgives nothing
		s.send("b")
		s.ack("b", s.last)
		s.send("b")
		s.ack("b", s.last)
		s.in("b", false)
		s.sleep(time.Millisecond)
	}
	s.enter("b")
	s.sleep(barMost) // a long sound time does
	s.closed("b", s.term, s.now)
	s.sleep(barFirst)
	s.enter("b")
}

func TestALaggardLeavesWhenItsOldestEntryIsASecondOld(t *testing.T) {
	s := newScript(t, "b", "c")
	s.write(10)
	s.enter("b")
	s.enter("c")
	s.sleep(time.Hour) // nothing to store
	if next := s.check(s.now); !next.IsZero() {
		t.Fatalf("asked to come back at %v", next)
	}
	s.in("b", true)
	s.write(11)
	began := s.now
	for i := range 200 { // the log grows on; c keeps up, b stores nothing
		s.sleep(10 * time.Millisecond)
		s.write(s.last + 5)
		s.send("c")
		s.ack("c", s.last)
		next := s.check(s.now)
		if age := s.now.Sub(began); age < laggard {
			s.in("b", true)
			if next.Before(s.now) || next.Sub(began) > laggard+2*appendGrain {
				t.Fatalf("step %d: next check at %v", i, next.Sub(began))
			}
		} else if age > laggard+2*appendGrain {
			s.in("b", false)
		}
	}
	s.in("c", true)
	s.is(s.last)

	// One that is always late, but never by a second, stays.
	s = newScript(t, "b")
	s.write(10)
	s.enter("b")
	for range 300 {
		s.sleep(10 * time.Millisecond)
		s.write(s.last + 1)
		if s.last > 100 {
			s.send("b")
			s.ack("b", s.last-90) // 900 ms behind
		}
		s.check(s.now)
		s.in("b", true)
	}
}

func TestWhoIsNoMemberIsNotInSync(t *testing.T) {
	s := newScript(t, "b", "c")
	s.write(10)
	s.enter("b")
	s.enter("c")
	s.write(11)
	s.configured(raft.Configuration{Servers: []raft.Server{{ID: "leader"}, {ID: "c"}, {ID: "d"}}}, s.now)
	s.in("b", false)
	s.send("c")
	s.ack("c", 11)
	s.is(11)
	for range 3 { // raft sends it what it needs to know that it was removed
		s.send("b")
		s.ack("b", 11)
	}
	s.in("b", false)
	s.enter("d")
}

func TestATermThatIsOverAdvancesNoMore(t *testing.T) {
	s := newScript(t, "b")
	s.write(10)
	s.enter("b")
	s.write(11)
	s.end(0)
	s.end(1)
	s.send("b")
	s.ack("b", 11)
	s.told(false)
	s.sleep(time.Minute)
	if next := s.check(s.now); !next.IsZero() {
		t.Fatal("it goes on checking")
	}
}

// Whatever happens: what stored says is stored by every replica in the set, and whoever waits for an index is told.
func TestNothingCountsAsStoredThatAReplicaInTheSetLacks(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		ids := []raft.ServerID{"b", "c", "d"}
		s := newScript(t, ids...)
		has := map[raft.ServerID]uint64{}            // what it really has on disk
		type flight struct{ upTo, prev uint64 }      // a request on its way
		flights := map[raft.ServerID][]flight{}      // in order
		answers := map[raft.ServerID][]flight{}      // stored, the answer on its way
		var waiting []uint64                         // indexes whose reply waits for stored
		trace := []string{fmt.Sprint("seed ", seed)} // what was done
		for range 400 {
			id := ids[rnd.IntN(len(ids))]
			op := rnd.IntN(12)
			trace = append(trace, fmt.Sprint(op, id))
			_, before := s.stored()
			switch op {
			case 0, 1, 2:
				s.write(s.last + 1 + rnd.Uint64N(3))
				if _, stored := s.stored(); stored < s.last {
					waiting = append(waiting, s.last)
				}
			case 3, 4, 5:
				s.send(id)
				flights[id] = append(flights[id], flight{min(s.last, has[id]+4), s.prev[id]})
			case 6, 7:
				if f := flights[id]; len(f) > 0 {
					has[id] = max(has[id], f[0].upTo)
					flights[id], answers[id] = f[1:], append(answers[id], f[0])
				}
			case 8, 9:
				if a := answers[id]; len(a) > 0 {
					s.acked(id, s.term, a[0].upTo, a[0].prev, s.now)
					answers[id] = a[1:]
				}
			case 10:
				s.sleep(time.Duration(rnd.IntN(3000)) * time.Millisecond)
				s.check(s.now)
			case 11:
				if rnd.IntN(5) == 0 {
					s.closed(id, s.term, s.now)
					flights[id], answers[id] = nil, nil
				}
			}
			_, stored := s.stored()
			for _, id := range ids {
				if r := s.replicas[id]; r != nil && r.in && stored > has[id] {
					t.Fatalf("%v: stored up to %d, but %s has %d", trace, stored, id, has[id])
				}
			}
			told := false
			select {
			case <-s.advanced:
				told = true
			default:
			}
			for len(waiting) > 0 && waiting[0] <= stored {
				if !told && waiting[0] > before {
					t.Fatalf("%v: stored went from %d to %d, and %d was not told", trace, before, stored, waiting[0])
				}
				waiting = waiting[1:]
			}
		}
	}
}

func TestAKilledLeaderDoesNotBlockTheNextTerm(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		old, b := c.members[0], c.members[1]
		c.await("both are in sync", func() bool { return old.insync(b) && old.insync(c.members[2]) })
		c.net.part(true, old, b, c.members[2])
		b.t.campaign(b.id)
		leader := c.another(old)
		index := c.apply(leader)
		if _, stored := leader.t.insync.stored(); stored < index {
			c.Fatalf("stored up to %d only, %d is asked for", stored, index)
		}
		rest := c.members[3-map[*raftMember]int{b: 1, c.members[2]: 2}[leader]]
		c.await("the other is in sync", func() bool { return leader.insync(rest) })
		if leader.insync(old) {
			c.Fatal("the killed one is in sync")
		}
	})
}

// A replica that stops storing holds replies up for a second, no longer, whatever the load.
func TestASlowReplicaHoldsUpForASecondOnly(t *testing.T) {
	bubble(t, 3, 1, func(c *cluster) {
		leader, slow := c.members[0], c.members[3]
		c.await("it is in sync", func() bool { return leader.insync(slow) })
		slow.log.shut()
		start := time.Now()
		index := c.apply(leader)
		if _, stored := leader.t.insync.stored(); stored >= index {
			c.Fatal("it was not waited for")
		}
		select {
		case <-leader.t.insync.advanced:
		default:
		}
		for _, stored := leader.t.insync.stored(); stored < index; _, stored = leader.t.insync.stored() {
			select {
			case <-leader.t.insync.advanced: // by itself: nothing else is written
			case <-time.After(time.Minute):
				c.Fatal("it holds up for ever")
			}
		}
		if took := time.Since(start); took > laggard+2*appendGrain {
			c.Errorf("it held up for %v", took)
		}
		if leader.insync(slow) {
			c.Error("it is still in sync")
		}
		slow.log.open()
		c.await("it is back", func() bool { return leader.insync(slow) })
		if took := time.Since(start); took < barFirst {
			c.Errorf("it was back after %v", took)
		}
	})
}
