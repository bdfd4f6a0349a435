package store

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

const (
	// seekHole is SEEK_HOLE of lseek(2).
	seekHole = 4
	// populateWrite is MADV_POPULATE_WRITE of madvise(2), Linux 5.14.
	populateWrite = 23
)

// overwritesInPlace says whether dir is on a filesystem known to write a block where it was: ext2 to ext4, XFS, or
// whatever lies under an overlay. One that copies on write (btrfs, ZFS), or has no disk (tmpfs), would write all
// twice for nothing.
func overwritesInPlace(dir string) bool {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return false
	}
	switch uint32(st.Type) {
	case 0xef53, 0x58465342, 0x794c7630:
		return true
	}
	return false
}

// extend makes the next chunk of the file ready, and one more if badger has come past the last one.
func (p *prealloc) extend() error {
	f, err := os.OpenFile(p.file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	end := min(info.Size(), walBytes)
	hole, err := f.Seek(min(p.at, info.Size()-1), seekHole)
	if err != nil {
		return fmt.Errorf("looking for a hole: %w", err)
	}
	chunk := int64(preallocChunk)
	if hole > p.at {
		chunk *= 2
	}
	p.at = hole &^ int64(os.Getpagesize()-1)
	size := min(chunk, end-p.at)
	if size <= 0 {
		p.file = ""
		return nil
	}
	if !p.guard.roomy(2 * walBytes) {
		return ErrNoSpace
	}
	p.at += size
	return touch(f, p.at-size, size)
}

// touch makes the pages of a part of f dirty and syncs them. The kernel does it, as for a write that changes nothing
// (MADV_POPULATE_WRITE): a write of zeroes could undo one that badger does at the same moment, and where a store would
// be a SIGBUS (the file is gone, the disk is full) this is an error.
func touch(f *os.File, at, size int64) error {
	b, err := syscall.Mmap(int(f.Fd()), at, int(size), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping: %w", err)
	}
	err = syscall.Madvise(b, populateWrite)
	if err == nil {
		err = syscall.Fdatasync(int(f.Fd()))
	}
	return errors.Join(err, syscall.Munmap(b))
}
