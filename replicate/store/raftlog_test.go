package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"
)

func TestRaftLogGivesBackWhatWasStored(t *testing.T) {
	r := openTest(t, t.TempDir())
	at := time.Unix(1700000000, 12345)
	want := &raft.Log{Index: 1, Term: 3, Type: raft.LogConfiguration, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: at}
	r.mustStore([]*raft.Log{want, {Index: 2, Term: 3}})
	r.reopen() // out of the cache
	var got raft.Log
	if err := r.RaftLog().GetLog(1, &got); err != nil {
		t.Fatal(err)
	}
	if got.Index != 1 || got.Term != 3 || got.Type != raft.LogConfiguration || string(got.Data) != "data" || string(got.Extensions) != "ext" || !got.AppendedAt.Equal(at) {
		t.Fatalf("%+v", got)
	}
	if err := r.RaftLog().GetLog(2, &got); err != nil || len(got.Data) != 0 || got.Extensions != nil || !got.AppendedAt.IsZero() {
		t.Fatalf("%+v %v", got, err)
	}
	for _, index := range []uint64{0, 3} {
		if err := r.RaftLog().GetLog(index, &got); !errors.Is(err, raft.ErrLogNotFound) {
			t.Fatal(err)
		}
	}
}

// The log against a model: a slice of terms, changed as raft changes it, and reopened now and then.
func TestRaftLogBehavesLikeASlice(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	r := openTest(t, t.TempDir())
	r.opt.Fsync = false
	model := map[uint64]uint64{}
	var first, last uint64 // 0, 0: empty
	next := uint64(1)
	// A log that begins later is only right with an applied state, which there is none of here: either reopen or cut
	// from the front.
	reopens := rnd.IntN(2) == 0
	for step := range 300 {
		switch op := rnd.IntN(10); {
		case op < 6:
			logs := entries(uint64(step+1), next, next+rnd.Uint64N(20), rnd.IntN(300))
			r.mustStore(logs)
			for _, l := range logs {
				model[l.Index] = l.Term
			}
			if first == 0 {
				first = logs[0].Index
			}
			last = logs[len(logs)-1].Index
			next = last + 1
		case op < 8 && last > 0:
			cut := first + rnd.Uint64N(last-first+1)
			front := op == 6 && !reopens
			lo, hi := cut, last
			if front {
				lo, hi = first, cut
			}
			if err := r.RaftLog().DeleteRange(lo, hi); err != nil {
				t.Fatal(err)
			}
			for i := lo; i <= hi; i++ {
				delete(model, i)
			}
			if front {
				first = cut + 1
			} else {
				last, next = cut-1, cut
			}
			if first > last {
				first, last = 0, 0
			}
		case op == 8 && step%5 == 0 && reopens:
			r.reopen()
		}
		r.wantEnds(first, last)
	}
	for i := uint64(1); i <= next+5; i++ {
		var got raft.Log
		err := r.RaftLog().GetLog(i, &got)
		if term, ok := model[i]; ok != (err == nil) || ok && got.Term != term {
			t.Fatalf("entry %d: %+v, %v", i, got, err)
		}
	}
	if _, size := r.RaftLog().Size(); (size == 0) != (last == 0) || size < 0 {
		t.Fatalf("%d bytes in %d entries", size, len(model))
	}
}

func TestEntriesBeyondOneTransactionAreStoredInSeveral(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.mustStore(entries(1, 1, 64, 128<<10))      // 8 MiB, what raft may hand to a follower
	r.mustStore(entries(1, 65, 65, MaxLogBytes)) // the largest record
	r.wantEnds(1, 65)
	r.reopen()
	r.wantEnds(1, 65)
	if err := r.RaftLog().StoreLogs(entries(1, 66, 66, MaxLogBytes+1)); err == nil {
		t.Fatal("an entry over the limit was taken")
	}
	r.wantEnds(1, 65)
}

// A store that fails in the middle of a call leaves a tail that raft does not know of. What is stored next must end
// the log, however short it is.
func TestAFailedStoreLeavesNothingAboveTheNext(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.mustStore(entries(1, 1, 3, 10))
	tamperOpen(t, r.Store, func(txn *badger.Txn) error { // as if StoreLogs of 4 to 9 had failed after writing
		for _, l := range entries(1, 4, 9, 10) {
			if err := txn.Set(raftLogKey(l.Index), encodeLog(l)); err != nil {
				return err
			}
		}
		return nil
	})
	r.RaftLog().stale = 9
	var got raft.Log
	if err := r.RaftLog().GetLog(5, &got); !errors.Is(err, raft.ErrLogNotFound) {
		t.Fatalf("an entry nobody stored was read: %+v", got)
	}
	r.mustStore(entries(2, 4, 4, 10))
	r.reopen()
	r.wantEnds(1, 4)
	if err := r.RaftLog().GetLog(4, &got); err != nil || got.Term != 2 {
		t.Fatalf("%+v %v", got, err)
	}
}

