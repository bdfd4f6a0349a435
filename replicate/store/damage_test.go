package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// What happens to a store whose files are damaged: each kind of file × each damage × what the process left behind, a
// clean end or a kill. Whatever it is, the store opens with exactly what was acknowledged, or it says what is damaged
// and leaves everything as it was; then Quarantine gives a new, empty node. It never opens with less.

// worn is a store with a history, and what is in it: tables of several flushes, a write-ahead log, a compacted log
// whose end is not flushed, a raft log cut in front.
type worn struct {
	id      string
	last    uint64
	latest  map[string]string
	applied uint64
	vote    uint64
}

const wornBytes = 1 << 10 // of an entry

// wear fills a store. What is left open is not flushed.
func wear(t *testing.T, r *reopenable) *worn {
	t.Helper()
	r.mustStore([]*raft.Log{{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(aConfiguration)}})
	if err := r.Configuration(1, 1, raft.EncodeConfiguration(aConfiguration)); err != nil {
		t.Fatal(err)
	}
	index := uint64(1)
	for round := range 6 {
		for range 8 {
			logs := entries(1, index+1, index+40, wornBytes)
			r.mustStore(logs)
			for range 40 {
				index++
				wearOne(t, r, index)
			}
		}
		if round < 5 {
			r.flushAll()
		}
		if round == 2 {
			if err := r.RaftLog().DeleteRange(1, 200); err != nil {
				t.Fatal(err)
			}
			r.reopen()
		}
	}
	if err := r.Stable().SetUint64([]byte("LastVoteTerm"), 77); err != nil {
		t.Fatal(err)
	}
	// Badger writes a full memtable to a table in the background; a copy taken meanwhile is none that a kill leaves.
	waitUntil(t, "a quiet database", func() bool {
		logs, err := filepath.Glob(filepath.Join(r.opt.Dir, databaseName, "*"+walSuffix))
		return err == nil && len(logs) == 1
	})
	now, err := readManifestMark(r.files.database())
	if err == nil {
		err = r.raftLog.noteManifest(now) // as the keeper does after two seconds
	}
	if err != nil {
		t.Fatal(err)
	}
	return &worn{id: r.ID(), last: index, latest: r.latest(), applied: r.State().Index, vote: 77}
}

func wearOne(t *testing.T, r *reopenable, index uint64) {
	t.Helper()
	n := fmt.Sprint(index)
	if err := r.Append(index, 1, 1, index+1, []Record{rec(int32(index%5), "k"+fmt.Sprint(index%700), n), rec(-1, "s"+fmt.Sprint(index%9), n)}); err != nil {
		t.Fatal(err)
	}
}

// check says what is missing from an open store.
func (w *worn) check(t *testing.T, r *reopenable) error {
	t.Helper()
	if r.ID() != w.id {
		return errors.New("another node id")
	}
	if _, last := r.RaftLog().ends(); last != w.last {
		return fmt.Errorf("raft's log ends at %d, want %d", last, w.last)
	}
	if v, err := r.Stable().GetUint64([]byte("LastVoteTerm")); err != nil || v != w.vote {
		return fmt.Errorf("the vote is %d: %v", v, err)
	}
	for index := r.State().Index + 1; index <= w.last; index++ {
		var e raft.Log
		if err := r.RaftLog().GetLog(index, &e); err != nil || !bytes.Equal(e.Data, entries(1, index, index, wornBytes)[0].Data) {
			return fmt.Errorf("entry %d: %v", index, err)
		}
		wearOne(t, r, index)
	}
	if got := r.latest(); !maps.Equal(got, w.latest) {
		return fmt.Errorf("%d keys, want %d", len(got), len(w.latest))
	}
	return nil
}

func waitUntil(t *testing.T, what string, is func() bool) {
	t.Helper()
	for late := time.Now().Add(30 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Fatal("not within 30 s: " + what)
		}
	}
}

