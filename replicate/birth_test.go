package replicate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
)

// nursery is a network of nodes that want to be born, in a bubble of synctest.
type nursery struct {
	t       *testing.T
	mu      sync.Mutex
	infants map[string]*infant
	chosen  string // by the arbiter
	founded []string
	workers sync.WaitGroup
}

type infant struct {
	birth
	n        *nursery
	cancel   context.CancelFunc
	state    bool
	mute     bool
	sees     map[string]gossipMember
	changing chan struct{}
	why      string
}

func newNursery(t *testing.T) *nursery { return &nursery{t: t, infants: map[string]*infant{}} }

// start runs a node; the options may change it before.
func (n *nursery) start(id string, options ...func(*infant)) *infant {
	i := &infant{n: n, sees: map[string]gossipMember{}, changing: make(chan struct{})}
	i.node, i.log, i.timing = id, slog.New(slog.DiscardHandler), defaultBirthTiming
	i.members = func() []gossipMember {
		n.mu.Lock()
		defer n.mu.Unlock()
		var all []gossipMember
		for _, id := range slices.Sorted(maps.Keys(i.sees)) {
			all = append(all, i.sees[id])
		}
		return all
	}
	i.changed = func() <-chan struct{} {
		n.mu.Lock()
		defer n.mu.Unlock()
		return i.changing
	}
	i.ask = n.ask
	i.found = func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.founded = append(n.founded, id)
		i.state = true
		return nil
	}
	i.waiting = func(why string) {
		n.mu.Lock()
		defer n.mu.Unlock()
		i.why = why
	}
	for _, o := range options {
		o(i)
	}
	var ctx context.Context
	ctx, i.cancel = context.WithCancel(context.Background())
	n.mu.Lock()
	n.infants[id] = i
	n.mu.Unlock()
	n.workers.Go(func() {
		if err := i.run(ctx); err != nil {
			n.t.Error(err)
		}
	})
	return i
}

func (n *nursery) ask(ctx context.Context, node string) (facts, error) {
	n.mu.Lock()
	i := n.infants[node]
	mute, state := i.mute, i.state
	n.mu.Unlock()
	if mute {
		<-ctx.Done()
		return facts{}, ctx.Err()
	}
	time.Sleep(time.Millisecond)
	f := facts{HasState: state, Expect: i.expect}
	if !state {
		f.Leader = i.endorsement()
	}
	return f, nil
}

// meet lets a see b, in the state given and with b's tags.
func (n *nursery) meet(a, b *infant, state gossipState) {
	n.mu.Lock()
	defer n.mu.Unlock()
	tags := map[string]string{}
	if b.expect > 0 {
		tags[tagExpect] = strconv.Itoa(b.expect)
	}
	if b.state {
		tags[tagClusterID] = "one"
	}
	a.sees[b.node] = gossipMember{ID: b.node, State: state, Tags: tags}
	close(a.changing)
	a.changing = make(chan struct{})
}

func (n *nursery) allMeet() {
	for _, a := range n.infants {
		for _, b := range n.infants {
			if a != b {
				n.meet(a, b, gossipAlive)
			}
		}
	}
}

func (n *nursery) end() {
	for _, i := range n.infants {
		i.cancel()
	}
	n.workers.Wait()
}

func (n *nursery) expect(want ...string) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !slices.Equal(n.founded, want) {
		n.t.Errorf("founded by %v, not %v", n.founded, want)
	}
}

func (n *nursery) waits(i *infant, for_ string) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !strings.Contains(i.why, for_) {
		n.t.Errorf("%s waits: %q, not for %q", i.node, i.why, for_)
	}
}

func expecting(count int) func(*infant) {
	return func(i *infant) { i.expect, i.join = count, true }
}
func joining(i *infant) { i.join = true }

func inNursery(t *testing.T, story func(t *testing.T, n *nursery)) {
	synctest.Test(t, func(t *testing.T) {
		n := newNursery(t)
		story(t, n)
		n.end()
	})
}

func TestAloneIsBornAtOnce(t *testing.T) {
	inNursery(t, func(t *testing.T, n *nursery) {
		began := time.Now()
		n.start("a")
		synctest.Wait()
		n.expect("a")
		if time.Since(began) != 0 {
			t.Error("it took a while")
		}
	})
}

func TestWithJoinAloneNobodyIsEverBorn(t *testing.T) {
	inNursery(t, func(t *testing.T, n *nursery) {
		a := n.start("a", joining)
		time.Sleep(time.Hour)
		n.waits(a, "no other sidecar is found")
		b := n.start("b", joining)
		n.allMeet()
		time.Sleep(time.Hour)
		n.expect()
		n.waits(b, "nobody here may found one")
	})
}

func TestOfTheExpectedTheLowestFounds(t *testing.T) {
	inNursery(t, func(t *testing.T, n *nursery) {
		for _, id := range []string{"c", "b"} {
			n.start(id, expecting(3))
		}
		n.allMeet()
		time.Sleep(time.Minute)
		n.expect()
		n.waits(n.infants["b"], "2 of the 3 sidecars")
		n.waits(n.infants["c"], "b is to found the cluster")
		n.start("d", expecting(3))
		n.start("e", joining) // one more, that does not count
		n.allMeet()
		time.Sleep(2 * time.Second)
		n.expect("b")
		n.allMeet() // now b's tags tell
		a := n.start("a", expecting(3))
		n.allMeet()
		time.Sleep(time.Hour)
		n.expect("b")
		if a.why != "" { // it belongs to the cluster
			t.Errorf("waits for %q", a.why)
		}
	})
}

