package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// hand is the log in the hand of the test: it takes the entries that are offered and says what becomes of them. The
// schedules below cannot be had from a real one on demand.
type hand struct {
	t        *testing.T
	events   chan replicate.Event
	entries  chan replicate.Entry
	stored   []replicate.Record // what Latest gives
	mu       sync.Mutex
	resigned []uint64
	fences   []func(error) // under way; nil in openFence mode
	hold     bool          // whether fences wait for the test
	full     atomic.Bool   // the disk
}

func (h *hand) Events() <-chan replicate.Event  { return h.events }
func (h *hand) Entries() chan<- replicate.Entry { return h.entries }
func (h *hand) Full() bool                      { return h.full.Load() }
func (h *hand) Resign(term uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.resigned = append(h.resigned, term)
}

// resignations are the terms resigned from so far.
func (h *hand) resignations() []uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.resigned
}

func (h *hand) Latest(yield func(replicate.Record) error) error {
	for _, r := range h.stored {
		if err := yield(r); err != nil {
			return err
		}
	}
	return nil
}
func (h *hand) Fence(_ uint64, done func(error)) {
	if !h.hold {
		done(nil)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fences = append(h.fences, done)
}

// take is the entry offered now; nothing is, if ok is false.
func (h *hand) take() (e replicate.Entry, ok bool) {
	synctest.Wait()
	select {
	case e = <-h.entries:
		synctest.Wait()
		return e, true
	default:
		return e, false
	}
}

func (h *hand) mustTake() replicate.Entry {
	h.t.Helper()
	e, ok := h.take()
	if !ok {
		h.t.Fatal("no entry was offered")
	}
	return e
}

func (h *hand) event(e replicate.Event) {
	h.events <- e
	synctest.Wait()
}

func (h *hand) applied(e replicate.Entry) {
	h.event(replicate.Event{Kind: replicate.Applied, Term: e.Term, Sequence: e.Sequence, Records: e.Records, Stored: true})
}

// onlyOrders is an upstream that has one topic, orders, with three partitions; late is learnt by a Refresh.
type onlyOrders struct {
	late    map[string]bool
	refresh func(done func(error)) // nil: at once
}

func (o *onlyOrders) Topic(name string) ([16]byte, int32, bool) {
	if name == "orders" || o.late[name] {
		return [16]byte{1}, 3, true
	}
	return [16]byte{}, 0, false
}
func (o *onlyOrders) TopicName([16]byte) (string, bool) { return "", false }
func (o *onlyOrders) Refresh(_ []string, _ [][16]byte, done func(error)) {
	if o.refresh == nil {
		done(nil)
		return
	}
	o.refresh(done)
}

// bubble runs a test with a coordinator that is active in term 1 and whose log is in the test's hand.
func bubble(t *testing.T, topics *onlyOrders, test func(c *Coordinator, h *hand)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := &hand{t: t, events: make(chan replicate.Event), entries: make(chan replicate.Entry)}
		config := Config{Group: group.DefaultConfig(), CommitTimeout: 5 * time.Second, ElectionTimeout: 500 * time.Millisecond}
		config.Group.InitialRebalanceDelay = 0
		c := New(config, h, topics, slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		h.event(replicate.Event{Kind: replicate.Reset})
		h.event(replicate.Event{Kind: replicate.Active, Term: 1})
		test(c, h)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// answer is what Done was called with; no call of Done so far means that the request is parked.
type answer struct {
	mu       sync.Mutex
	response kmsg.Response
	err      error
	calls    int
}

func (a *answer) done(response kmsg.Response, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.response, a.err = response, err
	a.calls++
}

func (a *answer) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.calls == 0:
		return "parked"
	case a.calls > 1:
		return fmt.Sprintf("answered %d times", a.calls)
	case a.err != nil:
		return a.err.Error()
	}
	switch r := a.response.(type) {
	case *kmsg.OffsetCommitResponse:
		return errorName(r.Topics[0].Partitions[0].ErrorCode)
	case *kmsg.OffsetFetchResponse:
		if code := r.Groups[0].ErrorCode; code != 0 {
			return errorName(code)
		}
		return fmt.Sprint(r.Groups[0].Topics[0].Partitions[0].Offset)
	case *kmsg.HeartbeatResponse:
		return errorName(r.ErrorCode)
	case *kmsg.JoinGroupResponse:
		return fmt.Sprintf("%s generation %d", errorName(r.ErrorCode), r.Generation)
	case *kmsg.SyncGroupResponse:
		return errorName(r.ErrorCode)
	}
	return fmt.Sprintf("%T", a.response)
}

func errorName(code int16) string {
	if err := kerr.TypedErrorForCode(code); err != nil {
		return err.Message
	}
	return "NONE"
}

func (a *answer) is(t *testing.T, want string) {
	t.Helper()
	synctest.Wait()
	if got := a.String(); got != want {
		t.Errorf("the answer is %q, want %q", got, want)
	}
}

// session submits the requests of one client connection.
type session struct {
	c       *Coordinator
	client  group.Client
	ordinal uint64
}

func newSession(c *Coordinator, id byte) *session {
	return &session{c: c, client: group.Client{ID: "test", Host: "/127.0.0.1", Session: group.Session{id}}}
}

func (s *session) submit(body kmsg.Request) *answer {
	s.ordinal++
	return s.resubmit(body, s.ordinal)
}

func (s *session) resubmit(body kmsg.Request, ordinal uint64) *answer {
	a := &answer{}
	client := s.client
	client.Ordinal = ordinal
	s.c.Submit(&Request{Body: body, Client: client, Term: s.c.Status().Term, Done: a.done})
	return a
}

func commit(topic string, offset int64) kmsg.Request {
	r := kmsg.NewPtrOffsetCommitRequest()
	r.Version, r.Group, r.Generation = 8, "g", -1
	partition := kmsg.NewOffsetCommitRequestTopicPartition()
	partition.Offset = offset
	rt := kmsg.NewOffsetCommitRequestTopic()
	rt.Topic, rt.Partitions = topic, append(rt.Partitions, partition)
	r.Topics = append(r.Topics, rt)
	return r
}

func fetch() kmsg.Request {
	r := kmsg.NewPtrOffsetFetchRequest()
	r.Version = 8
	rg := kmsg.NewOffsetFetchRequestGroup()
	rg.Group = "g"
	rt := kmsg.NewOffsetFetchRequestGroupTopic()
	rt.Topic, rt.Partitions = "orders", []int32{0}
	rg.Topics = append(rg.Topics, rt)
	r.Groups = append(r.Groups, rg)
	return r
}

func TestCommitIsAnsweredOnceReplicated(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		committed := s.submit(commit("orders", 5))
		e := h.mustTake()
		committed.is(t, "parked")
		if e.Term != 1 || e.Sequence != 1 {
			t.Errorf("entry is (%d, %d), want (1, 1)", e.Term, e.Sequence)
		}
		h.applied(e)
		committed.is(t, "NONE")
	})
}

