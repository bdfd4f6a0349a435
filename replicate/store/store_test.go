package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/hashicorp/raft"
)

// reopenable is a store that a test closes and opens again.
type reopenable struct {
	*Store
	t   *testing.T
	opt Options
}

func openTest(t *testing.T, dir string) *reopenable {
	t.Helper()
	r := &reopenable{t: t, opt: Options{Dir: dir, Fsync: true}}
	r.open()
	t.Cleanup(func() {
		if r.Store != nil {
			r.Store.Close()
		}
	})
	return r
}

func (r *reopenable) open() {
	r.t.Helper()
	s, err := Open(r.opt)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Store = s
}

func (r *reopenable) close() {
	r.t.Helper()
	if err := r.Store.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.Store = nil
}

func (r *reopenable) reopen() {
	r.t.Helper()
	r.close()
	r.open()
}

// openFails gives Open's error.
func (r *reopenable) openFails() error {
	r.t.Helper()
	s, err := Open(r.opt)
	if err == nil {
		s.Close()
		r.t.Fatal("Open succeeded")
	}
	return err
}

func entries(term uint64, from, to uint64, size int) []*raft.Log {
	var logs []*raft.Log
	for i := from; i <= to; i++ {
		logs = append(logs, &raft.Log{Index: i, Term: term, Data: bytes.Repeat([]byte{byte(i)}, size)})
	}
	return logs
}

func (r *reopenable) mustStore(logs []*raft.Log) {
	r.t.Helper()
	if err := r.RaftLog().StoreLogs(logs); err != nil {
		r.t.Fatal(err)
	}
}

func (r *reopenable) wantEnds(first, last uint64) {
	r.t.Helper()
	f, _ := r.RaftLog().FirstIndex()
	l, _ := r.RaftLog().LastIndex()
	if f != first || l != last {
		r.t.Fatalf("raft's log goes from %d to %d, want %d to %d", f, l, first, last)
	}
}

// tamper changes the database behind the store's back.
func tamper(t *testing.T, dir string, change func(*badger.Txn) error) {
	t.Helper()
	db, err := badger.Open(badger.DefaultOptions(filepath.Join(dir, databaseName)).WithLogger(nil).WithCompression(options.None).
		WithMemTableSize(memTableBytes).WithValueLogFileSize(1 << 20))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(change), db.Close()); err != nil {
		t.Fatal(err)
	}
}

func wantDamaged(t *testing.T, err error, text string) {
	t.Helper()
	var damaged *DamagedError
	if !errors.As(err, &damaged) || !strings.Contains(err.Error(), text) {
		t.Fatalf("%v: not a DamagedError with %q", err, text)
	}
}

func TestADirectoryInUseIsRefused(t *testing.T) {
	r := openTest(t, t.TempDir())
	err := r.openFails()
	var locked *LockedError
	if !errors.As(err, &locked) || locked.Holder != fmt.Sprint(os.Getpid()) || !strings.Contains(err.Error(), r.opt.Dir) {
		t.Fatal(err)
	}
	r.close()
	r.open() // a lock file that stayed behind is harmless
}

