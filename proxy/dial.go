package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	dialTimeout = 3 * time.Second        // connect and ApiVersions, all addresses together
	dialStagger = 250 * time.Millisecond // before the next address is tried as well
	maxPending  = 1 << 20                // bytes of small frames kept while a leg is dialled; more wait in the socket
	idleCheck   = time.Second            // a leg unused for longer is looked at before it is used
	maxVersions = 1 << 20                // bytes of an ApiVersions response
	rejectTime  = 3 * time.Second        // in which a broker closes on a failed Produce without acks; later it is idleness
)

var (
	errSelfLoop  = errors.New("the address leads back to this sidecar: --upstream (or a broker's advertised.listeners) names one of our own listeners")
	errNoAddress = errors.New("no upstream address is known")
)

// leg is a client connection's own connection to an upstream broker. The connection's reader sends on it, its writer
// reads the replies.
type leg struct {
	proxy *Proxy
	owner *conn
	addrs []string      // to be dialled
	own   bool          // they are the listener's own broker's
	ready chan struct{} // closed when the dial has ended
	up    atomic.Bool   // set before that if it went well: replies may be read
	// flushed is closed when the frames kept meanwhile are sent, or never will be; open is set before if they were: the
	// reader then writes by itself.
	flushed chan struct{}
	open    atomic.Bool
	// broken is set when reading or writing has failed.
	broken atomic.Bool
	// retired is set when the reader has no more use for the leg: the writer closes it with the last reply.
	retired atomic.Bool
	// Of a leg that is not up, and set before ready is closed: why, and which address was to blame.
	err  error
	addr string

	mu          sync.Mutex // guards conn and pending until up, closed, and interrupted
	conn        net.Conn
	pending     []byte
	closed      bool
	interrupted bool // the read deadline was set to the past

	// silent counts the requests without a reply that were sent, accepted those of them that went ahead of an answered
	// one. A broker tells the failure of such a request by closing the connection, and so the client must be told.
	silent      atomic.Uint32
	accepted    atomic.Uint32
	silentIn    atomic.Int32 // the version of the newest
	blamed      atomic.Bool  // somebody has looked into why the broker has closed it
	outstanding atomic.Int32 // sent and not yet relayed
	sent        atomic.Int64 // Unix nanoseconds of the last progress in sending

	// The reader's.
	writeBy deadline
	used    time.Time

	// The writer's.
	in     frameReader
	readBy deadline
	owed   int // replies that nobody waits for any more
}

// newLeg begins to dial the first of these addresses that answers.
func (c *conn) newLeg(addrs []string, own bool) *leg {
	l := &leg{proxy: c.proxy, owner: c, addrs: addrs, own: own, ready: make(chan struct{}), flushed: make(chan struct{}), used: time.Now()}
	c.proxy.running.Add(1)
	go l.dial()
	return l
}

func (l *leg) dial() {
	c := l.owner
	defer c.proxy.running.Done()
	defer c.inflight.signal()
	defer close(l.flushed)
	err := l.tryDial()
	if l.own && c.ctx.Err() == nil {
		c.listener.dialed(err)
	}
	close(l.ready)
	c.inflight.signal()
	switch {
	case err == nil:
		l.flush()
	case l.silent.Load() > 0:
		c.pause(c.listener.failureDelay())
		c.close()
	}
}

func (l *leg) tryDial() (err error) {
	defer func() {
		if broken := recover(); broken != nil {
			err = fmt.Errorf("panic: %v", broken)
			l.proxy.logger.Error("dialling the upstream ended in a panic", "panic", broken, "stack", string(debug.Stack()))
		}
		l.err = err
		l.up.Store(err == nil)
	}()
	conn, addr, err := l.proxy.dialFirst(l.owner.ctx, l.addrs)
	l.addr = addr
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = conn.Close()
		return net.ErrClosed
	}
	l.conn = conn
	l.in.conn = conn
	l.writeBy.set, l.readBy.set = conn.SetWriteDeadline, conn.SetReadDeadline
	l.sent.Store(time.Now().UnixNano())
	l.proxy.metrics.Add(tracing.UpstreamConnections, 1)
	return nil
}