func tamperOpen(t *testing.T, s *Store, change func(*badger.Txn) error) {
	t.Helper()
	if err := s.db.Update(change); err != nil {
		t.Fatal(err)
	}
}

func TestAStoreThatFailsHalfwayIsFatal(t *testing.T) {
	r := openTest(t, t.TempDir())
	told := make(chan error, 1)
	r.Store.opt.OnFatal = func(err error) { told <- err }
	r.mustStore(entries(1, 1, 3, 10))
	calls := 0
	// 3 MiB are three transactions. The hook sits in the first; closing the database makes the second fail.
	err := r.RaftLog().store(entries(1, 4, 27, 128<<10), func(*badger.Txn) error {
		calls++
		go r.db.Close()
		return nil
	})
	if err == nil {
		t.Fatal("no error")
	}
	if calls != 1 {
		t.Fatal(calls)
	}
	if r.Err() == nil {
		return // the first transaction failed already: nothing is on disk, and that is no more than an error
	}
	<-told
	if err := r.RaftLog().StoreLogs(entries(1, 4, 4, 10)); !errors.Is(err, r.Err()) {
		t.Fatalf("a broken store took an entry: %v", err)
	}
	if err := r.Stable().SetUint64(keyCurrentTerm, 9); err != nil {
		t.Fatalf("raft would panic: %v", err)
	}
}

func TestAFlippedBitInAnEntryIsFound(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.mustStore(entries(1, 1, 10, 100))
	r.close()
	flip := func(txn *badger.Txn) error {
		value, err := getFrom(txn, raftLogKey(4))
		if err != nil {
			return err
		}
		value[50] ^= 1
		return txn.Set(raftLogKey(4), value)
	}
	tamper(t, r.opt.Dir, flip)
	wantDamaged(t, r.openFails(), "raft log entry 4: checksum mismatch")
}

func TestAHoleInTheLogIsFound(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.mustStore(entries(1, 1, 10, 100))
	r.close()
	tamper(t, r.opt.Dir, func(txn *badger.Txn) error { return txn.Delete(raftLogKey(4)) })
	wantDamaged(t, r.openFails(), "hole between 3 and 5")
}

