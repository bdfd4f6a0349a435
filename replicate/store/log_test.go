package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"
)

func nopLogger() *slog.Logger { return slog.New(slog.DiscardHandler) }

func rec(partition int32, key, value string) Record {
	return Record{Partition: partition, Key: []byte(key), Value: []byte(value)}
}

func tombstone(partition int32, key string) Record {
	return Record{Partition: partition, Key: []byte(key)}
}

// apply appends an entry the way the fsm does, with raft's log under it.
func (r *reopenable) apply(records ...Record) {
	r.t.Helper()
	index := r.State().Index + 1
	last, _ := r.RaftLog().LastIndex()
	if last < index {
		r.mustStore(entries(1, last+1, index, 8))
	}
	if err := r.Append(index, 1, 1, index+1, records); err != nil {
		r.t.Fatal(err)
	}
}

func (r *reopenable) flushAll() {
	r.t.Helper()
	if err := r.Flush(allOfTail); err != nil {
		r.t.Fatal(err)
	}
}

func (r *reopenable) latest() map[string]string {
	r.t.Helper()
	m := map[string]string{}
	if err := r.Latest(func(rec Record) error {
		m[fmt.Sprintf("%d/%s", rec.Partition, rec.Key)] = string(rec.Value)
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	return m
}

func (r *reopenable) read(partition int32, from int64) []Stored {
	r.t.Helper()
	var all []Stored
	if err := r.Read(partition, from, func(s Stored) bool {
		all = append(all, s)
		return true
	}); err != nil {
		r.t.Fatal(err)
	}
	return all
}

func offsets(all []Stored) []int64 {
	var o []int64
	for _, s := range all {
		o = append(o, s.Offset)
	}
	return o
}

// The log against a model through random entries, flushes, reopenings and compactions: each record keeps its offset
// and place, and the newest of each key is what Latest gives.
func TestTheCompactedLogBehavesLikeItsModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	r := openTest(t, t.TempDir())
	r.opt.Fsync = false
	model := map[int32][]Stored{}
	newest := map[string]string{}
	thinned := false // a flush may have left out what it superseded
	for step := range 400 {
		var records []Record
		for range rnd.IntN(30) {
			p := int32(rnd.IntN(5)) - 1
			rec := Record{Partition: p, Key: fmt.Appendf(nil, "key-%d", rnd.IntN(60))}
			if rnd.IntN(5) > 0 {
				size := rnd.IntN(100)
				if rnd.IntN(200) == 0 {
					size = inlineBytes + rnd.IntN(inlineBytes)
				}
				rec.Value = bytes.Repeat([]byte{byte('a' + step%26)}, size)
			}
			records = append(records, rec)
		}
		r.apply(records...)
		r.mu.Lock()
		thinned = thinned || r.tailBytes >= thinFrom
		r.mu.Unlock()
		for i, rec := range records {
			id := fmt.Sprintf("%d/%s", rec.Partition, rec.Key)
			if delete(newest, id); rec.Value != nil {
				newest[id] = string(rec.Value)
			}
			if rec.Partition >= 0 {
				model[rec.Partition] = append(model[rec.Partition], Stored{Record: rec, Offset: int64(len(model[rec.Partition])), Index: r.State().Index, Position: i})
			}
		}
		switch rnd.IntN(40) {
		case 0:
			r.flushAll()
		case 1:
			r.reopen()
		case 2:
			if err := r.Compact(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 2 {
		if got := r.latest(); !maps.Equal(got, newest) {
			t.Fatalf("latest: %d keys, want %d", len(got), len(newest))
		}
		for p, want := range model {
			from := rnd.Int64N(int64(len(want)))
			got := map[int64]Stored{}
			for _, s := range r.read(p, from) {
				got[s.Offset] = s
			}
			superseded := map[string]bool{}
			for _, b := range slices.Backward(want[from:]) {
				a, ok := got[b.Offset]
				delete(got, b.Offset)
				same := a.Index == b.Index && a.Position == b.Position && bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) && (a.Value == nil) == (b.Value == nil)
				if missing := !ok && thinned && superseded[string(b.Key)]; !missing && !same {
					t.Fatalf("partition %d: offset %d is %+v, want %+v", p, b.Offset, a, b)
				}
				superseded[string(b.Key)] = true
			}
			if len(got) != 0 {
				t.Fatalf("partition %d from %d has %d records too many", p, from, len(got))
			}
		}
		r.reopen()
	}
}

func TestTheTailIsFlushedEveryFiveSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := openTest(t, "")
		state := func() (flushed uint64, tail int) {
			synctest.Wait()
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.flushed.Index, len(r.tail)
		}
		r.apply(rec(0, "a", "1"))
		if flushed, tail := state(); flushed != 0 || tail != 1 {
			t.Fatal("flushed at once")
		}
		time.Sleep(flushEvery + keepEvery)
		if flushed, tail := state(); flushed != 1 || tail != 0 {
			t.Fatal(flushed, tail)
		}
		r.close()
	})
}

