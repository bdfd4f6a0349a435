package coordinator

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// TestFailoversKeepThePromises lets a seed decide what becomes of three coordinators over one log, and of their clients:
// leadership is lost and regained, entries are refused, get stuck and land too late, or live on without their sidecar;
// events come late, fences fail, copies lag, snapshots are installed; a deposed coordinator goes on as if nothing had
// happened. Connections send again what came back unanswered, as proxy/session.go does. Meanwhile:
//
//   - what is acknowledged is in the log, and stored wherever it must be;
//   - the effects of a connection's requests are in the log in their order, each once;
//   - whatever is read is the state at some place of the log that is no older than anything known when it was asked for;
//   - the state of every coordinator is that of its records;
//   - a generation is told of one round, and no partition has two owners in it;
//   - unless time passed, no heartbeat, sync or commit of a member fails for want of the membership it was told of, and in
//     the end the group has those members who think so, and no other.
//
// A failure prints the seed, which is the name of its subtest, and what happened.
func TestFailoversKeepThePromises(t *testing.T) {
	seeds, steps := 100, 3000
	if os.Getenv("E2E_LONG") != "" {
		seeds, steps = 2000, 4000
	}
	t.Cleanup(func() { uuid.SetRand(nil) })
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 5))
			var key [32]byte
			binary.BigEndian.PutUint64(key[:], seed)
			uuid.SetRand(rand.NewChaCha8(key))
			withReplicas(t, 2+r.IntN(2), func(l *ledger) { newSimulation(t, l, r).run(steps) })
		})
	}
}

type simulation struct {
	*ledger
	*rand.Rand
	t     *testing.T
	trace strings.Builder
	slow  bool          // time passes: requests and members may time out
	slept time.Duration // of what may pass if not

	sims    []*simReplica
	pending bool // the leader has not been told

	conns   []*conn
	clients []simClient
	mu      sync.Mutex
	answers []simAnswer

	values  int64            // handed out to commits
	commits []*simCommit     // by the value less one
	groups  map[string]bool  // names that were used
	floor   int              // so many records of the log are known of to somebody
	rounds  map[int32]string // by generation: leader and members
	owners  map[string]string
}

// simReplica is what the log does behind a replica's back.
type simReplica struct {
	*replica
	stuck  *replicate.Entry  // with the appender
	lost   []replicate.Entry // to be told of as failed
	failed uint64            // the term of which an entry has failed
	stored uint64            // what it was told is stored of the term it is told
	cut    int               // for so many steps it hears nothing, and nobody of it
}

type simAnswer struct {
	call     *simCall
	stream   int
	replica  *simReplica
	response kmsg.Response
	err      error
}

func newSimulation(t *testing.T, l *ledger, r *rand.Rand) *simulation {
	s := &simulation{
		ledger: l, Rand: r, t: t, slow: r.IntN(4) == 0, groups: map[string]bool{"s": true},
		rounds: map[int32]string{}, owners: map[string]string{},
	}
	t.Cleanup(func() {
		if t.Failed() {
			trace := s.trace.String()
			t.Logf("seed %s, slow %t:\n%s", t.Name(), s.slow, trace[max(0, len(trace)-12_000):])
		}
	})
	for _, replica := range l.replicas {
		s.sims = append(s.sims, &simReplica{replica: replica})
	}
	for i := range 2 {
		s.clients = append(s.clients, &committer{conn: s.connect(fmt.Sprint("committer", i))})
	}
	for i := range 2 {
		s.clients = append(s.clients, &reader{conn: s.connect(fmt.Sprint("reader", i))})
	}
	for i, version := range []int16{3, 9, 9} {
		m := &simMember{conn: s.connect(fmt.Sprint("member", i)), version: version}
		if i == 2 {
			instance := "static"
			m.instance = &instance
		}
		s.clients = append(s.clients, m)
	}
	return s
}

func (s *simulation) note(format string, args ...any) { fmt.Fprintf(&s.trace, format+"\n", args...) }

func (s *simulation) sim(r *replica) *simReplica { return s.sims[slices.Index(s.ledger.replicas, r)] }