// flush sends what has gathered meanwhile and then lets the reader write by itself. Replies are read all the while, so
// that a broker that answers before it reads on cannot lock us up.
func (l *leg) flush() {
	for {
		l.mu.Lock()
		pending := l.pending
		l.pending = nil
		if len(pending) == 0 {
			l.open.Store(true)
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		_ = l.conn.SetWriteDeadline(time.Now().Add(l.proxy.config.UpstreamTimeout))
		if _, err := l.conn.Write(pending); err != nil {
			l.broken.Store(true)
			_ = l.conn.Close() // so that the writer hears of it
			if l.silent.Load() != l.accepted.Load() {
				l.owner.close() // requests without a reply were not sent, and nobody else can tell
			}
			return
		}
		_ = l.conn.SetWriteDeadline(time.Time{})
		l.sent.Store(time.Now().UnixNano())
	}
}

// send writes a whole small frame, or keeps it until the leg is up.
func (l *leg) send(frame []byte, done <-chan struct{}) error {
	for !l.open.Load() {
		l.mu.Lock()
		if !l.open.Load() && len(l.pending)+len(frame) <= maxPending {
			l.pending = append(l.pending, frame...)
			l.mu.Unlock()
			return nil
		}
		l.mu.Unlock()
		if !l.wait(done) {
			return nil // the writer will see why
		}
	}
	l.used = time.Now()
	l.writeBy.after(l.proxy.config.UpstreamTimeout)
	_, err := l.conn.Write(frame)
	l.sent.Store(l.used.UnixNano())
	return err
}

// wait waits until the reader may write; false when it never may.
func (l *leg) wait(done <-chan struct{}) bool {
	select {
	case <-l.flushed:
		return l.open.Load()
	case <-done:
		return false
	}
}

// dead says whether a leg must not be used for a new request: it has failed, or with nothing outstanding on it the
// broker has closed it (connections.max.idle.ms).
func (l *leg) dead() bool {
	if !l.up.Load() {
		return l.failed()
	}
	if l.open.Load() && !l.broken.Load() && l.outstanding.Load() == 0 && time.Since(l.used) > idleCheck && ended(l.conn) {
		l.broken.Store(true)
	}
	return l.broken.Load()
}

// unsure says whether a request without a reply may still fail: the end of the leg is then to be told to the client.
func (l *leg) unsure() bool {
	if l.silent.Load() == l.accepted.Load() {
		return false
	}
	return !l.up.Load() || time.Since(time.Unix(0, l.sent.Load())) < rejectTime
}

// newestSilent names the newest request without a reply.
func (l *leg) newestSilent() string {
	return fmt.Sprintf("a Produce request without acks (api key %d, version %d)", keyProduce, l.silentIn.Load())
}

// failed says whether a leg was not to be had, or has broken off.
func (l *leg) failed() bool {
	if l.up.Load() {
		return l.broken.Load()
	}
	return l.settled() && !l.up.Load()
}

// settled says whether the dial has ended.
func (l *leg) settled() bool {
	select {
	case <-l.ready:
		return true
	default:
		return false
	}
}

// address is where a leg leads, or was to lead.
func (l *leg) address() string {
	if l.settled() && l.addr != "" {
		return l.addr
	}
	if len(l.addrs) > 0 {
		return l.addrs[0]
	}
	return ""
}

// answered notes that a request sent on the leg needs it no more.
func (l *leg) answered() {
	if l.outstanding.Add(-1) == 0 && l.retired.Load() {
		l.close()
	}
}

// retire closes the leg as soon as nothing is outstanding on it.
func (l *leg) retire() {
	l.retired.Store(true)
	if l.outstanding.Load() == 0 {
		l.close()
	}
}

// finished says whether there is nothing left to close.
func (l *leg) finished() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// interrupt ends a read of the writer that listens for the reply to a request that has not been read yet.
func (l *leg) interrupt(q *inflight) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if q.listening.Load() == l && !l.interrupted {
		l.interrupted = true
		_ = l.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// close may be called from any goroutine, more than once.
func (l *leg) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	if l.conn != nil {
		_ = l.conn.Close()
		l.proxy.metrics.Add(tracing.UpstreamConnections, -1)
	}
}

// dialFirst connects to the first of these addresses that answers ApiVersions, trying the next one as well when an
// earlier one takes its time. The address in an error is that of the last failure.
func (p *Proxy) dialFirst(ctx context.Context, addrs []string) (net.Conn, string, error) {
	if len(addrs) == 0 {
		return nil, "", errNoAddress
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	type result struct {
		conn     net.Conn
		addr     string
		versions *kmsg.ApiVersionsResponse
		err      error
	}
	results := make(chan result)
	attempt := func(addr string) {
		defer p.running.Done()
		conn, versions, err := p.connect(ctx, addr)
		select {
		case results <- result{conn, addr, versions, err}:
		case <-ctx.Done():
			if err == nil {
				_ = conn.Close()
			}
		}
	}
	stagger := time.NewTimer(0)
	defer stagger.Stop()
	started, failed := 0, 0
	var last result
	for {
		select {
		case <-stagger.C:
			if started < len(addrs) {
				p.running.Add(1)
				go attempt(addrs[started])
				started++
				stagger.Reset(dialStagger)
			}
		case r := <-results:
			if r.err == nil {
				p.table.learnVersions(r.addr, r.versions)
				p.health.clear(r.addr)
				return r.conn, r.addr, nil
			}
			last = r
			if failed++; failed == len(addrs) {
				return nil, last.addr, last.err
			}
			if started < len(addrs) {
				stagger.Reset(0)
			}
		case <-ctx.Done():
			if p.ctx.Err() == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
				p.suspect(addrs[0], fmt.Errorf("no answer in %v", dialTimeout))
			}
			return nil, addrs[0], fmt.Errorf("dialling %s: %w", addrs[0], ctx.Err())
		}
	}
}

// connect dials one address and learns what it speaks.
func (p *Proxy) connect(ctx context.Context, addr string) (net.Conn, *kmsg.ApiVersionsResponse, error) {
	p.metrics.Add(tracing.UpstreamDials, 1)
	conn, err := p.config.Dial(ctx, "tcp", addr)
	if err == nil && p.table.isOwn(conn.RemoteAddr(), conn.LocalAddr()) {
		_ = conn.Close()
		err = errSelfLoop
	}
	if err != nil {
		p.dialFailed(ctx, addr, err)
		return nil, nil, fmt.Errorf("dialling %s: %w", addr, err)
	}
	unpaced(conn)
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	versions, err := askVersions(conn)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = conn.Close()
		p.dialFailed(ctx, addr, err)
		return nil, nil, fmt.Errorf("asking %s for its versions: %w", addr, err)
	}
	return conn, versions, nil
}

