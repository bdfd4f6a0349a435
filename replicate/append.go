package replicate

import (
	"errors"

	"github.com/hashicorp/raft"
)

// ErrNotLeader is why an entry Failed or a fence is broken: this replica does not lead in that term, or an entry of
// that term has failed before.
var ErrNotLeader = errors.New("not the leader in that term")

// pending is an entry on its way: raft answers, or err is the answer already.
type pending struct {
	term, sequence uint64
	future         raft.ApplyFuture
	err            error
}

// append takes entries as long as fewer than EntriesInFlight are in flight, and gives them to raft. No linger: what
// comes while entries are in flight is gathered by the coordinator into its next one.
func (r *replica) append() {
	defer close(r.inFlight)
	var encoder entryEncoder
	for {
		select {
		case r.slots <- struct{}{}:
		case <-r.stop:
			return
		}
		select {
		case e := <-r.entries:
			if !r.takeTurn() {
				return
			}
			r.unanswered.Add(1)
			r.inFlight <- r.offer(&encoder, &e)
			<-r.turn
		case <-r.stop:
			return
		}
	}
}

// offer gives one entry to raft, unless its term is over or has failed.
func (r *replica) offer(encoder *entryEncoder, e *Entry) pending {
	p := pending{term: e.Term, sequence: e.Sequence}
	term, leading := r.leadership()
	switch {
	case !leading || term != e.Term || r.failedTerm.Load() >= e.Term:
		p.err = ErrNotLeader
	default:
		p.err = e.check()
	}
	var b []byte
	if p.err == nil {
		b = encoder.encode(e)
		p.err = r.store.Room(int64(len(b))) // raft, whose log would fail, gives up the lead for a whole time-out
	}
	if p.err != nil {
		// From here on, not only once settle has told: the next entry may already be waiting.
		r.fail(e.Term)
		return p
	}
	p.future = r.raft.Apply(b, 0)
	return p
}

// settle waits for raft's answers in the order of the entries. An answer comes after the fsm has handed the entry on,
// so a Failed never overtakes an Applied.
func (r *replica) settle() {
	for p := range r.inFlight {
		err := p.err
		if err == nil {
			err = p.future.Error()
		}
		if err != nil {
			r.fail(p.term)
			r.send(Event{Kind: Failed, Term: p.term, Sequence: p.sequence, Err: err})
		}
		r.unanswered.Add(-1)
		<-r.slots
	}
}

// fail lets nothing more of term be appended.
func (r *replica) fail(term uint64) {
	for old := r.failedTerm.Load(); old < term && !r.failedTerm.CompareAndSwap(old, term); old = r.failedTerm.Load() {
	}
}