func (s *simulation) name(r *replica) string {
	return string(rune('A' + slices.Index(s.ledger.replicas, r)))
}

func (s *simulation) run(steps int) {
	for i := 0; i < steps && !s.t.Failed(); i++ {
		switch n := s.IntN(100); {
		case n < 32:
			s.clients[s.IntN(len(s.clients))].step()
		case n < 48:
			s.conns[s.IntN(len(s.conns))].look()
		case n < 97:
			s.stepLog()
		case n < 98:
			s.election()
		default:
			s.sleep()
		}
		s.settle()
		for _, r := range s.sims {
			r.cut = max(0, r.cut-1)
		}
		if i%16 == 0 {
			s.checkStates()
		}
	}
	s.calm()
}

func (s *simulation) sleep() {
	d := time.Duration(s.IntN(120)) * time.Millisecond
	if s.slow {
		d = []time.Duration{d, d, d, time.Second, 3 * time.Second, 6 * time.Second, 12 * time.Second}[s.IntN(7)]
	} else if s.slept += d; s.slept > 2*time.Second {
		return
	}
	s.note("sleep %v", d)
	s.pass(d)
}

// pass lets time pass. What timers set off comes after what this goroutine has looked at; an event that means nothing
// tells the race detector.
func (s *simulation) pass(d time.Duration) {
	for _, r := range s.sims {
		r.event(replicate.Event{Kind: replicate.Stored})
	}
	time.Sleep(d)
}

// stepLog has the log of one replica do one thing.
func (s *simulation) stepLog() {
	r := s.sims[s.IntN(len(s.sims))]
	if s.IntN(3) > 0 {
		r = s.sim(s.leader)
	}
	if r.cut > 0 && s.IntN(3) > 0 {
		return
	}
	switch n := s.IntN(20); {
	case s.pending && n < 4:
		s.tell()
	case n < 5:
		s.take(r)
	case r.cut > 0:
		if len(r.fences) > 0 {
			s.endFence(r, errors.New("nobody answers"))
		}
	case n < 9 && s.leader == r.replica && len(r.tail) > 0:
		n := 1 + s.IntN(len(r.tail))
		s.note("%s replicates %d", s.name(r.replica), n)
		r.replicate(n)
	case n < 14:
		s.hear(r)
	case n < 16 && r.told != 0 && s.leader != r.replica:
		s.dethrone(r)
	case n < 17 && r.told != 0:
		s.store(r)
	case n < 18 && len(r.fences) > 0:
		err := r.leads(r.fences[0].term)
		if err == nil && s.IntN(3) == 0 {
			err = errors.New("no majority answers")
		}
		s.endFence(r, err)
	case n == 18 && s.IntN(10) == 0 && (s.leader != r.replica || !s.pending && r.told == 0):
		s.note("%s is restored from a snapshot of %d", s.name(r.replica), len(s.log))
		r.applied = len(s.log)
		r.last, r.next = s.counter()
		r.event(replicate.Event{Kind: replicate.Reset})
	case n == 19:
		synctest.Wait()
		r.hold, r.late = s.IntN(3) == 0, s.IntN(3) == 0
	}
}

// counter gives the term and number that count at the end of the log.
func (s *simulation) counter() (term, next uint64) {
	for _, e := range s.log {
		if counts(e, term, next) {
			term, next = e.entry.Term, e.entry.Sequence+1
		}
	}
	return term, next
}

// take is the appender: it takes an entry that is offered, which gets into the replica's own log, or is refused, or stuck
// between the two.
func (s *simulation) take(r *simReplica) {
	if r.stuck != nil {
		e := *r.stuck
		r.stuck = nil
		if s.leader == r.replica && (s.ledger.term != e.Term || r.failed < e.Term) { // nothing in between looked at the term
			s.note("%s appends %d/%d in term %d", s.name(r.replica), e.Term, e.Sequence, s.ledger.term)
			r.tail = append(r.tail, e)
		} else {
			s.refuse(r, e)
		}
		return
	}
	if len(r.tail)+len(r.lost) >= replicate.EntriesInFlight {
		return
	}
	synctest.Wait()
	var e replicate.Entry
	select {
	case e = <-r.entries:
	default:
		return
	}
	leads := s.leader == r.replica && s.ledger.term == e.Term
	switch n := s.IntN(16); {
	case n == 0:
		s.note("%s is stuck with %d/%d", s.name(r.replica), e.Term, e.Sequence)
		r.stuck = &e
	case n == 1 || !leads || r.failed >= e.Term && len(r.lost) == 0:
		s.refuse(r, e)
	default: // perhaps behind one that was refused
		s.note("%s appends %d/%d, %d records", s.name(r.replica), e.Term, e.Sequence, len(e.Records))
		r.tail = append(r.tail, e)
	}
}

