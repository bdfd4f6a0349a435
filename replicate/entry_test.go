package replicate

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// The bytes of docs/formats.md. They never change: raft's logs in the field are full of them.
func TestEntryBytes(t *testing.T) {
	e := Entry{Term: 300, Sequence: 2, Records: []Record{
		{Partition: 7, Key: []byte("key"), Value: []byte("value")},
		{Partition: -1, Key: []byte("k"), Value: []byte{}},
		{Partition: 49, Key: []byte("gone")},
	}}
	const want = "01ac02020" + "30e036b65790676616c7565" + "01016b01" + "6204676f6e6500"
	b := e.encode()
	if got := hex.EncodeToString(b); got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	back, err := decodeEntry(b)
	if err != nil || !reflect.DeepEqual(back, e) {
		t.Fatalf("%+v %v", back, err)
	}
}

func TestEntriesThatAreNotOursAreRefused(t *testing.T) {
	good := (&Entry{Term: 1, Sequence: 1, Records: []Record{record(0, "k", "v")}}).encode()
	for i := range good {
		if _, err := decodeEntry(good[:i]); err == nil {
			t.Errorf("an entry cut at %d was taken", i)
		}
	}
	if _, err := decodeEntry(append(bytes.Clone(good), 0)); err == nil {
		t.Error("an entry with a rest was taken")
	}
	good[0] = 3
	if _, err := decodeEntry(good); err == nil || !strings.Contains(err.Error(), "format version 3") {
		t.Error(err)
	}
	large := repetitive().encode()
	for i := range large {
		if _, err := decodeEntry(large[:i]); err == nil {
			t.Errorf("a compressed entry cut at %d was taken", i)
		}
	}
	huge := binary.AppendUvarint([]byte{entryCompressed}, maxPlain+1)
	if _, err := decodeEntry(append(huge, 0, 0)); !errors.Is(err, errMalformedEntry) {
		t.Error(err)
	}
}

func repetitive() *Entry {
	e := &Entry{Term: 7, Sequence: 9}
	for i := range 10 {
		e.Records = append(e.Records, record(3, fmt.Sprintf("a group and its topic, partition %d", i), fmt.Sprintf("an offset and its metadata, %d", i)))
	}
	return e
}

func TestEntriesThatRepeatThemselvesAreCompressed(t *testing.T) {
	var c entryEncoder
	for range 2 { // buffers are used again
		e := repetitive()
		plain := e.appendPlain(nil)
		b := c.encode(e)
		if b[0] != entryCompressed || len(b) > len(plain)/3 || cap(b) > 2*len(b) {
			t.Fatalf("version %d, %d bytes of %d, in %d", b[0], len(b), len(plain), cap(b))
		}
		if back, err := decodeEntry(b); err != nil || !reflect.DeepEqual(&back, e) {
			t.Fatalf("%+v %v", back, err)
		}
		noise := make([]byte, 4*EntryBytes)
		_, _ = rand.Read(noise)
		e = &Entry{Term: 7, Sequence: 10, Records: []Record{record(0, "k", string(noise))}}
		if b = c.encode(e); b[0] != entryPlain {
			t.Fatal("noise was compressed")
		}
		if back, err := decodeEntry(b); err != nil || !reflect.DeepEqual(&back, e) {
			t.Fatal(err)
		}
	}
}

func TestEntryLimits(t *testing.T) {
	many := make([]Record, MaxRecords+1)
	half := record(0, "k", string(make([]byte, EntryBytes)))
	for name, records := range map[string][]Record{
		"records": many,
		"key":     {{Key: make([]byte, MaxKeyBytes+1)}},
		"record":  {record(0, "", string(make([]byte, MaxRecordBytes+1)))},
		"sum":     {half, half},
	} {
		if err := (&Entry{Records: records}).check(); !errors.Is(err, ErrEntryTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, records := range [][]Record{nil, many[:MaxRecords], {record(0, "k", string(make([]byte, MaxRecordBytes-1)))}, {half, record(0, "a", "b")}} {
		if err := (&Entry{Records: records}).check(); err != nil {
			t.Error(err)
		}
	}
}

func FuzzDecodeEntry(f *testing.F) {
	f.Add((&Entry{Term: 1, Sequence: 1, Records: []Record{record(-1, "k", "v"), {Partition: 3, Key: []byte("gone")}}}).encode())
	f.Add([]byte{1, 1, 1, 0})
	f.Add(repetitive().encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEntry(b)
		if err != nil {
			return
		}
		again, err := decodeEntry(e.encode())
		if err != nil || !reflect.DeepEqual(again, e) {
			t.Fatalf("%+v is %+v: %v", e, again, err)
		}
	})
}
