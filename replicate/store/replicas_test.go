package store

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"
)

// position is where a record lies: offset, raft index, place in its entry.
type position struct {
	Offset   int64
	Index    uint64
	Position int
	Value    string
}

// positions gives the newest record of each key, tombstones left out, as latest has it.
func (r *reopenable) positions() map[string]position {
	r.t.Helper()
	r.flushAll()
	all := map[string]position{}
	err := r.view1(func(txn *badger.Txn) error {
		return r.eachKey(txn, []byte{rangeLatest, shard}, func(item *badger.Item) {
			err := item.Value(func(v []byte) error {
				st, inLog, err := decodeLatest(item.Key(), v)
				if err != nil {
					return err
				}
				record, err := r.keepLatest(txn, item.Key(), v)
				if err == nil && (inLog || st.Value != nil) {
					all[fmt.Sprintf("%d/%s", st.Partition, st.Key)] = position{st.Offset, st.Index, st.Position, string(record.Value)}
				}
				return err
			})
			if err != nil {
				r.t.Error(err)
			}
		})
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return all
}

// Replicas apply the same entries. Each flushes, thins, compacts and restarts when it likes; one falls behind and gets
// a snapshot of another. In the end, and whenever they are equally far, the newest record of each key and its position
// are the same on all, and every offset that two of them both hold has the same record.
func TestReplicasAgreeWhateverTheirHousekeeping(t *testing.T) {
	seed := seedsOf(t)[0]
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	var replicas []*reopenable
	for range 3 {
		r := &reopenable{t: t, opt: Options{Dir: t.TempDir()}}
		r.open()
		t.Cleanup(func() { r.Store.Close() })
		r.mustStore([]*raft.Log{{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(aConfiguration)}})
		if err := r.Configuration(1, 1, raft.EncodeConfiguration(aConfiguration)); err != nil {
			t.Fatal(err)
		}
		replicas = append(replicas, r)
	}
	var log [][]Record // entry i has index i+2
	now := time.Now()
	installs := 0
	for range 40 {
		for range 1 + rnd.IntN(40) {
			log = append(log, someRecords(rnd))
		}
		for _, i := range rnd.Perm(len(replicas)) {
			r := replicas[i]
			if rnd.IntN(5) > 0 {
				catchUp(t, r, log)
			}
			// Time passes differently too: what is dropped is not the same everywhere.
			housekeeping(t, r, rnd, now.Add(time.Duration(rnd.IntN(30))*time.Hour))
			if other := replicas[rnd.IntN(len(replicas))]; rnd.IntN(2) == 0 && r.State().Index < other.State().Index && other.State().Index > 2 {
				sendSnapshot(t, other, r)
				installs++
			}
		}
	}
	for _, r := range replicas {
		catchUp(t, r, log)
	}
	want := replicas[0].positions()
	for i, r := range replicas[1:] {
		if got := r.positions(); !maps.Equal(got, want) {
			t.Fatalf("replica %d has %d newest records, the first has %d, and they differ", i+1, len(got), len(want))
		}
		for p := range int32(3) {
			agree(t, replicas[0].read(p, 0), r.read(p, 0))
		}
	}
	if len(want) < 50 {
		t.Fatalf("%d keys", len(want))
	}
	t.Logf("%d entries, %d snapshots, %d keys", len(log), installs, len(want))
}

func someRecords(rnd *rand.Rand) (records []Record) {
	for range rnd.IntN(6) {
		r := Record{Partition: int32(rnd.IntN(4)) - 1, Key: fmt.Appendf(nil, "key-%d", rnd.IntN(80))}
		switch rnd.IntN(12) {
		case 0:
		case 1: // large: it lies in the log alone
			r.Value = slices.Repeat([]byte{byte(rnd.IntN(256))}, inlineBytes+rnd.IntN(100<<10))
		default:
			r.Value = fmt.Appendf(nil, "%d", rnd.Uint64())
		}
		records = append(records, r)
	}
	return records
}

func catchUp(t *testing.T, r *reopenable, log [][]Record) {
	t.Helper()
	for index := r.State().Index + 1; index < uint64(len(log))+2; index++ {
		if _, last := r.RaftLog().ends(); last < index {
			r.mustStore(entries(1, index, index, 8))
		}
		if err := r.Append(index, 1, 1, index+1, log[index-2]); err != nil {
			t.Fatal(err)
		}
	}
}

func housekeeping(t *testing.T, r *reopenable, rnd *rand.Rand, now time.Time) {
	t.Helper()
	var err error
	switch rnd.IntN(5) {
	case 0:
		r.flushAll()
	case 1:
		err = r.Flush(r.State().Index - min(r.State().Index, rnd.Uint64N(30)))
	case 2:
		err = r.compactAt(now)
	case 3: // its tail is replayed
		from := r.State().Index
		r.flushAll()
		r.reopen()
		if r.State().Index != from {
			t.Fatal("a flushed tail came back shorter")
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// sendSnapshot is raft's InstallSnapshot.
func sendSnapshot(t *testing.T, from, to *reopenable) {
	t.Helper()
	index := from.State().Index
	from.flushAll()
	sink, err := from.Snapshots().Create(1, index, 1, aConfiguration, 1, nil)
	if err == nil {
		err = sink.Close()
	}
	metas, lerr := from.Snapshots().List()
	if err := errors.Join(err, lerr); err != nil || len(metas) != 1 {
		t.Fatal(metas, err)
	}
	meta, stream, err := from.Snapshots().Open(metas[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	all := make([]byte, meta.Size)
	if _, err := io.ReadFull(stream, all); err != nil {
		t.Fatal(err)
	}
	if err := install(t, to, meta, all); err != nil {
		t.Fatal(err)
	}
	if to.State().Index != meta.Index {
		t.Fatalf("applied %d, snapshot %d", to.State().Index, meta.Index)
	}
}

// agree compares the offsets that both hold.
func agree(t *testing.T, a, b []Stored) {
	t.Helper()
	byOffset := map[int64]*Stored{}
	for i := range a {
		byOffset[a[i].Offset] = &a[i]
	}
	both := 0
	for i := range b {
		x, y := byOffset[b[i].Offset], &b[i]
		if x == nil {
			continue
		}
		both++
		if string(x.Key) != string(y.Key) || string(x.Value) != string(y.Value) || (x.Value == nil) != (y.Value == nil) || x.Index != y.Index || x.Position != y.Position {
			t.Fatalf("offset %d of partition %d: entry %d/%d %q and entry %d/%d %q", y.Offset, y.Partition, x.Index, x.Position, x.Key, y.Index, y.Position, y.Key)
		}
	}
	if both == 0 {
		t.Fatal("no offset is held by both")
	}
}