func TestFetchShowsNothingThatIsNotReplicated(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s, other := newSession(c, 1), newSession(c, 2)
		s.submit(commit("orders", 5))
		fetched := other.submit(fetch())
		e := h.mustTake()
		fetched.is(t, "parked")
		h.applied(e)
		fetched.is(t, "5")
	})
}

func TestFetchWaitsForAFenceThatBeganAfterIt(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		h.hold = true
		s := newSession(c, 1)
		first := s.submit(fetch())
		synctest.Wait()
		second := s.submit(fetch())
		second.is(t, "parked")
		h.underWay()[0](nil)
		first.is(t, "-1")
		second.is(t, "parked")
		h.underWay()[1](nil)
		second.is(t, "-1")
	})
}

func TestRequestsThatComeMeanwhileShareAnEntry(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		s.submit(commit("orders", 1))
		synctest.Wait()
		for i := range 10 {
			s.submit(commit("orders", int64(2+i)))
		}
		e := h.mustTake()
		if len(e.Records) < 11 {
			t.Errorf("the entry has %d records, want those of 11 commits", len(e.Records))
		}
		if _, more := h.take(); more {
			t.Error("a second entry was offered")
		}
	})
}

// Those whom an entry has answered share the next one with those who wait already, if they come back in time.
func TestACrowdIsWaitedFor(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		send := func(n int) {
			for range n {
				s.submit(commit("orders", 1))
			}
			synctest.Wait()
		}
		// One round: the first half is in flight for 1 ms, the second half comes meanwhile.
		round := func() (half int) {
			h.applied(h.mustTake()) // the first request, alone
			send(lingerCrowd)
			first := h.mustTake()
			send(lingerCrowd)
			time.Sleep(time.Millisecond)
			h.applied(first)
			if _, ok := h.take(); ok {
				t.Fatal("the second half was offered before the first could come back")
			}
			return len(first.Records)
		}
		send(1)
		half := round()
		send(lingerCrowd)
		e := h.mustTake()
		if len(e.Records) <= half {
			t.Errorf("the entry has %d records, want those of both halves", len(e.Records))
		}
		h.applied(e)

		send(1)
		half = round() // nobody comes back
		time.Sleep(time.Millisecond/2 + time.Microsecond)
		if e := h.mustTake(); len(e.Records) > half {
			t.Errorf("the entry has %d records, want those of one half", len(e.Records))
		}
	})
}

