package store

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// barrierFiles is how many tables badger may try to write before it waits: two compactions of a few tables at once,
// and a flush.
const barrierFiles = 128

// barrier keeps badger from writing tables while the disk is nearly full. Badger asks nobody before it flushes or
// compacts, and writes through mmap: without space that is a SIGBUS on a goroutine of its own, the end of the process.
// But it creates each table with O_EXCL, under the next number; so while the barrier is up, empty files have those
// names. The attempt fails, badger says so through its logger, and there it waits, until the barrier is down. What a
// kill leaves of these files badger deletes at its next start, as it does with every table its MANIFEST does not name.
type barrier struct {
	dir string // badger's
	log *slog.Logger

	mu    sync.Mutex
	files []string
	down  chan struct{} // closed when the barrier comes down; nil: it is down
}

// raise puts the barrier up.
func (b *barrier) raise() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.down != nil {
		return
	}
	b.down = make(chan struct{})
	names, err := os.ReadDir(b.dir)
	highest := 0
	for _, e := range names {
		number, ok := strings.CutSuffix(e.Name(), tableSuffix)
		if n, err := strconv.Atoi(number); ok && err == nil {
			highest = max(highest, n)
		}
	}
	for n := highest + 1; n <= highest+barrierFiles && err == nil; n++ {
		name := filepath.Join(b.dir, fmt.Sprintf("%06d%s", n, tableSuffix))
		f, cerr := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if os.IsExist(cerr) {
			continue // a table that has just been begun
		}
		if err = cerr; err == nil {
			b.files = append(b.files, name)
			err = f.Close()
		}
	}
	b.log.Warn("disk space is very low: flushes and compactions of the database wait until some is freed", "dir", b.dir)
	if err != nil {
		b.log.Warn("keeping the database from writing tables", "err", err)
	}
}

// lower takes it down.
func (b *barrier) lower() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.down == nil {
		return
	}
	for _, name := range b.files {
		if err := os.Remove(name); err != nil {
			b.log.Warn("letting the database write tables again", "err", err)
		}
	}
	b.files = nil
	close(b.down)
	b.down = nil
}

// up says whether it is up; wait, if it is, returns when it is not.
func (b *barrier) up() (wait func(), up bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	down := b.down
	return func() { <-down }, down != nil
}

// heard is called with what badger says, on the goroutine that says it. True: it was about an attempt that the
// barrier made fail.
func (b *barrier) heard(format string) bool {
	if b == nil {
		return false
	}
	wait, up := b.up()
	if !up {
		return false
	}
	switch {
	case strings.HasPrefix(format, "While running doCompact"), strings.HasPrefix(format, "error flushing memtable"):
		wait() // neither holds a lock (badger's levels.go, runCompactor; db.go, flushMemtable)
		return true
	}
	return strings.Contains(format, "LOG Compact FAILED")
}
