package replicate

import (
	"bytes"
	"encoding/hex"
	"errors"
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
	good[0] = 2
	if _, err := decodeEntry(good); err == nil || !strings.Contains(err.Error(), "format version 2") {
		t.Error(err)
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
