package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/coordinator"
	core "github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

const (
	linkDial        = 3 * time.Second // to reach the active sidecar and be welcomed
	linkBackoffMin  = 20 * time.Millisecond
	linkBackoffMax  = time.Second
	linkPauseMin    = 2 * time.Millisecond // after the active sidecar has said that it is not, or not yet
	linkPauseMax    = 100 * time.Millisecond
	linkTick        = time.Second
	linkPingAfter   = 2         // ticks without a word, while answers are outstanding, before it is asked for a sign of life
	linkSilentTicks = 10        // before the connection is given up
	peerWriteAt     = 64 << 10  // bytes gathered for one write between sidecars
	peerKeepOut     = 128 << 10 // bytes of the buffer for them that are kept: the active sidecar has one for each peer
	peerKeepQueue   = 4096      // messages that a queue keeps room for
	maxPeerResponse = 256 << 20 // bytes of a response; instead of a larger one there is an error
)

var (
	errLinkSilent  = errors.New("no sign of life")
	errLinkAnswers = errors.New("an answer to what was not asked")
)

// forwarder keeps a link to the sidecar that is active, while that is another.
type forwarder struct {
	proxy   *Proxy
	process [16]byte      // this run of the process
	number  atomic.Uint64 // links so far
	now     atomic.Pointer[toward]

	mu   sync.Mutex // guards what now is set to
	stop context.CancelFunc
}

// toward is who is active: the link, once it is up, leads to node.
type toward struct {
	term uint64
	node string // "": nobody, or ourselves
	turn uint64 // how often this has changed; whoever was active before may be so again
	link *link
}

func (f *forwarder) init(p *Proxy) {
	f.proxy, f.process = p, uuid.New()
	f.stop = func() {}
	f.now.Store(&toward{})
}

// target is our own coordinator unless the peers know of a higher term.
func (f *forwarder) target(own coordinator.Status) target {
	now := f.now.Load()
	switch {
	case own.Active && own.Term >= now.term:
		return target{term: own.Term}
	case now.link != nil && !now.link.paused.Load():
		return target{term: now.term, link: now.link}
	}
	return target{}
}

// followActive learns who is active and turns to it. A link to whoever was before is given up at once, even if its
// socket looks open: what is on it comes back to its sessions.
func (f *forwarder) followActive() {
	p := f.proxy
	defer p.running.Done()
	defer func() { f.turn(toward{}) }()
	for {
		status := p.coordinator.Status()
		term, node, changed := p.peers.Active()
		if node == p.config.Node || status.Active && status.Term >= term {
			node = ""
		}
		f.turn(toward{term: term, node: node})
		select {
		case <-status.Changed:
		case <-changed:
		case <-p.ctx.Done():
			return
		}
	}
}

func (f *forwarder) turn(to toward) {
	f.mu.Lock()
	old := f.now.Load()
	if old.term == to.term && old.node == to.node {
		f.mu.Unlock()
		return
	}
	f.stop()
	f.stop = func() {}
	to.turn = old.turn + 1
	f.now.Store(&to)
	if to.node != "" {
		var ctx context.Context
		ctx, f.stop = context.WithCancel(f.proxy.ctx)
		f.proxy.running.Add(1)
		go f.keepLink(ctx, to)
	}
	f.mu.Unlock()
	if old.link != nil {
		old.link.cut(fmt.Errorf("term %d has begun", to.term))
	}
	f.proxy.held.look()
}

// setLink notes that the link is up, or with nil that there is none, unless another sidecar is active by now.
func (f *forwarder) setLink(to toward, from, l *link) bool {
	f.mu.Lock()
	now := f.now.Load()
	ok := now.turn == to.turn && now.link == from
	if ok {
		to.link = l
		f.now.Store(&to)
	}
	f.mu.Unlock()
	if ok && l != nil {
		f.proxy.held.look()
	}
	return ok
}

