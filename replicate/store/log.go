package store

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	badger "github.com/dgraph-io/badger/v4"
)

const allOfTail = math.MaxUint64

// ErrClosing says that the store is being closed; what was not applied will be replayed.
var ErrClosing = errors.New("the store is closing")

// tailEntry is an applied entry that has not been flushed.
type tailEntry struct {
	index, term             uint64
	entryTerm, nextSequence uint64
	configuration           []byte // nil unless the entry is one
	records                 []Record
	offsets                 []int64
	bytes                   int
}

// Append applies an entry: its records get their offsets and join the tail. Records are kept, not copied. An entry
// that does not count is appended without records. It waits while the tail is full, and fails once the store is
// closing or broken; after a failure nothing may be appended any more.
func (s *Store) Append(index, term, entryTerm, nextSequence uint64, records []Record) error {
	e := tailEntry{index: index, term: term, entryTerm: entryTerm, nextSequence: nextSequence, records: records}
	return s.appendTail(e)
}

// Configuration applies a change of raft's membership.
func (s *Store) Configuration(index, term uint64, encoded []byte) error {
	s.mu.Lock()
	e := tailEntry{index: index, term: term, entryTerm: s.current.EntryTerm, nextSequence: s.current.NextSequence, configuration: encoded}
	s.mu.Unlock()
	return s.appendTail(e)
}

func (s *Store) appendTail(e tailEntry) error {
	e.bytes = 64
	for i := range e.records {
		e.bytes += recordBytes(&e.records[i])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.tailBytes > tailMaxBytes && !s.closing && s.Err() == nil {
		s.wake()
		s.room.Wait()
	}
	if s.closing {
		return ErrClosing
	}
	if err := s.Err(); err != nil {
		return err
	}
	e.offsets = make([]int64, len(e.records))
	for i := range e.records {
		e.offsets[i] = s.current.place(e.records[i].Partition)
	}
	s.current.advance(&e)
	s.tail = append(s.tail, e)
	s.tailBytes += e.bytes
	if s.tailBytes >= flushBytes {
		s.wake()
	}
	return nil
}

// recordBytes is about what a record takes in the tail.
func recordBytes(r *Record) int { return len(r.Key) + len(r.Value) + 48 }

// place takes a partition's next offset.
func (s *State) place(partition int32) int64 {
	if partition < 0 {
		return -1
	}
	offset := s.Next[partition]
	s.Next[partition] = offset + 1
	return offset
}

func (s *State) advance(e *tailEntry) {
	s.Index, s.Term = e.index, e.term
	s.EntryTerm, s.NextSequence = e.entryTerm, e.nextSequence
	if e.configuration != nil {
		s.Configuration, s.ConfigurationIndex = e.configuration, e.index
	}
}

func (s *Store) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// Flush writes the tail up to index to the compacted log.
func (s *Store) Flush(index uint64) error {
	return s.flush(index)
}

func (s *Store) flush(index uint64) error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	thin, limit := false, flushTxnBytes
	for {
		tail, bytes := s.head(index)
		if len(tail) == 0 {
			return nil
		}
		if err := s.checkSpace(); err != nil {
			return err
		}
		if !thin && bytes >= thinFrom {
			thin, limit = true, thinTxnBytes
		}
		w := s.newFlushWriter(thin)
		chunk := w.gather(tail, limit)
		if limit > flushTxnBytes && w.superseded < len(w.records) { // it saves too little to be worth the longer wait
			limit = flushTxnBytes
			w = s.newFlushWriter(thin)
			chunk = w.gather(tail, limit)
		}
		written, err := w.write(s)
		if err != nil {
			return fmt.Errorf("flushing entries %d to %d: %w", chunk[0].index, chunk[len(chunk)-1].index, err)
		}
		s.mu.Lock()
		s.flushed = w.state
		for i := range chunk {
			s.tailBytes -= chunk[i].bytes
			chunk[i] = tailEntry{} // the array lives on under the rest of the tail
		}
		if s.tail = s.tail[len(chunk):]; len(s.tail) == 0 {
			s.tail = nil
		}
		s.room.Broadcast()
		s.mu.Unlock()
		s.compactor.wrote(written)
	}
}

// head is the tail up to index, and the bytes of all of it.
func (s *Store) head(index uint64) (head []tailEntry, bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, _ := slices.BinarySearchFunc(s.tail, index, func(e tailEntry, index uint64) int {
		if e.index <= index {
			return -1
		}
		return 1
	})
	return s.tail[:n:n], s.tailBytes
}

