package store

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"
)

const stateVersion = 1

// State is how far the compacted log has come. It travels with snapshots.
type State struct {
	// Index and Term are raft's, of the newest entry applied.
	Index, Term uint64
	// EntryTerm and NextSequence say which entry counts next: the term of the newest that did and the sequence number
	// after its own. An entry of a newer term counts if its number is 1.
	EntryTerm, NextSequence uint64
	// Configuration is raft's, encoded, as of Index; ConfigurationIndex is its entry's, 0 if there has been none.
	ConfigurationIndex uint64
	Configuration      []byte
	// Installed is the index of the newest snapshot that came from elsewhere: raft's log may begin above it.
	Installed uint64
	// Next is each partition's next offset.
	Next map[int32]int64
}

func (s State) clone() State {
	s.Next = maps.Clone(s.Next)
	if s.Next == nil {
		s.Next = map[int32]int64{}
	}
	return s
}

func (s *State) encode() []byte {
	b := []byte{stateVersion}
	for _, v := range []uint64{s.Index, s.Term, s.EntryTerm, s.NextSequence, s.ConfigurationIndex, s.Installed} {
		b = binary.AppendUvarint(b, v)
	}
	b = binary.AppendUvarint(b, uint64(len(s.Configuration)))
	b = append(b, s.Configuration...)
	b = binary.AppendUvarint(b, uint64(len(s.Next)))
	for _, p := range slices.Sorted(maps.Keys(s.Next)) {
		b = binary.AppendUvarint(b, uint64(uint32(p)))
		b = binary.AppendUvarint(b, uint64(s.Next[p]))
	}
	return b
}

func decodeState(b []byte) (State, error) {
	r := reader{b: b}
	if v := r.byte(); v != stateVersion {
		return State{}, errors.New("applied state of an unknown version")
	}
	s := State{Next: map[int32]int64{}}
	for _, f := range []*uint64{&s.Index, &s.Term, &s.EntryTerm, &s.NextSequence, &s.ConfigurationIndex, &s.Installed} {
		*f = r.uvarint()
	}
	s.Configuration = slices.Clone(r.bytes(r.uvarint()))
	for n := r.uvarint(); n > 0 && !r.bad; n-- {
		p := int32(uint32(r.uvarint()))
		s.Next[p] = int64(r.uvarint())
	}
	if r.bad || len(r.b) != 0 {
		return State{}, errors.New("applied state is malformed")
	}
	return s, nil
}
