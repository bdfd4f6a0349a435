package replicate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// Limits of the peer port.
const (
	helloTimeout       = 5 * time.Second // for connecting, TLS, token and hello together
	probeTimeout       = time.Second     // for the same, to learn whether anybody is there
	maxPeerConnections = 4096            // incoming ones; more are closed
	maxGreetings       = 256             // of them before the end of the hello; more wait to be accepted
	greetingPatience   = time.Second / 2 // while they wait, who has taken longer for its hello is given up
	unackedTimeout     = 30 * time.Second
	complaintInterval  = 10 * time.Second
	maxComplaints      = 256
)

// keepAlive finds the peers that have gone without a word while nothing is sent to them.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 4}

// peerConfig of a peerPort.
type peerConfig struct {
	bind string // host:port
	// listen and dial are net's own when nil.
	listen   func(network, addr string) (net.Listener, error)
	dial     func(ctx context.Context, network, addr string) (net.Conn, error)
	identity func() peerIdentity                         // asked for each connection
	resolve  func(node string) (addr string, known bool) // where a node's peer port is
	security Security                                    //
	accept   map[peerKind]func(net.Conn, peerIdentity)   // takes over incoming connections; see handle
	logger   *slog.Logger                                //
	metrics  *tracing.Metrics                            //
}

// peerPort is where sidecars meet: one listener, and the way to the others'. Every connection begins with a hello, so
// that nothing is ever exchanged with a stranger, another cluster, or another node than the one meant.
type peerPort struct {
	config   peerConfig
	guard    guard
	listener net.Listener
	greeting chan struct{} // a slot for each connection that has not been welcomed yet, and for the next one
	ctx      context.Context
	cancel   context.CancelFunc
	running  sync.WaitGroup // accept and the greetings

	mu       sync.Mutex
	handlers map[peerKind]func(net.Conn, peerIdentity)
	live     map[*incomingConn]struct{}
	unheard  []*incomingConn // those that hold a slot, the oldest first
	closed   bool

	complaints struct {
		sync.Mutex
		since map[string]time.Time
	}
}

var (
	errUnknownNode = errors.New("no address is known of that node")
	errOtherNode   = errors.New("another node lives there now")
	errPortClosed  = errors.New("the peer port is closed")
	errUnsecured   = errors.New("it is not on this machine, and nothing secures the peer port: give all sidecars --peer-cert, --peer-key and --peer-ca, or the same --join-token, or else --insecure-peers")
)

// openPeerPort binds the port and takes connections.
func openPeerPort(c peerConfig) (*peerPort, error) {
	p := &peerPort{config: c, greeting: make(chan struct{}, maxGreetings), handlers: map[peerKind]func(net.Conn, peerIdentity){}, live: map[*incomingConn]struct{}{}}
	if p.config.logger == nil {
		p.config.logger = slog.New(slog.DiscardHandler)
	}
	p.complaints.since = map[string]time.Time{}
	own := c.identity()
	if _, err := (hello{from: own}).encode(); err != nil { // an identity that fits, once and for all
		return nil, err
	}
	var err error
	if p.guard, err = newGuard(c.security, own.cluster, p.complain); err != nil {
		return nil, err
	}
	if p.config.listen == nil {
		lc := net.ListenConfig{KeepAliveConfig: keepAlive}
		lc.SetMultipathTCP(false)
		p.config.listen = func(network, addr string) (net.Listener, error) {
			return lc.Listen(context.Background(), network, addr)
		}
	}
	if p.config.dial == nil {
		p.config.dial = (&net.Dialer{KeepAliveConfig: keepAlive}).DialContext
	}
	if p.listener, err = p.config.listen("tcp", c.bind); err != nil {
		return nil, err
	}
	for kind, handler := range c.accept {
		p.handle(kind, handler)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.running.Go(p.accept)
	return p, nil
}

// handle says who takes over incoming connections of a kind. A handler runs on a goroutine of its own, and owns the
// connection: it is to be closed, which the port does as well when it is closed itself.
func (p *peerPort) handle(kind peerKind, handler func(conn net.Conn, from peerIdentity)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handlers[kind] = handler
}

// addr is the bound one.
func (p *peerPort) addr() net.Addr { return p.listener.Addr() }

// close ends the listener, every incoming connection and every dial on its way. Connections that were dialled belong to
// those who have dialled them.
func (p *peerPort) close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	err := p.listener.Close()
	p.running.Wait()
	p.mu.Lock()
	live := slices.Collect(maps.Keys(p.live))
	p.mu.Unlock()
	for _, conn := range live {
		_ = conn.raw.Close() // first: TLS would wait to say goodbye
		_ = conn.Close()
	}
	return err
}

