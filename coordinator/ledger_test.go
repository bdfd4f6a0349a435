package coordinator

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// ledger is one replicated log in the hand of the test, with a coordinator on each of its replicas. The test decides who
// leads, what is appended and replicated, and when a replica hears of it; the rules are raft's and those of replicate's
// fsm, so that nothing happens here that could not happen there.
type ledger struct {
	t        testing.TB
	log      []logged
	term     uint64 // the newest
	leader   *replica
	replicas []*replica
}

// logged is an entry with the term of its place in the log; its index is its position, from 1.
type logged struct {
	term  uint64
	entry replicate.Entry
}

// replica is one sidecar: its coordinator, and what it knows of the log.
type replica struct {
	*ledger
	c        *Coordinator
	events   chan replicate.Event
	entries  chan replicate.Entry
	told     uint64            // the term its coordinator was told to be active in, 0: none
	tail     []replicate.Entry // appended in the term it leads in, not replicated
	applied  int               // how much of the log it has delivered
	last     uint64            // the term whose entries count, and
	next     uint64            // the number of the next one
	fences   []pendingFence
	hold     bool // fences wait for the test; else a fence tells the truth at once
	late     bool // copies are told of by the test alone
	resigned []uint64
}

type pendingFence struct {
	term uint64
	done func(error)
}

func (r *replica) Events() <-chan replicate.Event  { return r.events }
func (r *replica) Entries() chan<- replicate.Entry { return r.entries }
func (r *replica) Resign(term uint64)              { r.resigned = append(r.resigned, term) }
func (r *replica) Full() bool                      { return false }

func (r *replica) Fence(term uint64, done func(error)) {
	if r.hold {
		r.fences = append(r.fences, pendingFence{term, done})
		return
	}
	done(r.leads(term))
}

// holdFences has fences wait for the test, or no longer.
func (r *replica) holdFences(hold bool) {
	synctest.Wait()
	r.hold = hold
}

// leads is what a fence would find out.
func (r *replica) leads(term uint64) error {
	if r.leader != r || r.term() != term {
		return replicate.ErrNotLeader
	}
	return nil
}

func (r *replica) term() uint64 { return r.ledger.term }

func (r *replica) Latest(yield func(replicate.Record) error) error {
	for _, record := range r.newest(r.applied) {
		if record.Value != nil {
			if err := yield(record); err != nil {
				return err
			}
		}
	}
	return nil
}

// newest gives the newest record of each key in the first n places of the log.
func (l *ledger) newest(n int) map[string]replicate.Record {
	newest := map[string]replicate.Record{}
	for _, records := range l.counted(n) {
		for _, record := range records {
			newest[string(record.Key)] = record
		}
	}
	return newest
}

// counted gives the records of those entries among the first n that count, by their index less one.
func (l *ledger) counted(n int) [][]replicate.Record {
	records := make([][]replicate.Record, n)
	term, next := uint64(0), uint64(0)
	for i, e := range l.log[:n] {
		if counts(e, term, next) {
			term, next = e.entry.Term, e.entry.Sequence+1
			records[i] = e.entry.Records
		}
	}
	return records
}

// counts is the fsm's rule.
func counts(e logged, term, next uint64) bool {
	switch {
	case e.entry.Term != e.term:
		return false
	case e.entry.Term == term:
		return e.entry.Sequence == next
	}
	return e.entry.Term > term && e.entry.Sequence == 1
}

// withReplicas runs a test with so many coordinators, of which the first is active in term 1.
func withReplicas(t *testing.T, n int, test func(l *ledger)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := &ledger{t: t}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, n)
		for range n {
			r := &replica{ledger: l, events: make(chan replicate.Event), entries: make(chan replicate.Entry)}
			config := Config{Group: group.DefaultConfig(), CommitTimeout: 5 * time.Second, ElectionTimeout: 500 * time.Millisecond}
			config.Group.InitialRebalanceDelay = 0
			r.c = New(config, r, &onlyOrders{}, slog.New(slog.DiscardHandler), nil)
			l.replicas = append(l.replicas, r)
			go func() { ended <- r.c.Run(ctx) }()
			r.event(replicate.Event{Kind: replicate.Reset})
		}
		l.elect(l.replicas[0], 0)
		test(l)
		cancel()
		for range n {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}

func (r *replica) event(e replicate.Event) {
	r.events <- e
	synctest.Wait()
}

// append takes the entry that is offered now, if there is one and no more than so many are in flight, into r's own log.
func (r *replica) append() bool {
	synctest.Wait()
	if len(r.tail) >= replicate.EntriesInFlight {
		return false
	}
	select {
	case e := <-r.entries:
		r.tail = append(r.tail, e)
		synctest.Wait()
		return true
	default:
		return false
	}
}

