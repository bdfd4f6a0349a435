package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/hashicorp/raft"
)

// Limits of the store. A transaction of badger may hold 15 % of a memtable: 1.2 MiB and some 12,000 keys.
const (
	memTableBytes   = 8 << 20
	baseLevelBytes  = 128 << 20
	levelZeroTables = 5 // are compacted

	// MaxKeyBytes and MaxEntryRecords are what one entry must keep to be flushed in one transaction.
	MaxKeyBytes     = 40 << 10
	MaxEntryRecords = 8192

	flushBytes    = 8 << 20 // the tail is flushed when it holds this much
	flushEvery    = 5 * time.Second
	tailMaxBytes  = 16 << 20  // Append waits for the flush beyond this
	flushTxnBytes = 256 << 10 // of one flush transaction: small, so that an append waits a millisecond, not ten
	// thinTxnBytes is the same where much is left out: the larger the part of the tail, the more. Both lie in the
	// transaction twice, in a block and in latest.
	thinTxnBytes = 512 << 10
	// thinFrom is how large a tail must be for a flush to leave out what the same transaction supersedes: some 1,500
	// commits a second. Below that the history keeps every commit for its first minutes; above, HistoryBytes would drop
	// most of them anyway, after they have been written three times.
	thinFrom  = 1 << 20
	keepEvery = time.Second
	// ballastTicks is how often a ballast that was given up is looked for.
	ballastTicks = 15
)

// Options of a Store.
type Options struct {
	// Dir holds everything; "" keeps everything in memory.
	Dir string
	// Fsync false leaves appended entries to the page cache: they survive kill -9, not a power cut.
	Fsync bool
	// MinFree is how many bytes must stay free on the filesystem for appends to be taken; 0 is no guard.
	MinFree int64
	// Quarantine moves damaged parts aside within Dir and starts as a new, empty node instead of failing.
	Quarantine bool
	Logger     *slog.Logger
	// OnFatal is called once, on a goroutine of its own, when the store must not be used any more.
	OnFatal func(error)

	// Space gives the free bytes under dir and the filesystem's size; nil asks the filesystem.
	Space func(dir string) (free, total int64, err error)

	hook func(point string) // told what a restore has done, in tests
}

func (s *Store) reached(point string) {
	if s.opt.hook != nil {
		s.opt.hook(point)
	}
}

// Store is one open database.
type Store struct {
	opt   Options
	log   *slog.Logger
	db    *badger.DB
	files *files // nil in memory
	id    string

	raftLog   RaftLog
	stable    Stable
	snapshots Snapshots
	local     Local

	// mu guards the tail: what is applied and not yet flushed.
	mu        sync.Mutex
	room      *sync.Cond
	tail      []tailEntry
	tailBytes int
	current   State // with the tail
	flushed   State // without it; written under flushMu as well
	closing   bool

	// flushMu is held by whoever writes the compacted log: a flush, the compactor, a restore.
	flushMu   sync.Mutex
	restoring sync.RWMutex // held for writing while the compacted log is replaced

	barrier   *barrier // nil in memory
	compactor compactor
	prealloc  *prealloc // nil: not worth it here
	wal       *walSync  // nil: badger syncs, or nobody does
	kick      chan struct{}
	stop      chan struct{}
	workers   sync.WaitGroup

	version  atomic.Uint64 // of badger's transactions all up to this one have been acknowledged
	broken   atomic.Pointer[error]
	fatality sync.Once
}

