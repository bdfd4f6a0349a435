package store

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
)

const (
	watermarkBytes = 64
	watermarkMagic = "oswmark1"
)

// watermark is a file that names what was acknowledged, as of some moment: magic, be64 index of raft's log, be64
// version of the database, be64 length and be64 head of badger's MANIFEST, zeroes, and in the last four bytes the
// CRC32C of the rest. It may be low, never high; what is 0 is not known.
type watermark struct {
	file *os.File
	marks
}

// marks is what a watermark says.
type marks struct {
	index    uint64 // of raft's log
	version  uint64 // of badger's newest transaction
	manifest manifestMark
}

// manifestMark is how long a MANIFEST was; head tells it from another.
type manifestMark struct {
	bytes int64
	head  uint64
}

// openWatermark reads the file, or creates it. One that cannot be made out counts as 0: it only ever adds a check.
func openWatermark(path string) (*watermark, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	w := &watermark{file: f}
	var b [watermarkBytes]byte
	if n, _ := f.ReadAt(b[:], 0); n == len(b) && string(b[:8]) == watermarkMagic &&
		binary.BigEndian.Uint32(b[60:]) == crc32.Checksum(b[:60], castagnoli) {
		w.index, w.version = binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])
		w.manifest = manifestMark{bytes: int64(binary.BigEndian.Uint64(b[24:])), head: binary.BigEndian.Uint64(b[32:])}
	}
	return w, nil
}

// write replaces the marks. Raising them need not be synced; lowering must be, before what they named is deleted.
func (w *watermark) write(m marks, sync bool) error {
	if m == w.marks {
		return nil
	}
	var b [watermarkBytes]byte
	copy(b[:], watermarkMagic)
	binary.BigEndian.PutUint64(b[8:], m.index)
	binary.BigEndian.PutUint64(b[16:], m.version)
	binary.BigEndian.PutUint64(b[24:], uint64(m.manifest.bytes))
	binary.BigEndian.PutUint64(b[32:], m.manifest.head)
	binary.BigEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	if _, err := w.file.WriteAt(b[:], 0); err != nil {
		return err
	}
	if sync {
		if err := w.file.Sync(); err != nil {
			return err
		}
	}
	w.marks = m
	return nil
}

func (w *watermark) close() error {
	return w.file.Close()
}

// markKeeper keeps the watermark, once a second.
type markKeeper struct {
	manifest manifestMark // a tick ago
	failed   bool
}

func (k *markKeeper) keep(s *Store) {
	if s.files == nil {
		return
	}
	err := s.raftLog.writeMark()
	if now, merr := readManifestMark(s.files.database()); merr != nil {
		err = errors.Join(err, merr)
	} else if now != k.manifest {
		k.manifest = now // it may be in the middle of a write
	} else {
		err = errors.Join(err, s.raftLog.noteManifest(now)) // nothing, if that is what it says
	}
	if err != nil && !k.failed {
		s.log.Warn("writing the watermark: a lost end of the database may not be noticed until it can be", "err", err)
	}
	k.failed = err != nil
}

func readManifestMark(dir string) (manifestMark, error) {
	f, err := os.Open(filepath.Join(dir, manifestName))
	if err != nil {
		return manifestMark{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return manifestMark{}, err
	}
	var b [manifestMagic + manifestHead]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return manifestMark{}, err
	}
	return manifestMark{bytes: info.Size(), head: headOf(b[:])}, nil
}
