package store

import (
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

const (
	walSuffix      = ".mem" // badger's write-ahead logs: 00001.mem and so on, ascending
	valueLogSuffix = ".vlog"
	// walBytes is what badger uses of a log before it begins the next; the file is twice a memtable long.
	walBytes = memTableBytes + 256<<10

	// For each preallocEvery bytes of raft's log preallocChunk bytes are made ready: twice as much, because flushes go
	// to the same file. A sync of badger that comes in between has to write the chunk too, so all 8 MiB at once would
	// be seen in the commits' p99.
	preallocEvery = 128 << 10
	preallocChunk = 256 << 10
	// preallocWithin is how soon preallocEvery must be reached: 2 MiB/s. Below that there is no queue of commits that
	// would gain, and a chunk would only be one commit in a hundred that takes longer.
	preallocWithin = 64 * time.Millisecond

	// preallocAhead is how many numbers are tried; badger keeps three memtables.
	preallocAhead = 4
	// preallocRescan is after how many bytes without a new file the directory is read instead.
	preallocRescan = 4 * memTableBytes
)

// prealloc gives badger's write-ahead log its blocks before badger writes to it. The file is sparse, and each sync of
// a page that has no block yet waits for the filesystem's journal; where the block is there and written, a sync
// overwrites it in place, which takes ext4 half the time or less.
//
// Nothing but zero pages is added, and only where badger has not been: what a sparse file reads as too, so the end of
// the log stays where it is.
type prealloc struct {
	dir   string // badger's
	guard *guard
	log   *slog.Logger

	grown atomic.Int64 // bytes since the last kick was taken
	kick  chan struct{}

	// The goroutine's own.
	file   string // that badger writes to; "": not known, or done with
	at     int64  // where file's next chunk begins
	last   time.Time
	next   int   // the first number not seen; 0: read the directory
	barren int64 // bytes since a file was found
}

// newPrealloc gives nil where it would not help.
func newPrealloc(opt Options, f *files, log *slog.Logger) *prealloc {
	if f == nil || !opt.Fsync || !overwritesInPlace(f.dir) {
		return nil
	}
	return &prealloc{dir: f.database(), guard: f.guard, log: log, kick: make(chan struct{}, 1)}
}

// grew is called when n bytes were written; it costs an atomic add. So nothing wakes up while nothing is written.
func (p *prealloc) grew(n int) {
	if p == nil || p.grown.Add(int64(n)) < preallocEvery {
		return
	}
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// run ends when stop is closed, and must have ended before badger closes.
func (p *prealloc) run(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-p.kick:
		}
		p.barren += p.grown.Swap(0)
		now := time.Now()
		slow := now.Sub(p.last) > preallocWithin
		if p.last = now; slow {
			continue
		}
		if file := p.newest(); file != "" {
			p.file, p.at = file, 0
		}
		if p.file == "" {
			continue
		}
		if err := p.extend(); err != nil {
			// It was deleted under us, or the disk is full: badger goes on as it would have, or the guard sees to it.
			p.log.Debug("allocating a write-ahead log ahead of its use", "file", p.file, "err", err)
			p.file = ""
		}
	}
}

// newest is the write-ahead log that badger writes to now, "" if it was seen before. Older ones are full.
func (p *prealloc) newest() string {
	found := 0
	if p.next == 0 || p.barren > preallocRescan {
		found = p.scan()
		if found < p.next {
			found = 0
		}
		p.barren = 0
	} else {
		for n := p.next; n < p.next+preallocAhead; n++ {
			if _, err := os.Lstat(p.path(n)); err == nil {
				found = n
			}
		}
	}
	if found == 0 {
		return ""
	}
	p.next, p.barren = found+1, 0
	return p.path(found)
}

func (p *prealloc) path(n int) string {
	return walName(p.dir, n)
}

// scan gives the highest number in the directory, 0 if there is none.
func (p *prealloc) scan() int {
	dir, err := os.Open(p.dir)
	if err != nil {
		return 0
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1) // what could be read will do
	highest := 0
	for _, name := range names {
		highest = max(highest, walNumber(name))
	}
	return highest
}
