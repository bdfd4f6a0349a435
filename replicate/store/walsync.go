package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// walSync puts on disk what badger has written to its write-ahead logs. Badger's own SyncWrites syncs the value log as
// well, at each commit, although nothing is ever in it: for the filesystem that is another flush of the disk's cache,
// as dear as the one that counts (measured: 0.2 ms beside 0.28).
//
// A transaction lies in the log that was the newest when it was written, or, if that is gone, in a table, which badger
// has synced. Logs are numbered without gaps, and given up in order; so whatever may not be on disk is in the one that
// was synced last and those with the numbers that follow it.
type walSync struct {
	dir string // badger's

	mu     sync.Mutex
	file   *os.File // synced last; nil before the first time
	number int
}

func walName(dir string, n int) string {
	return filepath.Join(dir, fmt.Sprintf("%05d%s", n, walSuffix))
}

// walNumber gives the number in a log's name, 0 for any other file.
func walNumber(name string) int {
	number, isLog := strings.CutSuffix(name, walSuffix)
	if n, err := strconv.Atoi(number); isLog && err == nil {
		return n
	}
	return 0
}

// sync returns when every transaction that badger has committed is on disk.
func (w *walSync) sync() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.find(); err != nil {
		return err
	}
	for {
		next, err := os.Open(walName(w.dir, w.number+1))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return dataSync(w.file)
		case err != nil:
			return err
		}
		if err := w.turn(next, w.number+1); err != nil {
			return err
		}
	}
}

// find opens the oldest log if none is open, or the one that is has been given up.
func (w *walSync) find() error {
	if w.file != nil {
		gone, err := unlinked(w.file)
		if err != nil || !gone {
			return err
		}
	}
	for {
		number, err := w.oldest()
		if err != nil {
			return err
		}
		f, err := os.Open(walName(w.dir, number))
		if errors.Is(err, fs.ErrNotExist) {
			continue // badger has given it up since the directory was read, as it does with what it has replayed at start
		}
		if err != nil {
			return fmt.Errorf("looking for the write-ahead log: %w", err)
		}
		return w.turn(f, number)
	}
}

// oldest is the lowest number of a log; the newest log is never given up, so there is one.
func (w *walSync) oldest() (int, error) {
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		return 0, err
	}
	oldest := 0
	for _, e := range entries {
		if n := walNumber(e.Name()); n > 0 && (oldest == 0 || n < oldest) {
			oldest = n
		}
	}
	if oldest == 0 {
		return 0, fmt.Errorf("there is no write-ahead log in %s", w.dir)
	}
	return oldest, nil
}

// turn syncs the log that is open, and goes on with another.
func (w *walSync) turn(to *os.File, number int) error {
	old := w.file
	w.file, w.number = to, number
	if old == nil {
		return nil
	}
	return errors.Join(dataSync(old), old.Close())
}

func (w *walSync) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}