// Open opens or creates the store. Its errors name the directory and the way out; see DamagedError, LockedError,
// NewerFormatError.
func Open(opt Options) (*Store, error) {
	s := &Store{opt: opt, log: opt.Logger, kick: make(chan struct{}, 1), stop: make(chan struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.room = sync.NewCond(&s.mu)
	s.raftLog.s, s.stable.s, s.snapshots.s, s.local.s = s, s, s, s
	err := s.open()
	var damaged *DamagedError
	if errors.As(err, &damaged) && opt.Quarantine && s.files != nil {
		aside, qerr := s.files.quarantine(time.Now())
		if qerr != nil {
			err = fmt.Errorf("moving damaged parts aside: %w", errors.Join(qerr, err))
		} else {
			s.log.Error("data directory was damaged: its parts were moved aside, starting as a new, empty node",
				"dir", opt.Dir, "aside", aside, "damage", damaged.Reason)
			err = s.open()
		}
	}
	if err != nil {
		s.shut()
		return nil, err
	}
	s.workers.Go(s.keep)
	s.workers.Go(s.compact)
	if s.files != nil && opt.MinFree > 0 {
		s.files.guard.wrote()
		s.workers.Go(func() { s.files.guard.watch(s.barrier, s.stop) })
	}
	if s.prealloc = newPrealloc(opt, s.files, s.log); s.prealloc != nil {
		s.workers.Go(func() { s.prealloc.run(s.stop) })
	}
	return s, nil
}

// open does one attempt; whatever it opened is left to shut.
func (s *Store) open() error {
	if s.opt.Dir != "" && s.files == nil {
		f, err := openFiles(s.opt, s.log)
		if err != nil {
			return err
		}
		s.files = f
		s.barrier = &barrier{dir: f.database(), log: s.log}
	}
	if s.files != nil {
		if err := s.files.prepare(); err != nil {
			return err
		}
	}
	if err := s.checkDatabase(); err != nil {
		return err
	}
	db, err := openBadger(s.badgerOptions())
	if err != nil {
		return s.openError(err)
	}
	s.db = db
	if ownSync && s.opt.Fsync && s.files != nil {
		s.wal = &walSync{dir: s.files.database()}
	}
	if err := s.load(); err != nil {
		if cerr := s.closeDatabase(); cerr != nil {
			s.log.Warn("closing the database", "err", cerr)
		}
		s.db = nil
		return err
	}
	return nil
}

func (s *Store) badgerOptions() badger.Options {
	dir := ""
	if s.files != nil {
		dir = s.files.database()
	}
	return badger.DefaultOptions(dir).
		WithInMemory(dir == "").
		WithSyncWrites(s.opt.Fsync && !ownSync).
		WithMemTableSize(memTableBytes).
		// Up to this size the tree is level 0 and the last one: with 10 MiB each byte was written once more for level 5,
		// and for large commits once more for level 4.
		WithBaseLevelSize(baseLevelBytes).
		// Fewer tables in level 0 (2, stalled at 4) made writers wait for compaction: a third of the throughput.
		WithNumMemtables(3).
		WithNumLevelZeroTables(levelZeroTables).
		WithNumLevelZeroTablesStall(15).
		WithNumCompactors(2).
		WithBlockCacheSize(0).
		WithBloomFalsePositive(0). // no key is asked for that is not there
		WithIndexCacheSize(0).
		WithCompression(options.None).
		WithChecksumVerificationMode(options.NoVerification). // database.check has done it
		// Nothing may reach the value log: its failed syncs are only logged, and its collector has had bugs that brought
		// deleted keys back (badger#2286, #2310).
		WithValueThreshold(1 << 20).
		WithValueLogFileSize(1 << 20).
		WithDetectConflicts(false).
		WithMetricsEnabled(false).
		WithNumVersionsToKeep(1).
		WithLogger(badgerLogger{s.log, s.barrier})
}

// load reads what is kept in memory and checks that nothing acknowledged is missing.
func (s *Store) load() error {
	state := State{}.clone()
	if v, err := s.get(appliedKey); err != nil {
		return err
	} else if v != nil {
		b, ok := unseal(appliedKey, v)
		if !ok {
			return s.damaged("the applied state fails its checksum")
		}
		if state, err = decodeState(b); err != nil {
			return s.damaged(err.Error())
		}
	}
	s.current, s.flushed = state.clone(), state
	if err := s.resumeRestore(); err != nil {
		return err
	}
	if err := s.raftLog.load(); err != nil {
		return err
	}
	if err := s.raftLog.startMark(); err != nil {
		return fmt.Errorf("writing %s: %w", s.files.path(watermarkName), err)
	}
	id, err := s.local.Get(nodeIDKey)
	if err != nil {
		return err
	}
	if id == nil {
		id = []byte(newUUID())
		if err := s.local.Put(nodeIDKey, id); err != nil {
			return fmt.Errorf("writing node id: %w", err)
		}
	}
	s.id = string(id)
	return nil
}

const nodeIDKey = "node-id"

func newUUID() string {
	var u [16]byte
	_, _ = rand.Read(u[:]) // never fails (crypto/rand since Go 1.24)
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// ID is this node's: a UUID minted when the database was created, never taken from a name that may come back.
func (s *Store) ID() string { return s.id }

// RaftLog is raft's log store.
func (s *Store) RaftLog() *RaftLog { return &s.raftLog }

// Stable is raft's stable store.
func (s *Store) Stable() *Stable { return &s.stable }

// Snapshots is raft's snapshot store.
func (s *Store) Snapshots() *Snapshots { return &s.snapshots }

// Local keeps this node's own small keys.
func (s *Store) Local() *Local { return &s.local }

// State is how far the log has been applied, the tail included.
func (s *Store) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current.clone()
}

// Bootstrap writes the first configuration of a new cluster. Unlike raft.BootstrapCluster it is one transaction: a
// crash between raft's two writes would leave a term without a log, which can neither vote nor be bootstrapped.
func (s *Store) Bootstrap(c raft.Configuration) error {
	if fresh, err := s.Fresh(); err != nil || !fresh {
		return errors.Join(err, errors.New("bootstrapping: the store already has raft state"))
	}
	entry := &raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(c)}
	return s.raftLog.store([]*raft.Log{entry}, func(txn *badger.Txn) error {
		return txn.Set(stableKey(keyCurrentTerm), encodeUint64(1))
	})
}

// Quarantined says whether damaged parts lie aside in the directory: a fresh store there has had a state before.
func (s *Store) Quarantined() bool {
	if s.files == nil {
		return false
	}
	aside, err := filepath.Glob(s.files.path(quarantinePrefix + "*"))
	return err == nil && len(aside) > 0
}

// Fresh says whether raft has never run here.
func (s *Store) Fresh() (bool, error) {
	return freshState(&s.stable, &s.raftLog, &s.snapshots)
}

func freshState(stable raft.StableStore, log raft.LogStore, snaps raft.SnapshotStore) (bool, error) {
	state, err := raft.HasExistingState(log, stable, snaps)
	return !state, err
}

// get reads a small value; nil if there is none.
func (s *Store) get(key []byte) (value []byte, err error) {
	err = s.db.View(func(txn *badger.Txn) error {
		value, err = getFrom(txn, key)
		return err
	})
	return value, err
}

func getFrom(txn *badger.Txn, key []byte) ([]byte, error) {
	item, err := txn.Get(key)
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return item.ValueCopy(nil)
}

// update runs one transaction; when it returns nil the writes are on disk.
func (s *Store) update(fill func(*badger.Txn) error) error {
	return s.transact(fill, 0)
}

// write is update for a fill that does write something, so that its transaction has a version of its own.
func (s *Store) write(fill func(*badger.Txn) error) error {
	return s.transact(fill, 1)
}

func (s *Store) transact(fill func(*badger.Txn) error, own uint64) error {
	if err := s.Err(); err != nil {
		return err
	}
	txn := s.db.NewTransaction(true)
	defer txn.Discard()
	version := txn.ReadTs() + own // at least; others may come in between
	if s.files != nil {
		s.files.guard.wrote()
	}
	if err := fill(txn); err != nil {
		return err
	}
	err := txn.Commit()
	if err == nil && s.wal != nil {
		err = s.wal.sync()
	}
	if err != nil {
		if !s.db.IsClosed() {
			// What a failed sync has left on disk nobody knows, and a memtable that could not be made ends the process at
			// the next write (badger's ensureRoomForWrite).
			s.fatal(fmt.Errorf("the database failed to write, see to the disk under %s: %w", s.opt.Dir, err))
		}
		return err
	}
	for old := s.version.Load(); old < version && !s.version.CompareAndSwap(old, version); old = s.version.Load() {
	}
	return nil
}

// Err is why the store must not be used any more, or nil.
func (s *Store) Err() error {
	if p := s.broken.Load(); p != nil {
		return *p
	}
	return nil
}

// fatal makes the store refuse every further write.
func (s *Store) fatal(err error) {
	s.broken.CompareAndSwap(nil, &err)
	s.mu.Lock()
	s.room.Broadcast()
	s.mu.Unlock()
	s.fatality.Do(func() {
		s.log.Error("the store cannot go on", "err", err)
		if s.opt.OnFatal != nil {
			go s.opt.OnFatal(err)
		}
	})
}

// keep flushes the tail, writes the watermark, and gives memory back after a load.
func (s *Store) keep() {
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	last := time.Now()
	var load calm
	var marks markKeeper
	ticks := 0
	for {
		select {
		case <-s.stop:
			return
		case <-s.kick:
		case <-tick.C:
			marks.keep(s)
			if s.files != nil && ticks%ballastTicks == 0 {
				s.files.guard.inflate()
			}
			ticks++
			if load.tick(s.raftLog.ever()) {
				debug.FreeOSMemory()
			}
			if time.Since(last) < flushEvery {
				continue
			}
		}
		last = time.Now()
		if err := s.flush(allOfTail); err != nil && s.Err() == nil {
			s.log.Warn("flushing the tail failed; it stays in memory and in raft's log", "err", err)
		}
	}
}

// Close flushes, writes the watermark and closes the database. Raft must have stopped.
func (s *Store) Close() error {
	s.Release()
	s.workers.Wait()
	var err error
	if s.Err() == nil {
		if err = s.flush(allOfTail); errors.Is(err, ErrNoSpace) {
			s.log.Warn("closing without a flush; the tail will be replayed from raft's log", "err", err)
			err = nil
		}
		_ = s.raftLog.writeMark()
	}
	return errors.Join(err, s.shut())
}

// Release begins the end: everything that waits for space gives up, Append fails with ErrClosing, and the workers
// stop. Raft may still be running, and can be stopped now whatever it was waiting for. Close follows.
func (s *Store) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		s.closing = true
		close(s.stop)
		s.room.Broadcast()
	}
}