// keepLink keeps a connection to the active sidecar until that is no longer the one, or Shutdown.
func (f *forwarder) keepLink(ctx context.Context, to toward) {
	p := f.proxy
	defer p.running.Done()
	for delay, next := time.Duration(0), time.Duration(0); ; {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
		delay = max(next, linkBackoffMin)
		next = min(2*delay, linkBackoffMax)
		dialing, cancel := context.WithTimeout(ctx, linkDial)
		conn, err := p.peers.Dial(dialing, to.node)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				p.complainOf("link "+to.node, 1, fmt.Sprintf("the active sidecar %s cannot be reached: %v; trying again", to.node, err))
			}
			continue
		}
		unpaced(conn)
		l := newLink(f, to, conn)
		if !f.setLink(to, nil, l) {
			_ = conn.Close()
			return
		}
		if l.run(); l.answered.Load() { // it was sound: again at once
			delay, next = 0, 0
		}
	}
}

// link is a connection to the active sidecar, in one term. The streams of all sessions share it.
type link struct {
	forwarder *forwarder
	to        toward
	number    uint64 // of all links of this process
	conn      net.Conn
	paused    atomic.Bool   // nothing new is sent for a moment
	heard     atomic.Bool   // since the last tick
	answered  atomic.Bool   // one request at least
	wake      chan struct{} // capacity 1: there is something to write
	done      chan struct{} // closed when it is cut

	// The reader's.
	pause time.Duration

	mu      sync.Mutex
	dead    bool
	streams map[uint32]*stream
	last    uint32 // the newest stream's id
	pending int    // requests that were sent and not answered
	// queue has no bytes of its own: frames belong to the slots of their clients, which bound them, and stop reading
	// when they are full. Nobody ever waits for the link.
	queue []outgoing
}

// stream carries the requests of a session to the active sidecar, in one activation.
type stream struct {
	link    *link
	session *session
	number  uint64

	calls []*call // with the peer, in order; guarded by the session's mu

	// Guarded by the link's mu.
	id      uint32 // 0: not opened yet
	closed  bool
	pending int
}

// outgoing is a message to be written.
type outgoing struct {
	kind   wire.PeerKind
	stream *stream
	call   *call
}

func newLink(f *forwarder, to toward, conn net.Conn) *link {
	to.link = nil
	return &link{
		forwarder: f, to: to, number: f.number.Add(1), conn: conn,
		wake:    make(chan struct{}, 1),
		done:    make(chan struct{}),
		streams: map[uint32]*stream{},
	}
}

// run serves the link until it is cut.
func (l *link) run() {
	p := l.forwarder.proxy
	p.metrics.Add(tracing.ForwardLinks, 1)
	p.logger.Debug("link to the active sidecar is up", "peer", l.to.node, "term", l.to.term)
	p.running.Add(2)
	go l.write()
	go l.watch()
	l.cut(l.read())
	p.metrics.Add(tracing.ForwardLinks, -1)
}

// cut ends the link, from any goroutine. What is on it comes back to its sessions.
func (l *link) cut(why error) {
	l.mu.Lock()
	if l.dead {
		l.mu.Unlock()
		return
	}
	l.dead = true
	streams := l.streams
	l.streams, l.queue = nil, nil
	close(l.done)
	l.mu.Unlock()
	_ = l.conn.Close()
	l.forwarder.setLink(l.to, l, nil) // before anything comes back and asks where to go
	p := l.forwarder.proxy
	if errors.Is(why, errLinkSilent) || errors.Is(why, errLinkAnswers) || errors.Is(why, errPeerMistake) || errors.Is(why, wire.ErrMalformed) || errors.Is(why, wire.ErrShort) {
		p.complainOf("link ended "+l.to.node, 1, fmt.Sprintf("the link to the active sidecar %s is given up: %v; trying another", l.to.node, why))
	}
	p.logger.Debug("link to the active sidecar ended", "peer", l.to.node, "term", l.to.term, "streams", len(streams), "err", why)
	for _, st := range streams {
		st.session.comeBack(st)
	}
}

