package coordinator

import (
	"errors"
	"slices"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kerr"
)

// entryRequests bounds how many Steps with records one entry takes, besides replicate.EntryBytes.
const entryRequests = 1024

// The clients that an entry has answered come back at once, or never soon. Without a wait for them two halves of a crowd
// would take turns, each with an entry of its own, and an entry costs what ten commits do. From lingerCrowd requests on
// the next entry is kept open for half of the time the last one took, lingerMost at most, or until as many have come as
// had asked before; fewer gain nothing by it. Measured with 64 connections: a fifth more commits a second, a fifth less
// CPU each.
const (
	lingerCrowd = 8
	lingerMost  = time.Millisecond
)

// activation is one term in which this sidecar's coordinator answers.
type activation struct {
	term     uint64
	began    time.Time
	sequence uint64 // of the newest entry in flight
	// flight holds the entries that are not replicated yet, in order: the first `offered` are with the appender, the last
	// one may still grow.
	flight  []*entry
	offered int
	// The next entry is kept open until it has so many requests, or until then; 0: it is not (see lingerCrowd).
	crowd       int
	lingerUntil time.Time
	// storing holds the entries that are replicated, but not known to be stored by every in-sync replica, in order, if a
	// reply waits for that. They are no longer to be undone.
	storing []*entry
	stored  uint64 // raft's index up to which every in-sync replica has stored this term's entries

	fencing   []*held // wait for the fence that is under way
	fenceNext []*held // wait for one that has yet to begin
	fence     bool    // one is under way
	// When it, or the last one, began; when the last one that succeeded began; when the next one is due after a failure.
	fenceBegan, fenced, fenceAt time.Time

	held []*held // every reply held back, by deadline; answered ones are dropped when they come first
}

// entry is a replicate.Entry in the making or in flight, with what undoes it and the replies that wait for it.
type entry struct {
	sequence uint64
	index    uint64 // raft's, once it is replicated
	records  []replicate.Record
	previous []group.Record
	calls    []uint64 // whose records are among them
	replies  []*held
	bytes    int
	requests int
	offered  time.Time // when the appender took it
}

// held is a reply that waits for conditions to come true.
type held struct {
	reply      group.Reply
	deadline   time.Time
	conditions int
	copies     bool // what it acknowledges must be stored by every in-sync replica, besides being replicated
	answered   bool
}

// add puts the records of a Step for call (0: of a Tick) into the last entry in flight, or into new ones. They may span
// entries; the replies of the Step then hang on the last.
func (a *activation) add(call uint64, effects group.Effects) {
	for i, r := range effects.Records {
		size := len(r.Key) + len(r.Value)
		e := a.open()
		if e == nil || e.requests >= entryRequests || e.bytes+size > replicate.EntryBytes || len(e.records) >= replicate.MaxRecords {
			a.sequence++
			e = &entry{sequence: a.sequence}
			a.flight = append(a.flight, e)
		}
		if n := len(e.calls); n == 0 || e.calls[n-1] != call {
			e.calls = append(e.calls, call)
		}
		if i == len(effects.Records)-1 {
			e.requests++
		}
		e.bytes += size
		e.records = append(e.records, replicate.Record(r))
		e.previous = append(e.previous, effects.Previous[i])
	}
}

// open is the entry that may still grow, or nil.
func (a *activation) open() *entry {
	if len(a.flight) == a.offered {
		return nil
	}
	return a.flight[len(a.flight)-1]
}

// deadline is that of the reply held longest, or zero.
func (a *activation) deadline() time.Time {
	for len(a.held) > 0 && a.held[0].answered {
		a.held[0] = nil
		a.held = a.held[1:]
	}
	if len(a.held) == 0 {
		return time.Time{}
	}
	return a.held[0].deadline
}

// expired takes the replies whose deadline has passed.
func (a *activation) expired(now time.Time) []*held {
	var due []*held
	for d := a.deadline(); !d.IsZero() && !d.After(now); d = a.deadline() {
		due = append(due, a.held[0])
		a.held[0].answered = true
	}
	return due
}

// nextEntry is what the appender is offered now: a nil channel when there is nothing. While an entry is in flight the
// next one grows until it is full: each costs a sync, and half as many of twice the size is what 64 clients gain most by
// (measured: a third more commits a second, a sixth less CPU each).
func (c *Coordinator) nextEntry() (chan<- replicate.Entry, replicate.Entry) {
	a := c.activation
	if a == nil || a.offered == len(a.flight) || a.offered > 0 && len(a.flight)-a.offered == 1 || a.lingering(time.Now()) {
		return nil, replicate.Entry{}
	}
	e := a.flight[a.offered]
	return c.log.Entries(), replicate.Entry{Term: a.term, Sequence: e.sequence, Records: e.records}
}

