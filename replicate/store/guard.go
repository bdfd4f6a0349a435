package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// ErrNoSpace is what an append fails with while the filesystem has less free space than MinFree. Badger would be
// killed by SIGBUS when it touches a page that the filesystem cannot give (badger#1199, #1801).
var ErrNoSpace = errors.New("too little free disk space")

const (
	ballastBytes = 32 << 20 // or an eighth of a small filesystem
	// ballastRoom: with less free than so many ballasts beyond MinFree the filesystem is too small to keep one on.
	ballastRoom = 3

	// While something is written the space is looked at so often: who fills a disk takes a GB a second, and badger's
	// flushes and compactions, which ask nobody, take a tenth of one.
	watchEvery = 2 * time.Millisecond
	watchAfter = 2 * time.Second // and so long after the last write
	// With watchAhead more than is needed it may be less often: that is ten times what can be filled meanwhile.
	watchCalmly = 50 * time.Millisecond
	watchAhead  = 512 << 20
	// watchBarrier is how often it is looked at when the only question is whether there is space again.
	watchBarrier = 50 * time.Millisecond
	// openBytes is what opening the database may write: its memtables become tables.
	openBytes = 24 << 20
	// fullAhead is how much earlier than an append Full looks ahead: what can be filled until it is asked again.
	fullAhead = 8 << 20
)

// guard watches the free space under the data directory.
type guard struct {
	dir     string
	min     int64 // 0: no guard
	ballast string
	log     *slog.Logger
	// space is statfs: free bytes for us, and the filesystem's size.
	space func(dir string) (free, total int64, err error)

	active atomic.Int64  // writes since the watcher has looked
	wake   chan struct{} // there is one, after none

	mu      sync.Mutex
	tripped bool
}

func newGuard(opt Options, log *slog.Logger) *guard {
	g := &guard{dir: opt.Dir, min: opt.MinFree, ballast: filepath.Join(opt.Dir, ballastName), log: log, space: opt.Space, wake: make(chan struct{}, 1)}
	if g.space == nil {
		g.space = diskSpace
	}
	return g
}

// floor is MinFree, less on a small filesystem, where a quarter has to do.
func (g *guard) floor(total int64) int64 {
	return min(g.min, max(total/4, openBytes))
}

// admit is asked before the database is opened. When space is low it gives up the ballast.
func (g *guard) admit() error {
	if g.min <= 0 {
		return nil
	}
	free, total, err := g.space(g.dir)
	if err != nil {
		return fmt.Errorf("asking for the free space of %s: %w", g.dir, err)
	}
	if free < g.floor(total) {
		if os.Remove(g.ballast) == nil {
			g.log.Warn("disk space is low: the ballast was given up to be able to start", "dir", g.dir, "free", free)
		}
		if free, _, err = g.space(g.dir); err != nil {
			return fmt.Errorf("asking for the free space of %s: %w", g.dir, err)
		}
	}
	if need := min(g.floor(total), openBytes); free < need {
		return fmt.Errorf("data directory %s is on a filesystem with %d MiB free, and %d MiB are needed to start: free some space, or choose another data directory: %w",
			g.dir, free>>20, need>>20, ErrNoSpace)
	}
	return nil
}

// check fails while fewer than floor + size bytes are free.
func (g *guard) check(size int64) error {
	if g.min <= 0 {
		return nil
	}
	free, total, err := g.space(g.dir)
	if err != nil {
		return fmt.Errorf("asking for the free space of %s: %w", g.dir, err)
	}
	need := g.floor(total) + size
	g.mu.Lock()
	defer g.mu.Unlock()
	if free >= need {
		if g.tripped {
			g.log.Warn("disk space is back: appends are taken again", "dir", g.dir, "free", free)
		}
		g.tripped = false
		return nil
	}
	if !g.tripped {
		g.log.Error("disk space is low: appends are refused until some is freed", "dir", g.dir, "free", free, "needed", need)
	}
	g.tripped = true
	if free < need/4 && os.Remove(g.ballast) == nil {
		g.log.Warn("disk space is very low: the ballast was given up", "dir", g.dir)
	}
	return fmt.Errorf("%w: %d MiB free under %s, %d MiB must stay free", ErrNoSpace, free>>20, g.dir, need>>20)
}

// roomy says whether size bytes beyond the floor are free: for what can be done without, so it trips nothing.
func (g *guard) roomy(size int64) bool {
	if g.min <= 0 {
		return true
	}
	free, total, err := g.space(g.dir)
	return err == nil && free >= g.floor(total)+size
}

// spare says whether there is space for a few bytes of which much depends.
func (g *guard) spare() bool {
	free, total, err := g.space(g.dir)
	return err == nil && free >= g.floor(total)/8
}