func (s *simulation) refuse(r *simReplica, e replicate.Entry) {
	s.note("%s refuses %d/%d", s.name(r.replica), e.Term, e.Sequence)
	r.lost = append(r.lost, e)
}

// hear delivers what comes next: an entry that is replicated, or that one was lost.
func (s *simulation) hear(r *simReplica) {
	if r.deliverOne() {
		s.note("%s hears of %d", s.name(r.replica), r.applied)
		if !r.late && s.log[r.applied-1].term == r.told {
			r.stored = max(r.stored, uint64(r.applied))
		}
		return
	}
	for len(r.lost) > 0 {
		e := r.lost[0]
		if slices.ContainsFunc(r.tail, func(other replicate.Entry) bool { return other.Term == e.Term && other.Sequence < e.Sequence }) {
			return // answers come in order
		}
		r.lost = r.lost[1:]
		s.note("%s hears that %d/%d failed", s.name(r.replica), e.Term, e.Sequence)
		r.failed = max(r.failed, e.Term)
		r.event(replicate.Event{Kind: replicate.Failed, Term: e.Term, Sequence: e.Sequence, Err: replicate.ErrNotLeader})
	}
}

// store tells of copies, perhaps before raft has committed what they are of.
func (s *simulation) store(r *simReplica) {
	most := uint64(r.applied)
	if s.leader == r.replica {
		most = uint64(len(s.log) + len(r.tail))
	}
	if most <= r.stored {
		return
	}
	r.stored += 1 + s.Uint64N(most-r.stored)
	s.note("%s hears that %d is stored", s.name(r.replica), r.stored)
	r.event(replicate.Event{Kind: replicate.Stored, Term: r.told, Index: r.stored})
}

func (s *simulation) endFence(r *simReplica, err error) {
	f := r.fences[0]
	r.fences = r.fences[1:]
	s.note("%s ends a fence: %v", s.name(r.replica), err)
	f.done(err)
	synctest.Wait()
}

// election begins a term. The new leader is told when it has delivered everything, the old one whenever it turns out.
func (s *simulation) election() {
	synctest.Wait()
	old := s.sim(s.leader)
	next := s.sims[s.IntN(len(s.sims))]
	live := 0
	if len(old.tail) > 0 {
		live = s.IntN(len(old.tail) + 1)
	}
	s.note("%s leads in term %d; of %d entries of %s live %d", s.name(next.replica), s.ledger.term+1, len(old.tail), s.name(old.replica), live)
	s.ledger.start(next.replica, live)
	for _, r := range s.sims {
		r.lost = append(r.lost, r.tail...)
		r.tail = nil
	}
	s.pending = true
	next.cut = 0
	if old != next && s.IntN(2) == 0 {
		old.cut, old.hold = 100+s.IntN(200), true
		s.note("%s is cut off", s.name(old.replica))
	}
}

// tell makes the leader's coordinator active.
func (s *simulation) tell() {
	r := s.sim(s.leader)
	for r.deliverOne() {
		if !r.late && s.log[r.applied-1].term == r.told {
			r.stored = max(r.stored, uint64(r.applied))
		}
	}
	s.note("%s is active in term %d", s.name(r.replica), s.ledger.term)
	s.activate()
	r.stored, s.pending = 0, false
}

// dethrone tells one that it leads no longer.
func (s *simulation) dethrone(r *simReplica) {
	s.note("%s hears that it leads no longer", s.name(r.replica))
	r.depose()
}

