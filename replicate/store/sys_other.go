//go:build !linux

package store

import (
	"errors"
	"math"
	"os"
)

// Elsewhere than on Linux badger's own lock does, and there is no space guard.

func lockFile(*os.File) error { return nil }

func isReadOnly(error) bool { return false }

func isReadOnlyDir(string) bool { return false }

func diskSpace(string) (free, total int64, err error) {
	return math.MaxInt64 / 2, math.MaxInt64 / 2, nil
}

// ownSync: badger's own sync is used; that a mapping's writes are synced with its file is known of Linux.
const ownSync = false

func dataSync(f *os.File) error { return f.Sync() }

func unlinked(*os.File) (bool, error) { return false, nil }

func reserve(string, int64) error { return errors.ErrUnsupported }

func allocate(*os.File, int64) error { return errors.ErrUnsupported }