// accept takes connections until the listener is closed.
func (p *peerPort) accept() {
	for p.slot() {
		conn, err := p.listener.Accept()
		if err != nil {
			<-p.greeting
			if p.ctx.Err() != nil {
				return
			}
			// Mostly too many open files; the port must be there again when that is over.
			p.complain("accept", fmt.Sprintf("the peer port takes no connections: %v", err))
			select {
			case <-time.After(50 * time.Millisecond):
			case <-p.ctx.Done():
				return
			}
			continue
		}
		incoming, err := p.track(conn)
		if err != nil {
			_ = conn.Close()
			p.refused(conn, err)
			<-p.greeting
			continue
		}
		p.running.Add(1)
		go p.greet(incoming)
	}
}

// slot waits until one more connection may be greeted; false: the port is closed. Strangers who say nothing keep nobody
// out for long: a peer says hello within milliseconds.
func (p *peerPort) slot() bool {
	for p.ctx.Err() == nil {
		select {
		case p.greeting <- struct{}{}:
			return true
		default:
		}
		p.mu.Lock()
		if len(p.unheard) == 0 { // all of them just now
			p.mu.Unlock()
			continue
		}
		oldest := p.unheard[0]
		p.mu.Unlock()
		timer := time.NewTimer(greetingPatience - time.Since(oldest.since))
		select {
		case p.greeting <- struct{}{}:
			timer.Stop()
			return true
		case <-timer.C:
			if p.heard(oldest) {
				_ = oldest.raw.Close()
			}
		case <-p.ctx.Done():
			timer.Stop()
		}
	}
	return false
}

// heard gives the slot of a connection back; false: it was given back before.
func (p *peerPort) heard(conn *incomingConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.unheard, conn)
	if i < 0 {
		return false
	}
	p.unheard = slices.Delete(p.unheard, i, i+1)
	<-p.greeting // at once: it is in there
	return true
}

// track counts a connection among the live ones until it is closed, and among the unheard.
func (p *peerPort) track(conn net.Conn) (*incomingConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errPortClosed
	}
	if len(p.live) >= maxPeerConnections {
		return nil, strange(tracing.StrangerConnections, "there are %d connections of peers already: is something opening them over and over?", maxPeerConnections)
	}
	tracked := &incomingConn{Conn: conn, port: p, raw: conn, since: time.Now(), gone: make(chan struct{})}
	p.live[tracked] = struct{}{}
	p.unheard = append(p.unheard, tracked)
	p.config.metrics.Add(tracing.PeerConnections, 1)
	return tracked, nil
}

// incomingConn is an accepted connection.
type incomingConn struct {
	net.Conn // with TLS round it, once that is done
	port     *peerPort
	raw      net.Conn
	since    time.Time
	closing  sync.Once
	gone     chan struct{} // closed with it
	err      error
}

// Close closes it, and forgets it.
func (c *incomingConn) Close() error {
	c.closing.Do(func() {
		close(c.gone)
		c.port.mu.Lock()
		delete(c.port.live, c)
		c.port.mu.Unlock()
		c.port.config.metrics.Add(tracing.PeerConnections, -1)
		c.err = c.Conn.Close()
	})
	return c.err
}

// greet hears the hello of a connection and hands it over.
func (p *peerPort) greet(conn *incomingConn) {
	from, handler, err := p.welcome(conn)
	if !p.heard(conn) {
		err = strange(tracing.StrangerSilent, "it said no complete hello within %v, and others waited: is something opening connections over and over?", greetingPatience)
	}
	if err != nil || handler == nil {
		_ = conn.Close()
	}
	if err != nil {
		p.refused(conn.raw, err)
	}
	p.running.Done()
	if err == nil && handler != nil {
		handler(conn, from)
	}
}

