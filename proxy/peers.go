package proxy

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	core "github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	peerBuffer       = 16 << 10         // read from a peer at once; larger messages get memory of their own
	peerWriteTimeout = 30 * time.Second // for a peer to take what it is sent
	maxPeerMessage   = 64 << 20         // from a peer; a frame over the limit for group requests is refused alone
	maxPeerStreams   = 1 << 18          // on one connection; each is a client's
	maxPeerRequests  = 1 << 18          // of one connection that are not answered
	maxPeerBytes     = 256 << 20        // of their frames
	maxPeerNodes     = 4096             // whose newest connection is remembered
)

var (
	errNewerConnection = errors.New("the peer has a newer connection")
	errPeerMistake     = errors.New("not what a sidecar sends")
)

// peerConns are the connections by which peers forward requests. Each peer has one; a newer one ends the older, of which
// nothing is executed any more even if there is something to be read on it.
type peerConns struct {
	mu    sync.Mutex
	all   map[*peerConn]struct{}
	nodes map[string]peerNode
}

// peerNode is the newest connection of a peer.
type peerNode struct {
	process [16]byte
	number  uint64
	conn    *peerConn // nil: it has ended
}

// peerConn is one such connection.
type peerConn struct {
	proxy    *Proxy
	conn     net.Conn
	from     string
	requests atomic.Int64 // that are not answered
	bytes    atomic.Int64 // of their frames

	submit sync.Mutex // held while a request is submitted
	ended  bool       // nothing more is; guarded by submit

	// The reader's.
	in       peerReader
	streams  map[uint32]*peerStream
	sessions map[core.Session]*peerStream

	mu      sync.Mutex
	answers []peerAnswer
	wake    chan struct{} // capacity 1
	done    chan struct{} // closed when the reader has ended
}

// peerStream is a session's requests in one activation, at the side that executes them.
type peerStream struct {
	id     uint32
	term   uint64
	number uint64
	client core.Client
	over   wire.PeerCode // what every further request is answered; 0: it is executed. The reader's
	closed atomic.Bool   // nobody waits for its answers
}

// peerAnswer is what became of a request.
type peerAnswer struct {
	stream      *peerStream // nil: a pong
	ordinal     uint64
	correlation int32
	size        int // of its frame
	code        wire.PeerCode
	err         int16
	text        string
	response    kmsg.Response
}

// ServePeer executes the requests that a peer forwards, and returns when its connection has ended. The peer was asked who
// it is; from is its node id.
func (p *Proxy) ServePeer(conn net.Conn, from string) {
	c := &peerConn{
		proxy: p, conn: conn, from: from,
		in:       newPeerReader(conn, maxPeerMessage),
		streams:  map[uint32]*peerStream{},
		sessions: map[core.Session]*peerStream{},
		wake:     make(chan struct{}, 1),
		done:     make(chan struct{}),
	}
	defer func() { _ = conn.Close() }()
	if !p.serving.add(c) {
		return
	}
	defer p.running.Done()
	defer p.serving.remove(c)
	unpaced(conn)
	p.metrics.Add(tracing.ForwardPeers, 1)
	defer p.metrics.Add(tracing.ForwardPeers, -1)
	p.running.Add(1)
	go c.write()
	defer close(c.done)
	defer c.closeAfterPanic()
	c.report(c.read())
}

// closeAfterPanic is deferred by both goroutines. A panic closes this connection and nothing else.
func (c *peerConn) closeAfterPanic() {
	if broken := recover(); broken != nil {
		c.proxy.logger.Error("a peer's connection closed after a panic", "peer", c.from, "panic", broken, "stack", string(debug.Stack()))
		_ = c.conn.Close()
	}
}

// report names what has ended the connection.
func (c *peerConn) report(err error) {
	p := c.proxy
	switch {
	case errors.Is(err, errPeerMistake) || errors.Is(err, wire.ErrShort) || errors.Is(err, wire.ErrMalformed):
		p.metrics.Add(tracing.ForwardMistakes, 1)
		p.complainOf("peer "+c.from, mistakeLines, fmt.Sprintf("peer %s at %s: %v; its connection is closed", c.from, c.conn.RemoteAddr(), err))
	case p.ctx.Err() == nil:
		p.logger.Debug("a peer's connection ended", "peer", c.from, "err", err)
	}
}