func (p *Proxy) dialFailed(ctx context.Context, addr string, err error) {
	if errors.Is(ctx.Err(), context.Canceled) {
		return // nobody waits for it any more
	}
	p.metrics.Add(tracing.UpstreamDialsFailed, 1)
	if errors.Is(err, errSelfLoop) {
		p.complain("upstream %s is refused: %v", addr, err)
		return
	}
	p.suspect(addr, err)
}

// askVersions exchanges ApiVersions. A broker that does not know our version answers in the form of version 0 with error
// 35 (KIP-511), and is asked again in its own.
func askVersions(conn net.Conn) (*kmsg.ApiVersionsResponse, error) {
	req := kmsg.NewPtrApiVersionsRequest()
	req.ClientSoftwareName = "offset-sidecar"
	req.ClientSoftwareVersion = "1"
	for version := int16(4); ; {
		req.SetVersion(version)
		resp, err := exchangeVersions(conn, req)
		if err != nil {
			return nil, err
		}
		if resp.ErrorCode != kerr.UnsupportedVersion.Code {
			return resp, kerr.ErrorForCode(resp.ErrorCode)
		}
		lower := int16(0)
		for _, k := range resp.ApiKeys {
			if k.ApiKey == keyApiVersions {
				lower = k.MaxVersion
			}
		}
		if lower >= version {
			return nil, kerr.UnsupportedVersion
		}
		version = lower
	}
}

func exchangeVersions(conn net.Conn, req *kmsg.ApiVersionsRequest) (*kmsg.ApiVersionsResponse, error) {
	frame := kmsg.NewRequestFormatter(kmsg.FormatterClientID("offset-sidecar")).AppendRequest(nil, req, int32(req.Version))
	if _, err := conn.Write(frame); err != nil {
		return nil, err
	}
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, err
	}
	size := int32(binary.BigEndian.Uint32(head[:]))
	if size < 6 || size > maxVersions {
		return nil, fmt.Errorf("this is no Kafka broker: it answered with %q%s", head[:], otherProtocol(head[:]))
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(conn, body); err != nil {
		return nil, err
	}
	resp := kmsg.NewPtrApiVersionsResponse()
	resp.Version = req.Version
	if int16(binary.BigEndian.Uint16(body[4:])) == kerr.UnsupportedVersion.Code {
		resp.Version = 0
	}
	if err := resp.ReadFrom(body[4:]); err != nil {
		return nil, fmt.Errorf("reading ApiVersions: %w", err)
	}
	return resp, nil
}

func otherProtocol(first []byte) string {
	if name := wire.Sniff(first); name != "" {
		return ", which is " + name
	}
	return ""
}
