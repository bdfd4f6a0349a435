package store

import (
	"encoding/binary"
	"hash/crc32"
	"os"
)

const (
	watermarkBytes = 64
	watermarkMagic = "oswmark1"
)

// watermark is a file that names the last index of raft's log that was acknowledged, as of some moment: magic,
// be64 index, zeroes, and in the last four bytes the CRC32C of the rest. It may be low, never high.
type watermark struct {
	file  *os.File
	index uint64
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
		w.index = binary.BigEndian.Uint64(b[8:])
	}
	return w, nil
}

// write replaces the index. Raising it need not be synced; lowering must be, before what it named is deleted.
func (w *watermark) write(index uint64, sync bool) error {
	if index == w.index {
		return nil
	}
	var b [watermarkBytes]byte
	copy(b[:], watermarkMagic)
	binary.BigEndian.PutUint64(b[8:], index)
	binary.BigEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	if _, err := w.file.WriteAt(b[:], 0); err != nil {
		return err
	}
	if sync {
		if err := w.file.Sync(); err != nil {
			return err
		}
	}
	w.index = index
	return nil
}

func (w *watermark) close() error {
	return w.file.Close()
}
