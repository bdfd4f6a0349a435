package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/offset-sidecar/offset-sidecar/upstream"
)

const (
	loopback = "127.0.0.1"
	// A session's record has a bit for each of 64 requests, so no connection may have more outstanding.
	mostInflight = 64

	acceptBackoffMin = 5 * time.Millisecond
	acceptBackoffMax = time.Second

	failureDelayMin = 250 * time.Millisecond // before a client is closed whose broker could not be dialled
	failureDelayMax = 2 * time.Second

	complaintInterval = 10 * time.Second // a complaint that has been logged is not repeated for so long
	mistakeLines      = 50               // of one kind by one client host are told in that time
	maxComplaints     = 256              // different ones remembered for that
)

// Config of a Proxy. Every field must be set, unless it says otherwise.
type Config struct {
	Listen          string        // bootstrap listener, HOST:PORT; port 0 makes every listener ephemeral
	AdvertiseHost   string        // the host clients are told; may be empty if Listen is on loopback
	Upstream        []string      // the upstream's bootstrap servers, HOST:PORT
	MaxFrame        int32         // bytes of a request, and of a reply that has to be read
	MaxGroupFrame   int32         // bytes of a group or offset request
	MaxInflight     int           // requests of a connection that are read and not answered, at most 64
	MaxConnections  int           // client connections
	UpstreamTimeout time.Duration // without progress from the upstream, beyond the request's own wait
	CommitTimeout   time.Duration // a write of the coordinator is answered within this time
	Node            string        // this sidecar's id among its peers; "" without any
	Logger          *slog.Logger
	Listener        func(network, addr string) (net.Listener, error)                  // nil: net.Listen
	Dial            func(ctx context.Context, network, addr string) (net.Conn, error) // nil: a net.Dialer's
}

// Coordinator executes group and offset requests (coordinator.Coordinator).
type Coordinator interface {
	Submit(*coordinator.Request)
	Status() coordinator.Status
}

// Peers are the other sidecars (replicate.Node).
type Peers interface {
	// Active says whose coordinator answers, as far as is known, perhaps our own; node "" is nobody. The higher term
	// counts. Changed is closed when this no longer holds.
	Active() (term uint64, node string, changed <-chan struct{})
	// Dial opens a connection for forwarded requests to a peer, whose ServePeer it reaches.
	Dial(ctx context.Context, node string) (net.Conn, error)
}

// Upstream knows the upstream's brokers and topics (upstream.Client).
type Upstream interface {
	Brokers() upstream.Brokers
	OnBrokers(func(upstream.Brokers))
	Nudge()
	Topic(name string) (id [16]byte, partitions int32, known bool)
	TopicName(id [16]byte) (string, bool)
}

// Proxy serves Kafka clients. Its methods may be called from any goroutine.
type Proxy struct {
	config      Config
	coordinator Coordinator
	upstream    Upstream
	store       Store
	peers       Peers // nil: alone
	metrics     *tracing.Metrics
	logger      *slog.Logger

	listenHost    string
	advertiseHost string
	basePort      int // of the bootstrap listener; 0 if ports are ephemeral

	ctx       context.Context
	cancel    context.CancelFunc
	running   sync.WaitGroup // every goroutine
	bootstrap *listener
	table     table
	health    health
	held      heldSessions
	forward   forwarder
	serving   peerConns
	mover     mover
	keeper    chan struct{} // capacity 1: there is something to bind again

	mu    sync.Mutex
	conns map[*conn]struct{}
	left  chan struct{} // capacity 1: a client has gone

	complaints struct {
		sync.Mutex
		of map[string]complaint
	}
}

// listener accepts the connections meant for one broker, or for none (anyNode).
type listener struct {
	node     int32
	lns      []net.Listener
	failures atomic.Int32 // dials failed in a row
}

func (l *listener) close() {
	for _, ln := range l.lns {
		_ = ln.Close()
	}
}

// New makes a Proxy; Start binds its listeners. Without peers (nil) group requests are for our own coordinator alone.
func New(config Config, c Coordinator, u Upstream, store Store, peers Peers, metrics *tracing.Metrics) *Proxy {
	if config.Listener == nil {
		config.Listener = net.Listen
	}
	if config.Dial == nil {
		config.Dial = new(net.Dialer).DialContext
	}
	config.MaxInflight = min(max(config.MaxInflight, 1), mostInflight)
	p := &Proxy{
		config: config, coordinator: c, upstream: u, store: store, peers: peers, metrics: metrics, logger: config.Logger,
		conns:  map[*conn]struct{}{},
		left:   make(chan struct{}, 1),
		keeper: make(chan struct{}, 1),
		mover:  mover{splices: make(chan struct{}, maxSplices), metrics: metrics},
	}
	p.held.added = make(chan struct{}, 1)
	p.complaints.of = map[string]complaint{}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.table.init(p)
	p.forward.init(p)
	return p
}