// add notes a connection, unless the proxy stops.
func (s *peerConns) add(c *peerConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.proxy.ctx.Err() != nil {
		return false
	}
	if s.all == nil {
		s.all, s.nodes = map[*peerConn]struct{}{}, map[string]peerNode{}
	}
	s.all[c] = struct{}{}
	c.proxy.running.Add(1)
	return true
}

// remove forgets the connection but not its number: one that was dialled before it may come after it.
func (s *peerConns) remove(c *peerConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, c)
	if n := s.nodes[c.from]; n.conn == c {
		n.conn = nil
		s.nodes[c.from] = n
	}
}

// begin makes c the newest connection of its peer, and ends the one before it: nothing of that is submitted after begin
// has returned.
func (s *peerConns) begin(c *peerConn, process [16]byte, number uint64) error {
	s.mu.Lock()
	old := s.nodes[c.from]
	if old.process == process && old.number >= number {
		s.mu.Unlock()
		return errNewerConnection
	}
	if len(s.nodes) >= maxPeerNodes {
		for node, n := range s.nodes {
			if n.conn == nil {
				delete(s.nodes, node)
				break
			}
		}
	}
	s.nodes[c.from] = peerNode{process, number, c}
	s.mu.Unlock()
	if old.conn != nil {
		old.conn.end()
	}
	return nil
}

// closeAll ends every connection; the proxy stops.
func (s *peerConns) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		_ = c.conn.Close()
	}
}

// end ends the connection from another's goroutine.
func (c *peerConn) end() {
	_ = c.conn.Close()
	c.submit.Lock()
	c.ended = true
	c.submit.Unlock()
}

// read takes the peer's messages until the connection ends.
func (c *peerConn) read() error {
	message, err := c.in.next()
	if err != nil {
		return err
	}
	m, err := wire.ParsePeer(message)
	if err != nil {
		return err
	}
	if m.Kind != wire.PeerBegin {
		return fmt.Errorf("%w: a message of kind %d comes first", errPeerMistake, m.Kind)
	}
	if err := c.proxy.serving.begin(c, m.Process, m.Number); err != nil {
		return err
	}
	for {
		if message, err = c.in.next(); err != nil {
			return err
		}
		if m, err = wire.ParsePeer(message); err == nil {
			err = c.take(&m)
		}
		if err != nil {
			return err
		}
	}
}

func (c *peerConn) take(m *wire.PeerMessage) error {
	switch m.Kind {
	case wire.PeerOpen:
		return c.open(m)
	case wire.PeerRequest:
		return c.request(m)
	case wire.PeerClose:
		if st := c.streams[m.Stream]; st != nil {
			c.forget(st)
		}
	case wire.PeerPing:
		c.answer(peerAnswer{})
	case wire.PeerBegin:
		return fmt.Errorf("%w: a second beginning", errPeerMistake)
	}
	return nil
}

// open begins a stream, which ends the session's older one.
func (c *peerConn) open(m *wire.PeerMessage) error {
	if m.Stream == 0 || c.streams[m.Stream] != nil {
		return fmt.Errorf("%w: stream %d is opened twice", errPeerMistake, m.Stream)
	}
	if len(c.streams) >= maxPeerStreams {
		return fmt.Errorf("%w: more than %d streams", errPeerMistake, maxPeerStreams)
	}
	st := &peerStream{id: m.Stream, term: m.Term, number: m.Number}
	st.client.Host, st.client.Session = m.Host, m.Session
	if old := c.sessions[m.Session]; old != nil {
		if old.number >= m.Number {
			return fmt.Errorf("%w: stream number %d of a session after %d", errPeerMistake, m.Number, old.number)
		}
		c.forget(old)
	}
	c.streams[st.id], c.sessions[st.client.Session] = st, st
	return nil
}

