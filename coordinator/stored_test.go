package coordinator

import (
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate"
)

// replicated says that an entry is committed by raft, and not known to be stored by every in-sync replica.
func (h *hand) replicated(e replicate.Entry, index uint64) {
	h.event(replicate.Event{Kind: replicate.Applied, Term: e.Term, Sequence: e.Sequence, Index: index, Records: e.Records})
}

func (h *hand) storedUpTo(term, index uint64) {
	h.event(replicate.Event{Kind: replicate.Stored, Term: term, Index: index})
}

func TestCommitIsAnsweredOnceEveryInSyncReplicaHasIt(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		first := s.submit(commit("orders", 5))
		h.replicated(h.mustTake(), 10)
		first.is(t, "parked")
		second := s.submit(commit("orders", 6)) // the next entry does not wait for the copies of the one before
		h.replicated(h.mustTake(), 12)
		h.storedUpTo(1, 9)
		h.storedUpTo(7, 99) // of another term
		first.is(t, "parked")
		h.storedUpTo(1, 11)
		first.is(t, "NONE")
		second.is(t, "parked")
		h.storedUpTo(1, 12)
		second.is(t, "NONE")
	})
}

func TestCopiesMayBeThereBeforeRaftHasCommitted(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		committed := newSession(c, 1).submit(commit("orders", 5))
		e := h.mustTake()
		h.storedUpTo(1, 10)
		committed.is(t, "parked")
		h.replicated(e, 10)
		committed.is(t, "NONE")
	})
}

func TestAnEntryThatIsStoredTellsOfThoseBefore(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		first := s.submit(commit("orders", 5))
		h.replicated(h.mustTake(), 10)
		second := s.submit(commit("orders", 6))
		e := h.mustTake()
		h.event(replicate.Event{Kind: replicate.Applied, Term: e.Term, Sequence: e.Sequence, Index: 11, Records: e.Records, Stored: true})
		first.is(t, "NONE")
		second.is(t, "NONE")
	})
}

func TestAReplyThatAppendedNothingWaitsForRaftAlone(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		committed, fetched := newSession(c, 1).submit(commit("orders", 5)), newSession(c, 2).submit(fetch())
		e := h.mustTake()
		fetched.is(t, "parked")
		h.replicated(e, 10)
		fetched.is(t, "5")
		committed.is(t, "parked")
	})
}

// A request that comes again over a new stream of its session is acknowledged no earlier than the first one would be.
func TestAResentCommitWaitsForTheCopiesOfTheFirst(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		s.submit(commit("orders", 5))
		e := h.mustTake()
		inFlight := s.resubmit(commit("orders", 5), 1)
		h.replicated(e, 10)
		storing := s.resubmit(commit("orders", 5), 1)
		inFlight.is(t, "parked")
		storing.is(t, "parked")
		h.storedUpTo(1, 10)
		inFlight.is(t, "NONE")
		storing.is(t, "NONE")
	})
}

func TestCommitTimeoutCountsTheCopies(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		committed := newSession(c, 1).submit(commit("orders", 5))
		e := h.mustTake()
		time.Sleep(4 * time.Second)
		h.replicated(e, 10)
		time.Sleep(time.Second - time.Millisecond)
		committed.is(t, "parked")
		time.Sleep(time.Millisecond)
		committed.is(t, "COORDINATOR_NOT_AVAILABLE")
		h.storedUpTo(1, 10)
		committed.is(t, "COORDINATOR_NOT_AVAILABLE")
	})
}

// What is replicated stands, but its client is told so by the next activation, whose in-sync set it is.
func TestAnActivationThatEndsGivesBackWhatWaitsForCopies(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		committed := s.submit(commit("orders", 5))
		h.replicated(h.mustTake(), 10)
		h.event(replicate.Event{Kind: replicate.Inactive, Term: 1})
		committed.is(t, ErrInactive.Error())
		h.event(replicate.Event{Kind: replicate.Active, Term: 2})
		h.storedUpTo(1, 10)
		s.resubmit(commit("orders", 5), 1).is(t, "NONE")
		s.submit(fetch()).is(t, "5")
		if e, offered := h.take(); offered {
			t.Errorf("the resent commit was appended: %d records", len(e.Records))
		}
	})
}
