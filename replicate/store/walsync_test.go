package store

import (
	"os"
	"testing"

	"github.com/hashicorp/raft"
)

func writeLog(t *testing.T, dir string, n int) {
	t.Helper()
	if err := os.WriteFile(walName(dir, n), []byte{byte(n)}, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTheNewestLogIsSyncedWhicheverHaveComeAndGone(t *testing.T) {
	dir := t.TempDir()
	w := &walSync{dir: dir}
	defer w.close()
	expect := func(number int) {
		t.Helper()
		if err := w.sync(); err != nil {
			t.Fatal(err)
		}
		if w.number != number {
			t.Fatalf("synced up to log %d, want %d", w.number, number)
		}
	}
	writeLog(t, dir, 4)
	writeLog(t, dir, 5)
	expect(5)
	expect(5)
	writeLog(t, dir, 6)
	expect(6)
	writeLog(t, dir, 7)
	writeLog(t, dir, 8)
	for _, n := range []int{4, 5, 6, 7} { // given up in order, the one that is open among them
		if err := os.Remove(walName(dir, n)); err != nil {
			t.Fatal(err)
		}
	}
	expect(8)
	if err := os.Remove(walName(dir, 8)); err != nil {
		t.Fatal(err)
	}
	if err := w.sync(); err == nil {
		t.Fatal("no log at all is no error")
	}
}

// Badger turns to a new log every 8 MiB, and gives the old ones up as it writes tables.
func TestSyncFollowsBadgerFromLogToLog(t *testing.T) {
	s := openTest(t, t.TempDir())
	if s.wal == nil {
		return // badger syncs by itself here
	}
	data := make([]byte, 512<<10)
	for i := range uint64(64) {
		if err := s.RaftLog().StoreLog(&raft.Log{Index: i + 1, Term: 1, Data: data}); err != nil {
			t.Fatal(err)
		}
		if newest := newestNumber(t, s.Store); s.wal.number != newest {
			t.Fatalf("after entry %d log %d is the newest, and %d is synced", i+1, newest, s.wal.number)
		}
	}
	if s.wal.number < 3 {
		t.Fatalf("32 MiB have filled %d logs", s.wal.number)
	}
}

func newestNumber(t *testing.T, s *Store) (newest int) {
	t.Helper()
	names, err := os.ReadDir(s.files.database())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range names {
		newest = max(newest, walNumber(e.Name()))
	}
	return newest
}
