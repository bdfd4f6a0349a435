package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"
)

const (
	raftLogVersion = 1

	// storeTxnBytes is where a StoreLogs call is split; badger's limit for a transaction is 1.2 MiB.
	storeTxnBytes = 1 << 20
	// MaxLogBytes is the largest entry: a value of 1 MiB would go to badger's value log.
	MaxLogBytes = 1<<20 - 1<<10
	deleteChunk = 1000

	// The newest entries stay in memory for replication. raft.LogCache counts entries only: 1,024 of 128 KiB each
	// would be 128 MiB.
	cacheEntries = 1024
	cacheBytes   = 8 << 20
)

// RaftLog is raft's log. Only raft's main goroutine writes it.
type RaftLog struct {
	s *Store

	mu          sync.Mutex
	first, last uint64 // 0, 0: empty
	acked       uint64 // last index that StoreLogs has returned nil for
	stale       uint64 // highest index a failed StoreLogs may have left above last
	bytes       int64  // of the values of first to last
	written     int64  // of all values since Open
	cache       logCache
}

var _ raft.LogStore = (*RaftLog)(nil)

// FirstIndex is the lowest index kept, 0 if the log is empty.
func (l *RaftLog) FirstIndex() (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first, nil
}

// LastIndex is the highest index stored, 0 if the log is empty.
func (l *RaftLog) LastIndex() (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last, nil
}

// Size is how many entries the log holds, and their bytes.
func (l *RaftLog) Size() (entries uint64, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == 0 {
		return 0, 0
	}
	return l.last - l.first + 1, l.bytes
}

// ever is how many bytes have been stored since Open, deleted ones too.
func (l *RaftLog) ever() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written
}

// GetLog reads one entry and checks its CRC.
func (l *RaftLog) GetLog(index uint64, out *raft.Log) error {
	l.mu.Lock()
	cached := l.cache.get(index)
	last := l.last
	l.mu.Unlock()
	if cached != nil {
		*out = *cached
		return nil
	}
	if index > last {
		return raft.ErrLogNotFound // it may be there all the same, left by a StoreLogs that failed
	}
	key := raftLogKey(index)
	value, err := l.s.get(key)
	if err != nil {
		return fmt.Errorf("reading raft log entry %d: %w", index, err)
	}
	if value == nil {
		return raft.ErrLogNotFound
	}
	if err := decodeLog(key, value, out); err != nil {
		return l.s.damaged(fmt.Sprintf("raft log entry %d: %v", index, err))
	}
	return nil
}

// StoreLog stores one entry.
func (l *RaftLog) StoreLog(entry *raft.Log) error {
	return l.StoreLogs([]*raft.Log{entry})
}

// StoreLogs stores entries of ascending index, and nothing stays above the last of them. When it returns nil they are
// on disk. It fails with ErrNoSpace before the disk is full.
func (l *RaftLog) StoreLogs(entries []*raft.Log) error {
	if len(entries) == 0 {
		return nil
	}
	return l.store(entries, nil)
}

// room fails with ErrNoSpace where there is none. What raft itself writes in order to lead, a few bytes, is taken as
// long as a vote is: so there is a leader that answers what is only read.
func (l *RaftLog) room(entries []*raft.Log, total int) error {
	err := l.s.Room(int64(total))
	command := func(e *raft.Log) bool { return e.Type == raft.LogCommand }
	if errors.Is(err, ErrNoSpace) && !slices.ContainsFunc(entries, command) && l.s.files.guard.spare() {
		return nil
	}
	return err
}

// store splits entries into transactions; more goes into the first.
func (l *RaftLog) store(entries []*raft.Log, more func(*badger.Txn) error) error {
	values := make([][]byte, len(entries))
	total := 0
	for i, e := range entries {
		if len(e.Data)+len(e.Extensions) > MaxLogBytes {
			return fmt.Errorf("raft log entry %d has %d bytes, over the limit of %d", e.Index, len(e.Data), MaxLogBytes)
		}
		values[i] = encodeLog(e)
		total += len(values[i])
	}
	if err := l.room(entries, total); err != nil {
		return err
	}
	l.mu.Lock()
	above := max(l.last, l.stale)
	l.stale = max(above, entries[len(entries)-1].Index)
	l.mu.Unlock()
	for from := 0; from < len(entries); {
		to, size := from+1, len(values[from])
		for to < len(entries) && size+len(values[to]) <= storeTxnBytes {
			size += len(values[to])
			to++
		}
		err := l.s.write(func(txn *badger.Txn) error {
			return l.fill(txn, entries, values, from, to, above, more)
		})
		if err != nil {
			if from > 0 {
				// Entries of this call are on disk and the caller believes that none is: after a restart the log would end in
				// an old term, and votes would go wrong. Only a new start from what is on disk can be trusted.
				l.s.fatal(fmt.Errorf("storing raft log entries %d to %d: a part is on disk and the rest failed: %w",
					entries[0].Index, entries[len(entries)-1].Index, err))
			}
			return fmt.Errorf("storing raft log entries from %d: %w", entries[from].Index, err)
		}
		from, more = to, nil
	}
	l.stored(entries, total, above)
	_ = l.writeMark() // keep says if it cannot be written
	l.s.prealloc.grew(total)
	return nil
}