// A few clients are not made to wait for each other.
func TestAFewAreNotWaitedFor(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		s.submit(commit("orders", 1))
		first := h.mustTake()
		s.submit(commit("orders", 2))
		time.Sleep(time.Second)
		h.applied(first)
		h.mustTake()
	})
}

// Schedule (g) of the next issue, seen from one coordinator: appends blocked, 100 speculative commits, deposed.
func TestAnEndedActivationLeavesNothingBehind(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		s.submit(commit("orders", 5))
		h.applied(h.mustTake())
		var lost []*answer
		for i := range 100 {
			lost = append(lost, s.submit(commit("orders", int64(100+i))))
			if i == 50 {
				h.mustTake()
			}
		}
		fetched := newSession(c, 2).submit(fetch())
		h.event(replicate.Event{Kind: replicate.Inactive, Term: 1})
		for _, a := range append(lost, fetched) {
			a.is(t, ErrInactive.Error())
		}
		h.event(replicate.Event{Kind: replicate.Active, Term: 2})
		again := newSession(c, 2).submit(fetch())
		again.is(t, "5")
		// The entry that was on its way is replicated after all, by the next leader: it counts as on every replica.
	})
}

func TestAFailedAppendEndsTheTermForGood(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		committed := s.submit(commit("orders", 5))
		e := h.mustTake()
		h.event(replicate.Event{Kind: replicate.Failed, Term: 1, Sequence: e.Sequence, Err: errors.New("disk full")})
		committed.is(t, ErrInactive.Error())
		if r := h.resignations(); len(r) != 1 || r[0] != 1 {
			t.Errorf("resigned from %v, want [1]", h.resignations())
		}
		if c.Status().Active {
			t.Error("still active in a term that has ended")
		}
		s.submit(commit("orders", 6)).is(t, ErrInactive.Error())
	})
}

func TestARequestThatCannotBeAppendedIsNotResent(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		tooLarge := s.submit(commit("orders", 5))
		e := h.mustTake()
		h.event(replicate.Event{Kind: replicate.Failed, Term: 1, Sequence: e.Sequence, Err: replicate.ErrEntryTooLarge})
		tooLarge.is(t, "UNKNOWN_SERVER_ERROR")
		if c.Status().Active {
			t.Error("still active in a term that has ended")
		}
	})
}

func TestAResentCommitIsExecutedOnce(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s, newer := newSession(c, 1), newSession(c, 2)
		lost := s.submit(commit("orders", 5))
		e := h.mustTake()
		h.event(replicate.Event{Kind: replicate.Inactive, Term: 1})
		lost.is(t, ErrInactive.Error())
		h.applied(e) // it was replicated, only its answer was lost
		h.event(replicate.Event{Kind: replicate.Active, Term: 2})
		newer.submit(commit("orders", 7))
		h.applied(h.mustTake())
		resent := s.resubmit(commit("orders", 5), 1)
		resent.is(t, "NONE")
		newer.submit(fetch()).is(t, "7")
	})
}

func TestAnEntryOfSomebodyElseEndsTheActivation(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		committed := s.submit(commit("orders", 5))
		e := h.mustTake()
		e.Sequence = 9
		h.applied(e)
		committed.is(t, ErrInactive.Error())
		if len(h.resignations()) != 1 {
			t.Errorf("resigned %v, want once", h.resignations())
		}
	})
}

