package replicate

import (
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// hungAfter is how long a write to raft's log may take before this sidecar stops leading.
const hungAfter = time.Second

// watchedLog is the log that raft writes through. A leader whose disk hangs goes on sending heartbeats, which have
// goroutines of their own, and would lead for ever; so the transport asks here before it sends.
type watchedLog struct {
	raft.LogStore
	insync *insync
	ahead  func(previous raft.Log, entries []*raft.Log) // told of a write that begins; nil: nobody wants to know
	last   raft.Log                                     // index and term of the last entry of the write before, if that succeeded
	base   time.Time                                    // what since counts from, on the monotonic clock
	since  atomic.Int64                                 // when the write under way began, in nanoseconds after base; 0: none is

	abdicated atomic.Int64 // the since of the write for which leadership was offered
}

var _ raft.MonotonicLogStore = (*watchedLog)(nil)

// StoreLog stores one entry.
func (l *watchedLog) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }

// StoreLogs stores entries. Raft calls it from one goroutine at a time.
func (l *watchedLog) StoreLogs(entries []*raft.Log) error {
	if l.ahead != nil && len(entries) > 0 {
		l.ahead(l.last, entries)
	}
	l.last = raft.Log{}
	l.since.Store(max(1, int64(time.Since(l.base))))
	err := l.LogStore.StoreLogs(entries)
	l.since.Store(0)
	if err != nil || len(entries) == 0 {
		return err
	}
	now, last := time.Now(), entries[len(entries)-1]
	l.last = raft.Log{Index: last.Index, Term: last.Term}
	l.insync.appended(entries[0].Index, last.Index, now)
	for _, e := range entries {
		if e.Type == raft.LogConfiguration {
			l.insync.configured(raft.DecodeConfiguration(e.Data), now)
		}
	}
	return nil
}

// IsMonotonic is the inner log's.
func (l *watchedLog) IsMonotonic() bool {
	m, ok := l.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

// hung says whether a write has been running for too long.
func (l *watchedLog) hung() bool {
	since := l.since.Load()
	return since != 0 && time.Since(l.base)-time.Duration(since) > hungAfter
}

// abdicate offers leadership to the others once for each write that hangs: raft's main goroutine, which would hand it
// over, is what hangs. Without it they would elect one of them after their own time-outs.
func (t *transport) abdicate() {
	since := t.log.since.Load()
	if old := t.log.abdicated.Load(); since == 0 || old == since || !t.log.abdicated.CompareAndSwap(old, since) {
		return
	}
	t.spawn(t.offer)
}

// offer asks the other voters to begin an election, until one has taken it.
func (t *transport) offer() {
	for _, heir := range t.heirs() {
		if t.offerTo(heir, offerWait) == nil {
			return
		}
	}
}