func TestADirectoryOfANewerVersionIsRefusedUntouched(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.close()
	name := filepath.Join(r.opt.Dir, FormatName)
	if err := os.WriteFile(name, []byte("offset-sidecar store 2\nmore that we do not know\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := r.openFails()
	var newer *NewerFormatError
	if !errors.As(err, &newer) {
		// The number is on the first line; what a newer version adds below it is its own.
		t.Fatal(err)
	}
	if newer.Version != 2 || !strings.Contains(err.Error(), r.opt.Dir) {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.openFails(); !strings.Contains(err.Error(), "cannot be made out") {
		t.Fatal(err)
	}
}

func TestADirectoryThatCannotBeWrittenIsNamed(t *testing.T) {
	// Root may write anything; a file in the directory's place, and a filesystem that says so, it cannot.
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := &reopenable{t: t, opt: Options{Dir: filepath.Join(file, "data")}}
	if err := r.openFails(); !strings.Contains(err.Error(), r.opt.Dir) || !strings.Contains(err.Error(), "choose another data directory") {
		t.Fatal(err)
	}
	r.opt.Dir = "/proc/offset-sidecar"
	if err := r.openFails(); !strings.Contains(err.Error(), r.opt.Dir) {
		t.Fatal(err)
	}
	if os.Getuid() != 0 {
		r.opt.Dir = t.TempDir()
		if err := os.Chmod(r.opt.Dir, 0o500); err != nil {
			t.Fatal(err)
		}
		if err := r.openFails(); !strings.Contains(err.Error(), "cannot be written") {
			t.Fatal(err)
		}
	}
}

func TestTheNodeIdIsMintedOnceAndNewWithANewDatabase(t *testing.T) {
	r := openTest(t, t.TempDir())
	id := r.ID()
	if len(id) != 36 {
		t.Fatalf("id %q", id)
	}
	r.reopen()
	if r.ID() != id {
		t.Fatal("the id has changed")
	}
	r.close()
	for _, name := range []string{databaseName, watermarkName} {
		if err := os.RemoveAll(filepath.Join(r.opt.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	if r.ID() == id {
		t.Fatal("a node without its log kept its id: it could vote twice")
	}
}

func TestLocalKeysAreKeptAndStayOutOfSnapshots(t *testing.T) {
	r := openTest(t, t.TempDir())
	if v, err := r.Local().Get("ports"); err != nil || v != nil {
		t.Fatal(v, err)
	}
	if err := r.Local().Put("ports", []byte("19093")); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	if v, err := r.Local().Get("ports"); err != nil || string(v) != "19093" {
		t.Fatal(v, err)
	}
	if err := r.Local().Put("ports", nil); err != nil {
		t.Fatal(err)
	}
	if v, err := r.Local().Get("ports"); err != nil || v != nil {
		t.Fatal(v, err)
	}
}

func TestStableStoreIsRaftsOwn(t *testing.T) {
	r := openTest(t, t.TempDir())
	st := r.Stable()
	if v, err := st.Get([]byte("x")); err != nil || v == nil || len(v) != 0 {
		t.Fatal(v, err)
	}
	if err := errors.Join(st.SetUint64(keyCurrentTerm, 7), st.Set([]byte("x"), []byte("y"))); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	if v, err := r.Stable().GetUint64(keyCurrentTerm); err != nil || v != 7 {
		t.Fatal(v, err)
	}
	if v, err := r.Stable().Get([]byte("x")); err != nil || string(v) != "y" {
		t.Fatal(v, err)
	}
}

func TestBootstrapIsDoneOnce(t *testing.T) {
	r := openTest(t, t.TempDir())
	c := raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a"}}}
	if err := r.Bootstrap(c); err != nil {
		t.Fatal(err)
	}
	if fresh, err := r.Fresh(); err != nil || fresh {
		t.Fatal(fresh, err)
	}
	if err := r.Bootstrap(c); err == nil {
		t.Fatal("bootstrapped twice")
	}
	if term, err := r.Stable().GetUint64(keyCurrentTerm); err != nil || term != 1 {
		t.Fatal(term, err)
	}
	r.wantEnds(1, 1)
}

func TestAVanishedDatabaseIsDamage(t *testing.T) {
	r := openTest(t, t.TempDir())
	r.mustStore(entries(1, 1, 10, 10))
	r.close()
	if err := os.RemoveAll(filepath.Join(r.opt.Dir, databaseName)); err != nil {
		t.Fatal(err)
	}
	err := r.openFails()
	wantDamaged(t, err, "its database is gone, but 10 entries were acknowledged")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

// A kill between badger's creation of a log and its first sizing leaves a file of no bytes.
func TestEmptyLogsOfTheDatabaseAreNoDamage(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	r.mustStore(entries(1, 1, 10, 100))
	r.close()
	for _, name := range []string{"00099.mem", "000099.vlog"} {
		if err := os.WriteFile(filepath.Join(dir, databaseName, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	r.wantEnds(1, 10)
	r.mustStore(entries(1, 11, 20, 100))
	r.reopen()
	r.wantEnds(1, 20)
}

func TestQuarantineMovesTheDamageAsideAndStartsAsANewNode(t *testing.T) {
	r := openTest(t, t.TempDir())
	id := r.ID()
	r.mustStore(entries(1, 1, 10, 10))
	r.close()
	tamper(t, r.opt.Dir, func(txn *badger.Txn) error { return txn.Delete(raftLogKey(10)) })
	wantDamaged(t, r.openFails(), "raft's log ends at 9, but everything up to 10 was acknowledged")
	wantDamaged(t, r.openFails(), "raft's log ends at 9") // and it stays
	r.opt.Quarantine = true
	r.open()
	if r.ID() == id {
		t.Fatal("the id was kept")
	}
	r.wantEnds(0, 0)
	aside, _ := filepath.Glob(filepath.Join(r.opt.Dir, "quarantine-*", databaseName))
	if len(aside) != 1 {
		t.Fatalf("%v", aside)
	}
	r.reopen() // nothing is left to quarantine
	r.wantEnds(0, 0)
}