// send queues calls of a stream; their order is that in which send is called. If the link has ended they come back.
func (l *link) send(st *stream, batch []*call) {
	if len(batch) == 0 {
		return
	}
	l.mu.Lock()
	if l.dead || st.closed {
		l.mu.Unlock()
		st.session.comeBack(st)
		return
	}
	if st.id == 0 {
		l.last++
		st.id = l.last
		l.streams[st.id] = st
		l.queue = append(l.queue, outgoing{wire.PeerOpen, st, nil})
	}
	for _, c := range batch {
		l.queue = append(l.queue, outgoing{wire.PeerRequest, st, c})
	}
	st.pending += len(batch)
	l.pending += len(batch)
	l.mu.Unlock()
	l.forwarder.proxy.metrics.Add(tracing.ForwardedRequests, int64(len(batch)))
	l.wakeWriter()
}

// close ends a stream, if there is one: nobody waits for what it has brought. What was not written yet never is.
func (st *stream) close() {
	if st == nil {
		return
	}
	l := st.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead || st.closed {
		return
	}
	st.closed = true
	l.pending -= st.pending
	if st.id == 0 {
		return
	}
	delete(l.streams, st.id)
	if st.pending > 0 {
		l.queue = slices.DeleteFunc(l.queue, func(o outgoing) bool { return o.stream == st && o.call != nil })
	}
	l.queue = append(l.queue, outgoing{wire.PeerClose, st, nil})
	l.wakeWriter()
}

func (l *link) wakeWriter() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// write writes what is queued, as much as has come in one go.
func (l *link) write() {
	defer l.forwarder.proxy.running.Done()
	out := wire.AppendPeer(nil, &wire.PeerMessage{Kind: wire.PeerBegin, Process: l.forwarder.process, Number: l.number})
	var batch []outgoing
	for {
		l.mu.Lock()
		batch, l.queue = l.queue, batch[:0]
		l.mu.Unlock()
		for _, o := range batch {
			out = o.append(out)
			if len(out) >= peerWriteAt {
				if _, err := l.conn.Write(out); err != nil {
					l.cut(err)
					return
				}
				out = out[:0]
			}
		}
		if clear(batch); cap(batch) > peerKeepQueue {
			batch = nil
		}
		if len(out) > 0 {
			if _, err := l.conn.Write(out); err != nil {
				l.cut(err)
				return
			}
			if out = out[:0]; cap(out) > peerKeepOut {
				out = nil
			}
			continue // perhaps more has come
		}
		select {
		case <-l.wake:
		case <-l.done:
			return
		}
	}
}

// append appends the message's bytes. What it reads of the call and its session never changes.
func (o outgoing) append(out []byte) []byte {
	m := wire.PeerMessage{Kind: o.kind}
	switch o.kind {
	case wire.PeerOpen:
		s := o.stream.session
		m.Term, m.Session, m.Number = o.stream.link.to.term, s.client.Session, o.stream.number
		m.Host, m.Listener = s.client.Host, s.listener
	case wire.PeerRequest:
		left := o.call.timeout
		if !o.call.heldOnly {
			left = max(0, time.Until(o.call.deadline))
		}
		m.Ordinal, m.Deadline, m.Frame = o.call.ordinal, uint32(left.Milliseconds()), o.call.frame
	}
	if o.stream != nil {
		m.Stream = o.stream.id
	}
	return wire.AppendPeer(out, &m)
}

