package replicate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// The first byte of every entry is its version. A replica stops at one it does not know: skipping would part it from
// the others.
const (
	entryPlain      = 1
	entryCompressed = 2 // what follows the first byte of a plain one, in S2

	// compressFrom is the size from which compressing is tried. The keys of a commit's records, and those of a group's
	// commits, differ by a few bytes, and each byte of an entry is written three times and sent to each replica.
	compressFrom = 512
	// maxPlain bounds what a compressed entry may claim to be.
	maxPlain = 2 << 20
)

var (
	// ErrEntryTooLarge is why an entry beyond the limits Failed.
	ErrEntryTooLarge = errors.New("entry is too large")

	errMalformedEntry = errors.New("entry is malformed")
)

// check holds an entry to the limits that let the store flush it in one transaction.
func (e *Entry) check() error {
	if len(e.Records) > MaxRecords {
		return fmt.Errorf("%w: %d records, over the limit of %d", ErrEntryTooLarge, len(e.Records), MaxRecords)
	}
	total := 0
	for i := range e.Records {
		r := &e.Records[i]
		if len(r.Key) > MaxKeyBytes {
			return fmt.Errorf("%w: a key of %d bytes, over the limit of %d", ErrEntryTooLarge, len(r.Key), MaxKeyBytes)
		}
		total += len(r.Key) + len(r.Value)
	}
	// The sum of keys and values is what the coordinator counts; an eighth is for what lies around them.
	limit := EntryBytes + EntryBytes/8
	if len(e.Records) == 1 {
		limit = MaxRecordBytes
	}
	if total > limit {
		return fmt.Errorf("%w: %d bytes in %d records, over the limit of %d", ErrEntryTooLarge, total, len(e.Records), limit)
	}
	return nil
}

// encode gives the bytes of docs/formats.md.
func (e *Entry) encode() []byte {
	return new(entryEncoder).encode(e)
}

// entryEncoder keeps its buffers: raft holds on to what encode gives, which must be no larger than it has to be.
type entryEncoder struct{ plain, packed []byte }

func (c *entryEncoder) encode(e *Entry) []byte {
	c.plain = e.appendPlain(c.plain[:0])
	if len(c.plain) >= compressFrom {
		if n := s2.MaxEncodedLen(len(c.plain)); cap(c.packed) < n {
			c.packed = make([]byte, n)
		}
		packed := s2.Encode(c.packed[:cap(c.packed)], c.plain[1:])
		if len(packed) < len(c.plain)-len(c.plain)/8 {
			return append(append(make([]byte, 0, 1+len(packed)), entryCompressed), packed...)
		}
	}
	b := bytes.Clone(c.plain)
	if cap(c.plain) > 2*EntryBytes {
		*c = entryEncoder{} // a single large record
	}
	return b
}

func (e *Entry) appendPlain(b []byte) []byte {
	b = append(b, entryPlain)
	b = binary.AppendUvarint(b, e.Term)
	b = binary.AppendUvarint(b, e.Sequence)
	b = binary.AppendUvarint(b, uint64(len(e.Records)))
	for i := range e.Records {
		r := &e.Records[i]
		b = binary.AppendVarint(b, int64(r.Partition))
		b = binary.AppendUvarint(b, uint64(len(r.Key)))
		b = append(b, r.Key...)
		if r.Value == nil {
			b = append(b, 0)
			continue
		}
		b = binary.AppendUvarint(b, uint64(len(r.Value))+1)
		b = append(b, r.Value...)
	}
	return b
}

// decodeEntry reads what encode wrote. Keys and values alias b, or what it was before compression.
func decodeEntry(b []byte) (Entry, error) {
	if len(b) == 0 {
		return Entry{}, errMalformedEntry
	}
	version, body := b[0], b[1:]
	switch version {
	case entryPlain:
	case entryCompressed:
		if n, err := s2.DecodedLen(body); err != nil || n > maxPlain {
			return Entry{}, errMalformedEntry
		}
		plain, err := s2.Decode(nil, body)
		if err != nil {
			return Entry{}, errMalformedEntry
		}
		body = plain
	default:
		return Entry{}, fmt.Errorf("entry has format version %d, and this version knows up to %d: run the version that wrote it", version, entryCompressed)
	}
	d := entryReader{b: body}
	e := Entry{Term: d.uvarint(), Sequence: d.uvarint()}
	count := d.uvarint()
	if count > store.MaxEntryRecords || count > uint64(len(d.b)) {
		return Entry{}, errMalformedEntry
	}
	e.Records = make([]Record, 0, count)
	for ; count > 0; count-- {
		r := Record{Partition: d.partition()}
		r.Key = d.bytes(d.uvarint())
		if n := d.uvarint(); n > 0 {
			r.Value = d.bytes(n - 1)
		}
		e.Records = append(e.Records, r)
	}
	if d.bad || len(d.b) != 0 {
		return Entry{}, errMalformedEntry
	}
	return e, nil
}

// entryReader takes fields off a byte slice; after the first that is missing it gives zeroes.
type entryReader struct {
	b   []byte
	bad bool
}

func (d *entryReader) fail() {
	d.b, d.bad = nil, true
}

func (d *entryReader) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *entryReader) partition() int32 {
	v, n := binary.Varint(d.b)
	if n <= 0 || v != int64(int32(v)) {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return int32(v)
}

func (d *entryReader) bytes(n uint64) []byte {
	if n > uint64(len(d.b)) {
		d.fail()
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}