// Start binds the bootstrap listener and those of the brokers known from an earlier run, and serves. Listeners of other
// brokers follow as they become known.
func (p *Proxy) Start() error {
	host, port, advertised, err := ReadListen(p.config.Listen, p.config.AdvertiseHost)
	if err != nil {
		return err
	}
	p.listenHost, p.advertiseHost, p.basePort = host, advertised, port
	if err := p.refuseLoop(); err != nil {
		return err
	}
	lns, bound, err := p.bind(port)
	if err != nil {
		return fmt.Errorf("binding --listen %s: %w (another process may hold the port: stop it, or choose another)", p.config.Listen, err)
	}
	p.bootstrap = &listener{node: anyNode, lns: lns}
	p.table.mu.Lock()
	p.table.addOwn(lns)
	p.table.mu.Unlock()
	p.table.load()
	p.upstream.OnBrokers(p.table.setBrokers)
	p.table.setBrokers(p.upstream.Brokers())
	p.running.Add(3)
	go p.saveTable()
	go p.keepListeners()
	go p.resumeSessions()
	if p.peers != nil {
		p.running.Add(1)
		go p.forward.followActive()
	}
	p.accept(p.bootstrap)
	p.logger.Info("listening for clients", "addr", net.JoinHostPort(p.advertiseHost, strconv.Itoa(bound)))
	return nil
}

// refuseLoop finds an --upstream that is our own bootstrap listener. Others of our ports are found when they are dialled.
func (p *Proxy) refuseLoop() error {
	for _, seed := range p.config.Upstream {
		host, port, err := net.SplitHostPort(seed)
		if err != nil || p.basePort == 0 || port != strconv.Itoa(p.basePort) {
			continue
		}
		ctx, cancel := context.WithTimeout(p.ctx, time.Second)
		ips, err := net.DefaultResolver.LookupIP(ctx, "ip", host)
		cancel()
		if err != nil {
			continue
		}
		for _, ip := range ips {
			own := net.ParseIP(p.listenHost)
			if p.listenHost == loopback && ip.Equal(net.IPv6loopback) || own != nil && own.Equal(ip) || own.IsUnspecified() && ip.IsLoopback() {
				return fmt.Errorf("--upstream %s is this sidecar's own --listen %s: name the Kafka brokers there", seed, p.config.Listen)
			}
		}
	}
	return nil
}

// Addr is the address of the bootstrap listener; nil before Start.
func (p *Proxy) Addr() net.Addr {
	if p.bootstrap == nil {
		return nil
	}
	return p.bootstrap.lns[0].Addr()
}

// Addrs gives the address under which clients reach each broker whose listener is bound, by node id.
func (p *Proxy) Addrs() map[int32]string {
	p.table.mu.RLock()
	defer p.table.mu.RUnlock()
	all := map[int32]string{}
	for id, b := range p.table.brokers {
		if b.listener != nil {
			all[id] = net.JoinHostPort(p.advertiseHost, strconv.Itoa(b.port))
		}
	}
	return all
}

// Clients gives the number of client connections.
func (p *Proxy) Clients() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns)
}

// Shutdown serves on until the last client has gone or ctx is done: consumers commit and leave after they were told to
// stop, which is often when we were. Then it closes everything and waits for all goroutines to end. The error is ctx's if
// clients were still there.
func (p *Proxy) Shutdown(ctx context.Context) error {
	err := p.drain(ctx)
	p.cancel()
	if p.bootstrap != nil {
		p.bootstrap.close()
	}
	p.table.mu.Lock()
	for _, b := range p.table.brokers {
		if b.listener != nil {
			b.listener.close()
		}
	}
	p.table.mu.Unlock()
	p.mu.Lock()
	for c := range p.conns {
		c.close()
	}
	p.mu.Unlock()
	p.serving.closeAll()
	p.running.Wait()
	p.table.store()
	return err
}