// welcome does all that comes before what the connection is for. The handler is nil for a probe.
func (p *peerPort) welcome(conn *incomingConn) (from peerIdentity, handler func(net.Conn, peerIdentity), err error) {
	if p.config.security.strangersPossible() && !isLoopback(conn.RemoteAddr()) {
		return from, nil, strange(tracing.StrangerAddress, "%v", errUnsecured)
	}
	tune(conn.raw)
	ctx, cancel := context.WithTimeout(p.ctx, helloTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.raw.SetDeadline(past) })
	defer stop()
	own := p.config.identity()
	if conn.Conn, err = p.guard.shieldServer(ctx, conn.raw, own.cluster); err != nil {
		conn.Conn = conn.raw
		return from, nil, err
	}
	body, reply, err := p.guard.hear(conn)
	if err != nil {
		return from, nil, err
	}
	h, err := decodeHello(body)
	if err != nil {
		return from, nil, strange(tracing.StrangerGarbage, "its hello cannot be read")
	}
	handler, refused := p.judge(h, own)
	if err := p.reply(h, own, refused, reply); err != nil {
		return from, nil, unheard(err)
	}
	if refused != nil {
		return from, nil, strange(refused.kind, "node %s of cluster %q: %s", h.from.node, h.from.cluster, refused.message)
	}
	if !stop() {
		return from, nil, strange(tracing.StrangerSilent, "its hello came too late")
	}
	return h.from, handler, nil
}

// verdict is a refusal, seen from the side that answers.
type verdict struct {
	refusal
	kind tracing.Stranger
}

// judge says who takes a connection over, or why nobody does.
func (p *peerPort) judge(h hello, own peerIdentity) (func(net.Conn, peerIdentity), *verdict) {
	code, message := h.meet(own)
	switch code {
	case codeWelcome:
	case codeOtherCluster:
		return nil, &verdict{refusal{code, message}, tracing.StrangerCluster}
	case codeOtherClusterID:
		return nil, &verdict{refusal{code, message}, tracing.StrangerClusterID}
	case codeVersion:
		return nil, &verdict{refusal{code, message}, tracing.StrangerVersion}
	default:
		return nil, &verdict{refusal{code, message}, tracing.StrangerNode}
	}
	if h.kind == peerProbe {
		return nil, nil
	}
	p.mu.Lock()
	handler := p.handlers[h.kind]
	p.mu.Unlock()
	if handler == nil {
		return nil, &verdict{refusal{codeRefused, fmt.Sprintf("nothing here takes connections for %v", h.kind)}, tracing.StrangerKind}
	}
	return handler, nil
}

// reply answers a hello. One that does not know the cluster's name learns nothing else.
func (p *peerPort) reply(h hello, own peerIdentity, refused *verdict, reply func([]byte) error) error {
	a := answer{version: helloVersion}
	if refused != nil {
		a.code, a.message = refused.code, refused.message
	}
	if a.code != codeOtherCluster {
		a.clusterID = own.clusterID
		a.node, _ = uuid.Parse(own.node)
	}
	encoded, err := a.encode()
	if err != nil {
		return err
	}
	return reply(encoded)
}

// refused counts and tells why a connection was closed.
func (p *peerPort) refused(conn net.Conn, err error) {
	var why *stranger
	if !errors.As(err, &why) || p.ctx.Err() != nil {
		return
	}
	p.config.metrics.Stranger(why.kind)
	host := conn.RemoteAddr().String()
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	p.complain(fmt.Sprint(why.kind, " ", host), fmt.Sprintf("closed a connection from %v to the peer port: %s", conn.RemoteAddr(), why.text))
}

// complain logs a warning, at most one of each key in complaintInterval.
func (p *peerPort) complain(key, text string) {
	now := time.Now()
	p.complaints.Lock()
	last, known := p.complaints.since[key]
	tell := !known || now.Sub(last) >= complaintInterval
	if tell {
		if len(p.complaints.since) >= maxComplaints {
			clear(p.complaints.since)
		}
		p.complaints.since[key] = now
	}
	p.complaints.Unlock()
	if tell {
		p.config.logger.Warn(text)
	}
}

// dial connects to a node, for kind, and gives who answered: that node, with the cluster id it knows.
func (p *peerPort) dial(ctx context.Context, node string, kind peerKind) (net.Conn, peerIdentity, error) {
	p.config.metrics.Add(tracing.PeerDials, 1)
	conn, who, err := p.reach(ctx, node, kind)
	if err != nil {
		p.config.metrics.Add(tracing.PeerDialsFailed, 1)
		return nil, peerIdentity{}, fmt.Errorf("dialling node %s for %v: %w", node, kind, err)
	}
	return conn, who, nil
}

