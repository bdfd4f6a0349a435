package replicate

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// birth decides whether a node without state founds a cluster. Whoever does not, waits until a leader adds it.
//
// Without --join, --bootstrap-expect and --bootstrap-arbiter the node is alone and founds at once. Otherwise it looks for
// the others first, and whoever finds a sign of a cluster never founds another: a member that has state, or whose tags
// name a cluster, whether it is alive or not. A member that does not answer is no proof of absence.
//
//   - --bootstrap-expect N: the lowest node id of at least N members that have answered without state and with the same
//     N founds, when N of them, itself included, endorse it. Each node endorses one other for a while: so two can only
//     be chosen where 2N or more are started at once.
//   - --bootstrap-arbiter: the one whose proposal the arbiter got first founds. The arbiter remembers for ever: if the
//     chosen one loses its state there is no second birth.
//   - --join alone: never.
type birth struct {
	node    string
	join    bool // somebody to join was named
	expect  int
	arbiter func(ctx context.Context, proposal string) (winner string, err error)
	// existed says that this node has belonged to a cluster whose state it does not have any more.
	existed bool
	// left says that it has left that, and has a copy that others may have parted from.
	left bool

	members func() []gossipMember
	changed func() <-chan struct{}
	ask     func(ctx context.Context, node string) (facts, error)
	found   func() error      // makes our store a cluster of one voter
	waiting func(what string) // shown to the operator; nil: to nobody
	log     *slog.Logger
	timing  birthTiming

	winner  string    // the arbiter's, not us
	decided time.Time // when it said so

	mu       sync.Mutex
	endorsed string
	since    time.Time // when it was last what we would have chosen anew
}

// birthTiming is how long birth waits for what.
type birthTiming struct {
	join    time.Duration // before the arbiter is asked, or a cluster of one expected: others may be found
	settle  time.Duration // after a change of gossip
	again   time.Duration // between rounds without one
	answer  time.Duration // for an answer
	report  time.Duration // between two lines of log
	endorse time.Duration // an endorsement stands
}

var defaultBirthTiming = birthTiming{
	join: 3 * time.Second, settle: 50 * time.Millisecond, again: time.Second, answer: 2 * time.Second,
	report: 30 * time.Second, endorse: 5 * time.Second,
}

const asksAtOnce = 8

// run returns once the node has founded a cluster, or when ctx ends: it has been added to one, or is closed.
func (b *birth) run(ctx context.Context) error {
	if !b.join && b.expect <= 1 && b.arbiter == nil && !b.existed {
		return b.found()
	}
	began := time.Now()
	ready := began.Add(b.timing.join + rand.N(b.timing.join/3+1))
	var reported time.Time
	var last string
	for {
		changed := b.changed()
		again := b.timing.again
		why := ""
		if exists, sign := b.sign(); exists {
			again = b.timing.report // a forwarder of it may stay here for ever
		} else if why = sign; why == "" {
			var founded bool
			var err error
			if founded, why, err = b.round(ctx, !time.Now().Before(ready)); founded || err != nil || ctx.Err() != nil {
				return err
			}
		}
		if b.waiting != nil && why != last {
			b.waiting(why)
		}
		last = why
		if now := time.Now(); why != "" && now.Sub(began) >= b.timing.report && now.Sub(reported) >= b.timing.report {
			reported = now
			b.log.Warn("this sidecar belongs to no cluster yet", "waiting", why)
		}
		select {
		case <-changed:
			select {
			case <-time.After(b.timing.settle):
			case <-ctx.Done():
				return nil
			}
		case <-time.After(again):
		case <-ctx.Done():
			return nil
		}
	}
}

// others are the members but ourselves.
func (b *birth) others() []gossipMember {
	return slices.DeleteFunc(slices.Clone(b.members()), func(m gossipMember) bool { return m.ID == b.node })
}

// round looks once, where there is no sign of a cluster. It says what is missing unless one was founded.
func (b *birth) round(ctx context.Context, ready bool) (founded bool, why string, err error) {
	others := b.others()
	switch {
	case b.arbiter != nil:
		if !ready {
			return false, "looking for other sidecars", nil
		}
		return b.arbitrate(ctx, others)
	case b.expect > 0:
		return b.count(ctx, others, ready)
	case len(others) == 0:
		return false, "no other sidecar is found at the addresses of --join: check them and --cluster, and the gossip key; if there is no cluster yet, one of --bootstrap-expect and --bootstrap-arbiter says who may found it", nil
	}
	return false, fmt.Sprintf("none of %d other sidecars belongs to a cluster, and nobody here may found one: start with --bootstrap-expect or --bootstrap-arbiter, or the first without --join", len(others)), nil
}

// sign looks for a cluster in what gossip knows. If one exists we belong to it, and are added when we are needed; if one
// has existed, why says what is to be done about it.
func (b *birth) sign() (exists bool, why string) {
	var dead []string
	for _, m := range b.others() {
		switch {
		case m.Tags[tagClusterID] == "":
		case m.alive():
			return true, ""
		default:
			dead = append(dead, m.ID)
		}
	}
	switch {
	case len(dead) > 0:
		return false, fmt.Sprintf("a cluster has existed, and nobody of it is alive: start %s again, with its data directory; if it is lost for good, see recover", strings.Join(dead, " or "))
	case b.left:
		return false, "this sidecar has left its cluster, and nobody of that is here: start another one of it; if all are lost for good, see recover"
	case b.existed:
		return false, "this sidecar has belonged to a cluster, and has no copy of its state: start another one of it; if all are lost for good, start with an empty data directory"
	}
	return false, ""
}