// Badger ends its write-ahead log at the first record that does not fit its checksum, and opens without a word. The
// process was killed, so the entries are in the log of the memtable alone.
func TestAFlippedBitThatMakesBadgerDropTheTailIsFound(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	r.mustStore(entries(1, 1, 500, 100))
	r.RaftLog().writeMark()
	copied := t.TempDir() // what a kill leaves: no Close
	copyDir(t, dir, copied)
	mem, _ := filepath.Glob(filepath.Join(copied, databaseName, "*.mem"))
	if len(mem) != 1 {
		t.Fatalf("%v", mem)
	}
	b, err := os.ReadFile(mem[0])
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, raftLogKey(100))
	b[at+40] ^= 1
	if err := os.WriteFile(mem[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	damaged := &reopenable{t: t, opt: Options{Dir: copied, Fsync: true}}
	wantDamaged(t, damaged.openFails(), "00001.mem ends at byte")
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(filepath.Join(to, databaseName), os.DirFS(filepath.Join(from, databaseName))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{watermarkName, FormatName} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Truncating a conflicting suffix brings the log below what was once acknowledged to a leader. A crash in the middle
// must not look like damage.
func TestASuffixMayBeDeleted(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	r.mustStore(entries(1, 1, 5000, 10))
	r.RaftLog().writeMark()
	if err := r.RaftLog().DeleteRange(1200, 5000); err != nil {
		t.Fatal(err)
	}
	r.wantEnds(1, 1199)
	copied := t.TempDir()
	copyDir(t, dir, copied)
	openTest(t, copied).wantEnds(1, 1199)
	r.mustStore(entries(2, 1200, 1201, 10))
	r.reopen()
	r.wantEnds(1, 1201)
}

func TestTheWatermarkFollowsWithinASecond(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		r := openTest(t, dir)
		r.mustStore(entries(1, 1, 42, 10))
		time.Sleep(keepEvery)
		synctest.Wait()
		w, err := openWatermark(filepath.Join(dir, watermarkName))
		if err != nil || w.index != 42 {
			t.Fatal(w, err)
		}
		w.close()
		r.close()
	})
}

func TestNoSpaceFailsAppendsCleanlyAndStableWritesWait(t *testing.T) {
	var free atomic.Int64
	free.Store(300 << 20) // too little for a ballast
	r := &reopenable{t: t, opt: Options{Dir: t.TempDir(), MinFree: 64 << 20}}
	r.opt.Space = func(string) (int64, int64, error) { return free.Load(), 10 << 30, nil }
	r.open()
	t.Cleanup(func() { r.Store.Close() })
	r.mustStore(entries(1, 1, 3, 10))
	free.Store(63 << 20)
	for range 2 {
		if err := r.RaftLog().StoreLogs(entries(1, 4, 4, 10)); !errors.Is(err, ErrNoSpace) {
			t.Fatal(err)
		}
	}
	noop := &raft.Log{Index: 4, Term: 2, Type: raft.LogNoop}
	if err := r.RaftLog().StoreLogs(append([]*raft.Log{noop}, entries(2, 5, 5, 10)...)); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	if !r.Full() {
		t.Fatal("room")
	}
	r.mustStore([]*raft.Log{noop}) // what a leader needs
	if err := r.Local().Put("x", []byte("y")); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	if err := r.Stable().SetUint64(keyCurrentTerm, 2); err != nil {
		t.Fatal(err) // raft's few bytes still go in
	}
	free.Store(1 << 20) // but not on a full disk: they wait
	if err := r.RaftLog().StoreLog(&raft.Log{Index: 5, Term: 2, Type: raft.LogNoop}); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() { wrote <- r.Stable().SetUint64(keyCurrentTerm, 3) }()
	select {
	case err := <-wrote:
		t.Fatal("written to a full disk", err)
	case <-time.After(50 * time.Millisecond):
	}
	free.Store(300 << 20)
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	free.Store(300 << 20)
	if r.Full() {
		t.Fatal("no room")
	}
	r.mustStore(entries(2, 5, 5, 10))
	r.wantEnds(1, 5)
}

func TestNothingWaitsForSpaceAcrossARelease(t *testing.T) {
	var free atomic.Int64
	free.Store(300 << 20)
	r := &reopenable{t: t, opt: Options{Dir: t.TempDir(), MinFree: 64 << 20}}
	r.opt.Space = func(string) (int64, int64, error) { return free.Load(), 10 << 30, nil }
	r.open()
	free.Store(1 << 20)
	wrote, appended := make(chan error, 1), make(chan error, 1)
	go func() { wrote <- r.Stable().SetUint64(keyCurrentTerm, 3) }()
	go func() {
		value := make([]byte, 900<<10)
		for index := uint64(1); ; index++ {
			if err := r.Append(index, 1, 1, index+1, []Record{{Partition: 0, Key: []byte("k"), Value: value}}); err != nil {
				appended <- err
				return
			}
		}
	}()
	time.Sleep(50 * time.Millisecond) // both wait, or will
	r.Release()
	if err := <-appended; !errors.Is(err, ErrClosing) {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Fatal("raft would panic", err)
	}
	free.Store(300 << 20)
	if err := r.RaftLog().StoreLogs(entries(3, 1, 1, 10)); !errors.Is(err, ErrClosing) {
		t.Fatal("an entry of a term that was not written was taken", err)
	}
	r.close()
	r.open()
	r.close()
}

func TestABallastIsGivenUpToStartOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	free, total := int64(40<<20), int64(10<<30)
	g := newGuard(Options{Dir: dir, MinFree: 64 << 20}, nopLogger())
	g.space = func(string) (int64, int64, error) {
		if _, err := os.Stat(g.ballast); err == nil {
			return free - ballastBytes, total, nil
		}
		return free, total, nil
	}
	free = 10 << 30
	g.inflate()
	if info, err := os.Stat(g.ballast); err != nil || info.Size() != ballastBytes {
		t.Fatal(info, err)
	}
	free = 40 << 20 // 8 MiB beside the ballast
	if err := g.admit(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(g.ballast); err == nil {
		t.Fatal("the ballast is still there")
	}
	g.inflate()
	if _, err := os.Stat(g.ballast); err == nil {
		t.Fatal("a ballast on a filesystem without room")
	}
	free = 5 << 20
	if err := g.admit(); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	if total = 64 << 20; g.floor(total) != 24<<20 {
		t.Fatal("a small filesystem needs a small floor", g.floor(total))
	}
}
