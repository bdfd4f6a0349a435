package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Limits of the loop.
const (
	inputQueue  = 1024            // requests submitted and not yet taken; more make Submit wait
	drainInputs = 1024            // requests taken in one go before the next entry is offered
	beatEvery   = time.Second     // how often an active loop wakes at least, to see that it was not paused
	pauseGap    = 2 * time.Second // a beat that is this late was missed by a paused process, not by the members
	blindTime   = 5 * time.Second // after the upstream could not be asked, topics are taken on trust for so long

	fullEvery = 5 * time.Millisecond // how often it is asked whether the disk is full
	fullFor   = time.Second          // for so long after it was found full it counts as full: it may hover at the limit

	fenceRetry = 50 * time.Millisecond // between read fences that fail, though the term goes on

	resignFirst, resignSlowest = 50 * time.Millisecond, 2 * time.Second // between activations that end by themselves
	resignReset                = 10 * time.Second                       // one that lasted so long was sound
)

// Log is the replicated log as the coordinator sees it (replicate.Node).
type Log interface {
	Events() <-chan replicate.Event
	Entries() chan<- replicate.Entry
	Latest(yield func(replicate.Record) error) error
}

// Leadership is what a coordinator asks of the term it is active in (replicate.Node).
type Leadership interface {
	// Fence calls done once, with nil when it is certain that this replica led in term after Fence was called: whatever
	// was read before then was the newest state. Else with replicate.ErrNotLeader if the term is over, and with any other
	// error if it may be tried again. It may call done at once.
	Fence(term uint64, done func(error))
	// Resign ends the leadership of this term, if it is not over yet.
	Resign(term uint64)
	// Full says that there is no room on disk for an entry; one that is offered may fail.
	Full() bool
}

// Config of a Coordinator.
type Config struct {
	Group group.Config
	// CommitTimeout bounds how long a reply waits for its records to be replicated (offsets.commit.timeout.ms); after it
	// the client gets COORDINATOR_NOT_AVAILABLE and the outcome is unknown.
	CommitTimeout time.Duration
	// ElectionTimeout is raft's: for so long after a read fence began, heartbeats need no newer one. 0: they always do.
	ElectionTimeout time.Duration
}

// Coordinator is this sidecar's group coordinator. It answers while it is active.
type Coordinator struct {
	config  Config
	log     Log
	leader  Leadership
	topics  Topics
	logger  *slog.Logger
	metrics *tracing.Metrics

	inputs    chan *Request
	refreshed chan refreshed
	fenceDone chan fenced
	stopped   chan struct{} // closed when Run has returned
	status    atomic.Pointer[publishedStatus]

	// The rest belongs to the loop.
	state      *group.State
	activation *activation // nil while inactive
	lastCall   uint64
	calls      map[uint64]*Request
	lookups    map[group.Session]*lookup
	lastLookup uint64
	blindUntil time.Time // the upstream could not be asked a moment ago
	beat       time.Time // when the loop must be awake again; set while active
	full       bool      // the disk is: nothing is executed that may write
	fullAsked  time.Time // when the disk was asked last
	foundFull  time.Time // when it was last found full
	failure    error     // the state can neither be trusted nor rebuilt: the loop ends

	resign      uint64    // a term to resign from
	resignAt    time.Time // and when
	resignDelay time.Duration

	timer *time.Timer
	wake  time.Time // what timer is set to; zero when it has fired
}

type publishedStatus struct {
	Status
	changed chan struct{}
}

// lookup is a session whose first request waits for topics, with those that wait behind it.
type lookup struct {
	id    uint64
	queue []*Request
}

type refreshed struct {
	session group.Session
	id      uint64
	err     error
}

type fenced struct {
	term uint64
	err  error
}

// New makes a Coordinator that is inactive until Run has learnt from the log that it leads.
func New(config Config, log interface {
	Log
	Leadership
}, topics Topics, logger *slog.Logger, metrics *tracing.Metrics) *Coordinator {
	c := &Coordinator{
		config: config, log: log, leader: log, topics: topics, logger: logger, metrics: metrics,
		inputs:    make(chan *Request, inputQueue),
		refreshed: make(chan refreshed),
		fenceDone: make(chan fenced, 1),
		stopped:   make(chan struct{}),
		state:     group.NewState(config.Group),
		calls:     map[uint64]*Request{},
		lookups:   map[group.Session]*lookup{},
	}
	c.status.Store(&publishedStatus{changed: make(chan struct{})})
	return c
}