func TestAnAppendWaitsWhileTheTailIsFull(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.opt.Fsync = false
	value := string(make([]byte, 100<<10))
	for i := range 400 { // 40 MiB through a tail of 16
		r.apply(rec(int32(i%50), fmt.Sprint(i%70), value))
		r.mu.Lock()
		if r.tailBytes > tailMaxBytes+200<<10 {
			t.Fatalf("the tail holds %d bytes", r.tailBytes)
		}
		r.mu.Unlock()
	}
	r.reopen()
	if n := len(r.latest()); n != 350 {
		t.Fatal(n)
	}
}

func TestTheLargestRecordAndTheLargestEntryFitATransaction(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.apply(rec(0, "big", string(make([]byte, 900<<10))))
	r.apply(rec(-1, "big", string(make([]byte, 900<<10))))
	var many []Record
	for i := range MaxEntryRecords {
		many = append(many, rec(int32(i%50), fmt.Sprintf("%08d", i), "12345678"))
	}
	r.apply(many...)
	r.apply(many...)
	r.flushAll()
	inline := string(make([]byte, inlineBytes)) // in a block and in latest
	for i := range 100 {
		r.apply(rec(1, fmt.Sprint("inline", i%7), inline))
	}
	r.flushAll()
	r.reopen()
	m := r.latest()
	if len(m) != MaxEntryRecords+2+7 || len(m["0/big"]) != 900<<10 || len(m["-1/big"]) != 900<<10 {
		t.Fatal(len(m))
	}
}

func TestCompactionKeepsTheNewestPerKeyAndTheOffsets(t *testing.T) {
	now := time.Now()
	r := openTest(t, "")
	for i := range 1000 {
		r.apply(rec(0, fmt.Sprint(i%7), fmt.Sprint(i)), rec(1, "only", fmt.Sprint(i)))
		if i%100 == 0 {
			r.flushAll()
		}
	}
	r.flushAll()
	if err := r.compactAt(now); err != nil {
		t.Fatal(err)
	}
	if n := len(r.read(0, 0)); n != 1000 {
		t.Fatalf("%d records left: superseded ones stay for %v", n, HistoryAge)
	}
	now = now.Add(HistoryAge + time.Minute)
	if err := r.compactAt(now); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(offsets(r.read(0, 0))); got != "[993 994 995 996 997 998 999]" {
		t.Fatal(got)
	}
	if got := fmt.Sprint(offsets(r.read(0, 997))); got != "[997 998 999]" {
		t.Fatal(got)
	}
	if all := r.read(1, 5); len(all) != 1 || all[0].Offset != 999 || all[0].Index != 1000 || all[0].Position != 1 || string(all[0].Value) != "999" {
		t.Fatalf("%+v", all)
	}
	r.apply(rec(0, "x", "y"))
	if all := r.read(0, 1000); len(all) != 1 || all[0].Offset != 1000 {
		t.Fatalf("%+v", all)
	}
}

