package store

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	badger "github.com/dgraph-io/badger/v4"
)

// What compaction keeps. Thinning the history by age comes with the history itself; until then superseded records
// stay for HistoryAge, and at most about HistoryBytes of them.
const (
	HistoryAge   = 10 * time.Minute
	HistoryBytes = 4 << 20
	TombstoneAge = 24 * time.Hour

	compactCheck = 5 * time.Second
	compactBytes = 8 << 20 // a pass begins when this much was written since the last, or half of what it left
	compactIdle  = 10 * time.Minute
)

// compactor says when a pass is due, and counts.
type compactor struct {
	running sync.Mutex   // one pass at a time
	written atomic.Int64 // to the log since the last pass began
	left    atomic.Int64 // bytes of the log after the last pass
	passed  atomic.Int64 // when the last pass began, Unix milliseconds
}

func (c *compactor) wrote(n int64) {
	c.written.Add(n)
}

func (c *compactor) due(now time.Time) bool {
	w, since := c.written.Load(), now.Sub(time.UnixMilli(c.passed.Load()))
	return w >= max(compactBytes, c.left.Load()/2) || w > 0 && since >= compactIdle || since >= TombstoneAge/4
}

// compact runs passes until the store closes.
func (s *Store) compact() {
	tick := time.NewTicker(compactCheck)
	defer tick.Stop()
	s.compactor.passed.Store(time.Now().UnixMilli())
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
		if !s.compactor.due(time.Now()) || s.Err() != nil || s.checkSpace() != nil {
			continue
		}
		if err := s.Compact(); err != nil && !errors.Is(err, ErrClosing) {
			s.log.Warn("compacting the log failed; it will be tried again", "err", err)
		}
	}
}

// Compact makes one pass over all partitions.
func (s *Store) Compact() error {
	return s.compactAt(time.Now())
}

func (s *Store) compactAt(now time.Time) error {
	s.compactor.running.Lock()
	defer s.compactor.running.Unlock()
	s.compactor.passed.Store(now.UnixMilli())
	s.compactor.written.Store(0)
	s.mu.Lock()
	state := s.flushed.clone()
	s.mu.Unlock()
	size, live := int64(0), int64(0)
	var plans []*partitionPlan
	for partition := range state.Next {
		p, err := s.plan(partition)
		if err != nil {
			return fmt.Errorf("compacting partition %d: %w", partition, err)
		}
		size, live = size+p.bytes, live+p.live
		plans = append(plans, p)
	}
	history := HistoryAge
	if size-live > HistoryBytes {
		history = 0
	}
	left := int64(0)
	for _, p := range plans {
		n, err := s.compactPartition(p.partition, now, history)
		if err != nil {
			return fmt.Errorf("compacting partition %d: %w", p.partition, err)
		}
		left += n
	}
	s.compactor.left.Store(left)
	return s.compactPrivate(now)
}

// partitionPlan is what is known of a partition before its pass.
type partitionPlan struct {
	partition   int32
	bytes, live int64
}

// plan sizes a partition without reading its records.
func (s *Store) plan(partition int32) (*partitionPlan, error) {
	p := &partitionPlan{partition: partition}
	err := s.view1(func(txn *badger.Txn) error {
		if err := s.eachKey(txn, partitionPrefix(rangeLog, partition), func(item *badger.Item) {
			p.bytes += item.ValueSize()
		}); err != nil {
			return err
		}
		return s.eachKey(txn, partitionPrefix(rangeLatest, partition), func(item *badger.Item) {
			p.live += item.ValueSize() + item.KeySize()
		})
	})
	return p, err
}

func (s *Store) view1(f func(*badger.Txn) error) error {
	s.restoring.RLock()
	defer s.restoring.RUnlock()
	return s.db.View(f)
}

func (s *Store) eachKey(txn *badger.Txn, prefix []byte, f func(*badger.Item)) error {
	opt := badger.DefaultIteratorOptions
	opt.PrefetchValues = false
	opt.Prefix = prefix
	it := txn.NewIterator(opt)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		if s.isClosing() {
			return ErrClosing
		}
		f(it.Item())
	}
	return nil
}

func (s *Store) isClosing() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

// compactPartition rewrites the blocks of a partition that hold a record to drop, and joins small ones.
func (s *Store) compactPartition(partition int32, now time.Time, history time.Duration) (left int64, err error) {
	run := compactRun{s: s, partition: partition, now: now, history: history, newest: map[string]int64{}}
	err = s.view1(func(txn *badger.Txn) error {
		if err := run.prepare(txn); err != nil {
			return err
		}
		opt := badger.DefaultIteratorOptions
		opt.PrefetchValues = false
		opt.Prefix = partitionPrefix(rangeLog, partition)
		it := txn.NewIterator(opt)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			if s.isClosing() {
				return ErrClosing
			}
			value, err := it.Item().ValueCopy(nil)
			if err != nil {
				return err
			}
			if err := run.block(it.Item().KeyCopy(nil), value); err != nil {
				return err
			}
		}
		return run.finish()
	})
	return run.left, err
}

