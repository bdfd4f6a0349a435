package proxy

import (
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// maxKept bounds the bytes of frames that a connection keeps in memory until they are answered (group requests, and what
// may have to be asked of another broker); further ones wait in its socket.
const maxKept = 16 << 20

// slotKind says who answers a request.
type slotKind uint8

const (
	slotAnswered slotKind = iota // response is the answer
	slotCalled                   // the coordinator, through call
	slotRelayed                  // a broker, through leg
	slotVersions                 // we do, once leg knows what the upstream speaks
)

// slot is a request that has been read and not yet answered. It belongs to the reader until it is pushed, then to the
// writer.
type slot struct {
	kind        slotKind
	rewrite     bool // the reply holds addresses
	repeatable  bool // asking twice does no harm, so it need not wait long for one broker
	key         int16
	version     int16
	correlation int32
	wait        time.Duration // how long the request itself lets the broker wait
	response    kmsg.Response
	call        *call
	leg         *leg
	silent      uint32 // requests without a reply that went ahead of it on leg
	bytes       int    // of it that are kept in memory until it is answered
	request     []byte // the whole frame of a request that any broker can answer; else nil
}

// inflight is the queue of a connection's slots: a ring with one writer (readRequests pushes) and one reader
// (writeReplies takes). Its size bounds what a client may have outstanding (--max-inflight).
type inflight struct {
	ring       []slot
	head, tail atomic.Uint32 // taken, pushed
	kept       atomic.Int64  // bytes that the slots keep
	ended      atomic.Bool   // nothing more will be pushed

	writerWaits atomic.Bool
	wakeWriter  chan struct{}       // capacity 1
	listening   atomic.Pointer[leg] // the writer, with no slot to answer, waits for bytes of this leg
	readerWaits atomic.Bool
	wakeReader  chan struct{} // capacity 1
}

func (q *inflight) init(size int) {
	q.ring = make([]slot, size)
	q.wakeWriter = make(chan struct{}, 1)
	q.wakeReader = make(chan struct{}, 1)
}

func (q *inflight) len() int { return int(q.tail.Load() - q.head.Load()) }

// room says whether there is room for one more slot that keeps so many bytes. One frame fits in any case.
func (q *inflight) room(bytes int) bool {
	if q.len() == len(q.ring) {
		return false
	}
	kept := q.kept.Load()
	return bytes == 0 || kept == 0 || kept+int64(bytes) <= maxKept
}

// push adds a slot for which there is room. It does not wake the writer: there is time for that when the request is on
// its way.
func (q *inflight) push(s slot) {
	tail := q.tail.Load()
	if s.bytes > 0 {
		q.kept.Add(int64(s.bytes))
	}
	q.ring[tail%uint32(len(q.ring))] = s
	q.tail.Store(tail + 1)
}

// sent wakes the writer for a slot whose request was sent on l, unless it waits for l's bytes as it is.
func (q *inflight) sent(l *leg) {
	if q.listening.Load() != l {
		q.signal()
	}
}

// signal wakes the writer if it waits for a slot, an answer or a leg.
func (q *inflight) signal() {
	if l := q.listening.Load(); l != nil {
		l.interrupt(q)
	}
	if q.writerWaits.Load() && q.writerWaits.Swap(false) {
		select {
		case q.wakeWriter <- struct{}{}:
		default:
		}
	}
}

// end says that nothing more will be pushed.
func (q *inflight) end() {
	q.ended.Store(true)
	q.signal()
}

// oldest gives the slot to be answered next, nil if there is none. It stays where it is until pop.
func (q *inflight) oldest() *slot {
	head := q.head.Load()
	if head == q.tail.Load() {
		return nil
	}
	return &q.ring[head%uint32(len(q.ring))]
}

func (q *inflight) pop() {
	head := q.head.Load()
	s := &q.ring[head%uint32(len(q.ring))]
	if s.bytes > 0 {
		q.kept.Add(-int64(s.bytes))
	}
	*s = slot{}
	q.head.Store(head + 1)
	if q.readerWaits.Load() && q.readerWaits.Swap(false) {
		select {
		case q.wakeReader <- struct{}{}:
		default:
		}
	}
}