// watch gives the link up when the other side, from which answers are due, is silent for too long: a host that has
// vanished, or a stopped process without a successor. What was on it is then held, and has a deadline again.
func (l *link) watch() {
	defer l.forwarder.proxy.running.Done()
	ticker := time.NewTicker(linkTick)
	defer ticker.Stop()
	for silent := 0; ; {
		select {
		case <-ticker.C:
		case <-l.done:
			return
		}
		l.mu.Lock()
		due := l.pending > 0
		if silent++; !due || l.heard.Swap(false) {
			silent = 0
		}
		ping := silent >= linkPingAfter && !l.dead
		if ping {
			l.queue = append(l.queue, outgoing{kind: wire.PeerPing})
		}
		l.mu.Unlock()
		if ping {
			l.wakeWriter()
		}
		if silent >= linkSilentTicks {
			l.cut(errLinkSilent)
			return
		}
	}
}

// read takes the answers.
func (l *link) read() error {
	in := newPeerReader(l.conn, maxPeerResponse+wire.PeerOverhead)
	for {
		message, err := in.next()
		if err != nil {
			return err
		}
		if !l.heard.Load() {
			l.heard.Store(true)
		}
		m, err := wire.ParsePeer(message)
		if err != nil {
			return err
		}
		if m.Kind != wire.PeerResponse {
			continue
		}
		l.mu.Lock()
		st := l.streams[m.Stream]
		if st != nil {
			st.pending--
			l.pending--
		}
		l.mu.Unlock()
		if st == nil {
			continue // of a client that has gone
		}
		m.Frame = in.keep(m.Frame)
		if err := l.take(st, &m); err != nil {
			return err
		}
	}
}

// take takes one answer.
func (l *link) take(st *stream, m *wire.PeerMessage) error {
	switch m.Code {
	case wire.PeerAnswered:
		l.pause = 0
		if !l.answered.Load() {
			l.answered.Store(true)
		}
	case wire.PeerInactive: // its activation has ended, or has yet to begin: who is active will be told
		if !l.paused.Load() {
			l.pause = min(max(2*l.pause, linkPauseMin), linkPauseMax)
			l.paused.Store(true)
			time.AfterFunc(l.pause, func() {
				l.paused.Store(false)
				l.forwarder.proxy.held.look()
			})
		}
	case wire.PeerRefused:
		p := l.forwarder.proxy
		p.complainOf("refused "+l.to.node, mistakeLines, fmt.Sprintf("the active sidecar %s refuses a request of client %s: %s", l.to.node, st.session.client.Host, m.Frame))
	}
	return st.session.receive(st, m)
}

// receive takes a peer's answer to a call, unless the stream has ended meanwhile.
func (s *session) receive(st *stream, m *wire.PeerMessage) error {
	s.mu.Lock()
	if s.stream != st {
		s.mu.Unlock()
		return nil
	}
	i, found := slices.BinarySearchFunc(st.calls, m.Ordinal, func(c *call, ordinal uint64) int { return int(int64(c.ordinal - ordinal)) })
	if !found {
		s.mu.Unlock()
		return errLinkAnswers
	}
	c := st.calls[i]
	var a answer
	switch m.Code {
	case wire.PeerAnswered:
		if len(m.Frame) < 4 || binary.BigEndian.Uint32(m.Frame) != binary.BigEndian.Uint32(c.frame[4:]) {
			s.mu.Unlock()
			return errLinkAnswers
		}
		a.frame = m.Frame
	case wire.PeerRefused:
		a.response = core.ErrorResponse(c.request, m.Error)
	}
	st.calls = slices.Delete(st.calls, i, i+1)
	s.land(c, a, a.none())
	again := s.again()
	s.mu.Unlock()
	if again {
		s.hold()
	}
	s.wake()
	return nil
}

// comeBack gives back what is on a stream whose link has ended.
func (s *session) comeBack(st *stream) {
	s.mu.Lock()
	if s.stream != st {
		s.mu.Unlock()
		return
	}
	s.stream = nil
	for _, c := range st.calls {
		s.land(c, answer{}, true)
	}
	st.calls = nil
	again := s.again()
	s.mu.Unlock()
	if again {
		s.hold()
	}
	s.wake()
}