func (r *replica) mustAppend() {
	r.t.Helper()
	if !r.append() {
		r.t.Fatal("no entry was offered")
	}
}

// replicate has a majority take the first n entries of the leader's own log.
func (r *replica) replicate(n int) {
	r.t.Helper()
	if r.leader != r {
		r.t.Fatal("only the leader replicates")
	}
	for _, e := range r.tail[:n] {
		r.log = append(r.log, logged{r.term(), e})
	}
	r.tail = slices.Clone(r.tail[n:])
}

// deliver hands on what is replicated.
func (r *replica) deliver() {
	for r.deliverOne() {
	}
}

func (r *replica) deliverOne() bool {
	if r.applied == len(r.log) {
		return false
	}
	e := r.log[r.applied]
	r.applied++
	event := replicate.Event{Kind: replicate.Ignored, Term: e.entry.Term, Sequence: e.entry.Sequence, Index: uint64(r.applied)}
	if counts(e, r.last, r.next) {
		r.last, r.next = e.entry.Term, e.entry.Sequence+1
		event.Kind, event.Records, event.Stored = replicate.Applied, e.entry.Records, !r.late
	}
	r.event(event)
	return true
}

// work has the log do what it should with all that r's coordinator offers.
func (r *replica) work() {
	r.t.Helper()
	for r.append() {
		r.replicate(len(r.tail))
		r.deliver()
	}
}

// fail tells of all entries in r's own log that they were lost, as raft does to who leads no longer.
func (r *replica) fail() {
	tail := r.tail
	r.tail = nil
	for _, e := range tail {
		r.event(replicate.Event{Kind: replicate.Failed, Term: e.Term, Sequence: e.Sequence, Err: replicate.ErrNotLeader})
	}
}

// depose tells r's coordinator that its term is over.
func (r *replica) depose() {
	if r.told != 0 {
		r.event(replicate.Event{Kind: replicate.Inactive, Term: r.told})
		r.told = 0
	}
}

// elect begins a term, in which r leads and its coordinator is active. Of what the leader before has in its own log, the
// first so many entries live on in r's. The leader before is told nothing.
func (l *ledger) elect(r *replica, live int) {
	l.start(r, live)
	l.activate()
}

func (l *ledger) start(r *replica, live int) {
	l.t.Helper()
	synctest.Wait() // what runs may ask who leads
	if live > 0 {
		l.leader.replicate(live)
	}
	l.term++
	l.leader = r
}

// activate tells the leader, which has delivered everything before.
func (l *ledger) activate() {
	r := l.leader
	r.deliver()
	r.depose()
	r.told = l.term
	r.event(replicate.Event{Kind: replicate.Active, Term: l.term})
}

// failover has r take over from the leader before, which is told.
func (l *ledger) failover(r *replica, live int) {
	l.t.Helper()
	before := l.leader
	l.elect(r, live)
	if before != r {
		before.tail = nil
		before.depose()
		before.deliver()
	}
}

// sent is a request with its answer.
type sent struct {
	*answer
	body    kmsg.Request
	ordinal uint64
}

func (s *session) send(body kmsg.Request) *sent {
	a := s.submit(body)
	return &sent{a, body, s.ordinal}
}

// again sends a request once more, to the coordinator that the session is with now.
func (s *session) again(r *sent) *sent {
	return &sent{s.resubmit(r.body, r.ordinal), r.body, r.ordinal}
}

// fill makes the entry that grows as large as it may be, so that the log is offered it while one is in flight.
func (r *replica) fill() (all []*sent) {
	s := newSession(r.c, 202)
	for range entryRequests + 1 {
		other := commit("orders", 1).(*kmsg.OffsetCommitRequest)
		other.Group = "filler"
		all = append(all, s.send(other))
	}
	return all
}

// consumer is a member of group g, or is to become one.
type consumer struct {
	*session
	version    int16 // of JoinGroup
	member     string
	instance   *string
	generation int32
	leader     bool
	members    []string // that the leader was told of
}

func newConsumer(r *replica, id byte, version int16) *consumer {
	return &consumer{session: newSession(r.c, id), version: version}
}

func (m *consumer) join() *sent {
	join := kmsg.NewPtrJoinGroupRequest()
	join.Version, join.Group, join.ProtocolType = m.version, "g", "consumer"
	join.SessionTimeoutMillis, join.RebalanceTimeoutMillis = 10_000, 60_000
	join.MemberID, join.InstanceID = m.member, m.instance
	join.Protocols = []kmsg.JoinGroupRequestProtocol{{Name: "range", Metadata: []byte{byte(m.client.Session[0])}}}
	return m.send(join)
}

