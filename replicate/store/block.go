package store

import (
	"encoding/binary"
	"errors"
	"time"
)

const (
	blockVersion  = 1
	latestVersion = 1

	// blockBytes is where a block is cut; a single larger record has a block of its own.
	blockBytes = 64 << 10
	// inlineBytes is how large a value may be to be kept in latest as well: loading reads latest alone, in order.
	inlineBytes = 64 << 10
)

// Record is one record of the compacted log. A nil Value is a tombstone. Partition -1 is private: it takes no offsets.
type Record struct {
	Partition  int32
	Key, Value []byte
}

// Stored is a Record with its place: its offset (-1 in the private partition), the index of its entry in raft's log
// and its position within the entry.
type Stored struct {
	Record
	Offset   int64
	Index    uint64
	Position int
	// Time is when it was flushed, by this replica's clock: in whole milliseconds.
	Time time.Time
}

var errMalformed = errors.New("malformed")

// block builds one value of the compacted log: records of one partition, in the order of their offsets.
type block struct {
	partition int32
	time      int64
	base      int64
	index     uint64
	count     int
	body      []byte
}

func (b *block) add(r *Stored) {
	if b.count == 0 {
		b.base, b.index = r.Offset, r.Index
	}
	b.count++
	b.body = binary.AppendUvarint(b.body, uint64(r.Offset-b.base))
	b.body = binary.AppendUvarint(b.body, r.Index-b.index)
	b.body = binary.AppendUvarint(b.body, uint64(r.Position))
	b.body = binary.AppendUvarint(b.body, uint64(len(r.Key)))
	b.body = append(b.body, r.Key...)
	b.body = appendValue(b.body, r.Value)
}

// appendValue writes a value with its length plus one, so that 0 is a tombstone.
func appendValue(dst, value []byte) []byte {
	if value == nil {
		return append(dst, 0)
	}
	dst = binary.AppendUvarint(dst, uint64(len(value))+1)
	return append(dst, value...)
}

func (r *reader) value() []byte {
	n := r.uvarint()
	if n == 0 {
		return nil
	}
	v := r.bytes(n - 1)
	if v == nil && !r.bad {
		v = []byte{}
	}
	return v
}

// encode gives the block's key and sealed value.
func (b *block) encode() (key, value []byte) {
	key = logKey(b.partition, b.base)
	value = make([]byte, 0, len(b.body)+32)
	value = append(value, blockVersion)
	value = binary.AppendUvarint(value, uint64(b.time))
	value = binary.AppendUvarint(value, b.index)
	value = binary.AppendUvarint(value, uint64(b.count))
	value = append(value, b.body...)
	return key, seal(key, value)
}

// decodeBlock calls yield for each record until it returns false. The records alias value.
func decodeBlock(key, value []byte, yield func(*Stored) bool) error {
	if len(key) != 14 {
		return errMalformed
	}
	value, ok := unseal(key, value)
	if !ok {
		return errors.New("checksum mismatch")
	}
	r := reader{b: value}
	if r.byte() != blockVersion {
		return errors.New("unknown version")
	}
	partition, base := int32(binary.BigEndian.Uint32(key[2:])), logKeyOffset(key)
	when := time.UnixMilli(int64(r.uvarint()))
	index := r.uvarint()
	for n := r.uvarint(); n > 0; n-- {
		s := Stored{Record: Record{Partition: partition}, Time: when}
		s.Offset = base + int64(r.uvarint())
		s.Index = index + r.uvarint()
		s.Position = int(r.uvarint())
		s.Key = r.bytes(r.uvarint())
		s.Value = r.value()
		if r.bad {
			return errMalformed
		}
		if !yield(&s) {
			return nil
		}
	}
	if len(r.b) != 0 {
		return errMalformed
	}
	return nil
}

const (
	flagTombstone = 1 << iota
	flagInLog     // the value is too large to be kept twice: read it from the compacted log
)

func encodeLatest(key []byte, s *Stored) []byte {
	var flags byte
	if s.Value == nil {
		flags |= flagTombstone
	}
	inline := s.Value
	if s.Partition >= 0 && len(inline) > inlineBytes {
		flags |= flagInLog
		inline = nil
	}
	b := make([]byte, 0, 40+len(inline))
	b = append(b, latestVersion, flags)
	b = binary.AppendUvarint(b, uint64(s.Offset+1))
	b = binary.AppendUvarint(b, s.Index)
	b = binary.AppendUvarint(b, uint64(s.Position))
	b = binary.AppendUvarint(b, uint64(s.Time.UnixMilli()))
	b = append(b, inline...)
	return seal(key, b)
}

// decodeLatest aliases key and value. inLog: the value must be read from the compacted log.
func decodeLatest(key, value []byte) (s Stored, inLog bool, err error) {
	value, ok := unseal(key, value)
	if !ok {
		return s, false, errors.New("checksum mismatch")
	}
	r := reader{b: value}
	if r.byte() != latestVersion {
		return s, false, errors.New("unknown version")
	}
	flags := r.byte()
	s.Partition, s.Key = latestKeyParts(key)
	s.Offset = int64(r.uvarint()) - 1
	s.Index = r.uvarint()
	s.Position = int(r.uvarint())
	s.Time = time.UnixMilli(int64(r.uvarint()))
	if r.bad {
		return s, false, errMalformed
	}
	if flags&(flagTombstone|flagInLog) == 0 {
		s.Value = r.b[:len(r.b):len(r.b)]
		if s.Value == nil {
			s.Value = []byte{}
		}
	}
	return s, flags&flagInLog != 0, nil
}