func TestAMemberThatDoesNotAnswerIsNoProofOfAbsence(t *testing.T) {
	inNursery(t, func(t *testing.T, n *nursery) {
		a := n.start("a", expecting(2))
		n.start("b", expecting(2))
		silent := n.start("x", joining, func(i *infant) { i.mute = true })
		n.allMeet()
		time.Sleep(time.Minute)
		n.expect()
		n.waits(a, "x does not answer")
		n.mu.Lock()
		silent.mute, silent.state = false, true
		n.mu.Unlock()
		time.Sleep(time.Minute)
		n.expect()
		n.waits(a, "x belongs to a cluster")
	})
}

func TestDifferentExpectationsFoundNothing(t *testing.T) {
	inNursery(t, func(t *testing.T, n *nursery) {
		a := n.start("a", expecting(2))
		n.start("b", expecting(2))
		n.start("c", expecting(3))
		n.allMeet()
		time.Sleep(time.Minute)
		n.expect()
		n.waits(a, "they must be the same")
	})
}

func TestThereIsNoSecondBirthWhileSomebodyRemembersTheFirst(t *testing.T) {
	inNursery(t, func(t *testing.T, n *nursery) {
		gone := &infant{state: true}
		gone.node = "z"
		a := n.start("a", expecting(2))
		b := n.start("b", expecting(2))
		n.meet(b, gone, gossipFailed)
		n.meet(a, gone, gossipFailed)
		n.allMeet()
		time.Sleep(time.Hour)
		n.expect()
		n.waits(a, "a cluster has existed, and nobody of it is alive: start z again")
	})
	inNursery(t, func(t *testing.T, n *nursery) {
		a := n.start("a", func(i *infant) { i.existed = true })
		time.Sleep(time.Hour)
		n.expect()
		n.waits(a, "has no copy of its state")
	})
	inNursery(t, func(t *testing.T, n *nursery) {
		a := n.start("a", expecting(1), func(i *infant) {
			i.ask = func(context.Context, string) (facts, error) { return facts{ClusterID: uuid.New(), Expect: 1}, nil }
		})
		n.start("b", joining)
		n.allMeet()
		time.Sleep(time.Hour)
		n.expect()
		n.waits(a, "b belongs to a cluster")
	})
}

func TestTheArbiterChoosesOne(t *testing.T) {
	arbiter := func(i *infant) {
		i.join = true
		i.arbiter = func(_ context.Context, proposal string) (string, error) {
			time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond)
			i.n.mu.Lock()
			defer i.n.mu.Unlock()
			if i.n.chosen == "" {
				i.n.chosen = proposal
			}
			return i.n.chosen, nil
		}
	}
	inNursery(t, func(t *testing.T, n *nursery) {
		for id := range 5 { // none knows of any other
			n.start(fmt.Sprint("n", id), arbiter)
		}
		time.Sleep(2 * time.Second)
		n.expect() // they look for others first
		time.Sleep(time.Hour)
		n.expect(n.chosen)
		for id, i := range n.infants {
			if id != n.chosen {
				n.waits(i, "and it is not here")
			}
		}
	})
	inNursery(t, func(t *testing.T, n *nursery) {
		failing := 3
		n.start("a", arbiter, func(i *infant) {
			inner := i.arbiter
			i.arbiter = func(ctx context.Context, proposal string) (string, error) {
				if failing--; failing >= 0 {
					return "", errors.New("no broker")
				}
				return inner(ctx, proposal)
			}
		})
		time.Sleep(time.Minute)
		n.expect("a")
	})
	inNursery(t, func(t *testing.T, n *nursery) { // somebody has state: the arbiter is not asked
		n.start("a", arbiter)
		n.start("b", joining, func(i *infant) { i.state = true })
		n.allMeet()
		time.Sleep(time.Hour)
		n.expect()
		if n.chosen != "" {
			t.Error("asked")
		}
	})
}

// Gossip spreads as it likes; each sees a part of the others for a while. Fewer than 2N have come.
func TestExpectedSidecarsFoundOneClusterInAnyOrder(t *testing.T) {
	for seed := range 200 {
		inNursery(t, func(t *testing.T, n *nursery) {
			random := rand.New(rand.NewPCG(uint64(seed), 7))
			count := 2 + random.IntN(3)
			total := count + random.IntN(count)
			for _, id := range random.Perm(total) {
				n.start(fmt.Sprint("n", id), expecting(count))
				time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
				for range random.IntN(2 * total) {
					ids := slices.Sorted(maps.Keys(n.infants))
					a, b := n.infants[ids[random.IntN(len(ids))]], n.infants[ids[random.IntN(len(ids))]]
					if a != b {
						n.meet(a, b, gossipAlive)
						time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond)
					}
				}
			}
			n.allMeet()
			time.Sleep(time.Minute)
			if n.mu.Lock(); len(n.founded) != 1 {
				t.Errorf("seed %d: %d of %d expected, founded by %v", seed, total, count, n.founded)
			}
			n.mu.Unlock()
		})
	}
}

// A forwarder has no state either, and that is how it shall be.
func TestWhoBelongsToAClusterIsNotReportedAsWaiting(t *testing.T) {
	inNursery(t, func(t *testing.T, n *nursery) {
		var log strings.Builder
		founder := n.start("a")
		synctest.Wait()
		b := n.start("b", joining, func(i *infant) { i.log = slog.New(slog.NewTextHandler(&log, nil)) })
		n.meet(b, founder, gossipAlive)
		time.Sleep(time.Hour)
		synctest.Wait()
		if log.Len() > 0 || b.why != "" {
			t.Errorf("waits for %q, and logs %s", b.why, &log)
		}
		n.meet(b, founder, gossipFailed)
		time.Sleep(time.Minute)
		synctest.Wait()
		n.waits(b, "start a again")
		if !strings.Contains(log.String(), "belongs to no cluster") {
			t.Errorf("logs %s", &log)
		}
	})
}
