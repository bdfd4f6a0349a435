package replicate

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// testdata keeps a data directory of every format that was released, as a kill left it: with a flushed part, a part
// that is only in raft's log, and several terms. This version must open each. A new format (store.FormatVersion, or an
// entry's or block's version) gets a new archive:
//
//	go test ./replicate -run TestDirectoriesOfEveryReleasedFormatOpen -update
//
// which writes the newest one only, and only if it does not exist: a released archive is never written again.
var update = flag.Bool("update", false, "write the archive of the newest format if it is missing")

const fixtureWant = "map[-1/session:2 0/a:3 0/b:1 49/replayed:yes 7/big:65536]"

func TestDirectoriesOfEveryReleasedFormatOpen(t *testing.T) {
	newest := filepath.Join("testdata", fmt.Sprintf("store-%d.tar.gz", store.FormatVersion))
	if _, err := os.Stat(newest); *update && errors.Is(err, os.ErrNotExist) {
		writeFixture(t, newest)
	}
	archives, err := filepath.Glob(filepath.Join("testdata", "store-*.tar.gz"))
	if err != nil || len(archives) != store.FormatVersion {
		t.Fatalf("%d archives of %d formats: %v", len(archives), store.FormatVersion, err)
	}
	for _, archive := range archives {
		t.Run(filepath.Base(archive), func(t *testing.T) {
			dir := t.TempDir()
			unpack(t, archive, dir)
			for range 2 { // what was opened once opens again
				h := openHarness(t, testConfig(dir))
				h.active()
				got := h.latest()
				if n := len(got["7/big"]); n > 0 {
					got["7/big"] = fmt.Sprint(n)
				}
				if fmt.Sprint(got) != fixtureWant {
					t.Errorf("latest: %v, want %s", got, fixtureWant)
				}
				offsets := ""
				err := h.n.Read(0, 0, func(s store.Stored) bool {
					offsets += fmt.Sprint(s.Offset, string(s.Key), string(s.Value), " ")
					return true
				})
				if err != nil || offsets != "0a1 1b1 2c1 3a2 4c 5a3 " {
					t.Errorf("partition 0: %s %v", offsets, err)
				}
				h.close()
			}
		})
	}
}

func writeFixture(t *testing.T, archive string) {
	dir := t.TempDir()
	h := openHarness(t, testConfig(dir))
	h.active()
	h.commit(record(0, "a", "1"), record(0, "b", "1"), record(-1, "session", "1"))
	h.commit(record(0, "c", "1"), record(0, "a", "2"))
	h.n.Resign(h.term)
	h.active()
	h.commit(Record{Partition: 0, Key: []byte("c")}, record(7, "big", string(make([]byte, 64<<10))))
	h.close() // flushed up to here
	h = openHarness(t, testConfig(dir))
	h.active()
	h.commit(record(0, "a", "3"), record(-1, "session", "2"), record(49, "replayed", "yes"))
	pack(t, dir, archive)
}

func pack(t *testing.T, dir, archive string) {
	if err := os.MkdirAll(filepath.Dir(archive), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(archive)
	if err != nil {
		t.Fatal(err)
	}
	z, _ := gzip.NewWriterLevel(f, gzip.BestCompression)
	w := tar.NewWriter(z)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func unpack(t *testing.T, archive, dir string) {
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		head, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, filepath.FromSlash(head.Name))
		if head.Typeflag == tar.TypeDir {
			err = os.MkdirAll(name, 0o700)
		} else {
			err = unpackFile(name, r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func unpackFile(name string, r io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	w, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}