func TestARequestForAnotherTermIsGivenBack(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		h.event(replicate.Event{Kind: replicate.Inactive, Term: 1})
		h.event(replicate.Event{Kind: replicate.Active, Term: 2})
		a := &answer{}
		c.Submit(&Request{Body: commit("orders", 1), Client: s.client, Term: 1, Done: a.done})
		a.is(t, ErrInactive.Error())
	})
}

func TestCommitTimeoutIsRetriable(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		committed, fetched := s.submit(commit("orders", 5)), s.submit(fetch())
		e := h.mustTake()
		time.Sleep(5*time.Second - time.Millisecond)
		committed.is(t, "parked")
		time.Sleep(time.Millisecond)
		committed.is(t, "COORDINATOR_NOT_AVAILABLE")
		fetched.is(t, "NOT_COORDINATOR")
		h.applied(e) // late: the outcome was unknown to the client, and is no second answer
		committed.is(t, "COORDINATOR_NOT_AVAILABLE")
		s.submit(fetch()).is(t, "5")
	})
}

func TestASessionWaitsForItsTopicsAloneAndInOrder(t *testing.T) {
	var pending []func(error)
	topics := &onlyOrders{late: map[string]bool{}}
	topics.refresh = func(done func(error)) { pending = append(pending, done) }
	bubble(t, topics, func(c *Coordinator, h *hand) {
		s, other := newSession(c, 1), newSession(c, 2)
		first, second := s.submit(commit("new", 1)), s.submit(commit("orders", 2))
		bystander := other.submit(commit("orders", 3))
		h.applied(h.mustTake())
		bystander.is(t, "NONE")
		second.is(t, "parked")
		topics.late["new"] = true
		pending[0](nil)
		h.applied(h.mustTake())
		if e, more := h.take(); more {
			h.applied(e)
		}
		first.is(t, "NONE")
		second.is(t, "NONE")
		other.submit(fetch()).is(t, "2")
	})
}

func TestAnUnknownTopicIsRefusedUnlessTheUpstreamIsDown(t *testing.T) {
	topics := &onlyOrders{}
	bubble(t, topics, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		s.submit(commit("nope", 1)).is(t, "UNKNOWN_TOPIC_OR_PARTITION")
		topics.refresh = func(done func(error)) { done(errors.New("connection refused")) }
		accepted := s.submit(commit("nope", 1))
		h.applied(h.mustTake())
		accepted.is(t, "NONE")
	})
}

// join is the JoinGroup of a new member.
func join() kmsg.Request {
	r := kmsg.NewPtrJoinGroupRequest()
	r.Version, r.Group, r.ProtocolType = 3, "g", "consumer"
	r.SessionTimeoutMillis, r.RebalanceTimeoutMillis = 10_000, 60_000
	r.Protocols = []kmsg.JoinGroupRequestProtocol{{Name: "range"}}
	return r
}

// joined makes a Stable group of one member with a session time-out of 10 s, and gives its heartbeat.
func joined(t *testing.T, s *session, h *hand) *kmsg.HeartbeatRequest {
	t.Helper()
	answer := s.submit(join())
	h.applied(h.mustTake())
	answer.is(t, "NONE generation 1")
	member := answer.response.(*kmsg.JoinGroupResponse).MemberID
	assign := kmsg.NewPtrSyncGroupRequest()
	assign.Version, assign.Group, assign.Generation, assign.MemberID = 3, "g", 1, member
	assign.GroupAssignment = []kmsg.SyncGroupRequestGroupAssignment{{MemberID: member}}
	synced := s.submit(assign)
	h.applied(h.mustTake())
	synced.is(t, "NONE")
	heartbeat := kmsg.NewPtrHeartbeatRequest()
	heartbeat.Version, heartbeat.Group, heartbeat.Generation, heartbeat.MemberID = 3, "g", 1, member
	return heartbeat
}

// However long the process stood still: the session of a member that was well before begins anew.
func TestAPausedProcessExpelsNobody(t *testing.T) {
	for _, pause := range []time.Duration{4 * time.Second, 9500 * time.Millisecond, time.Minute} {
		bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
			s := newSession(c, 1)
			heartbeat := joined(t, s, h)
			time.Sleep(time.Second) // the next heartbeat is due in two
			// The loop stands still, as it does in a stopped process: here in a Done that blocks it.
			c.Submit(&Request{Body: fetch(), Client: newSession(c, 2).client, Term: 1, Done: func(kmsg.Response, error) { time.Sleep(pause) }})
			time.Sleep(pause + 9*time.Second)
			s.submit(heartbeat).is(t, "NONE")
			time.Sleep(11 * time.Second)
			if e, more := h.take(); more {
				h.applied(e)
			}
			s.submit(heartbeat).is(t, "UNKNOWN_MEMBER_ID")
		})
	}
}