// fill writes entries[from:to]; with the last of them goes whatever lies above.
func (l *RaftLog) fill(txn *badger.Txn, entries []*raft.Log, values [][]byte, from, to int, above uint64, more func(*badger.Txn) error) error {
	if more != nil {
		if err := more(txn); err != nil {
			return err
		}
	}
	for i := from; i < to; i++ {
		if err := txn.Set(raftLogKey(entries[i].Index), values[i]); err != nil {
			return err
		}
	}
	if to < len(entries) {
		return nil
	}
	for index := entries[to-1].Index + 1; index <= above; index++ {
		if err := txn.Delete(raftLogKey(index)); err != nil {
			return err
		}
	}
	return nil
}

func (l *RaftLog) stored(entries []*raft.Log, size int, above uint64) {
	first, last := entries[0].Index, entries[len(entries)-1].Index
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == 0 || first < l.first {
		l.first = first
	}
	if above > last {
		l.cache.drop()
	}
	l.last, l.acked, l.stale = last, last, last
	l.bytes += int64(size)
	l.written += int64(size)
	for _, e := range entries {
		l.cache.put(e)
	}
}

// DeleteRange removes the entries from lo to hi, which are all below or all above what stays. A suffix goes from
// above, so that a crash in between leaves no hole, and after the watermark has come down.
func (l *RaftLog) DeleteRange(lo, hi uint64) error {
	l.mu.Lock()
	first, last := l.first, l.last
	l.cache.drop()
	l.mu.Unlock()
	lo, hi = max(lo, first), min(hi, last)
	if last == 0 || lo > hi {
		return nil
	}
	suffix := hi == last
	if suffix {
		if err := l.lowerMark(lo - 1); err != nil {
			return fmt.Errorf("lowering the watermark: %w", err)
		}
	}
	for lo <= hi {
		from, to := lo, min(hi, lo+deleteChunk-1)
		if suffix {
			from, to = max(lo, hi-min(hi, deleteChunk-1)), hi
		}
		size, err := l.deleteChunk(from, to)
		if err != nil {
			return fmt.Errorf("deleting raft log entries %d to %d: %w", from, to, err)
		}
		l.mu.Lock()
		l.bytes -= size
		if suffix {
			l.last, hi = from-1, from-1
			l.acked = min(l.acked, l.last)
		} else {
			l.first, lo = to+1, to+1
		}
		if l.first > l.last {
			l.first, l.last, l.bytes = 0, 0, 0
		}
		l.mu.Unlock()
	}
	return nil
}

func (l *RaftLog) deleteChunk(from, to uint64) (size int64, err error) {
	err = l.s.update(func(txn *badger.Txn) error {
		for index := from; index <= to; index++ {
			key := raftLogKey(index)
			if item, err := txn.Get(key); err == nil {
				size += item.ValueSize()
			}
			if err := txn.Delete(key); err != nil {
				return err
			}
		}
		return nil
	})
	return size, err
}

// lowerMark brings the watermark down to index, on disk.
func (l *RaftLog) lowerMark(index uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acked = min(l.acked, index)
	if l.s.files == nil || l.s.files.mark.index <= index {
		return nil
	}
	m := l.s.files.mark.marks
	m.index = index
	return l.s.files.mark.write(m, true)
}

// writeMark raises the watermark to what has been acknowledged. A few hundred nanoseconds in the page cache, so it is
// done at once: what a kill leaves is then known to the last entry.
func (l *RaftLog) writeMark() error {
	if l.s.files == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.s.files.mark.marks
	m.index = max(m.index, l.acked)
	m.version = max(m.version, l.s.version.Load())
	return l.s.files.mark.write(m, false)
}

// startMark sets the watermark to what was found at Open. The database may count its transactions from a lower
// number than before: it goes on after the newest that still has a key, so this comes before the first.
func (l *RaftLog) startMark() error {
	if l.s.files == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.s.files.mark.marks
	m.index, m.version = max(m.index, l.acked), l.s.db.MaxVersion()
	return l.s.files.mark.write(m, m.version < l.s.files.mark.version)
}

// noteManifest puts into the watermark how long badger's MANIFEST was a tick ago, and is.
func (l *RaftLog) noteManifest(now manifestMark) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.s.files.mark.marks
	m.manifest = now
	return l.s.files.mark.write(m, false)
}