// forget ends a stream: its answers are not sent.
func (c *peerConn) forget(st *peerStream) {
	st.closed.Store(true)
	delete(c.streams, st.id)
	if c.sessions[st.client.Session] == st {
		delete(c.sessions, st.client.Session)
	}
}

// request hands a client's frame to the coordinator, or says why not.
func (c *peerConn) request(m *wire.PeerMessage) error {
	p := c.proxy
	st := c.streams[m.Stream]
	if st == nil {
		return fmt.Errorf("%w: a request on stream %d, which is not open", errPeerMistake, m.Stream)
	}
	p.metrics.Add(tracing.PeerRequests, 1)
	a := peerAnswer{stream: st, ordinal: m.Ordinal}
	if status := p.coordinator.Status(); st.over == 0 && (!status.Active || status.Term != st.term) {
		// For good, even if that activation is just about to begin: what comes next would overtake this one.
		st.over = wire.PeerInactive
	}
	if st.over != 0 {
		a.code = st.over
		c.answer(a)
		return nil
	}
	if c.requests.Load() >= maxPeerRequests || c.bytes.Load() >= maxPeerBytes {
		a.code, a.err, a.text = wire.PeerRefused, kerr.CoordinatorNotAvailable.Code, "too many requests of this peer are not answered yet"
		c.answer(a)
		return nil
	}
	frame := c.in.keep(m.Frame)
	h, req, err := p.decodeForwarded(frame)
	if err != nil {
		st.over = wire.PeerStreamEnd
		a.code, a.err, a.text = wire.PeerRefused, kerr.UnknownServerError.Code, err.Error()
		c.answer(a)
		return nil
	}
	if h.ClientID == nil {
		st.client.ID = ""
	} else if st.client.ID != *h.ClientID {
		st.client.ID = *h.ClientID
	}
	a.correlation, a.size = h.CorrelationID, len(frame)
	client := st.client
	client.Ordinal = m.Ordinal
	c.requests.Add(1)
	c.bytes.Add(int64(a.size))
	r := &coordinator.Request{Body: req, Client: client, Term: st.term, Done: func(response kmsg.Response, err error) {
		if a.response = response; err != nil {
			a.code = wire.PeerInactive
		}
		c.answer(a)
	}}
	c.submit.Lock()
	defer c.submit.Unlock()
	if c.ended {
		return errNewerConnection
	}
	p.coordinator.Submit(r)
	return nil
}

// decodeForwarded reads a client's frame as the sidecar did that has forwarded it.
func (p *Proxy) decodeForwarded(frame []byte) (h wire.RequestHeader, req kmsg.Request, err error) {
	defer func() { // else it would be sent again, and end the next connection, too
		if broken := recover(); broken != nil {
			p.logger.Error("a forwarded request was not read", "api", kmsg.NameForKey(h.APIKey), "panic", broken, "stack", string(debug.Stack()))
			err = fmt.Errorf("%s version %d: %v", kmsg.NameForKey(h.APIKey), h.APIVersion, broken)
		}
	}()
	if len(frame) > int(p.config.MaxGroupFrame) {
		return h, nil, fmt.Errorf("a request of %d bytes, more than the %d that group requests may have", len(frame), p.config.MaxGroupFrame)
	}
	h, err = wire.ParseRequestHeader(frame)
	if err != nil {
		return h, nil, fmt.Errorf("a request header that nobody can read: %w", err)
	}
	if routeOf(h.APIKey).action != coordinate || !served(h.APIKey, h.APIVersion) {
		return h, nil, fmt.Errorf("%s version %d is not for the coordinator", kmsg.NameForKey(h.APIKey), h.APIVersion)
	}
	req, err = wire.DecodeRequest(h, frame)
	return h, req, err
}

