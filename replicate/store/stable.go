package store

import (
	"encoding/binary"
	"fmt"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"
)

// keyCurrentTerm is the name under which raft keeps its term (raft's api.go).
var keyCurrentTerm = []byte("CurrentTerm")

// Stable keeps raft's term and vote. Raft panics when a write fails; so one waits while the disk is full, and after a
// fatal error, when raft is about to be stopped, it does nothing at all.
type Stable struct{ s *Store }

var _ raft.StableStore = (*Stable)(nil)

// Set writes one value; it is on disk when Set returns nil.
func (t *Stable) Set(key, value []byte) error {
	if f := t.s.files; f != nil && !f.guard.wait(t.s.stop) {
		// A term that was not written must not get into the log either.
		err := ErrClosing
		t.s.broken.CompareAndSwap(nil, &err)
		return nil
	}
	if t.s.Err() != nil {
		return nil
	}
	err := t.s.write(func(txn *badger.Txn) error { return txn.Set(stableKey(key), value) })
	if err != nil {
		return fmt.Errorf("writing raft's %s: %w", key, err)
	}
	_ = t.s.raftLog.writeMark() // keep says if it cannot be written
	return nil
}

// Get gives an empty value if there is none.
func (t *Stable) Get(key []byte) ([]byte, error) {
	v, err := t.s.get(stableKey(key))
	if v == nil {
		v = []byte{}
	}
	return v, err
}

// SetUint64 writes one number.
func (t *Stable) SetUint64(key []byte, value uint64) error {
	return t.Set(key, encodeUint64(value))
}

// GetUint64 gives 0 if there is none.
func (t *Stable) GetUint64(key []byte) (uint64, error) {
	v, err := t.Get(key)
	if err != nil || len(v) == 0 {
		return 0, err
	}
	if len(v) != 8 {
		return 0, t.s.damaged(fmt.Sprintf("raft's %s has %d bytes", key, len(v)))
	}
	return binary.BigEndian.Uint64(v), nil
}

func encodeUint64(v uint64) []byte {
	return binary.BigEndian.AppendUint64(nil, v)
}
