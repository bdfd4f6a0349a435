package store

import (
	"errors"
	"os"
	"syscall"
)

func lockFile(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

func isReadOnly(err error) bool {
	return errors.Is(err, syscall.EROFS)
}

func isReadOnlyDir(dir string) bool {
	const rdonly = 1 // ST_RDONLY
	var st syscall.Statfs_t
	return syscall.Statfs(dir, &st) == nil && st.Flags&rdonly != 0
}

func diskSpace(dir string) (free, total int64, err error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, 0, err
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// reserve gives the first size bytes of a file blocks, and leaves them as they are.
func reserve(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return syscall.Fallocate(int(f.Fd()), 0, 0, min(size, info.Size()))
}

// allocate gives the file real blocks; a sparse ballast would weigh nothing.
func allocate(f *os.File, size int64) error {
	return syscall.Fallocate(int(f.Fd()), 0, 0, size)
}

// ownSync: walSync syncs what badger writes, instead of badger.
const ownSync = true

// dataSync puts what a file holds on disk, also what was written to it through a mapping.
func dataSync(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); !errors.Is(err, syscall.EINTR) {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

// unlinked says whether an open file has been deleted.
func unlinked(f *os.File) (bool, error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return false, os.NewSyscallError("fstat", err)
	}
	return st.Nlink == 0, nil
}