func TestAFlushOfALargeTailLeavesOutWhatItSupersedes(t *testing.T) {
	r := openTest(t, t.TempDir())
	const keys, rounds = 10, 20
	value := func(round, key int) string { return fmt.Sprintf("%0*d", thinFrom/keys/(rounds-1), round*keys+key) }
	for round := range rounds {
		var records []Record
		for key := range keys {
			records = append(records, rec(int32(key%2), fmt.Sprint("k", key), value(round, key)))
		}
		r.apply(append(records, rec(-1, "private", fmt.Sprint(round)))...)
	}
	r.apply(tombstone(0, "k0"), tombstone(-1, "private"))
	r.flushAll()
	for range 2 {
		want := map[string]string{}
		for key := 1; key < keys; key++ {
			want[fmt.Sprintf("%d/k%d", key%2, key)] = value(rounds-1, key)
		}
		if got := r.latest(); !maps.Equal(got, want) {
			t.Fatalf("latest has %d keys, want %d: %.200v", len(got), len(want), got)
		}
		kept := 0
		for p := range int32(2) {
			newest := map[string]Stored{}
			for _, s := range r.read(p, 0) {
				// Where a record was put does not depend on what was left out.
				if round := s.Offset / (keys / 2); s.Index != uint64(round)+1 {
					t.Fatalf("offset %d of partition %d is of entry %d", s.Offset, p, s.Index)
				}
				newest[string(s.Key)] = s
				kept++
			}
			if len(newest) != keys/2 {
				t.Fatalf("partition %d has %d keys", p, len(newest))
			}
			for key, s := range newest {
				if string(s.Value) != want[fmt.Sprintf("%d/%s", p, key)] {
					t.Fatalf("partition %d: the newest record of %s is another in the log", p, key)
				}
			}
		}
		if kept >= keys*rounds {
			t.Fatalf("%d records in the log, as many as were appended", kept)
		}
		if next := r.State().Next; next[0] != keys/2*rounds+1 || next[1] != keys/2*rounds {
			t.Fatal(next)
		}
		r.reopen()
	}
}

func TestTombstonesStayADayAndTheLastRecordForEver(t *testing.T) {
	now := time.Now()
	r := openTest(t, "")
	r.apply(rec(0, "a", "1"), rec(0, "b", "1"), rec(-1, "s", "1"), rec(1, "c", "1"))
	r.apply(tombstone(0, "a"), tombstone(-1, "s"), rec(0, "z", "1"), tombstone(1, "c"))
	r.flushAll()
	now = now.Add(TombstoneAge - time.Minute)
	if err := r.compactAt(now); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(offsets(r.read(0, 0)), offsets(r.read(1, 0))); got != "[1 2 3] [1]" {
		t.Fatal(got)
	}
	now = now.Add(3 * time.Minute)
	if err := r.compactAt(now); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(offsets(r.read(0, 0)), offsets(r.read(1, 0))); got != "[1 3] [1]" {
		t.Fatal(got)
	}
	keys := 0
	err := r.db.View(func(txn *badger.Txn) error {
		return r.eachKey(txn, []byte{rangeLatest, shard}, func(*badger.Item) { keys++ })
	})
	if err != nil || keys != 3 {
		t.Fatalf("%d keys are left of b, z and c: %v", keys, err)
	}
	if got := fmt.Sprint(r.latest()); got != "map[0/b:1 0/z:1]" {
		t.Fatal(got)
	}
}

func TestCompactionBoundsTheHistory(t *testing.T) {
	r := openTest(t, "")
	value := string(make([]byte, 60<<10))
	for i := range 2 * HistoryBytes / len(value) { // all of it young
		r.apply(rec(int32(i%3), "k", value))
	}
	r.flushAll()
	if err := r.Compact(); err != nil {
		t.Fatal(err)
	}
	left := 0
	for p := range int32(3) {
		left += len(r.read(p, 0))
	}
	if kept := (left - 3) * len(value); left < 3 || kept > HistoryBytes {
		t.Fatalf("%d bytes of history are left, in %d records", kept, left)
	}
}