// Submit hands a request to the coordinator and waits while its queue is full. The requests of one session must be
// submitted in their order. Done is called in any case.
func (c *Coordinator) Submit(r *Request) {
	select {
	case c.inputs <- r:
	case <-c.stopped:
		r.Done(nil, ErrInactive)
		return
	}
	select {
	case <-c.stopped: // perhaps after the loop has looked for the last time
		c.refuseInputs()
	default:
	}
}

// refuseInputs gives back what nobody will take any more.
func (c *Coordinator) refuseInputs() {
	for {
		select {
		case r := <-c.inputs:
			r.Done(nil, ErrInactive)
		default:
			return
		}
	}
}

// Status says whether this coordinator is active.
func (c *Coordinator) Status() Status {
	p := c.status.Load()
	return Status{Active: p.Active, Term: p.Term, Changed: p.changed}
}

func (c *Coordinator) publish(active bool, term uint64) {
	old := c.status.Swap(&publishedStatus{Status: Status{Active: active, Term: term}, changed: make(chan struct{})})
	close(old.changed)
	if !active {
		c.metrics.Set(tracing.Active, 0)
		return
	}
	c.metrics.Set(tracing.Active, 1)
	c.metrics.Set(tracing.Term, int64(term))
	c.metrics.Add(tracing.Activations, 1)
}

// Run is the loop. It returns when ctx is done, or with an error when the log has ended or its state cannot be read.
func (c *Coordinator) Run(ctx context.Context) error {
	c.timer = time.NewTimer(time.Hour)
	c.timer.Stop()
	defer c.stop()
	events := c.log.Events()
	for {
		entries, next := c.nextEntry()
		c.setTimer()
		select {
		case <-ctx.Done():
			return nil
		case event, open := <-events:
			if !open {
				return errors.New("the replicated log has ended")
			}
			if err := c.handleEvent(event); err != nil {
				return err
			}
		case entries <- next:
			c.activation.taken(time.Now())
		case r := <-c.inputs:
			c.takeInputs(r)
		case r := <-c.refreshed:
			c.handleRefreshed(r)
		case f := <-c.fenceDone:
			c.handleFenced(f)
		case <-c.timer.C:
			c.handleTimer()
		}
		if c.failure != nil {
			return c.failure
		}
	}
}

// stop gives back what is unanswered when the loop ends.
func (c *Coordinator) stop() {
	c.timer.Stop()
	c.deactivate("the sidecar stops")
	close(c.stopped)
	c.refuseInputs()
}

// takeInputs handles r and whatever else has come, so that an entry carries all of it.
func (c *Coordinator) takeInputs(r *Request) {
	for range drainInputs {
		c.handleRequest(r)
		select {
		case r = <-c.inputs:
		default:
			return
		}
	}
	c.handleRequest(r)
}

func (c *Coordinator) handleRequest(r *Request) {
	if c.activation == nil || r.Term != c.activation.term {
		r.Done(nil, ErrInactive)
		return
	}
	if waiting := c.lookups[r.Client.Session]; waiting != nil {
		waiting.queue = append(waiting.queue, r)
		return
	}
	if c.lookUp(r, nil) {
		return
	}
	c.step(r, c.blind())
}

// blind says that the upstream could not be asked a moment ago. What cannot be verified is accepted, and not asked for
// again at each request: heartbeats wait behind the question.
func (c *Coordinator) blind() bool {
	return !c.blindUntil.IsZero() && time.Now().Before(c.blindUntil)
}

// lookUp begins to ask the upstream for topics of the request that are not known, and says whether it did. What the
// client gets depends on them (Kafka refuses commits for unknown topics), and its later requests wait behind it.
func (c *Coordinator) lookUp(r *Request, behind []*Request) bool {
	if c.blind() {
		return false
	}
	var names []string
	var ids [][16]byte
	if c.guard(func() { names, ids = c.state.UnknownTopics(r.Body, c.topics) }) != nil || len(names)+len(ids) == 0 {
		return false // what is broken shows in the step
	}
	c.lastLookup++
	session, id := r.Client.Session, c.lastLookup
	c.lookups[session] = &lookup{id: id, queue: append([]*Request{r}, behind...)}
	c.topics.Refresh(names, ids, func(err error) {
		go c.sendRefreshed(refreshed{session, id, err}) // done may be called by the loop itself
	})
	return true
}