func TestASilentUpstreamHoldsASessionUpOnce(t *testing.T) {
	topics := &onlyOrders{refresh: func(done func(error)) {
		time.AfterFunc(2*time.Second, func() { done(errors.New("no answer")) })
	}}
	bubble(t, topics, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		for range 10 {
			s.submit(commit("new", 1))
		}
		heartbeat := kmsg.NewPtrHeartbeatRequest()
		heartbeat.Version, heartbeat.Group = 3, "g"
		answer := s.submit(heartbeat)
		time.Sleep(2 * time.Second)
		h.applied(h.mustTake())
		answer.is(t, "UNKNOWN_MEMBER_ID")
	})
}

func TestManySmallRecordsSpanEntries(t *testing.T) {
	topics := &onlyOrders{refresh: func(done func(error)) { done(errors.New("connection refused")) }}
	bubble(t, topics, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		many := commit("t", 1).(*kmsg.OffsetCommitRequest)
		for i := range int32(12_000) {
			many.Topics[0].Partitions = append(many.Topics[0].Partitions, kmsg.OffsetCommitRequestTopicPartition{Partition: 1 + i})
		}
		committed := s.submit(many)
		for e, more := h.take(); more; e, more = h.take() {
			h.applied(e)
		}
		committed.is(t, "NONE")
		remove := kmsg.NewPtrDeleteGroupsRequest()
		remove.Version, remove.Groups = 2, []string{"g"}
		removed := s.submit(remove)
		entries := 0
		for e, more := h.take(); more; e, more = h.take() {
			if len(e.Records) > replicate.MaxRecords {
				t.Errorf("an entry of %d records", len(e.Records))
			}
			entries++
			h.applied(e)
		}
		if entries < 2 {
			t.Errorf("12,000 tombstones in %d entries", entries)
		}
		removed.is(t, "*kmsg.DeleteGroupsResponse")
	})
}

func TestWhatEndsItselfAgainAndAgainDoesSoSlowly(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		began := time.Now()
		for term := uint64(1); term <= 10; term++ {
			newSession(c, 1).submit(commit("orders", 5))
			e := h.mustTake()
			h.event(replicate.Event{Kind: replicate.Failed, Term: term, Sequence: e.Sequence, Err: errors.New("disk full")})
			for len(h.resignations()) < int(term) {
				time.Sleep(10 * time.Millisecond)
				synctest.Wait()
			}
			h.event(replicate.Event{Kind: replicate.Inactive, Term: term})
			h.event(replicate.Event{Kind: replicate.Active, Term: term + 1})
		}
		if took := time.Since(began); took < 5*time.Second {
			t.Errorf("ten activations that failed at once took %v", took)
		}
	})
}

func TestEveryRequestIsAnsweredThoughTheLoopEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hand{t: t, events: make(chan replicate.Event), entries: make(chan replicate.Entry)}
		c := New(Config{Group: group.DefaultConfig(), CommitTimeout: time.Second}, h, &onlyOrders{}, slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
		for range 200 {
			newSession(c, 1).submit(fetch()).is(t, ErrInactive.Error())
		}
	})
}

func TestABrokenInvariantEndsTheActivationAndKeepsTheLoop(t *testing.T) {
	topics := &onlyOrders{}
	bubble(t, topics, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		broken := commit("orders", 1).(*kmsg.OffsetCommitRequest)
		c.state = nil // as broken as it can be; the loop is parked in its select
		a := s.submit(broken)
		a.is(t, "UNKNOWN_SERVER_ERROR")
		if len(h.resignations()) != 1 {
			t.Errorf("resigned %v, want once", h.resignations())
		}
		h.event(replicate.Event{Kind: replicate.Inactive, Term: 1})
		h.event(replicate.Event{Kind: replicate.Active, Term: 2})
		s.submit(fetch()).is(t, "-1")
	})
}