// taken notes that the appender has the entry it was offered.
func (a *activation) taken(now time.Time) {
	a.flight[a.offered].offered = now
	a.offered++
	a.crowd = 0
}

// expect keeps the next entry open for those whom e, just replicated, has answered.
func (a *activation) expect(e *entry, now time.Time) {
	waiting := 0
	if next := a.open(); next != nil {
		waiting = next.requests
	}
	if a.crowd = e.requests + waiting; a.crowd < lingerCrowd {
		a.crowd = 0
	}
	a.lingerUntil = now.Add(min(now.Sub(e.offered)/2, lingerMost))
}

// lingering says that the only entry, which nobody has taken yet, is kept open; once it is not, it never is again.
func (a *activation) lingering(now time.Time) bool {
	if len(a.flight) > 1 || a.flight[0].requests >= a.crowd || !now.Before(a.lingerUntil) {
		a.crowd = 0
	}
	return a.crowd > 0
}

func (c *Coordinator) handleEvent(event replicate.Event) error {
	switch event.Kind {
	case replicate.Reset:
		c.deactivate("the log was restored from a snapshot")
		return c.rebuild()
	case replicate.Applied:
		c.handleApplied(event)
	case replicate.Stored:
		if a := c.activation; a != nil && a.term == event.Term {
			c.handleStored(event.Index)
		}
	case replicate.Ignored:
		if a := c.activation; a != nil && a.term == event.Term {
			c.endActivation("an entry of its own was refused")
		}
	case replicate.Failed:
		if a := c.activation; a != nil && a.term == event.Term {
			c.logger.Warn("an entry could not be appended", "term", event.Term, "sequence", event.Sequence, "err", event.Err)
			if errors.Is(event.Err, replicate.ErrEntryTooLarge) {
				c.refuseEntry(event.Sequence)
			}
			c.endActivation("an entry could not be appended")
		}
	case replicate.Active:
		c.activate(event.Term)
	case replicate.Inactive:
		if a := c.activation; a != nil && a.term == event.Term {
			c.deactivate("leadership ended")
		}
	}
	return nil
}

// refuseEntry answers the requests of an entry that can never be appended. Given back, they would come again, and end
// every activation to come. The core keeps to the log's limits, so this is its last resort.
func (c *Coordinator) refuseEntry(sequence uint64) {
	for _, e := range c.activation.flight {
		if e.sequence != sequence {
			continue
		}
		for _, call := range e.calls {
			if r, live := c.calls[call]; live {
				delete(c.calls, call)
				r.Done(group.ErrorResponse(r.Body, kerr.UnknownServerError.Code), nil)
			}
		}
	}
}

// handleApplied takes the entry at the head of the queue off it: it is no longer to be undone, and its replies are
// released or wait for its copies alone. Whatever else the log delivers is applied; if it comes while this coordinator is
// active, the state it stepped on was not the log's, and the activation ends.
func (c *Coordinator) handleApplied(event replicate.Event) {
	if a := c.activation; a != nil {
		if a.offered > 0 && event.Term == a.term && event.Sequence == a.flight[0].sequence &&
			len(event.Records) == len(a.flight[0].records) {
			e := a.flight[0]
			a.flight[0] = nil
			a.flight = a.flight[1:]
			a.offered--
			c.metrics.Add(tracing.RaftAppends, 1)
			c.metrics.Add(tracing.RaftAppendRecords, int64(len(e.records)))
			c.replicated(e, event)
			a.expect(e, time.Now())
			return
		}
		c.logger.Error("an entry was applied that is not the one expected", "term", event.Term, "sequence", event.Sequence)
		c.endActivation("the log differs from what was computed")
	}
	for _, r := range event.Records {
		if err := c.guard(func() { c.state.Apply(group.Record(r)) }); err != nil {
			c.logger.Error("applying a record", "index", event.Index, "err", err)
		}
	}
}

// replicated releases those replies of an entry that wait for raft alone, and the others too if its copies are there.
func (c *Coordinator) replicated(e *entry, event replicate.Event) {
	a := c.activation
	if event.Stored {
		c.handleStored(event.Index)
	}
	stored := event.Stored || event.Index <= a.stored
	waiting := e.replies[:0]
	for _, h := range e.replies {
		if h.copies && !stored {
			waiting = append(waiting, h)
		} else {
			c.met(h)
		}
	}
	if len(waiting) > 0 {
		a.storing = append(a.storing, &entry{index: event.Index, replies: waiting})
	}
}

// handleStored releases the replies of the entries up to raft's index: their copies are there.
func (c *Coordinator) handleStored(index uint64) {
	a := c.activation
	a.stored = max(a.stored, index)
	for len(a.storing) > 0 && a.storing[0].index <= a.stored {
		e := a.storing[0]
		a.storing[0] = nil
		a.storing = a.storing[1:]
		for _, h := range e.replies {
			c.met(h)
		}
	}
}