// answers of those who were asked; nil: none.
type birthAnswer struct {
	id    string
	facts *facts
}

// askAll asks all members that are alive.
func (b *birth) askAll(ctx context.Context, others []gossipMember) []birthAnswer {
	ctx, cancel := context.WithTimeout(ctx, b.timing.answer)
	defer cancel()
	var alive []birthAnswer
	for _, m := range others {
		if m.alive() {
			alive = append(alive, birthAnswer{id: m.ID})
		}
	}
	var asking sync.WaitGroup
	slots := make(chan struct{}, asksAtOnce)
	for i := range alive {
		slots <- struct{}{}
		asking.Go(func() {
			defer func() { <-slots }()
			if f, err := b.ask(ctx, alive[i].id); err == nil {
				alive[i].facts = &f
			}
		})
	}
	asking.Wait()
	return alive
}

// state finds one that has state, or belongs to a cluster that has.
func (b *birth) state(answers []birthAnswer) string {
	for _, a := range answers {
		if a.facts != nil && (a.facts.HasState || a.facts.ClusterID != (uuid.UUID{})) {
			return fmt.Sprintf("%s belongs to a cluster; its leader adds this sidecar", a.id)
		}
	}
	return ""
}

// count is --bootstrap-expect.
func (b *birth) count(ctx context.Context, others []gossipMember, ready bool) (founded bool, why string, err error) {
	if candidate := b.endorse(others); candidate != b.node {
		return false, fmt.Sprintf("%s is to found the cluster, having the lowest node id", candidate), nil
	}
	if b.join && b.expect == 1 && !ready {
		return false, "looking for other sidecars", nil
	}
	answers := b.askAll(ctx, others)
	if why := b.state(answers); why != "" {
		return false, why, nil
	}
	empty, endorsing := 1, 1
	for _, a := range answers {
		switch {
		case a.facts == nil:
			return false, fmt.Sprintf("%s does not answer on its peer port, and may have state: reach it, or stop it", a.id), nil
		case a.facts.Expect == 0: // it waits to be added
			continue
		case a.facts.Expect != b.expect:
			return false, fmt.Sprintf("%s was started with --bootstrap-expect %d, this sidecar with %d: they must be the same", a.id, a.facts.Expect, b.expect), nil
		}
		empty++
		if a.facts.Leader == "" || a.facts.Leader == b.node {
			endorsing++
		}
	}
	if endorsing < b.expect {
		return false, fmt.Sprintf("%d of the %d sidecars of --bootstrap-expect are here, %d of them agree on who founds the cluster", empty, b.expect, endorsing), nil
	}
	b.log.Info("founding a cluster", "expected", b.expect, "found", empty)
	return true, "", b.found()
}

// endorse gives the one that shall found the cluster as far as we can see: the lowest node id that is alive and expects
// as many, ourselves included. It changes its mind only after a while, unless that one is gone.
func (b *birth) endorse(others []gossipMember) string {
	lowest, there := b.node, false
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range others {
		if !m.alive() || m.Tags[tagExpect] == "" {
			continue
		}
		lowest = min(lowest, m.ID)
		there = there || m.ID == b.endorsed
	}
	now := time.Now()
	if lowest != b.endorsed && (there || b.endorsed == b.node) && now.Sub(b.since) < b.timing.endorse {
		return b.endorsed
	}
	b.endorsed, b.since = lowest, now
	return lowest
}

// endorsement is what facts.Leader says of a node that has no state.
func (b *birth) endorsement() string {
	if b.expect == 0 {
		return ""
	}
	return b.endorse(b.others())
}

// arbitrate is --bootstrap-arbiter.
func (b *birth) arbitrate(ctx context.Context, others []gossipMember) (founded bool, why string, err error) {
	if why := b.state(b.askAll(ctx, others)); why != "" {
		return false, why, nil
	}
	winner := b.winner
	if winner == "" || time.Since(b.decided) >= b.timing.report {
		if winner, err = b.arbiter(ctx, b.node); err != nil {
			if ctx.Err() != nil {
				return false, "", nil
			}
			return false, fmt.Sprintf("the arbiter of the cluster's birth cannot be asked: %v", err), nil
		}
		b.winner, b.decided = winner, time.Now()
	}
	if winner == b.node {
		b.log.Info("founding a cluster, as the arbiter says")
		return true, "", b.found()
	}
	at, there := slices.BinarySearchFunc(others, winner, func(m gossipMember, id string) int { return cmp.Compare(m.ID, id) })
	if there && others[at].alive() {
		return false, fmt.Sprintf("%s founds the cluster, as the arbiter says", winner), nil
	}
	return false, fmt.Sprintf("the arbiter says that %s founds or has founded the cluster, and it is not here: start it, or another one of that cluster", winner), nil
}