// closeDatabase closes badger, which writes its memtable into a table: by mmap, which a full disk answers with SIGBUS,
// and again and again until it succeeds. Where it would not, the database is left as a kill leaves it: nothing is lost,
// but this process cannot open it again.
func (s *Store) closeDatabase() error {
	if s.files != nil {
		if err := s.files.guard.closable(); err != nil {
			s.log.Warn("the database is left without being closed; the next start replays its log", "err", err)
			return nil
		}
		s.barrier.lower() // or it would wait for it
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing the database: %w", err)
	}
	if s.files == nil || s.files.mark == nil {
		return nil
	}
	now, err := readManifestMark(s.files.database())
	if err == nil {
		err = s.raftLog.noteManifest(now)
	}
	if err != nil {
		s.log.Warn("writing the watermark", "err", err)
	}
	return nil
}

func (s *Store) shut() error {
	var err error
	if s.db != nil {
		err = s.closeDatabase()
		s.db = nil
	}
	if s.wal != nil {
		err = errors.Join(err, s.wal.close())
		s.wal = nil
	}
	if s.files != nil {
		err = errors.Join(err, s.files.close())
		s.files = nil
	}
	return err
}

// Local keeps small keys that are this node's own: never replicated, never in a snapshot.
type Local struct{ s *Store }