// settle takes the answers that have come.
func (s *simulation) settle() {
	for range 1000 {
		synctest.Wait()
		s.mu.Lock()
		answers := s.answers
		s.answers = nil
		s.mu.Unlock()
		if len(answers) == 0 {
			return
		}
		slices.SortStableFunc(answers, func(a, b simAnswer) int { // those given back come in the order of a map
			if a.err == nil || b.err == nil {
				return 0
			}
			if n := strings.Compare(a.call.conn.name, b.call.conn.name); n != 0 {
				return n
			}
			return int(a.call.ordinal) - int(b.call.ordinal)
		})
		for _, a := range answers {
			a.call.conn.take(a)
		}
	}
	s.t.Error("answers without end")
}

// checkStates: the state is that of the records, where nothing is speculative.
func (s *simulation) checkStates() {
	s.t.Helper()
	synctest.Wait()
	for _, r := range s.sims {
		if a := r.c.activation; a != nil && len(a.flight) > 0 {
			continue
		}
		for key, record := range s.newest(r.applied) {
			if got := r.c.state.Record([]byte(key)); !bytes.Equal(got, record.Value) || (got == nil) != (record.Value == nil) {
				s.t.Errorf("%s: the record of %q is %x, want %x", s.name(r.replica), key, got, record.Value)
			}
		}
	}
}

// calm heals everything, lets the clients come to rest, and looks at what is left.
func (s *simulation) calm() {
	s.note("calm")
	for round, calm := 0, 0; calm < 2 || s.slow && round < 40; round++ {
		if round == 400 {
			s.t.Error("no rest")
		}
		if s.t.Failed() {
			return
		}
		for _, c := range s.clients {
			c.rest()
		}
		for _, c := range s.conns {
			c.look()
		}
		s.heal()
		calm++
		if slices.ContainsFunc(s.clients, func(c simClient) bool { return !c.rests() }) {
			calm = 0
		}
		if s.slow {
			s.pass(time.Second) // for whatever has to time out
		} else {
			s.pass(20 * time.Millisecond) // a coordinator may take its time to resign
		}
	}
	s.checkMembers()
	for _, next := range s.sims {
		s.ledger.start(next.replica, 0)
		s.pending = true
		s.heal()
		s.checkStates()
		s.checkSurfaces(next)
	}
	s.checkLog()
}

// heal has the log do what it should.
func (s *simulation) heal() {
	for range 200 {
		synctest.Wait()
		leader := s.sim(s.leader)
		if slices.Contains(leader.resigned, s.ledger.term) {
			s.election()
			continue
		}
		busy := false
		for _, r := range s.sims {
			r.hold, r.late, r.cut = false, false, 0
			for len(r.fences) > 0 {
				s.endFence(r, r.leads(r.fences[0].term))
				busy = true
			}
			if r.stuck != nil {
				s.refuse(r, *r.stuck)
				r.stuck = nil
			}
			if r.told != 0 && (s.leader != r.replica || r.told != s.ledger.term && !s.pending) {
				s.dethrone(r)
			}
			for r.applied < len(s.log) || len(r.lost) > 0 {
				before := len(r.lost) + len(s.log) - r.applied
				s.hear(r)
				if len(r.lost)+len(s.log)-r.applied == before {
					break
				}
				busy = true
			}
		}
		if s.pending {
			s.tell()
			busy = true
		}
		if leader.append() {
			busy = true
		}
		if len(leader.tail) > 0 {
			leader.replicate(len(leader.tail))
			busy = true
		}
		if leader.told == s.ledger.term && leader.stored < uint64(leader.applied) {
			leader.stored = uint64(leader.applied)
			leader.event(replicate.Event{Kind: replicate.Stored, Term: leader.told, Index: leader.stored})
		}
		s.settle()
		if !busy {
			return
		}
	}
	s.t.Error("the log does not come to rest")
}