// flushWriter gathers what one transaction writes.
type flushWriter struct {
	now     time.Time
	thin    bool  // records that this transaction supersedes are left out
	state   State // at the end of what was gathered
	records []Stored
	newest  map[string]int // by the key in latest: where in records
	bytes   int            // of records
	key     []byte

	superseded int // how many were left out
}

func (s *Store) newFlushWriter(thin bool) *flushWriter {
	return &flushWriter{now: time.Now().Truncate(time.Millisecond), thin: thin, state: s.flushed.clone(), newest: map[string]int{}}
}

// gather takes as much of the tail as gives a transaction of limit bytes: whole entries, at least one.
func (w *flushWriter) gather(tail []tailEntry, limit int) (chunk []tailEntry) {
	n := 0
	for n < len(tail) {
		e := &tail[n]
		if bytes, records := w.growth(e, limit); n > 0 && (w.bytes+bytes > limit || len(w.records)+records > MaxEntryRecords) {
			break
		}
		for p := range e.records {
			w.add(Stored{Record: e.records[p], Offset: e.offsets[p], Index: e.index, Position: p, Time: w.now})
			w.state.place(e.records[p].Partition)
		}
		w.state.advance(e)
		n++
	}
	return tail[:n]
}

// growth is at most what an entry adds; near the limit it is worth to look which keys are new.
func (w *flushWriter) growth(e *tailEntry, limit int) (bytes, records int) {
	if !w.thin || w.bytes+e.bytes <= limit && len(w.records)+len(e.records) <= MaxEntryRecords {
		return e.bytes, len(e.records)
	}
	for p := range e.records {
		r := &e.records[p]
		bytes += recordBytes(r)
		w.key = appendLatestKey(w.key[:0], r.Partition, r.Key)
		if at, known := w.newest[string(w.key)]; known {
			bytes -= recordBytes(&w.records[at].Record)
		} else {
			records++
		}
	}
	return bytes, records
}

func (w *flushWriter) add(r Stored) {
	w.bytes += recordBytes(&r.Record)
	w.key = appendLatestKey(w.key[:0], r.Partition, r.Key)
	at, known := w.newest[string(w.key)]
	if known && w.thin {
		w.bytes -= recordBytes(&w.records[at].Record)
		w.records[at] = r
		w.superseded++
		return
	}
	w.newest[string(w.key)] = len(w.records)
	w.records = append(w.records, r)
}

// write puts what was gathered into the compacted log, and the state after it, in one transaction.
func (w *flushWriter) write(s *Store) (written int64, err error) {
	pairs := w.blocks()
	err = s.update(func(txn *badger.Txn) error {
		for _, kv := range pairs {
			if err := txn.Set(kv[0], kv[1]); err != nil {
				return err
			}
			written += int64(len(kv[1]))
		}
		for key, at := range w.newest {
			k := []byte(key)
			if err := txn.Set(k, encodeLatest(k, &w.records[at])); err != nil {
				return err
			}
		}
		return txn.Set(appliedKey, seal(appliedKey, w.state.encode()))
	})
	return written, err
}

// blocks gives the keys and values of the compacted log, each partition's records in the order of their offsets.
func (w *flushWriter) blocks() (pairs [][2][]byte) {
	order := make([]*Stored, 0, len(w.records))
	for i := range w.records {
		if w.records[i].Partition >= 0 {
			order = append(order, &w.records[i])
		}
	}
	slices.SortFunc(order, func(a, b *Stored) int {
		return cmp.Or(cmp.Compare(a.Partition, b.Partition), cmp.Compare(a.Offset, b.Offset))
	})
	b := block{time: w.now.UnixMilli()}
	cut := func() {
		if b.count > 0 {
			key, value := b.encode()
			pairs = append(pairs, [2][]byte{key, value})
			b.count, b.body = 0, b.body[:0] // encode has copied it
		}
	}
	for _, r := range order {
		if r.Partition != b.partition || len(b.body) >= blockBytes {
			cut()
			b.partition = r.Partition
		}
		b.add(r)
	}
	cut()
	return pairs
}

// view is a read transaction and the tail that lies upon it.
func (s *Store) view() (*badger.Txn, []tailEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.db.NewTransaction(false), append([]tailEntry(nil), s.tail...)
}

