//go:build linux

package store

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// newestLog is the write-ahead log that badger writes to, and the bytes of the blocks it has.
func newestLog(t *testing.T, dir string) (name string, allocated int64) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, databaseName, "*"+walSuffix))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	name = names[len(names)-1]
	var st syscall.Stat_t
	if err := syscall.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return name, st.Blocks * 512
}

func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not within 10 s: " + what)
		}
	}
}

func TestTheWriteAheadLogHasBlocksAheadOfItsUse(t *testing.T) {
	dir := t.TempDir()
	if !overwritesInPlace(dir) {
		t.Log("not on this filesystem")
		return
	}
	r := openTest(t, dir)
	first, n := newestLog(t, dir)
	if n >= preallocEvery {
		t.Fatalf("%d bytes allocated while nothing was appended", n)
	}
	const size = preallocEvery / 4 // few syncs, so that they are fast enough for it on a slow disk too
	index := uint64(0)
	appended := func(bytes int) {
		for range bytes / size {
			index++
			r.mustStore(entries(1, index, index, size))
		}
	}
	name, used := first, int64(0)
	waitFor(t, "blocks beyond what was appended", func() bool {
		appended(preallocEvery)
		used += preallocEvery
		name, n = newestLog(t, dir)
		return name != first || n > used+2*preallocEvery
	})
	used = 0
	waitFor(t, "blocks of the second file", func() bool {
		appended(preallocEvery)
		if name, n = newestLog(t, dir); name != first {
			used += preallocEvery
		}
		return name != first && used < memTableBytes/2 && n > used+2*preallocEvery
	})
	r.reopen()
	r.wantEnds(1, index)
}

// What a kill leaves behind the log's end is zeroes, allocated or not, and badger reads them as the end.
func TestBlocksAheadOfUseAreTheEndOfTheLog(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	r.mustStore(entries(1, 1, 100, 4<<10))
	r.RaftLog().writeMark()
	name, _ := newestLog(t, dir)
	p := prealloc{guard: r.files.guard, log: nopLogger(), file: name}
	for p.file != "" {
		if err := p.extend(); err != nil {
			t.Fatal(err)
		}
	}
	if _, n := newestLog(t, dir); n < walBytes || n > walBytes+1<<20 {
		t.Fatalf("%d bytes allocated, want %d", n, walBytes)
	}
	copied := t.TempDir()
	copyDir(t, dir, copied)
	openTest(t, copied).wantEnds(1, 100)
	r.mustStore(entries(1, 101, 200, 4<<10)) // badger goes on in the same file
	copied = t.TempDir()
	copyDir(t, dir, copied)
	openTest(t, copied).wantEnds(1, 200)
}

func TestAWriteAheadLogThatGoesAwayIsAnError(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "00001"+walSuffix))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(4 << 10); err != nil {
		t.Fatal(err)
	}
	if err := touch(f, 0, 64<<10); err == nil { // as if badger had cut it after its size was asked for
		t.Fatal("pages beyond the end of a file were written")
	}
	p := prealloc{guard: newGuard(Options{}, nopLogger()), log: nopLogger(), file: f.Name()}
	if err := errors.Join(f.Truncate(0), os.Remove(f.Name())); err != nil {
		t.Fatal(err)
	}
	if err := p.extend(); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

func TestNothingIsAllocatedAheadWhenSpaceIsLow(t *testing.T) {
	r := &reopenable{t: t, opt: Options{Dir: t.TempDir(), Fsync: true, MinFree: 64 << 20}}
	r.opt.Space = func(string) (int64, int64, error) { return 64<<20 + walBytes, 10 << 30, nil }
	r.open()
	t.Cleanup(func() { r.Store.Close() })
	name, _ := newestLog(t, r.opt.Dir)
	p := prealloc{guard: r.files.guard, log: nopLogger(), file: name}
	if err := p.extend(); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	r.mustStore(entries(1, 1, 1, 10)) // appends are still taken
}

func TestTheNewestWriteAheadLogIsFound(t *testing.T) {
	dir := t.TempDir()
	p := &prealloc{dir: dir}
	create := func(names ...string) {
		for _, name := range names {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect := func(want string) {
		t.Helper()
		if want != "" {
			want = filepath.Join(dir, want)
		}
		if got := p.newest(); got != want {
			t.Fatalf("%q, want %q", got, want)
		}
	}
	expect("")
	create("00009.mem", "00010.mem", "00011.sst", "MANIFEST", "x.mem")
	expect("00010.mem")
	expect("")
	create("00011.mem")
	expect("00011.mem")
	create("00012.mem", "00013.mem")
	expect("00013.mem")
	create("00040.mem") // far ahead: found when it is time to look around
	expect("")
	p.barren = preallocRescan + 1
	expect("00040.mem")
	p.barren = preallocRescan + 1
	expect("")
	create("100000.mem")
	p.next = 100000
	expect("100000.mem")
}