// checkSurfaces compares what the active coordinator tells with a state that is made of the log alone.
func (s *simulation) checkSurfaces(r *simReplica) {
	s.t.Helper()
	config := r.c.config.Group
	rebuilt := group.NewState(config)
	for _, record := range s.newest(len(s.log)) {
		rebuilt.Apply(group.Record(record))
	}
	rebuilt.Activate(time.Now(), s.ledger.term)
	list := kmsg.NewPtrListGroupsRequest()
	list.Version = 4
	describe := kmsg.NewPtrDescribeGroupsRequest()
	describe.Version, describe.Groups = 5, []string{"g", "s"}
	all := kmsg.NewPtrOffsetFetchRequest()
	all.Version = 8
	for name := range s.groups {
		all.Groups = append(all.Groups, kmsg.OffsetFetchRequestGroup{Group: name})
	}
	for i, request := range []kmsg.Request{list, describe, all} {
		got := newSession(r.c, 203).submit(request)
		synctest.Wait()
		want := rebuilt.Step(time.Now(), group.Input{Call: uint64(i + 1), Request: request, Topics: &onlyOrders{}}).Replies[0].Response
		if !reflect.DeepEqual(got.response, want) {
			s.t.Errorf("%s tells %+v\nwant %+v", s.name(r.replica), got.response, want)
		}
	}
}

// checkMembers: the group has those members who think so.
func (s *simulation) checkMembers() {
	s.t.Helper()
	describe := kmsg.NewPtrDescribeGroupsRequest()
	describe.Version, describe.Groups = 5, []string{"g"}
	a := newSession(s.leader.c, 204).submit(describe)
	synctest.Wait()
	var got, want []string
	for _, m := range a.response.(*kmsg.DescribeGroupsResponse).Groups[0].Members {
		got = append(got, m.MemberID)
	}
	for _, c := range s.clients {
		if m, ok := c.(*simMember); ok && m.state == memberStable {
			want = append(want, m.id)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		s.t.Errorf("the group has members %v, want %v", got, want)
	}
}

// checkLog: each request had its effect once, and those of a connection in their order.
func (s *simulation) checkLog() {
	s.t.Helper()
	sessions := map[group.Session]map[uint64]bool{}
	newest := map[string]uint64{} // ordinal of a connection's newest commit
	seen := map[int64]bool{}
	for index, records := range s.counted(len(s.log)) {
		for _, record := range records {
			if id, highest, done, ok := readSession(record); ok {
				before, now := sessions[id], map[uint64]bool{}
				for i := range uint64(64) {
					if done>>i&1 == 1 && highest >= i {
						now[highest-i] = true
					}
				}
				if len(now) <= len(before) && highest < 64 {
					s.t.Errorf("at %d: session %x executes a request again: %v, then %v", index, id, before, now)
				}
				sessions[id] = now
			}
			if value, ok := readOffset(record); ok && value > 0 {
				c := s.commits[value-1]
				if seen[value] {
					s.t.Errorf("at %d: commit %d of %s has its effect again", index, value, c.conn.name)
				}
				seen[value] = true
				if c.ordinal <= newest[c.conn.name] {
					s.t.Errorf("at %d: commit %d of %s, ordinal %d, overwrites ordinal %d", index, value, c.conn.name, c.ordinal, newest[c.conn.name])
				}
				newest[c.conn.name] = c.ordinal
			}
		}
	}
	for _, c := range s.commits {
		if c.acknowledged && !seen[c.value] {
			s.t.Errorf("commit %d of %s was acknowledged, and is not in the log", c.value, c.conn.name)
		}
	}
}

// readSession takes the record of a session apart (docs/formats.md).
func readSession(r replicate.Record) (id group.Session, highest, done uint64, ok bool) {
	if len(r.Key) != 18 || binary.BigEndian.Uint16(r.Key) != 1001 || len(r.Value) < 18 {
		return id, 0, 0, false
	}
	copy(id[:], r.Key[2:])
	return id, binary.BigEndian.Uint64(r.Value[2:]), binary.BigEndian.Uint64(r.Value[10:]), true
}

// readOffset gives the offset of an OffsetCommitValue.
func readOffset(r replicate.Record) (int64, bool) {
	if len(r.Key) < 2 || binary.BigEndian.Uint16(r.Key) != 1 || len(r.Value) < 10 {
		return 0, false
	}
	return int64(binary.BigEndian.Uint64(r.Value[2:])), true
}