// wait returns when a few bytes can be written safely, or stop is closed. Raft panics when its stable store fails.
func (g *guard) wait(stop <-chan struct{}) bool {
	return g.waitFor(stop, 0)
}

// waitFor returns true when size bytes are free, and an eighth of the floor; false when stop is closed.
func (g *guard) waitFor(stop <-chan struct{}, size int64) bool {
	if g.min <= 0 {
		return true
	}
	for {
		free, total, err := g.space(g.dir)
		if err == nil && free >= max(g.floor(total)/8, min(size, g.floor(total))) {
			return true
		}
		g.giveUp("disk space is very low: the ballast was given up")
		select {
		case <-stop:
			return false
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// closable says whether the database can be closed, which writes a table; a ballast is given up for it.
func (g *guard) closable() error {
	if isReadOnlyDir(g.dir) {
		return errors.New("the filesystem is read-only")
	}
	if g.min <= 0 {
		return nil
	}
	for {
		free, _, err := g.space(g.dir)
		if err != nil || free >= openBytes {
			return err
		}
		if !g.giveUp("disk space is low: the ballast was given up to be able to close") {
			return fmt.Errorf("%w: %d MiB", ErrNoSpace, free>>20)
		}
	}
}

// inflate creates the ballast if the filesystem has plenty of room.
func (g *guard) inflate() {
	if g.min <= 0 {
		return
	}
	free, total, err := g.space(g.dir)
	size := min(ballastBytes, total/8)
	if info, serr := os.Stat(g.ballast); serr == nil && info.Size() == size || err != nil {
		return
	}
	if free < g.floor(total)+ballastRoom*size {
		return
	}
	f, err := os.OpenFile(g.ballast, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		g.log.Debug("creating the ballast", "err", err)
		return
	}
	if err := errors.Join(allocate(f, size), f.Close()); err != nil {
		g.log.Debug("creating the ballast", "err", err)
		os.Remove(g.ballast)
	}
}

// wrote is called before each transaction: badger may flush and compact for a while.
func (g *guard) wrote() {
	if g.active.Add(1) == 1 {
		select {
		case g.wake <- struct{}{}:
		default:
		}
	}
}

// watch raises the barrier and gives up the ballast as soon as space is very low, and gives badger's newest write-ahead
// log its blocks: what is written there then needs no space. It sleeps while nothing is written.
func (g *guard) watch(b *barrier, stop <-chan struct{}) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	logs := prealloc{dir: b.dir}
	relaxed := false
	for last := time.Now(); ; {
		select {
		case <-stop:
			return
		case <-g.wake:
			last, relaxed = time.Now(), false
			tick.Reset(watchEvery)
			continue
		case <-tick.C:
		}
		if g.active.Swap(0) > 0 {
			last = time.Now()
		}
		_, up := b.up()
		idle := time.Since(last) > watchAfter
		if idle && up {
			tick.Reset(watchBarrier)
		} else if idle {
			tick.Stop()
		}
		free, total, err := g.space(g.dir)
		if calm := err == nil && !up && free > g.floor(total)+watchAhead; calm != relaxed && !idle {
			if relaxed = calm; calm {
				tick.Reset(watchCalmly)
			} else {
				tick.Reset(watchEvery)
			}
		}
		switch {
		case err != nil:
		case free < g.floor(total)*3/4:
			b.raise()
			g.giveUp("disk space is very low: the ballast was given up")
		case up && free >= g.floor(total):
			b.lower()
			relaxed = false
			tick.Reset(watchEvery)
		case !up && free > g.floor(total)+walBytes:
			if name := logs.newest(); name != "" {
				if err := reserve(name, walBytes); err != nil {
					g.log.Debug("reserving the blocks of a write-ahead log", "file", name, "err", err)
				}
			}
		}
	}
}

// giveUp removes the ballast, if there is one.
func (g *guard) giveUp(why string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if os.Remove(g.ballast) != nil {
		return false
	}
	g.log.Warn(why, "dir", g.dir)
	return true
}

// Room fails with ErrNoSpace while appends of size bytes would. Who asks before it hands an entry to raft can refuse it
// and go on leading: raft gives up leadership when its log fails.
func (s *Store) Room(size int64) error {
	if s.files == nil {
		return nil
	}
	return s.files.guard.check(size)
}

// Full says that appends fail for want of space, or are about to.
func (s *Store) Full() bool {
	return s.files != nil && !s.files.guard.roomy(fullAhead)
}

// Roomy says that it is a while until Full will be: whoever takes on work for another must not give it back at once.
func (s *Store) Roomy() bool {
	return s.files == nil || s.files.guard.roomy(2*fullAhead)
}

func (s *Store) checkSpace() error {
	return s.Room(0)
}