// Latest calls yield with the newest record of each key, tombstones left out, flushed log and tail as one, in no
// order that means anything. The record is yield's to keep. It stops at yield's error, or at damage.
func (s *Store) Latest(yield func(Record) error) error {
	s.restoring.RLock()
	defer s.restoring.RUnlock()
	txn, tail := s.view()
	defer txn.Discard()
	newer := map[string]*Record{}
	for i := range tail {
		for p := range tail[i].records {
			r := &tail[i].records[p]
			newer[string(appendLatestKey(nil, r.Partition, r.Key))] = r
		}
	}
	opt := badger.DefaultIteratorOptions
	opt.PrefetchValues = false // which is a goroutine an item; the values lie beside their keys anyway
	opt.Prefix = []byte{rangeLatest, shard}
	it := txn.NewIterator(opt)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		item := it.Item()
		if _, ok := newer[string(item.Key())]; ok {
			continue
		}
		var record Record
		err := item.Value(func(v []byte) (err error) {
			record, err = s.keepLatest(txn, item.Key(), v)
			return err
		})
		if err != nil {
			return s.damagedRecord(item.Key(), err)
		}
		if record.Value == nil {
			continue
		}
		if err := yield(record); err != nil {
			return err
		}
	}
	for _, r := range newer {
		if r.Value == nil {
			continue
		}
		if err := yield(*r); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) damagedRecord(key []byte, err error) error {
	partition, name := latestKeyParts(key)
	return &DamagedError{Dir: s.opt.Dir, Reason: fmt.Sprintf("the newest record of key %q in partition %d cannot be read", name, partition), Err: err}
}

// keepLatest decodes a value of latest into memory of its own.
func (s *Store) keepLatest(txn *badger.Txn, key, value []byte) (Record, error) {
	st, inLog, err := decodeLatest(key, value)
	if err != nil {
		return Record{}, err
	}
	if inLog {
		found, err := readAt(txn, st.Partition, st.Offset)
		if err != nil {
			return Record{}, err
		}
		st.Value = found.Value
	}
	if st.Value == nil {
		return Record{}, nil
	}
	both := append(make([]byte, 0, len(st.Key)+len(st.Value)), st.Key...)
	both = append(both, st.Value...)
	n := len(st.Key)
	return Record{Partition: st.Partition, Key: both[:n:n], Value: both[n:]}, nil
}

// readAt finds the record at an offset of the flushed log.
func readAt(txn *badger.Txn, partition int32, offset int64) (found Stored, err error) {
	ok := false
	err = scanLog(txn, partition, offset, func(r *Stored) bool {
		found, ok = *r, r.Offset == offset
		return false
	})
	if err == nil && !ok {
		err = fmt.Errorf("no record at offset %d", offset)
	}
	return found, err
}

// scanLog yields the flushed records of a partition from an offset on; they are copies.
func scanLog(txn *badger.Txn, partition int32, from int64, yield func(*Stored) bool) error {
	opt := badger.DefaultIteratorOptions
	opt.Reverse = true
	opt.PrefetchValues = false
	opt.Prefix = partitionPrefix(rangeLog, partition)
	back := txn.NewIterator(opt)
	back.Seek(logKey(partition, from))
	start := from
	if back.Valid() {
		start = logKeyOffset(back.Item().Key()) // the block that begins at or before from
	}
	back.Close()

	opt.Reverse = false
	it := txn.NewIterator(opt)
	defer it.Close()
	for it.Seek(logKey(partition, start)); it.Valid(); it.Next() {
		value, err := it.Item().ValueCopy(nil)
		if err != nil {
			return err
		}
		more := true
		err = decodeBlock(it.Item().KeyCopy(nil), value, func(r *Stored) bool {
			more = r.Offset < from || yield(r)
			return more
		})
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// Read yields the records of a partition from an offset on, in order, flushed log and tail as one, until yield returns
// false. Offsets that compaction has removed are gaps. The records are yield's to keep, not to change.
func (s *Store) Read(partition int32, from int64, yield func(Stored) bool) error {
	s.restoring.RLock()
	defer s.restoring.RUnlock()
	txn, tail := s.view()
	defer txn.Discard()
	more, next := true, from
	err := scanLog(txn, partition, from, func(r *Stored) bool {
		next = r.Offset + 1
		more = yield(*r)
		return more
	})
	if err != nil {
		return fmt.Errorf("reading partition %d from offset %d: %w", partition, from, err)
	}
	for i := range tail {
		for p, r := range tail[i].records {
			if r.Partition != partition || tail[i].offsets[p] < next {
				continue
			}
			if !more || !yield(Stored{Record: r, Offset: tail[i].offsets[p], Index: tail[i].index, Position: p}) {
				return nil
			}
		}
	}
	return nil
}
