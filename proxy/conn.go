package proxy

import (
	"context"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// conn is a client connection.
type conn struct {
	proxy    *Proxy
	listener *listener
	client   net.Conn
	ctx      context.Context
	cancel   context.CancelFunc
	session  session
	inflight inflight
	ends     atomic.Int32 // of its goroutines, that have ended

	mu     sync.Mutex // guards legs
	legs   []*leg     // to be closed with the connection
	closed bool

	// The reader's.
	in         frameReader
	own, other *leg
	passed     bool // SASL went to our own broker: only that leg speaks for the client

	silent atomic.Pointer[leg] // the newest on which a request without a reply was sent

	// The writer's.
	out    []byte
	timer  *time.Timer
	last   *leg // that of the newest slot, if it had one
	streak int  // slots in a row that had it
}

// mistake is something the client did that ends its connection, with the words for the log.
type mistake struct {
	kind tracing.Mistake
	text string
}

func (m *mistake) Error() string { return m.text }

func blame(kind tracing.Mistake, format string, args ...any) error {
	return &mistake{kind, fmt.Sprintf(format, args...)}
}

func newConn(p *Proxy, l *listener, client net.Conn) *conn {
	c := &conn{proxy: p, listener: l, client: client}
	c.ctx, c.cancel = context.WithCancel(p.ctx)
	c.in.conn = client
	c.inflight.init(p.config.MaxInflight)
	host := client.RemoteAddr().String()
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	c.session.init(p, l.node, "/"+host, c.inflight.signal, func() bool { return hungUp(client) })
	return c
}

// close ends the connection from any goroutine: both of its own then end.
func (c *conn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	c.cancel()
	_ = c.client.Close()
	for _, l := range c.legs {
		l.close()
	}
}

// pause waits, but not longer than the connection lives.
func (c *conn) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-c.ctx.Done():
	}
}

// ended is deferred by both goroutines. A panic closes this connection and nothing else.
func (c *conn) ended(who string) {
	if broken := recover(); broken != nil {
		c.proxy.logger.Error("client connection closed after a panic", "in", who, "client", c.client.RemoteAddr(), "panic", broken, "stack", string(debug.Stack()))
		c.close()
	}
	if c.ends.Add(1) == 2 {
		c.session.end()
		c.proxy.metrics.Add(tracing.RequestsInFlight, -int64(c.inflight.len()))
		c.proxy.gone(c)
	}
	c.proxy.running.Done()
}

// ownLeg gives the leg to the listener's broker, dialling it if need be. One that the client's own SASL has opened cannot
// be opened again without it, nor may one end without the client's noticing that may have failed what it never answers.
func (c *conn) ownLeg() (*leg, error) {
	if c.own != nil {
		if !c.own.dead() {
			return c.own, nil
		}
		switch ended := c.passed || c.own.unsure(); {
		case ended && !c.own.up.Load():
			return nil, errUnsent
		case ended:
			return nil, errLegEnded
		}
	}
	c.own = c.replace(c.own, c.ownAddrs(), true)
	return c.own, nil
}

func (c *conn) ownAddrs() []string {
	if c.listener.node == anyNode {
		return c.proxy.table.anyAddrs()
	}
	if addr := c.proxy.table.addrOf(c.listener.node); addr != "" {
		return []string{addr}
	}
	return nil
}

// anyLeg gives the leg for what any broker can answer: our own while that seems well, else one to another broker.
func (c *conn) anyLeg() (*leg, error) {
	own := c.proxy.table.addrOf(c.listener.node)
	if c.passed || !c.suspectLeg(c.own) && !c.proxy.health.suspected(own) {
		return c.ownLeg()
	}
	if c.listener.node == anyNode {
		c.own = c.replace(c.own, c.ownAddrs(), true)
		return c.own, nil
	}
	if c.other == nil || c.other.dead() || c.suspectLeg(c.other) {
		others := c.proxy.table.others(own, int(c.session.client.Session[0]))
		if len(others) == 0 {
			return c.ownLeg()
		}
		c.other = c.replace(c.other, others, false)
	}
	return c.other, nil
}

// suspectLeg says whether a leg leads to a broker that is suspected to be down.
func (c *conn) suspectLeg(l *leg) bool {
	return l != nil && (l.failed() || l.up.Load() && c.proxy.health.suspected(l.addr))
}

// replace dials a new leg, to the listener's own broker or to another. What is outstanding on the old one is still read.
func (c *conn) replace(old *leg, addrs []string, own bool) *leg {
	if old != nil {
		old.retire()
	}
	l := c.newLeg(addrs, own)
	c.mu.Lock()
	c.legs = slices.DeleteFunc(c.legs, (*leg).finished)
	c.legs = append(c.legs, l)
	closed := c.closed
	c.mu.Unlock()
	if closed {
		l.close()
	}
	return l
}