// load finds first and last, and checks that the log has no hole, ends where it must, and that what is still to be
// applied can be read.
func (l *RaftLog) load() error {
	*l = RaftLog{s: l.s}
	err := l.s.db.View(func(txn *badger.Txn) error {
		opt := badger.DefaultIteratorOptions
		opt.PrefetchValues = false
		opt.Prefix = []byte{rangeRaftLog, shard}
		it := txn.NewIterator(opt)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			item := it.Item()
			index := raftLogIndex(item.Key())
			if l.first == 0 {
				l.first = index
			} else if index != l.last+1 {
				return l.s.damaged(fmt.Sprintf("raft's log has a hole between %d and %d", l.last, index))
			}
			l.last = index
			l.bytes += item.ValueSize()
			if index <= l.s.flushed.Index {
				continue // only followers read it again, and GetLog checks it then
			}
			var entry raft.Log
			err := item.Value(func(v []byte) error { return decodeLog(item.Key(), v, &entry) })
			if err != nil {
				return l.s.damaged(fmt.Sprintf("raft log entry %d: %v", index, err))
			}
		}
		return nil
	})
	if err != nil {
		var damaged *DamagedError
		if !errors.As(err, &damaged) {
			return fmt.Errorf("reading raft's log: %w", err)
		}
		return err
	}
	l.acked, l.stale = l.last, l.last
	if installed := l.s.flushed.Installed; l.last > 0 && l.last < installed {
		// The crash came between a restore and the dropping of the log below it.
		if err := l.reset(installed); err != nil {
			return err
		}
	}
	return l.checkEnds()
}

func (l *RaftLog) checkEnds() error {
	applied, installed := l.s.flushed.Index, l.s.flushed.Installed
	// After a snapshot from elsewhere raft's log may end below it, or be empty.
	last, need := max(l.last, installed), applied
	if l.s.files != nil {
		need = max(need, l.s.files.mark.index)
	}
	if last < need {
		err := &DamagedError{Dir: l.s.opt.Dir, Reason: fmt.Sprintf("raft's log ends at %d, but everything up to %d was acknowledged", last, need)}
		if last >= applied {
			err.spare = watermarkName
		}
		return err
	}
	if l.last > applied && l.first > applied+1 {
		return l.s.damaged(fmt.Sprintf("raft's log begins at %d, but entries from %d on are still to be applied", l.first, applied+1))
	}
	return nil
}

// reset drops the entries up to index, after a snapshot from elsewhere has taken their place.
func (l *RaftLog) reset(index uint64) error {
	last, _ := l.LastIndex()
	if last > index {
		last = index
	}
	first, _ := l.FirstIndex()
	return l.DeleteRange(first, last)
}

func encodeLog(e *raft.Log) []byte {
	b := make([]byte, 0, len(e.Data)+len(e.Extensions)+40)
	b = append(b, raftLogVersion, byte(e.Type))
	b = binary.AppendUvarint(b, e.Term)
	var at int64
	if !e.AppendedAt.IsZero() {
		at = e.AppendedAt.UnixNano()
	}
	b = binary.AppendVarint(b, at)
	b = binary.AppendUvarint(b, uint64(len(e.Extensions)))
	b = append(b, e.Extensions...)
	b = append(b, e.Data...)
	return seal(raftLogKey(e.Index), b)
}

// decodeLog copies what it keeps: value may belong to badger.
func decodeLog(key, value []byte, out *raft.Log) error {
	value, ok := unseal(key, value)
	if !ok {
		return errors.New("checksum mismatch")
	}
	r := reader{b: value}
	if v := r.byte(); v != raftLogVersion {
		return fmt.Errorf("unknown version %d", v)
	}
	*out = raft.Log{Index: raftLogIndex(key), Type: raft.LogType(r.byte()), Term: r.uvarint()}
	at, n := binary.Varint(r.b)
	if n <= 0 {
		return errMalformed
	}
	r.b = r.b[n:]
	if at != 0 {
		out.AppendedAt = time.Unix(0, at)
	}
	ext := r.bytes(r.uvarint())
	if r.bad {
		return errMalformed
	}
	both := append(make([]byte, 0, len(ext)+len(r.b)), ext...)
	both = append(both, r.b...)
	if len(ext) > 0 {
		out.Extensions = both[:len(ext):len(ext)]
	}
	out.Data = both[len(ext):]
	return nil
}

// logCache is a ring of the newest entries, bounded by number and bytes.
type logCache struct {
	ring   [cacheEntries]*raft.Log
	oldest uint64 // index of the oldest that may be in the ring
	newest uint64
	bytes  int
}

func (c *logCache) get(index uint64) *raft.Log {
	if e := c.ring[index%cacheEntries]; e != nil && e.Index == index {
		return e
	}
	return nil
}

func (c *logCache) put(e *raft.Log) {
	if c.newest == 0 || e.Index != c.newest+1 {
		c.drop()
		c.oldest = e.Index
	}
	if e.Index-c.oldest >= cacheEntries {
		c.evict()
	}
	c.ring[e.Index%cacheEntries] = e
	c.newest = e.Index
	c.bytes += len(e.Data)
	for c.bytes > cacheBytes && c.oldest < c.newest {
		c.evict()
	}
}

func (c *logCache) evict() {
	slot := &c.ring[c.oldest%cacheEntries]
	if *slot != nil {
		c.bytes -= len((*slot).Data)
		*slot = nil
	}
	c.oldest++
}

func (c *logCache) drop() {
	*c = logCache{}
}