// TestFlushesAreAllOrNothing takes the directory as a kill would leave it in the middle of many flushes.
func TestFlushesAreAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	for i := range 50 {
		r.apply(rec(0, "a", fmt.Sprint(i)), rec(0, "b", fmt.Sprint(i)))
	}
	r.flushAll()
	r.apply(rec(0, "a", "lost"), rec(0, "b", "lost"))
	copied := t.TempDir()
	copyDir(t, dir, copied)
	killed := openTest(t, copied)
	if got := fmt.Sprint(killed.latest()); got != "map[0/a:49 0/b:49]" {
		t.Fatal(got)
	}
	if s := killed.State(); s.Index != 50 || s.Next[0] != 100 || s.NextSequence != 51 {
		t.Fatalf("%+v", s)
	}
	killed.apply(rec(0, "a", "again"), rec(0, "b", "again")) // the replay
	if all := killed.read(0, 100); fmt.Sprint(offsets(all)) != "[100 101]" || string(all[0].Value) != "again" {
		t.Fatalf("%+v", all)
	}
}

var aConfiguration = raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a"}}}

func filled(t *testing.T, dir string) *reopenable {
	r := openTest(t, dir)
	r.mustStore(entries(1, 1, 1, 8))
	if err := r.Configuration(1, 1, raft.EncodeConfiguration(aConfiguration)); err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
		r.apply(rec(int32(i%50), fmt.Sprint("key", i%1000), fmt.Sprint(i)), rec(-1, fmt.Sprint("s", i%9), fmt.Sprint(i)))
	}
	r.apply(tombstone(3, "key3"), rec(4, "large", string(make([]byte, 500<<10))))
	return r
}

