package replicate

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/hashicorp/raft"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// fsm applies raft's committed entries: it decides which count, has the store place their records, and hands them on.
// All its methods run on raft's FSM goroutine.
type fsm struct {
	store *store.Store
	send  func(Event) bool // false: the node is ending
	fatal func(error)
	// stored says whether every replica in sync has stored our log up to an index; nil: nobody asks for that.
	stored func(index uint64) bool
	// configured is told of each configuration applied; nil if nobody wants to know.
	configured func(index uint64, c raft.Configuration)

	index      uint64 // of the last entry applied
	term, next uint64 // the entry that counts next
	// ended: nothing is applied any more, though raft goes on handing entries over; what is left out will be replayed.
	// Until the node has stopped, nobody may take the store for what raft has committed: no snapshot, no activation.
	ended atomic.Bool
}

var (
	_ raft.BatchingFSM        = (*fsm)(nil)
	_ raft.ConfigurationStore = (*fsm)(nil)
)

// resume takes up where the store is.
func (f *fsm) resume() {
	state := f.store.State()
	f.index, f.term, f.next = state.Index, state.EntryTerm, state.NextSequence
}

// tellConfiguration tells the one that the store has.
func (f *fsm) tellConfiguration() {
	if state := f.store.State(); f.configured != nil && state.ConfigurationIndex > 0 {
		f.configured(state.ConfigurationIndex, raft.DecodeConfiguration(state.Configuration))
	}
}

// ApplyBatch is raft's way in: command entries and configurations.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	for _, l := range logs {
		f.Apply(l)
	}
	return make([]any, len(logs))
}

// Apply applies one entry, once: what the store had at the start is passed over.
func (f *fsm) Apply(l *raft.Log) any {
	if f.ended.Load() || l.Index <= f.index {
		return nil
	}
	f.index = l.Index
	var err error
	switch l.Type {
	case raft.LogCommand:
		err = f.command(l)
	case raft.LogConfiguration:
		if err = f.store.Configuration(l.Index, l.Term, l.Data); err == nil && f.configured != nil {
			f.configured(l.Index, raft.DecodeConfiguration(l.Data))
		}
	}
	if err != nil {
		f.end(err)
	}
	return nil
}

// errEnding: the node is being closed.
var errEnding = errors.New("the node is closing")

// end stops applying: a gap must never follow.
func (f *fsm) end(err error) {
	f.ended.Store(true)
	if !errors.Is(err, errEnding) && !errors.Is(err, store.ErrClosing) {
		f.fatal(err)
	}
}

func (f *fsm) command(l *raft.Log) error {
	e, err := decodeEntry(l.Data)
	if err != nil {
		return fmt.Errorf("applying raft entry %d: %w", l.Index, err)
	}
	event := Event{Kind: Ignored, Term: e.Term, Sequence: e.Sequence, Index: l.Index}
	if f.counts(&e, l.Term) {
		f.term, f.next = e.Term, e.Sequence+1
		event.Kind, event.Records = Applied, e.Records
		event.Stored = f.stored == nil || f.stored(l.Index)
	}
	if err := f.store.Append(l.Index, l.Term, f.term, f.next, event.Records); err != nil {
		return fmt.Errorf("applying raft entry %d: %w", l.Index, err)
	}
	if !f.send(event) {
		return errEnding
	}
	return nil
}

// counts says whether an entry of this term and number belongs here: it was computed in the term that its place in
// the log has, and upon everything before it.
func (f *fsm) counts(e *Entry, logTerm uint64) bool {
	if e.Term != logTerm {
		return false
	}
	if e.Term == f.term {
		return e.Sequence == f.next
	}
	return e.Term > f.term && e.Sequence == 1
}

// StoreConfiguration makes raft hand its configurations over; they come through ApplyBatch.
func (f *fsm) StoreConfiguration(index uint64, c raft.Configuration) {
	f.Apply(&raft.Log{Index: index, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(c)})
}

// Snapshot only notes how far the tail must be flushed: the flush itself does not hold up Apply.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if f.ended.Load() {
		return nil, errEnding // raft's index is past what was applied
	}
	return &fsmSnapshot{store: f.store, index: f.index}, nil
}

type fsmSnapshot struct {
	store *store.Store
	index uint64
}

// Persist flushes the tail: what is flushed is the snapshot.
func (s *fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.store.Flush(s.index); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release has nothing to release.
func (s *fsmSnapshot) Release() {}

// Restore replaces everything by another replica's snapshot.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	if err := f.store.Restore(r); err != nil {
		return err
	}
	f.resume()
	f.tellConfiguration()
	if !f.send(Event{Kind: Reset}) {
		f.ended.Store(true)
	}
	return nil
}
