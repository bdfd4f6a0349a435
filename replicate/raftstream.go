package replicate

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// raftStream carries raft's requests over the peer port. An address is a node id.
type raftStream struct {
	port     *peerPort
	node     string
	ended    func(from string)
	incoming chan net.Conn
	closed   chan struct{}

	mu    sync.Mutex
	conns map[*raftConn]struct{} // those that were taken; nil once closed
}

var _ raft.StreamLayer = (*raftStream)(nil)

// newRaftStream makes the stream layer of one run of raft. Its owner passes incoming connections to take. ended is
// called once for each of them that the other side ends, on the goroutine that reads it: it may not block, nor close it.
func newRaftStream(p *peerPort, node string, ended func(from string)) *raftStream {
	return &raftStream{port: p, node: node, ended: ended, incoming: make(chan net.Conn), closed: make(chan struct{}), conns: map[*raftConn]struct{}{}}
}

// take passes an incoming connection on to raft; it returns when raft has it, or nobody will.
func (s *raftStream) take(conn net.Conn, from peerIdentity) {
	c := &raftConn{Conn: conn, stream: s, from: from.node}
	s.mu.Lock()
	open := s.conns != nil
	if open {
		s.conns[c] = struct{}{}
	}
	s.mu.Unlock()
	if !open {
		_ = conn.Close()
		return
	}
	var gone <-chan struct{}
	if incoming, ok := conn.(*incomingConn); ok {
		gone = incoming.gone
	}
	select {
	case s.incoming <- c:
	case <-s.closed:
		_ = c.Close()
	case <-gone:
		_ = c.Close()
	}
}

// Accept gives the next incoming connection.
func (s *raftStream) Accept() (net.Conn, error) {
	select {
	case c := <-s.incoming:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Dial connects to a node.
func (s *raftStream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, _, err := s.port.dial(ctx, string(address), peerRaft)
	return conn, err
}

// Addr is our node id.
func (s *raftStream) Addr() net.Addr { return nodeAddr(s.node) }

// Close ends it, and the incoming connections: raft's transport leaves those to their other side.
func (s *raftStream) Close() error {
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	if conns == nil {
		return nil
	}
	close(s.closed)
	for c := range conns {
		_ = c.Close()
	}
	return nil
}

// nodeAddr is a node id as an address.
type nodeAddr string

func (nodeAddr) Network() string  { return "peer" }
func (a nodeAddr) String() string { return string(a) }

// raftConn is an incoming connection that tells when the other side ends it.
type raftConn struct {
	net.Conn
	stream *raftStream
	from   string
	once   sync.Once // ended
}

func (c *raftConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.lost(err)
	}
	return n, err
}

func (c *raftConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		c.lost(err)
	}
	return n, err
}

func (c *raftConn) lost(err error) {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) {
		return // our own doing
	}
	c.once.Do(func() { c.stream.ended(c.from) })
}

func (c *raftConn) Close() error {
	c.stream.mu.Lock()
	delete(c.stream.conns, c)
	c.stream.mu.Unlock()
	return c.Conn.Close()
}