func (p *peerPort) reach(ctx context.Context, node string, kind peerKind) (net.Conn, peerIdentity, error) {
	to, err := uuid.Parse(node)
	if err != nil {
		return nil, peerIdentity{}, fmt.Errorf("a node id is a UUID: %w", err)
	}
	addr, known := p.config.resolve(node)
	if !known {
		return nil, peerIdentity{}, errUnknownNode
	}
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	conn, who, err := p.connect(ctx, addr, to, kind)
	if err != nil {
		return nil, peerIdentity{}, fmt.Errorf("%s: %w", addr, err)
	}
	return conn, who, nil
}

func (p *peerPort) connect(ctx context.Context, addr string, to uuid.UUID, kind peerKind) (net.Conn, peerIdentity, error) {
	if ip := addressOf(addr); ip != nil && !ip.IsLoopback() && p.config.security.strangersPossible() {
		p.disagree(addr, errUnsecured) // a name is looked at when it has led somewhere
		return nil, peerIdentity{}, errUnsecured
	}
	raw, err := p.config.dial(ctx, "tcp", addr)
	if err != nil {
		return nil, peerIdentity{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(past) })
	conn, who, err := p.introduce(ctx, raw, to, kind)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = raw.Close()
		p.disagree(addr, err)
		return nil, peerIdentity{}, err
	}
	return conn, who, nil
}

// disagree tells of a peer that is there and yet not to be talked to, unless that is nobody's fault.
func (p *peerPort) disagree(addr string, err error) {
	var refused *refusal
	if isSilence(err) || errors.Is(err, errOtherNode) || errors.As(err, &refused) && refused.code == codeRefused {
		return
	}
	p.complain("dialled "+addr, fmt.Sprintf("the sidecar at %s and this one do not get on: %v", addr, err))
}

// introduce says hello on a new connection.
func (p *peerPort) introduce(ctx context.Context, raw net.Conn, to uuid.UUID, kind peerKind) (net.Conn, peerIdentity, error) {
	if p.config.security.strangersPossible() && !isLoopback(raw.RemoteAddr()) {
		return nil, peerIdentity{}, errUnsecured
	}
	tune(raw)
	own := p.config.identity()
	conn, err := p.guard.shieldClient(ctx, raw, own.cluster)
	if err != nil {
		return nil, peerIdentity{}, err
	}
	encoded, err := hello{kind: kind, version: helloVersion, from: own, to: to}.encode()
	if err != nil {
		return nil, peerIdentity{}, err
	}
	body, err := p.guard.ask(conn, encoded)
	if err != nil {
		return nil, peerIdentity{}, err
	}
	a, err := decodeAnswer(body)
	if err != nil {
		return nil, peerIdentity{}, err
	}
	switch {
	case a.code == codeOtherNode, a.code == codeWelcome && a.node != to:
		return nil, peerIdentity{}, errOtherNode
	case a.code != codeWelcome:
		return nil, peerIdentity{}, &refusal{a.code, printable(a.message)}
	case a.version != helloVersion:
		return nil, peerIdentity{}, &refusal{codeVersion, fmt.Sprintf("it answers in peer protocol %d", a.version)}
	}
	return conn, peerIdentity{cluster: own.cluster, clusterID: a.clusterID, node: a.node.String()}, nil
}

// refuses dials a node's peer port and says whether it is certain that the node is not there: its host refuses or
// resets the connection, or another node lives at its address. Silence is no certainty.
func (p *peerPort) refuses(node string) bool {
	ctx, cancel := context.WithTimeout(p.ctx, probeTimeout)
	defer cancel()
	for range 3 {
		conn, _, err := p.dial(ctx, node, peerProbe)
		var refused *refusal
		switch {
		case err == nil:
			_ = conn.Close()
			return false
		case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, errOtherNode):
			return true
		case errors.As(err, &refused):
			return refused.code == codeOtherCluster
		case !errors.Is(err, io.EOF):
			return false
		}
		// Closed in the middle: a process that dies now refuses the next one.
	}
	return false
}

// past is a deadline that ends whatever waits on a connection.
var past = time.Unix(1, 0)

// isSilence says that the other side has closed, or said nothing in time.
func isSilence(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

func isLoopback(addr net.Addr) bool {
	ip := addressOf(addr.String())
	return ip != nil && ip.IsLoopback()
}

// addressOf gives the IP address of a host:port, nil if it is a name.
func addressOf(addr string) net.IP {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil
	}
	return net.ParseIP(host)
}

// printable keeps what somebody else says from writing lines of its own into our log.
func printable(s string) string {
	if len(s) > 200 {
		s = s[:200]
	}
	quoted := fmt.Sprintf("%q", s)
	return quoted[1 : len(quoted)-1]
}