// prepare learns each key's newest offset, and the partition's.
func (c *compactRun) prepare(txn *badger.Txn) error {
	value, err := getFrom(txn, appliedKey)
	if err != nil || value == nil {
		return err
	}
	body, ok := unseal(appliedKey, value)
	if !ok {
		return c.s.damaged("the applied state fails its checksum")
	}
	state, err := decodeState(body)
	if err != nil {
		return c.s.damaged(err.Error())
	}
	c.last = state.Next[c.partition] - 1
	return c.s.eachKey(txn, partitionPrefix(rangeLatest, c.partition), func(item *badger.Item) {
		_ = item.Value(func(v []byte) error {
			if st, _, err := decodeLatest(item.Key(), v); err == nil {
				c.newest[string(st.Key)] = st.Offset
			}
			return nil
		})
	})
}

// compactRun is a pass over one partition: blocks come in, fewer go out.
type compactRun struct {
	s         *Store
	partition int32
	last      int64 // the newest offset flushed: its record stays
	now       time.Time
	history   time.Duration
	newest    map[string]int64
	left      int64

	// What has been read and not yet written back.
	keys    [][]byte
	kept    []Stored
	bytes   int
	removed int
	expired []Stored // tombstones whose latest goes too
}

// Limits of one rewrite, beside blockBytes.
const (
	rewriteBlocks  = 1000
	rewriteExpired = 2000
)

// block takes one block. A run of blocks is written back when it is large enough to be left alone.
func (c *compactRun) block(key, value []byte) error {
	full := c.bytes+len(value) > blockBytes || len(c.keys) >= rewriteBlocks || len(c.expired) >= rewriteExpired
	if len(c.keys) > 0 && full {
		if err := c.finish(); err != nil {
			return err
		}
	}
	c.keys = append(c.keys, key)
	return decodeBlock(key, value, func(r *Stored) bool {
		keep, tombstone := c.keep(r)
		if keep {
			c.kept = append(c.kept, *r)
			c.bytes += len(r.Key) + len(r.Value) + 8
			return true
		}
		c.removed++
		if tombstone {
			c.expired = append(c.expired, *r)
		}
		return true
	})
}

// keep decides about a record; tombstone: it is its key's newest, and its time has come.
func (c *compactRun) keep(r *Stored) (keep, tombstone bool) {
	offset, known := c.newest[string(r.Key)]
	switch {
	case r.Offset >= c.last:
		return true, false
	case known && offset > r.Offset:
		return c.history > 0 && c.now.Sub(r.Time) < c.history, false
	case r.Value == nil && known:
		old := c.now.Sub(r.Time) >= TombstoneAge
		return !old, old
	case r.Value == nil:
		return false, false // its latest went first
	}
	return true, false
}

// finish writes back the blocks gathered, if that changes anything.
func (c *compactRun) finish() error {
	pairs := c.encode()
	old, removed, expired := c.keys, c.removed, c.expired
	c.keys, c.kept, c.bytes, c.removed, c.expired = nil, nil, 0, 0, nil
	if removed == 0 && len(pairs) == len(old) {
		return nil
	}
	return c.s.rewrite(old, pairs, expired)
}

// encode makes blocks of the records kept. A block has one time, its newest record's; so what is joined must be of
// about the same age, or so old that it does not matter.
func (c *compactRun) encode() (pairs [][2][]byte) {
	var b *block
	var began time.Time
	cut := func() {
		if b != nil {
			key, value := b.encode()
			pairs = append(pairs, [2][]byte{key, value})
			c.left += int64(len(value))
		}
	}
	for i := range c.kept {
		r := &c.kept[i]
		joins := r.Time.Sub(began) < time.Minute || c.now.Sub(r.Time) >= TombstoneAge
		if b == nil || len(b.body) >= blockBytes || !joins {
			cut()
			b, began = &block{partition: c.partition}, r.Time
		}
		b.add(r)
		b.time = max(b.time, r.Time.UnixMilli())
	}
	cut()
	return pairs
}

// rewrite replaces blocks in one transaction. A latest goes only if it is still the tombstone that was seen: flushes
// are shut out meanwhile.
func (s *Store) rewrite(old [][]byte, pairs [][2][]byte, expired []Stored) error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	return s.update(func(txn *badger.Txn) error {
		for _, key := range old {
			if err := txn.Delete(key); err != nil {
				return err
			}
		}
		for _, kv := range pairs {
			if err := txn.Set(kv[0], kv[1]); err != nil {
				return err
			}
		}
		for i := range expired {
			if err := dropLatest(txn, appendLatestKey(nil, expired[i].Partition, expired[i].Key), expired[i].Index); err != nil {
				return err
			}
		}
		return nil
	})
}

func dropLatest(txn *badger.Txn, key []byte, index uint64) error {
	value, err := getFrom(txn, key)
	if err != nil || value == nil {
		return err
	}
	st, inLog, err := decodeLatest(key, value)
	if err != nil || inLog || st.Value != nil || st.Index != index {
		return err
	}
	return txn.Delete(key)
}

// compactPrivate drops old tombstones of the private partition, which has no log.
func (s *Store) compactPrivate(now time.Time) error {
	var old []Stored
	err := s.view1(func(txn *badger.Txn) error {
		return s.eachKey(txn, partitionPrefix(rangeLatest, -1), func(item *badger.Item) {
			_ = item.Value(func(v []byte) error {
				st, _, err := decodeLatest(item.Key(), v)
				if err == nil && st.Value == nil && now.Sub(st.Time) >= TombstoneAge && len(old) < MaxEntryRecords {
					st.Key = append([]byte(nil), st.Key...)
					old = append(old, st)
				}
				return nil
			})
		})
	})
	if err != nil || len(old) == 0 {
		return err
	}
	return s.rewrite(nil, nil, old)
}