// copySparse copies a directory; what is zero stays a hole.
func copySparse(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(from, path)
		if e.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		if e.Name() == ballastName {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		out, err := os.Create(filepath.Join(to, rel))
		if err != nil {
			return err
		}
		err = out.Truncate(int64(len(b)))
		for at := 0; at < len(b) && err == nil; at += 4096 {
			if page := b[at:min(at+4096, len(b))]; !allZero(page) {
				_, err = out.WriteAt(page, int64(at))
			}
		}
		return errors.Join(err, out.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// fingerprint is every file of a directory; the lock file holds a process id.
func fingerprint(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == lockName {
			return err
		}
		b, err := os.ReadFile(path)
		all[path] = string(bytes.TrimRight(b, "\x00"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// damages are ways to hurt a file of which the first used bytes hold something.
var damages = map[string]func(b []byte, used int, rnd *rand.Rand) []byte{
	"one bit flipped": func(b []byte, used int, rnd *rand.Rand) []byte {
		b[rnd.IntN(used)] ^= 1 << rnd.IntN(8)
		return b
	},
	"a page of zeroes": func(b []byte, used int, rnd *rand.Rand) []byte {
		at := rnd.IntN(used) &^ 4095
		clear(b[at:min(at+4096, len(b))])
		return b
	},
	"cut short":       func(b []byte, used int, rnd *rand.Rand) []byte { return b[:rnd.IntN(used)] },
	"cut by one byte": func(b []byte, used int, _ *rand.Rand) []byte { return b[:used-1] },
	"cut to nothing":  func([]byte, int, *rand.Rand) []byte { return nil },
	"full of other bytes": func(b []byte, used int, rnd *rand.Rand) []byte {
		for i := range used {
			b[i] = byte(rnd.Uint32())
		}
		return b
	},
}

// seedsOf are the same each time, so that a change that breaks something is what breaks the test; STORE_SEED tries
// another.
func seedsOf(t *testing.T) []uint64 {
	t.Helper()
	v := os.Getenv("STORE_SEED")
	if v == "" {
		return []uint64{1, 7, 23}
	}
	seed, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return []uint64{seed}
}

func TestDamagedFilesLoseNothingSilently(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	want := wear(t, r)
	images := map[string]string{"killed": t.TempDir(), "killed early": t.TempDir(), "closed": t.TempDir(), "closed early": t.TempDir()}
	copySparse(t, dir, images["killed"])
	copySparse(t, dir, images["killed early"])
	r.close()
	copySparse(t, dir, images["closed"])
	copySparse(t, dir, images["closed early"])
	// The watermark names a change of the MANIFEST a second or two after it.
	forgetManifest(t, images["killed early"])
	forgetManifest(t, images["closed early"])
	for _, seed := range seedsOf(t) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		for _, moment := range slices.Sorted(maps.Keys(images)) {
			files := filesOf(t, images[moment])
			if strings.HasSuffix(moment, "early") {
				files = []string{manifestPath}
			}
			t.Run(fmt.Sprintf("seed %d, %s", seed, moment), func(t *testing.T) {
				damageEach(t, images[moment], files, want, rnd)
			})
		}
	}
}

// damageEach does each damage to each of the files.
func damageEach(t *testing.T, image string, files []string, want *worn, rnd *rand.Rand) {
	if err := damageOnce(t, image, want, "", nil, rnd); err != nil {
		t.Fatalf("undamaged: %v", err)
	}
	rounds := 1
	if os.Getenv("STORE_DAMAGES") != "" {
		rounds = 60
	}
	opened, refused := 0, 0
	for _, name := range files {
		for _, kind := range slices.Sorted(maps.Keys(damages)) {
			for range rounds {
				err := damageOnce(t, image, want, name, damages[kind], rnd)
				switch {
				case err == nil:
					opened++
				case errors.Is(err, errRefused):
					refused++
					if slices.Contains(mended, filepath.Base(name)) || strings.HasSuffix(name, valueLogSuffix) {
						t.Errorf("%s %s: refused, though it holds nothing: %v", name, kind, err)
					}
				default:
					t.Errorf("%s %s: %v", name, kind, err)
				}
			}
		}
	}
	t.Logf("%d opened with everything, %d refused", opened, refused)
}

var manifestPath = filepath.Join(databaseName, manifestName)

// forgetManifest takes the watermark back to before it named the MANIFEST.
func forgetManifest(t *testing.T, dir string) {
	t.Helper()
	w, err := openWatermark(filepath.Join(dir, watermarkName))
	if err != nil {
		t.Fatal(err)
	}
	m := w.marks
	m.manifest = manifestMark{}
	if err := errors.Join(w.write(m, false), w.close()); err != nil {
		t.Fatal(err)
	}
}

// mended are the files that hold nothing that is not elsewhere.
var mended = []string{keyRegistryName, discardName, lockName, watermarkName}

var errRefused = errors.New("refused")

func filesOf(t *testing.T, dir string) (names []string) {
	t.Helper()
	for path := range fingerprint(t, dir) {
		rel, _ := filepath.Rel(dir, path)
		names = append(names, rel)
	}
	slices.Sort(names)
	return append(names, lockName)
}

// damageOnce opens a damaged copy: nil if all is there, errRefused with its reason if Open rightly refused.
func damageOnce(t *testing.T, image string, want *worn, name string, hurt func([]byte, int, *rand.Rand) []byte, rnd *rand.Rand) error {
	t.Helper()
	dir, err := os.MkdirTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	copySparse(t, image, dir)
	if hurt != nil {
		path := filepath.Join(dir, name)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		used := max(len(bytes.TrimRight(b, "\x00")), 1)
		if len(b) == 0 {
			b = []byte{0}
		}
		if err := os.WriteFile(path, hurt(b, used, rnd), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before := fingerprint(t, dir)
	r := &reopenable{t: t, opt: Options{Dir: dir, Fsync: true}}
	if r.Store, err = Open(r.opt); err == nil {
		return errors.Join(want.check(t, r), r.Store.Close())
	}
	var damaged *DamagedError
	var newer *NewerFormatError
	if errors.As(err, &newer) && name == FormatName {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	if !errors.As(err, &damaged) || !strings.Contains(err.Error(), dir) {
		return fmt.Errorf("no message that helps: %w", err)
	}
	if strings.Contains(err.Error(), "file "+databaseName) && !maps.Equal(before, fingerprint(t, dir)) {
		return fmt.Errorf("refused, and something was changed: %w", err)
	}
	r.opt.Quarantine = true
	s, qerr := Open(r.opt)
	if qerr != nil {
		return fmt.Errorf("not even quarantine: %w", qerr)
	}
	defer s.Close()
	if _, last := s.RaftLog().ends(); last != 0 || s.ID() == want.id {
		return errors.New("not a new, empty node")
	}
	return fmt.Errorf("%w: %w", errRefused, err)
}

// What badger writes when it flushes or compacts, with a crash while the last record of the MANIFEST was on its way: it
// opens with everything, as long as what the new tables replace is still there. When that is gone, the record was on disk.
func TestATornManifestIsNoDamageUnlessSomethingIsGone(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	want := wear(t, r)
	before, flushed, many, compacted := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	copySparse(t, dir, before)
	r.close() // a flush
	copySparse(t, dir, flushed)
	for n := tablesOf(t, dir); n < levelZeroTables; n = tablesOf(t, dir) {
		r.open()
		if err := r.Local().Put("table", []byte{byte(n)}); err != nil {
			t.Fatal(err)
		}
		r.close()
	}
	copySparse(t, dir, many)
	r.open()
	waitUntil(t, "a compaction", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, manifestPath))
		m, merr := readManifest(b)
		named := 0
		for _, there := range m.tables {
			if there {
				named++
			}
		}
		return errors.Join(err, merr) == nil && named < levelZeroTables && named == tablesOf(t, dir)
	})
	copySparse(t, dir, compacted)
	for _, step := range []struct{ what, from, to string }{{"flush", before, flushed}, {"compaction", many, compacted}} {
		old, err := os.ReadFile(filepath.Join(step.from, manifestPath))
		if err != nil {
			t.Fatal(err)
		}
		whole, err := os.ReadFile(filepath.Join(step.to, manifestPath))
		if err != nil || len(whole) <= len(old) || !bytes.HasPrefix(whole, old) {
			t.Fatalf("%s: %d bytes after %d: %v", step.what, len(whole), len(old), err)
		}
		forgetManifest(t, step.from)
		forgetManifest(t, step.to)
		crashed := t.TempDir() // both sets of files are there
		copySparse(t, step.to, crashed)
		copySparse(t, step.from, crashed)
		for _, at := range []int{len(old), len(old) + 3, len(old) + manifestHead, len(old) + manifestHead + 1, len(whole) - 1, len(whole)} {
			torn := append(bytes.Clone(whole[:at]), make([]byte, len(whole)-at)...)
			for name, manifest := range map[string][]byte{"cut": whole[:at], "zeroes": torn} {
				put := func([]byte, int, *rand.Rand) []byte { return manifest }
				if err := damageOnce(t, crashed, want, manifestPath, put, nil); err != nil {
					t.Fatalf("%s, %s at %d of %d: %v", step.what, name, at, len(whole), err)
				}
				err := damageOnce(t, step.to, want, manifestPath, put, nil)
				if lost := !bytes.Equal(manifest, whole); lost != errors.Is(err, errRefused) {
					t.Fatalf("%s, what it replaced is gone, %s at %d of %d: %v", step.what, name, at, len(whole), err)
				}
			}
		}
	}
}

// Under --fsync never a power cut in the middle of a flush may leave the new table, but neither its name in the MANIFEST
// nor the write-ahead log it was made of. With others to take the state from it is moved aside; else each refusal names a
// file, and without those the store opens as it was at some time before.
func TestAPowerCutUnderFsyncNeverLeavesWhatCanBeUsed(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	want := wear(t, r)
	before, cut := t.TempDir(), t.TempDir()
	copySparse(t, dir, before)
	r.close() // a flush
	copySparse(t, dir, cut)
	for _, name := range filesOf(t, before) {
		b, err := os.ReadFile(filepath.Join(before, name))
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case filepath.Ext(name) == walSuffix:
			clear(b)
		case name != manifestPath:
			continue
		}
		if err := os.WriteFile(filepath.Join(cut, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	forgetManifest(t, cut) // it had not been noted yet
	aside := t.TempDir()
	copySparse(t, cut, aside)
	if s, err := Open(Options{Dir: aside, Quarantine: true}); err != nil {
		t.Errorf("not quarantined: %v", err)
	} else if err := s.Close(); err != nil {
		t.Error(err)
	}
	s, err := Open(Options{Dir: cut})
	said := regexp.MustCompile(`lose what was acknowledged after it, delete ([^ ;]+);`)
	for refusals := 0; err != nil; refusals++ {
		name := said.FindStringSubmatch(err.Error())
		if name == nil || refusals == 5 {
			t.Fatalf("no way out: %v", err)
		}
		if err := os.Remove(filepath.Join(cut, name[1])); err != nil {
			t.Fatal(err)
		}
		s, err = Open(Options{Dir: cut})
	}
	defer s.Close()
	_, last := s.RaftLog().ends()
	applied := s.State().Index
	if last > want.last || applied > last || applied == 0 {
		t.Errorf("applied up to %d, raft's log to %d of %d", applied, last, want.last)
	}
	for index := applied + 1; index <= last; index++ {
		var e raft.Log
		if err := s.RaftLog().GetLog(index, &e); err != nil {
			t.Error(err)
		}
	}
}

func tablesOf(t *testing.T, dir string) int {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, databaseName, "*"+tableSuffix))
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// A restore is killed at each of its points: the directory opens as it was before, or as the snapshot is.
func TestARestoreKilledAnywhereIsDoneOrUndone(t *testing.T) {
	a := filled(t, "")
	for i := range 1500 { // several frames
		a.apply(rec(int32(i%7), fmt.Sprint("large", i), strings.Repeat("x", 1500)))
	}
	meta, stream := snapshotOf(t, a, a.State().Index)
	after := a.latest()
	delete(after, "0/too late")
	for name, last := range map[string]uint64{"a log below it": 20, "a log above it": meta.Index + 10} {
		b := openTest(t, t.TempDir())
		b.mustStore(entries(1, 1, last, 10))
		b.apply(rec(7, "old", "1"))
		b.flushAll()
		before := b.latest()
		var images []string
		var points []string
		b.opt.hook = func(point string) {
			dir := t.TempDir()
			copySparse(t, b.opt.Dir, dir)
			images, points = append(images, dir), append(points, point)
		}
		b.reopen()
		if err := install(t, b, meta, stream); err != nil {
			t.Fatal(err)
		}
		b.opt.hook("done")
		if len(points) < 7 {
			t.Fatalf("%q", points)
		}
		for i, dir := range images {
			c := openTest(t, dir)
			want, index := after, meta.Index
			if s := c.State(); s.Index != meta.Index {
				want, index = before, 1
			}
			if got := c.latest(); !maps.Equal(got, want) || c.State().Index != index || points[i] == "done" && index == 1 {
				t.Fatalf("%s, %s: applied %d, %d keys", name, points[i], c.State().Index, len(got))
			}
			if _, end := c.RaftLog().ends(); end != 0 && end != last {
				t.Fatalf("%s, %s: raft's log ends at %d", name, points[i], end)
			}
			next := max(last, meta.Index) + 1
			if last < meta.Index && index == meta.Index {
				next = meta.Index + 1
			} else if index == 1 {
				next = last + 1
			}
			c.mustStore(entries(2, next, next, 10)) // and raft goes on
			c.reopen()
		}
	}
}

// Raft takes back a suffix that a new leader does not have, and a kill comes anywhere in that.
func TestASuffixTakenBackIsNoDamage(t *testing.T) {
	dir := t.TempDir()
	r := openTest(t, dir)
	r.mustStore(entries(1, 1, 3000, 10))
	for to := uint64(3000); to > 1; {
		from := to - min(to-1, 700)
		if err := r.RaftLog().lowerMark(from - 1); err != nil { // the kill comes between the two
			t.Fatal(err)
		}
		for range 2 {
			image := t.TempDir()
			copySparse(t, dir, image)
			c := openTest(t, image)
			if _, last := c.RaftLog().ends(); last != to && last != from-1 {
				t.Fatal(last)
			}
			c.close()
			if err := r.RaftLog().DeleteRange(from, to); err != nil {
				t.Fatal(err)
			}
		}
		r.mustStore(entries(to, from, from, 10)) // of a new term
		to = from
	}
}