func (p *Proxy) drain(ctx context.Context) error {
	for {
		n := p.Clients()
		if n == 0 {
			return nil
		}
		select {
		case <-p.left:
		case <-ctx.Done():
			return fmt.Errorf("closing %d client connections: %w", n, ctx.Err())
		}
	}
}

// accept starts to accept on all addresses of a listener.
func (p *Proxy) accept(l *listener) {
	for _, ln := range l.lns {
		p.running.Add(1)
		go p.acceptFrom(l, ln)
	}
}

func (p *Proxy) acceptFrom(l *listener, ln net.Listener) {
	defer p.running.Done()
	backoff := acceptBackoffMin
	for {
		client, err := ln.Accept()
		switch {
		case err == nil:
			backoff = acceptBackoffMin
			unpaced(client)
			p.serve(l, client)
		case errors.Is(err, net.ErrClosed) || p.ctx.Err() != nil || !isSyscall(err):
			return
		default: // out of file descriptors, or a client that has gone again
			p.complain("accepting on %s: %v; trying again", ln.Addr(), err)
			select {
			case <-time.After(backoff):
			case <-p.ctx.Done():
			}
			backoff = min(2*backoff, acceptBackoffMax)
		}
	}
}

// isSyscall tells failures of accept, which pass, from those of a listener that has ended.
func isSyscall(err error) bool {
	var op *net.OpError
	return errors.As(err, &op)
}

func (p *Proxy) serve(l *listener, client net.Conn) {
	p.mu.Lock()
	if len(p.conns) >= p.config.MaxConnections || p.ctx.Err() != nil {
		p.mu.Unlock()
		p.metrics.Add(tracing.ConnectionsRefused, 1)
		p.complain("a client was turned away: there are %d connections already (--max-connections)", p.config.MaxConnections)
		_ = client.Close()
		return
	}
	c := newConn(p, l, client)
	p.conns[c] = struct{}{}
	p.running.Add(2)
	p.mu.Unlock()
	p.metrics.Add(tracing.Connections, 1)
	p.metrics.Add(tracing.ConnectionsOpen, 1)
	go c.readRequests()
	go c.writeReplies()
}

// gone is called once both goroutines of a connection have ended.
func (p *Proxy) gone(c *conn) {
	p.mu.Lock()
	delete(p.conns, c)
	p.mu.Unlock()
	p.metrics.Add(tracing.ConnectionsOpen, -1)
	select {
	case p.left <- struct{}{}:
	default:
	}
}

// keepListeners binds ports that another process held and gives back those of brokers long gone.
func (p *Proxy) keepListeners() {
	defer p.running.Done()
	again := time.Second
	for {
		timer := time.NewTimer(again)
		select {
		case <-timer.C:
		case <-p.keeper:
			timer.Stop()
			again = time.Second
			continue
		case <-p.ctx.Done():
			timer.Stop()
			return
		}
		again = p.table.keep(time.Now())
	}
}

func (p *Proxy) wakeKeeper() {
	select {
	case p.keeper <- struct{}{}:
	default:
	}
}

// complaint counts the lines of one kind logged since then.
type complaint struct {
	since time.Time
	lines int
}

// complain logs a warning, the same one at most every ten seconds.
func (p *Proxy) complain(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	p.complainOf(text, 1, text)
}

// complainOf logs a warning unless as many lines as limit have been logged under that key in the last ten seconds.
func (p *Proxy) complainOf(key string, limit int, text string) {
	now := time.Now()
	p.complaints.Lock()
	c := p.complaints.of[key]
	if now.Sub(c.since) >= complaintInterval {
		c = complaint{since: now}
	}
	c.lines++
	if len(p.complaints.of) >= maxComplaints {
		clear(p.complaints.of)
	}
	p.complaints.of[key] = c
	p.complaints.Unlock()
	switch {
	case c.lines < limit || limit == 1 && c.lines == 1:
		p.logger.Warn(text)
	case c.lines == limit:
		p.logger.Warn(text + "; more of the kind will not be told for ten seconds")
	}
}

// failureDelay says how long to wait before a client is closed whose broker cannot be reached; clients reset their own
// back-off when a connection opens, so without it they would storm.
func (l *listener) failureDelay() time.Duration {
	return min(failureDelayMin<<min(max(l.failures.Load()-1, 0), 8), failureDelayMax)
}

func (l *listener) dialed(err error) {
	if err == nil {
		l.failures.Store(0)
	} else {
		l.failures.Add(1)
	}
}