func (c *Coordinator) activate(term uint64) {
	if c.activation != nil {
		c.deactivate("a newer term has begun")
	}
	now := time.Now()
	c.activation = &activation{term: term, began: now}
	c.beat = now.Add(beatEvery)
	c.full, c.fullAsked = false, time.Time{} // what an earlier activation knew of the disk is old
	if err := c.guard(func() { c.perform(now, 0, c.state.Activate(now, term)) }); err != nil {
		c.breakDown(err)
		return
	}
	c.logger.Info("coordinator is active", "term", term)
	c.publish(true, term)
}

// endActivation ends the activation while raft may still lead: it must not be resumed in that term. What ends one soon
// after the other (a full disk, a fault of our own) does so ever more slowly.
func (c *Coordinator) endActivation(why string) {
	a := c.activation
	now := time.Now()
	if now.Sub(a.began) > resignReset {
		c.resignDelay = 0
	}
	c.deactivate(why)
	c.resign, c.resignAt = a.term, now.Add(c.resignDelay)
	c.resignDelay = min(max(2*c.resignDelay, resignFirst), resignSlowest)
	c.resignIfDue(now)
}

func (c *Coordinator) resignIfDue(now time.Time) {
	if c.resign == 0 || now.Before(c.resignAt) {
		return
	}
	term := c.resign
	c.resign, c.resignAt = 0, time.Time{}
	c.leader.Resign(term)
}

// deactivate undoes what is not replicated, drops soft state and gives every unanswered request back.
func (c *Coordinator) deactivate(why string) {
	a := c.activation
	if a == nil {
		return
	}
	c.activation = nil
	c.publish(false, a.term)
	if err := c.guard(func() { c.undo(a) }); err != nil {
		c.logger.Error("undoing what was not replicated; the state is built anew", "err", err)
		c.failure = c.rebuild()
	}
	c.logger.Info("coordinator is inactive", "term", a.term, "why", why, "unanswered", len(c.calls))
	c.giveBack()
}

func (c *Coordinator) undo(a *activation) {
	for _, e := range slices.Backward(a.flight) {
		for _, r := range slices.Backward(e.previous) {
			c.state.Apply(r)
		}
	}
	c.state.Deactivate()
}

func (c *Coordinator) giveBack() {
	calls, lookups := c.calls, c.lookups
	c.calls, c.lookups = map[uint64]*Request{}, map[group.Session]*lookup{}
	for _, r := range calls {
		r.Done(nil, ErrInactive)
	}
	for _, l := range lookups {
		for _, r := range l.queue {
			r.Done(nil, ErrInactive)
		}
	}
}

// startFence begins a read fence for all replies that wait for one, unless one is under way: that began before some of
// them were asked for.
func (c *Coordinator) startFence(now time.Time) {
	a := c.activation
	if a == nil || a.fence || len(a.fenceNext) == 0 || now.Before(a.fenceAt) {
		return
	}
	a.fence, a.fenceBegan, a.fenceAt = true, now, time.Time{}
	c.metrics.Add(tracing.Fences, 1)
	a.fencing, a.fenceNext = a.fenceNext, nil
	term := a.term
	c.leader.Fence(term, func(err error) {
		select {
		case c.fenceDone <- fenced{term, err}: // the buffer of one is enough: one fence at a time and activation
		default:
			go c.sendFenced(fenced{term, err})
		}
	})
}

// sendFenced hands a finished fence to the loop while that of an ended activation still lies in the buffer.
func (c *Coordinator) sendFenced(f fenced) {
	select {
	case c.fenceDone <- f:
	case <-c.stopped:
	}
}

func (c *Coordinator) handleFenced(f fenced) {
	a := c.activation
	if a == nil || a.term != f.term {
		return
	}
	if errors.Is(f.err, replicate.ErrNotLeader) {
		c.endActivation("a read fence failed: " + f.err.Error())
		return
	}
	a.fence = false
	now := time.Now()
	if f.err != nil {
		// Voters that cannot be reached now. If the term is over the log will say so; those who cannot wait are told by
		// their deadline.
		c.logger.Debug("a read fence failed", "term", f.term, "err", f.err)
		waiting := slices.DeleteFunc(a.fencing, func(h *held) bool { return h.answered })
		a.fencing, a.fenceNext = nil, append(waiting, a.fenceNext...)
		if len(a.fenceNext) > 0 {
			a.fenceAt = now.Add(fenceRetry)
		}
		return
	}
	a.fenced = a.fenceBegan
	fencing := a.fencing
	a.fencing = nil
	for _, h := range fencing {
		c.met(h)
	}
	c.startFence(now)
}