// answer queues an answer. It is called by the coordinator's loop, among others, and never blocks.
func (c *peerConn) answer(a peerAnswer) {
	c.mu.Lock()
	c.answers = append(c.answers, a)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// write writes the answers, as many as have come in one go.
func (c *peerConn) write() {
	defer c.proxy.running.Done()
	defer func() { _ = c.conn.Close() }()
	defer c.closeAfterPanic()
	var batch []peerAnswer
	var out []byte
	for {
		c.mu.Lock()
		batch, c.answers = c.answers, batch[:0]
		c.mu.Unlock()
		for i := range batch {
			out = c.append(out, &batch[i])
			if len(out) >= peerWriteAt {
				if !c.flush(out) {
					return
				}
				out = out[:0]
			}
		}
		if clear(batch); cap(batch) > peerKeepQueue {
			batch = nil
		}
		if len(out) > 0 {
			if !c.flush(out) {
				return
			}
			if out = out[:0]; cap(out) > peerKeepOut {
				out = nil
			}
			continue // perhaps more has come
		}
		select {
		case <-c.wake:
		case <-c.done:
			return
		}
	}
}

func (c *peerConn) flush(out []byte) bool {
	_ = c.conn.SetWriteDeadline(time.Now().Add(peerWriteTimeout))
	_, err := c.conn.Write(out)
	return err == nil
}

// append appends an answer's bytes, unless nobody waits for it.
func (c *peerConn) append(out []byte, a *peerAnswer) []byte {
	if a.stream == nil {
		return wire.AppendPeer(out, &wire.PeerMessage{Kind: wire.PeerPong})
	}
	if a.size > 0 {
		c.requests.Add(-1)
		c.bytes.Add(-int64(a.size))
	}
	if a.stream.closed.Load() {
		return out
	}
	m := wire.PeerMessage{Kind: wire.PeerResponse, Stream: a.stream.id, Ordinal: a.ordinal, Code: a.code, Error: a.err}
	m.Term = c.proxy.coordinator.Status().Term
	out, start := wire.BeginPeer(out, &m)
	if a.response == nil {
		return wire.EndPeer(append(out, a.text...), start)
	}
	out = wire.AppendResponseFrame(out, a.correlation, a.response)
	if size := len(out) - start; size > maxPeerResponse {
		m.Code, m.Error = wire.PeerRefused, kerr.UnknownServerError.Code
		m.Frame = fmt.Appendf(nil, "the response has %d bytes, more than %d", size, maxPeerResponse)
		return wire.AppendPeer(out[:start], &m)
	}
	return wire.EndPeer(out, start)
}

// peerReader reads messages of a connection between sidecars.
type peerReader struct {
	buf   *bufio.Reader
	limit int  // bytes of a message
	held  int  // bytes of the buffer that are the newest message's
	own   bool // it has memory of its own
}

func newPeerReader(conn net.Conn, limit int) peerReader {
	return peerReader{buf: bufio.NewReaderSize(conn, peerBuffer), limit: limit}
}

// next gives a message without its length. It is valid until next is called again; see keep.
func (r *peerReader) next() ([]byte, error) {
	_, _ = r.buf.Discard(r.held)
	r.held, r.own = 0, false
	head, err := r.buf.Peek(4)
	if err != nil {
		return nil, err
	}
	size := int64(binary.BigEndian.Uint32(head))
	if size < 5 || size > int64(r.limit) {
		return nil, fmt.Errorf("%w: a message of %d bytes, of at most %d", errPeerMistake, size, r.limit)
	}
	if n := 4 + int(size); n <= peerBuffer {
		message, err := r.buf.Peek(n)
		if err != nil {
			return nil, err
		}
		r.held = n
		return message[4:], nil
	}
	_, _ = r.buf.Discard(4)
	r.own = true
	var whole bytes.Buffer // grows as bytes come: a length that was only claimed costs nothing
	if _, err := io.CopyN(&whole, r.buf, size); err != nil {
		return nil, err
	}
	return whole.Bytes(), nil
}

// keep gives part of the newest message in memory that outlives it.
func (r *peerReader) keep(part []byte) []byte {
	if r.own {
		return part
	}
	return bytes.Clone(part)
}