// joined takes the answer to a join, if it is one that a member needs.
func (m *consumer) joined(a *sent) {
	r, ok := a.response.(*kmsg.JoinGroupResponse)
	if !ok {
		return
	}
	if r.MemberID != "" {
		m.member = r.MemberID
	}
	if r.ErrorCode == 0 {
		m.generation, m.leader, m.members = r.Generation, r.LeaderID == r.MemberID, nil
		for _, other := range r.Members {
			m.members = append(m.members, other.MemberID)
		}
	}
}

// sync asks for the assignment; the leader assigns each member its own id.
func (m *consumer) sync() *sent {
	sync := kmsg.NewPtrSyncGroupRequest()
	sync.Version, sync.Group, sync.Generation, sync.MemberID, sync.InstanceID = 3, "g", m.generation, m.member, m.instance
	if m.leader {
		for _, id := range m.members {
			sync.GroupAssignment = append(sync.GroupAssignment, kmsg.SyncGroupRequestGroupAssignment{MemberID: id, MemberAssignment: []byte(id)})
		}
	}
	return m.send(sync)
}

func (m *consumer) heartbeat() *sent {
	heartbeat := kmsg.NewPtrHeartbeatRequest()
	heartbeat.Version, heartbeat.Group, heartbeat.Generation, heartbeat.MemberID, heartbeat.InstanceID = 3, "g", m.generation, m.member, m.instance
	return m.send(heartbeat)
}

// isAssigned checks that a sync was answered with the member's own assignment.
func (m *consumer) isAssigned(t testing.TB, a *sent) {
	t.Helper()
	synctest.Wait()
	r, ok := a.response.(*kmsg.SyncGroupResponse)
	if !ok || r.ErrorCode != 0 || string(r.MemberAssignment) != m.member {
		t.Errorf("%s synced: %v, %+v", m.member, a, a.response)
	}
}

// join has all of them join the group, at the replica that leads, until they are members of one generation.
func (l *ledger) join(members ...*consumer) {
	l.t.Helper()
	joins := map[*consumer]*sent{}
	for _, m := range members {
		joins[m] = m.join()
		l.leader.work()
	}
	for range 100 {
		last := members[0].generation
		same := true
		for _, m := range members {
			synctest.Wait()
			if a := joins[m]; a != nil && a.String() != "parked" {
				m.joined(a)
				delete(joins, m)
				if r := a.response.(*kmsg.JoinGroupResponse); r.ErrorCode != 0 {
					joins[m] = m.join()
				}
			} else if a == nil && m.heartbeatIsRebalance() {
				joins[m] = m.join()
			}
			l.leader.work()
			same = same && joins[m] == nil && m.generation == last
		}
		if same {
			return
		}
	}
	l.t.Fatalf("the members do not get together: %v", joins)
}

func (m *consumer) heartbeatIsRebalance() bool {
	a := m.heartbeat()
	synctest.Wait()
	return a.String() == "REBALANCE_IN_PROGRESS"
}

// stable has them join and sync.
func (l *ledger) stable(members ...*consumer) {
	l.t.Helper()
	l.join(members...)
	syncs := map[*consumer]*sent{}
	for _, m := range members {
		syncs[m] = m.sync()
	}
	l.leader.work()
	for m, a := range syncs {
		m.isAssigned(l.t, a)
	}
}

// described gives the group's state, its generation being known to its members alone, and its members.
func (l *ledger) described() string {
	l.t.Helper()
	describe := kmsg.NewPtrDescribeGroupsRequest()
	describe.Version, describe.Groups = 5, []string{"g"}
	a := newSession(l.leader.c, 200).submit(describe)
	synctest.Wait()
	r, ok := a.response.(*kmsg.DescribeGroupsResponse)
	if !ok {
		return a.String()
	}
	return fmt.Sprintf("%s %d", r.Groups[0].State, len(r.Groups[0].Members))
}

func (l *ledger) isDescribed(want string) {
	l.t.Helper()
	if got := l.described(); got != want {
		l.t.Errorf("the group is %q, want %q", got, want)
	}
}

// offset gives the committed offset that the active coordinator tells.
func (l *ledger) offset() string {
	a := newSession(l.leader.c, 201).submit(fetch())
	synctest.Wait()
	return a.String()
}

func (l *ledger) isCommitted(want string) {
	l.t.Helper()
	if got := l.offset(); got != want {
		l.t.Errorf("the committed offset is %s, want %s", got, want)
	}
}