// Get gives the value of name, nil if there is none.
func (l *Local) Get(name string) ([]byte, error) {
	return l.s.get(localKey(name))
}

// Put keeps value under name; nil removes it. It is on disk when Put returns.
func (l *Local) Put(name string, value []byte) error {
	if err := l.s.checkSpace(); err != nil {
		return err
	}
	return l.s.update(func(txn *badger.Txn) error { return setOrDelete(txn, localKey(name), value) })
}

func setOrDelete(txn *badger.Txn, key, value []byte) error {
	if value == nil {
		return txn.Delete(key)
	}
	return txn.Set(key, value)
}

// badgerLogger passes badger's messages on: its Info is our debug.
type badgerLogger struct {
	log     *slog.Logger
	barrier *barrier
}

func (l badgerLogger) at(level slog.Level, format string, args []any) {
	if l.log.Enabled(context.Background(), level) {
		l.log.Log(context.Background(), level, "badger: "+fmt.Sprintf(format, args...))
	}
}

func (l badgerLogger) Errorf(f string, a ...any) {
	if !l.barrier.heard(f) {
		l.at(slog.LevelError, f, a)
	}
}

func (l badgerLogger) Warningf(f string, a ...any) {
	if !l.barrier.heard(f) {
		l.at(slog.LevelWarn, f, a)
	}
}

func (l badgerLogger) Infof(f string, a ...any)  { l.at(slog.LevelDebug, f, a) }
func (l badgerLogger) Debugf(f string, a ...any) {} // one message a write: its arguments alone cost more than the write

// syncDir makes renames and new files in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
