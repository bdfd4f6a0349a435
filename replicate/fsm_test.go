package replicate

import (
	"testing"

	"github.com/hashicorp/raft"
)

// What an fsm that has ended passes over is replayed later: nothing may count it as applied, no snapshot either.
func TestNoSnapshotOfWhatWasNotApplied(t *testing.T) {
	h := openHarness(t, testConfig(t.TempDir()))
	defer h.close()
	h.active()
	f := &fsm{store: h.n.store, send: func(Event) bool { return false }, fatal: func(error) {}}
	f.resume()
	if _, err := f.Snapshot(); err != nil {
		t.Fatal(err)
	}
	f.Apply(&raft.Log{Index: f.index + 1, Term: 1, Type: raft.LogCommand, Data: []byte{99}})
	if s, err := f.Snapshot(); err == nil {
		t.Errorf("a snapshot at %d", s.(*fsmSnapshot).index)
	}
}

func TestNotActiveUponAnEntryItCannotRead(t *testing.T) {
	for range 5 {
		c := testConfig(t.TempDir())
		h := openHarness(t, c)
		h.active()
		h.commit(record(0, "k", "v"))
		_ = h.n.running.Load().raft.Apply([]byte{99, 1, 2, 3}, 0).Error() // of a version to come
		for range h.n.Events() {
		}
		h.n.Close()
		n, err := Open(c)
		if err != nil {
			t.Fatal(err)
		}
		for e := range n.Events() {
			if e.Kind == Active {
				t.Error("active upon a state that lacks an entry")
			}
		}
		if n.Err() == nil {
			t.Error("the node does not say why it ended")
		}
		n.Close()
	}
}