// sendRefreshed hands the outcome of a lookup to the loop; it ends with the loop at the latest.
func (c *Coordinator) sendRefreshed(r refreshed) {
	select {
	case c.refreshed <- r:
	case <-c.stopped:
	}
}

func (c *Coordinator) handleRefreshed(r refreshed) {
	waiting := c.lookups[r.session]
	if waiting == nil || waiting.id != r.id {
		return // of an activation that has ended
	}
	delete(c.lookups, r.session)
	if c.blindUntil = (time.Time{}); r.err != nil {
		c.blindUntil = time.Now().Add(blindTime)
	}
	c.step(waiting.queue[0], r.err != nil)
	for i, request := range waiting.queue[1:] {
		if c.activation == nil {
			request.Done(nil, ErrInactive)
			continue
		}
		if c.lookUp(request, waiting.queue[i+2:]) {
			return
		}
		c.step(request, c.blind())
	}
}

// step executes a request of the present activation.
func (c *Coordinator) step(r *Request, acceptUnknownTopics bool) {
	if c.activation == nil {
		r.Done(nil, ErrInactive)
		return
	}
	now := time.Now()
	c.lastCall++
	call := c.lastCall
	in := group.Input{
		Call: call, Request: r.Body, Client: r.Client, Topics: c.topics, AcceptUnknownTopics: acceptUnknownTopics,
	}
	c.calls[call] = r
	if _, join := r.Body.(*kmsg.JoinGroupRequest); join {
		in.NewID = uuid.NewString()
	}
	err := c.guard(func() {
		if c.diskIsFull(now) && c.state.MayWrite(&in) {
			c.refuse(call)
			return
		}
		c.metrics.Add(tracing.Steps, 1)
		c.perform(now, call, c.state.Step(now, in))
	})
	if err == nil {
		return
	}
	// A request that breaks the core is not given back: resent, it would break the next activation as well.
	delete(c.calls, call)
	c.breakDown(err)
	r.Done(group.ErrorResponse(r.Body, kerr.UnknownServerError.Code), nil)
}

// diskIsFull says whether there is no room for what a Step might write. An entry that cannot be stored ends the term and
// holds up whoever reads; so while the disk is full nothing is executed that might lead to one, and time stands still
// for the members.
func (c *Coordinator) diskIsFull(now time.Time) bool {
	if now.Sub(c.fullAsked) < fullEvery {
		return c.full
	}
	c.fullAsked = now
	switch full := c.leader.Full(); {
	case full:
		if !c.full {
			c.logger.Error("there is no room on disk: what changes groups and offsets is refused until there is")
		}
		c.full, c.foundFull = true, now
	case c.full && now.Sub(c.foundFull) >= fullFor:
		c.full = false
		c.logger.Info("there is room on disk again")
		c.state.Rearm(now)
	}
	return c.full
}

// perform queues the records of a Step for the log and its replies behind them. Call is the request's, 0 for a Tick.
func (c *Coordinator) perform(now time.Time, call uint64, effects group.Effects) {
	a := c.activation
	a.add(call, effects)
	for _, reply := range effects.Replies {
		c.hold(now, reply, len(effects.Records) > 0 || reply.Again)
	}
	if effects.Replies != nil {
		c.startFence(now)
	}
}

// hold keeps a reply until all it asserts is replicated, and what it acknowledges is also stored by every in-sync
// replica; and, if it needs one, until a fence is complete.
func (c *Coordinator) hold(now time.Time, reply group.Reply, acknowledges bool) {
	a := c.activation
	h := &held{reply: reply, copies: acknowledges}
	if n := len(a.flight); n > 0 {
		last := a.flight[n-1]
		last.replies = append(last.replies, h)
		h.conditions++
	} else if n := len(a.storing); n > 0 && acknowledges {
		last := a.storing[n-1]
		last.replies = append(last.replies, h)
		h.conditions++
	}
	if reply.Fence && !(reply.Recent && now.Sub(a.fenced) < c.config.ElectionTimeout) {
		a.fenceNext = append(a.fenceNext, h)
		h.conditions++
	}
	if h.conditions == 0 {
		c.answer(h)
		return
	}
	h.deadline = now.Add(c.config.CommitTimeout)
	a.held = append(a.held, h)
}

// met notes that one of the conditions of a held reply has come true.
func (c *Coordinator) met(h *held) {
	if h.conditions--; h.conditions == 0 {
		c.answer(h)
	}
}

