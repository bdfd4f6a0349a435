package replicate

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// entryVersion is the first byte of every entry. A replica stops at one it does not know: skipping would part it from
// the others.
const entryVersion = 1

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
	size := 24
	for i := range e.Records {
		size += len(e.Records[i].Key) + len(e.Records[i].Value) + 8
	}
	b := append(make([]byte, 0, size), entryVersion)
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

// decodeEntry reads what encode wrote. Keys and values alias b.
func decodeEntry(b []byte) (Entry, error) {
	if len(b) == 0 {
		return Entry{}, errMalformedEntry
	}
	if b[0] != entryVersion {
		return Entry{}, fmt.Errorf("entry has format version %d, and this version knows %d: run the version that wrote it", b[0], entryVersion)
	}
	d := entryReader{b: b[1:]}
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