// snapshotOf takes a snapshot as raft does and reads all of it.
func snapshotOf(t *testing.T, r *reopenable, index uint64) (*raft.SnapshotMeta, []byte) {
	t.Helper()
	r.flushAll()
	sink, err := r.Snapshots().Create(1, index, 1, aConfiguration, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sink.Close(), sink.Close()); err != nil {
		t.Fatal(err)
	}
	metas, err := r.Snapshots().List()
	if err != nil || len(metas) != 1 {
		t.Fatal(metas, err)
	}
	r.apply(rec(0, "later", "1")) // after the meta was read; the stream and its own meta may have it or not
	r.flushAll()
	meta, stream, err := r.Snapshots().Open(metas[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	r.apply(rec(0, "too late", "1"))
	r.flushAll()
	all, err := io.ReadAll(stream)
	if err != nil || int64(len(all)) != meta.Size {
		t.Fatalf("%d bytes, meta says %d: %v", len(all), meta.Size, err)
	}
	return meta, all
}

func install(t *testing.T, r *reopenable, meta *raft.SnapshotMeta, stream []byte) error {
	t.Helper()
	sink, err := r.Snapshots().Create(1, meta.Index, meta.Term, meta.Configuration, meta.ConfigurationIndex, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(sink, bytes.NewReader(stream)); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		return err
	}
	_, rc, err := r.Snapshots().Open(sink.ID())
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	return r.Restore(rc)
}

func TestASnapshotMakesAFreshStoreTheSame(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		a := filled(t, t.TempDir())
		taken := a.State().Index + 3 // barriers in between
		a.mustStore(entries(1, a.State().Index+1, taken, 0))
		a.Store.current.Index = taken
		meta, stream := snapshotOf(t, a, taken)
		if meta.Index != taken+1 || meta.Term != 1 || meta.ConfigurationIndex != 1 || len(meta.Configuration.Servers) != 1 {
			t.Fatalf("%+v", meta)
		}
		want := a.latest()
		delete(want, "0/too late")

		b := openTest(t, dir)
		b.mustStore(entries(1, 1, 20, 10)) // it had begun a log of its own
		b.RaftLog().writeMark()
		b.apply(rec(7, "stale", "1"))
		b.flushAll()
		if err := install(t, b, meta, stream); err != nil {
			t.Fatal(err)
		}
		check := func() {
			t.Helper()
			if got := b.latest(); !maps.Equal(got, want) {
				t.Fatalf("%d keys, want %d", len(got), len(want))
			}
			for p := range int32(50) {
				if got, all := b.read(p, 0), a.read(p, 0); fmt.Sprint(got) != fmt.Sprint(all[:len(got)]) || len(all)-len(got) > 1 {
					t.Fatalf("partition %d differs", p)
				}
			}
			if s := b.State(); s.Index != meta.Index || s.Installed != meta.Index || s.EntryTerm != 1 || s.NextSequence != meta.Index+1 {
				t.Fatalf("%+v", s)
			}
		}
		check()
		b.wantEnds(0, 0)
		b.mustStore(entries(1, meta.Index+1, meta.Index+2, 10)) // raft goes on above the gap
		if dir == "" {
			continue
		}
		b.reopen()
		check()
		b.wantEnds(meta.Index+1, meta.Index+2)
	}
}

func TestADamagedSnapshotIsRefused(t *testing.T) {
	a := filled(t, "")
	meta, stream := snapshotOf(t, a, a.State().Index)
	bad := map[string][]byte{
		"a byte short": stream[:len(stream)-1], "half": stream[:len(stream)/2], "nothing but a header": stream[:300],
		"a byte too long": append(bytes.Clone(stream), 0), "something else": []byte("something else entirely"),
	}
	for range 20 {
		at, bit := rand.IntN(len(stream)), rand.IntN(8)
		flipped := bytes.Clone(stream)
		flipped[at] ^= 1 << bit
		bad[fmt.Sprintf("bit %d of byte %d", bit, at)] = flipped
	}
	for _, dir := range []string{"", t.TempDir()} {
		b := openTest(t, dir)
		b.apply(rec(7, "old", "1"))
		b.flushAll()
		b.apply(rec(7, "unflushed", "1"))
		want, state := b.latest(), b.State()
		for name, stream := range bad {
			if err := install(t, b, meta, stream); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
				t.Fatalf("%s: %v", name, err)
			}
			if !maps.Equal(b.latest(), want) || fmt.Sprint(b.State()) != fmt.Sprint(state) {
				t.Fatalf("%s changed something", name)
			}
		}
		if dir != "" {
			b.reopen()
		}
		if err := install(t, b, meta, stream); err != nil {
			t.Fatal(err)
		}
	}
}

func TestARestoreThatWasCutShortIsFinishedAtTheNextOpen(t *testing.T) {
	a := filled(t, "")
	meta, stream := snapshotOf(t, a, a.State().Index)
	want := a.latest()
	delete(want, "0/too late")

	b := openTest(t, t.TempDir())
	b.apply(rec(7, "stale", "1"))
	sink, err := b.Snapshots().Create(1, meta.Index, meta.Term, meta.Configuration, meta.ConfigurationIndex, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Write(stream); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	cut := io.MultiReader(bytes.NewReader(stream[:len(stream)*2/3]), failing{})
	if err := b.Restore(cut); err == nil {
		t.Fatal("no error")
	}
	dir := t.TempDir() // the process is killed here
	copyDir(t, b.opt.Dir, dir)
	copyFile(t, b.opt.Dir, dir, incomingName)
	c := openTest(t, dir)
	if got := c.latest(); !maps.Equal(got, want) {
		t.Fatalf("%d keys, want %d", len(got), len(want))
	}
	c.reopen()
	if s := c.State(); s.Index != meta.Index {
		t.Fatalf("%+v", s)
	}
	dir = t.TempDir() // and had it lost the spooled stream
	copyDir(t, b.opt.Dir, dir)
	wantDamaged(t, (&reopenable{t: t, opt: Options{Dir: dir}}).openFails(), "only partly restored")
}

func copyFile(t *testing.T, from, to, name string) {
	t.Helper()
	b, err := os.ReadFile(from + "/" + name)
	if err == nil {
		err = os.WriteFile(to+"/"+name, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("cut") }
