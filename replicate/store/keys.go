package store

import (
	"encoding/binary"
	"hash/crc32"
)

// The key ranges. The second byte of each key is the shard, 0 until there are more raft groups than one.
const (
	rangeStable  = 's'
	rangeRaftLog = 'l'
	rangeLog     = 'c'
	rangeLatest  = 'k'
	rangeMeta    = 'm'
	rangeLocal   = 'n'

	shard = 0
)

var (
	appliedKey   = []byte{rangeMeta, shard, 'a'}
	restoringKey = []byte{rangeMeta, shard, 'r'}
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func stableKey(name []byte) []byte {
	return append([]byte{rangeStable, shard}, name...)
}

func localKey(name string) []byte {
	return append([]byte{rangeLocal, shard}, name...)
}

func raftLogKey(index uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{rangeRaftLog, shard}, index)
}

func raftLogIndex(key []byte) uint64 {
	return binary.BigEndian.Uint64(key[2:])
}

func partitionPrefix(kind byte, partition int32) []byte {
	return binary.BigEndian.AppendUint32([]byte{kind, shard}, uint32(partition))
}

func logKey(partition int32, offset int64) []byte {
	return binary.BigEndian.AppendUint64(partitionPrefix(rangeLog, partition), uint64(offset))
}

func logKeyOffset(key []byte) int64 {
	return int64(binary.BigEndian.Uint64(key[6:]))
}

func appendLatestKey(dst []byte, partition int32, key []byte) []byte {
	dst = append(dst, rangeLatest, shard)
	dst = binary.BigEndian.AppendUint32(dst, uint32(partition))
	return append(dst, key...)
}

func latestKeyParts(key []byte) (partition int32, name []byte) {
	return int32(binary.BigEndian.Uint32(key[2:])), key[6:]
}

// seal appends the CRC32C of key and value, so that a value found under another key is damage too.
func seal(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(value, checksum(key, value))
}

// unseal checks and cuts what seal appended.
func unseal(key, value []byte) ([]byte, bool) {
	n := len(value) - 4
	if n < 0 || binary.BigEndian.Uint32(value[n:]) != checksum(key, value[:n]) {
		return nil, false
	}
	return value[:n:n], true
}

func checksum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
}

// reader takes fields off a byte slice; after the first that is missing it is bad and gives zeroes.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) fail() {
	r.b, r.bad = nil, true
}

func (r *reader) byte() byte {
	if len(r.b) < 1 {
		r.fail()
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) bytes(n uint64) []byte {
	if n > uint64(len(r.b)) {
		r.fail()
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}