func (c *Coordinator) answer(h *held) {
	h.answered = true
	r, live := c.calls[h.reply.Call]
	if !live {
		return
	}
	delete(c.calls, h.reply.Call)
	c.count(h.reply.Response)
	r.Done(h.reply.Response, nil)
	c.metrics.Set(tracing.ParkedReplies, int64(len(c.calls)))
}

// setTimer arms the timer for what comes first: a deadline of the state or of a held reply, the next beat, or a term to
// resign from.
func (c *Coordinator) setTimer() {
	wake := c.resignAt
	earliest := func(t time.Time) {
		if !t.IsZero() && (wake.IsZero() || t.Before(wake)) {
			wake = t
		}
	}
	if c.activation != nil {
		if !c.full {
			earliest(c.state.Deadline())
		}
		earliest(c.activation.deadline())
		earliest(c.beat)
		earliest(c.activation.fenceAt)
		if a := c.activation; a.crowd > 0 && a.offered == 0 && len(a.flight) > 0 {
			earliest(a.lingerUntil)
		}
	}
	if wake.IsZero() || !c.wake.IsZero() && !wake.Before(c.wake) {
		return // the timer may fire too early, which does nothing, but is not set anew at each request
	}
	c.wake = wake
	c.timer.Reset(time.Until(wake))
}

// handleTimer runs what is due. Inputs are taken before timers: a member whose heartbeat waits in the queue has not
// failed, this loop was late.
func (c *Coordinator) handleTimer() {
	c.wake = time.Time{}
	select {
	case r := <-c.inputs:
		c.takeInputs(r)
	default:
	}
	now := time.Now()
	c.resignIfDue(now)
	if c.activation == nil {
		return
	}
	late := now.Sub(c.beat)
	if late >= 0 {
		c.beat = now.Add(beatEvery)
	}
	if late > pauseGap {
		c.logger.Warn("the process was paused; every session gets its full time again", "for", late+beatEvery)
		c.state.Rearm(now)
	}
	c.expireHeld(now)
	c.startFence(now) // again, if the last one has failed
	if c.diskIsFull(now) {
		return
	}
	deadline := c.state.Deadline()
	if deadline.IsZero() || deadline.After(now) {
		return
	}
	if err := c.guard(func() { c.perform(now, 0, c.state.Tick(now)) }); err != nil {
		c.breakDown(err)
	}
}

// expireHeld answers replies that have waited for the commit time-out. What they wait for may still be replicated later:
// as in Kafka the outcome is unknown to the client.
func (c *Coordinator) expireHeld(now time.Time) {
	for _, h := range c.activation.expired(now) {
		c.metrics.Add(tracing.CommitTimeouts, 1)
		c.refuse(h.reply.Call)
	}
}

// refuse answers a request, if that has not been done, with an error that makes its client try again.
func (c *Coordinator) refuse(call uint64) {
	if r, live := c.calls[call]; live {
		delete(c.calls, call)
		r.Done(group.ErrorResponse(r.Body, TimeoutCode(r.Body)), nil)
	}
}

// TimeoutCode is Kafka's error for a request whose records could not be replicated in time: COORDINATOR_NOT_AVAILABLE,
// but NOT_COORDINATOR for OffsetFetch, whose older clients mishandle the former (GroupCoordinatorService.fetchOffsets).
func TimeoutCode(req kmsg.Request) int16 {
	if _, fetch := req.(*kmsg.OffsetFetchRequest); fetch {
		return kerr.NotCoordinator.Code
	}
	return kerr.CoordinatorNotAvailable.Code
}

// guard turns a panic of the core into an error: a broken invariant makes the coordinator inactive, loudly, and leaves
// the data traffic alone.
func (c *Coordinator) guard(f func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("broken invariant: %v\n%s", p, debug.Stack())
		}
	}()
	f()
	return nil
}

// breakDown ends the activation after a broken invariant and builds the state anew from the log.
func (c *Coordinator) breakDown(cause error) {
	c.logger.Error("coordinator gives up its term", "err", cause)
	if a := c.activation; a != nil {
		a.flight = nil // the state is not to be trusted, nor to be undone
		c.endActivation("a broken invariant")
	}
	c.failure = c.rebuild()
}

// rebuild loads the newest record of each key. Records that the log has yet to deliver may be among them; they come
// again in their order, so the state ends as theirs.
func (c *Coordinator) rebuild() error {
	state := group.NewState(c.config.Group)
	err := c.log.Latest(func(r replicate.Record) error {
		state.Apply(group.Record(r))
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the compacted log: %w", err)
	}
	c.state = state
	return nil
}
