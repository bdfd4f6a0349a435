package replicate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// directory is what gossip would know: where each node's peer port is.
type directory struct {
	mu   sync.Mutex
	addr map[string]string
}

func (d *directory) set(node, addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.addr == nil {
		d.addr = map[string]string{}
	}
	d.addr[node] = addr
}

func (d *directory) resolve(node string) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	addr, known := d.addr[node]
	return addr, known
}

// testPeer is a peer port with what it was told.
type testPeer struct {
	*peerPort
	t       *testing.T
	id      peerIdentity
	metrics *tracing.Metrics
	log     *logLines
	taken   chan takenConn
}

type takenConn struct {
	conn net.Conn
	from peerIdentity
}

// logLines keeps what was logged.
type logLines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logLines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var clusterA, clusterB = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000000"), uuid.MustParse("bbbbbbbb-0000-4000-8000-000000000000")

// openTestPeer opens a peer port of cluster orders that takes connections for forwarded requests.
func openTestPeer(t *testing.T, d *directory, change func(*peerConfig, *peerIdentity)) *testPeer {
	t.Helper()
	p := &testPeer{t: t, metrics: new(tracing.Metrics), log: new(logLines), taken: make(chan takenConn, 16)}
	p.id = peerIdentity{cluster: "orders", clusterID: clusterA, node: uuid.NewString()}
	c := peerConfig{bind: "127.0.0.1:0", resolve: d.resolve, metrics: p.metrics, logger: slog.New(slog.NewTextHandler(p.log, nil))}
	c.accept = map[peerKind]func(net.Conn, peerIdentity){
		peerForward: func(conn net.Conn, from peerIdentity) { p.taken <- takenConn{conn, from} },
	}
	c.identity = func() peerIdentity { return p.id }
	if change != nil {
		change(&c, &p.id)
	}
	var err error
	if p.peerPort, err = openPeerPort(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.close() })
	d.set(p.id.node, p.addr().String())
	return p
}

// take waits for the next connection that was handed over.
func (p *testPeer) take() takenConn {
	p.t.Helper()
	select {
	case c := <-p.taken:
		p.t.Cleanup(func() { _ = c.conn.Close() })
		return c
	case <-time.After(time.Minute):
		p.t.Fatal("no connection came")
		return takenConn{}
	}
}

// waitFor gives a condition a minute.
func waitFor(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

// refusedFor waits until a connection was refused for that reason, alone, and logged with those words.
func (p *testPeer) refusedFor(why tracing.Stranger, words ...string) {
	p.t.Helper()
	waitFor(p.t, fmt.Sprintf("refused for reason %d", why), func() bool { return p.metrics.Strangers(why) == 1 })
	for other := range tracing.Stranger(20) {
		if n := p.metrics.Strangers(other); n != 0 && other != why {
			p.t.Errorf("reason %d was counted %d times as well", other, n)
		}
	}
	waitFor(p.t, "a line in the log", func() bool { return strings.Contains(p.log.String(), "peer port") })
	for _, word := range words {
		if !strings.Contains(p.log.String(), word) {
			p.t.Errorf("no %q in the log:\n%s", word, p.log)
		}
	}
}

// exchange sends a few bytes both ways.
func exchange(t *testing.T, a, b net.Conn) {
	t.Helper()
	for range 2 {
		go func() { _, _ = a.Write([]byte("hello there")) }()
		got := make([]byte, 11)
		if _, err := io.ReadFull(b, got); err != nil || string(got) != "hello there" {
			t.Fatalf("%q, %v", got, err)
		}
		a, b = b, a
	}
}

func TestPeersMeet(t *testing.T) {
	d := &directory{}
	a, b := openTestPeer(t, d, nil), openTestPeer(t, d, nil)
	conn, who, err := a.dial(context.Background(), b.id.node, peerForward)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if who != b.id {
		t.Errorf("reached %+v, not %+v", who, b.id)
	}
	taken := b.take()
	if taken.from != a.id {
		t.Errorf("dialled by %+v, not %+v", taken.from, a.id)
	}
	exchange(t, conn, taken.conn)
	if n := b.metrics.Value(tracing.PeerConnections); n != 1 {
		t.Errorf("%d connections open", n)
	}
	_ = taken.conn.Close()
	_ = taken.conn.Close()
	if n := b.metrics.Value(tracing.PeerConnections); n != 0 {
		t.Errorf("%d connections open after the close", n)
	}
	if n, failed := a.metrics.Value(tracing.PeerDials), a.metrics.Value(tracing.PeerDialsFailed); n != 1 || failed != 0 {
		t.Errorf("%d dials, %d failed", n, failed)
	}
}

// A sidecar that joins knows no cluster id yet: it learns that of whoever answers, and whoever it dials learns that it
// has none.
func TestOneWithoutAClusterIDLearnsIt(t *testing.T) {
	d := &directory{}
	member := openTestPeer(t, d, nil)
	joiner := openTestPeer(t, d, func(_ *peerConfig, id *peerIdentity) { id.clusterID = uuid.Nil })
	conn, who, err := joiner.dial(context.Background(), member.id.node, peerForward)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if who.clusterID != clusterA {
		t.Errorf("learnt %x", who.clusterID)
	}
	if from := member.take().from; from.clusterID != uuid.Nil {
		t.Errorf("the joiner came with %x", from.clusterID)
	}
	back, who, err := member.dial(context.Background(), joiner.id.node, peerForward)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	if from := joiner.take().from; from.clusterID != clusterA || who.clusterID != uuid.Nil {
		t.Errorf("from %x to %x", from.clusterID, who.clusterID)
	}
}

func TestWhoDoesNotBelongIsToldWhy(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*peerConfig, *peerIdentity) // of the one that dials
		kind   peerKind
		code   helloCode
		why    tracing.Stranger
		words  string
	}{
		{"another cluster", func(_ *peerConfig, id *peerIdentity) { id.cluster = "payments" }, peerForward, codeOtherCluster, tracing.StrangerCluster, "compare --cluster"},
		{"founded apart", func(_ *peerConfig, id *peerIdentity) { id.clusterID = clusterB }, peerForward, codeOtherClusterID, tracing.StrangerClusterID, "two were founded"},
		{"a kind nobody takes", nil, peerKind(77), codeRefused, tracing.StrangerKind, "kind 77"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := &directory{}
			a, b := openTestPeer(t, d, test.change), openTestPeer(t, d, nil)
			for range 2 { // counted twice, logged once
				_, _, err := a.dial(context.Background(), b.id.node, test.kind)
				var refused *refusal
				if !errors.As(err, &refused) || refused.code != test.code || !strings.Contains(refused.message, test.words) {
					t.Fatalf("%v", err)
				}
				if strings.Contains(refused.message, "orders") {
					t.Errorf("%q names the cluster", refused.message)
				}
				if b.metrics.Strangers(test.why) == 0 {
					b.refusedFor(test.why, test.words, a.id.node, a.id.cluster, "127.0.0.1")
				}
			}
			waitFor(t, "counted again", func() bool { return b.metrics.Strangers(test.why) == 2 })
			_ = b.close() // it has logged what it will
			if n := strings.Count(b.log.String(), "\n"); n != 1 {
				t.Errorf("%d lines:\n%s", n, b.log)
			}
			if a.metrics.Value(tracing.PeerDialsFailed) != 2 || b.metrics.Value(tracing.PeerConnections) != 0 {
				t.Error("miscounted")
			}
		})
	}
}

// An address may have been given to another sidecar: whoever wanted the old one must not talk to the new one.
func TestAnotherNodeAtAnAddressIsNotMistakenForTheOldOne(t *testing.T) {
	d := &directory{}
	a, b := openTestPeer(t, d, nil), openTestPeer(t, d, nil)
	old := uuid.NewString()
	d.set(old, b.addr().String())
	if _, _, err := a.dial(context.Background(), old, peerForward); !errors.Is(err, errOtherNode) {
		t.Errorf("%v", err)
	}
	b.refusedFor(tracing.StrangerNode)
	if !a.refuses(old) {
		t.Error("the old one is thought to be there")
	}
}

// talk sends bytes to a peer port as a stranger would, and gives all it gets.
func talk(t *testing.T, p *testPeer, say []byte) []byte {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := conn.Write(say); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
	return got
}

func TestAStrangerGetsNothing(t *testing.T) {
	for _, test := range []struct {
		name string
		say  string
		why  tracing.Stranger
	}{
		{"HTTP", "GET / HTTP/1.1\r\n\r\n", tracing.StrangerGarbage},
		{"Kafka", "\x00\x00\x00\x20\x00\x12\x00\x03\x00\x00\x00\x01", tracing.StrangerGarbage},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", tracing.StrangerTLS},
		{"another magic", "OSP2\x00\x02\x01\x02", tracing.StrangerGarbage},
		{"a length over the limit", "OSP1\xff\xff\x01\x02", tracing.StrangerGarbage},
		{"an empty hello", "OSP1\x00\x00", tracing.StrangerGarbage},
		{"a name longer than the hello", "OSP1\x00\x06\x01\x02\x00\xffor", tracing.StrangerGarbage},
		{"a hello without ids", "OSP1\x00\x0a\x01\x02\x00\x06orders", tracing.StrangerGarbage},
		{"a join token", "OSPT" + strings.Repeat("n", 32), tracing.StrangerToken},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := openTestPeer(t, &directory{}, nil)
			if got := talk(t, p, []byte(test.say)); len(got) != 0 {
				t.Errorf("got %q", got)
			}
			p.refusedFor(test.why, "127.0.0.1")
			waitFor(t, "closed", func() bool { return p.metrics.Value(tracing.PeerConnections) == 0 })
		})
	}
}

// What comes after the fields we know belongs to a later version, and version 0 to none.
func TestVersionsMeetAtTheOneBothSpeak(t *testing.T) {
	p := openTestPeer(t, &directory{}, nil)
	from := peerIdentity{cluster: "orders", clusterID: clusterA, node: uuid.NewString()}
	for _, test := range []struct {
		version uint8
		code    helloCode
	}{{0, codeVersion}, {1, codeWelcome}, {200, codeWelcome}} {
		b, err := hello{kind: peerProbe, version: test.version, from: from}.encode()
		if err != nil {
			t.Fatal(err)
		}
		b, _ = sealLength(append(b, "news of a later version"...), len(helloMagic))
		a, err := decodeAnswer(talk(t, p, b)[2:])
		if err != nil || a.code != test.code || a.version != helloVersion || a.node.String() != p.id.node || a.clusterID != clusterA {
			t.Errorf("version %d: %+v, %v", test.version, a, err)
		}
	}
	p.refusedFor(tracing.StrangerVersion, "upgrade", from.node)
}

// Another cluster must not learn anything: neither its messages nor its ids name this one.
func TestAnotherClusterLearnsNoIDs(t *testing.T) {
	p := openTestPeer(t, &directory{}, nil)
	b, err := hello{kind: peerProbe, version: 1, from: peerIdentity{cluster: "payments", node: uuid.NewString()}}.encode()
	if err != nil {
		t.Fatal(err)
	}
	a, err := decodeAnswer(talk(t, p, b)[2:])
	if err != nil || a.code != codeOtherCluster || a.node != uuid.Nil || a.clusterID != uuid.Nil {
		t.Errorf("%+v, %v", a, err)
	}
}

func TestANodeThatIsGoneRefuses(t *testing.T) {
	d := &directory{}
	a, b := openTestPeer(t, d, nil), openTestPeer(t, d, nil)
	if a.refuses(b.id.node) {
		t.Error("a node that is there refuses")
	}
	if b.metrics.Strangers(tracing.StrangerKind) != 0 || len(b.taken) != 0 {
		t.Error("a probe was taken for something else")
	}
	waitFor(t, "the probe closed", func() bool { return b.metrics.Value(tracing.PeerConnections) == 0 })
	_ = b.close()
	if !a.refuses(b.id.node) {
		t.Error("a node that is gone does not refuse")
	}
	if a.refuses(uuid.NewString()) {
		t.Error("a node that nobody knows refuses")
	}
	if _, _, err := a.dial(context.Background(), uuid.NewString(), peerRaft); !errors.Is(err, errUnknownNode) {
		t.Errorf("%v", err)
	}
}

// pipes is a network within a bubble, where time is ours.
type pipes struct {
	from      string // the address that everybody dials from; "" is a loopback one
	mu        sync.Mutex
	listeners map[string]*pipeListener
}

type pipeListener struct {
	net    *pipes
	addr   string
	queue  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

type pipeConn struct {
	net.Conn
	local, remote string
}

func (c pipeConn) LocalAddr() net.Addr  { return nodeAddr(c.local) }
func (c pipeConn) RemoteAddr() net.Addr { return nodeAddr(c.remote) }

func (n *pipes) listen(_, addr string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners == nil {
		n.listeners = map[string]*pipeListener{}
	}
	l := &pipeListener{net: n, addr: addr, queue: make(chan net.Conn), closed: make(chan struct{})}
	n.listeners[addr] = l
	return l, nil
}

func (n *pipes) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, syscall.ECONNREFUSED
	}
	from := cmp.Or(n.from, "127.0.0.1:1")
	here, there := net.Pipe()
	select {
	case l.queue <- pipeConn{there, addr, from}:
		return pipeConn{here, from, addr}, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.net.mu.Lock()
		defer l.net.mu.Unlock()
		if l.net.listeners[l.addr] == l {
			delete(l.net.listeners, l.addr)
		}
	})
	return nil
}

func (l *pipeListener) Addr() net.Addr { return nodeAddr(l.addr) }

// on puts a test peer on such a network.
func (n *pipes) on(addr string) func(*peerConfig, *peerIdentity) {
	return func(c *peerConfig, _ *peerIdentity) { c.bind, c.listen, c.dial = addr, n.listen, n.dial }
}

// Both sides wait for each other for five seconds, whatever was said until then.
func TestSilenceIsBounded(t *testing.T) {
	for said := range 6 {
		synctest.Test(t, func(t *testing.T) {
			network, d := &pipes{}, &directory{}
			p := openTestPeer(t, d, network.on("127.0.0.1:7947"))
			conn, err := network.dial(t.Context(), "tcp", "127.0.0.1:7947")
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if said > 0 {
				_, _ = conn.Write([]byte("OSP1\x00")[:said])
			}
			if _, err := io.ReadAll(conn); err != nil || time.Since(began) != helloTimeout {
				t.Errorf("after %d bytes: closed after %v, %v", said, time.Since(began), err)
			}
			p.refusedFor(tracing.StrangerSilent)
			_ = conn.Close()
		})
	}
	synctest.Test(t, func(t *testing.T) {
		network, d := &pipes{}, &directory{}
		p := openTestPeer(t, d, network.on("127.0.0.1:7947"))
		silent, _ := network.listen("tcp", "127.0.0.1:7948")
		defer silent.Close()
		held := make(chan net.Conn, 8)
		go func() {
			for {
				conn, err := silent.Accept()
				if err != nil {
					close(held)
					return
				}
				go func() { _, _ = io.Copy(io.Discard, conn) }()
				held <- conn
			}
		}()
		other := uuid.NewString()
		d.set(other, "127.0.0.1:7948")
		began := time.Now()
		if _, _, err := p.dial(t.Context(), other, peerRaft); err == nil || time.Since(began) != helloTimeout {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		began = time.Now()
		if p.refuses(other) || time.Since(began) != probeTimeout {
			t.Errorf("a silent node refuses, or it took %v to know", time.Since(began))
		}
		_ = silent.Close()
		for conn := range held {
			_ = conn.Close()
		}
	})
}

func TestStrangersWhoSayNothingKeepNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, d := &pipes{}, &directory{}
		a, b := openTestPeer(t, d, network.on("127.0.0.1:7947")), openTestPeer(t, d, network.on("127.0.0.1:7948"))
		for range maxGreetings {
			conn, err := network.dial(t.Context(), "tcp", "127.0.0.1:7948")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
		began := time.Now()
		for range 3 { // the first waits, and then none: the others have been silent for as long
			conn, _, err := a.dial(t.Context(), b.id.node, peerForward)
			if err != nil || time.Since(began) > greetingPatience {
				t.Fatalf("after %v: %v", time.Since(began), err)
			}
			defer conn.Close()
			exchange(t, conn, b.take().conn)
		}
		synctest.Wait()
		// Two for each at most: a second while its hello is being read.
		if n := b.metrics.Strangers(tracing.StrangerSilent); n == 0 || n > 7 || !strings.Contains(b.log.String(), "others waited") {
			t.Errorf("%d were given up:\n%s", n, b.log)
		}
	})
}

// A burst of peers is served in its order.
func TestWhoSaysHelloInTimeIsNotGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, d := &pipes{}, &directory{}
		a, b := openTestPeer(t, d, network.on("127.0.0.1:7947")), openTestPeer(t, d, network.on("127.0.0.1:7948"))
		var burst sync.WaitGroup
		for range 3 * maxGreetings {
			burst.Go(func() {
				if conn, _, err := a.dial(t.Context(), b.id.node, peerProbe); err != nil {
					t.Error(err)
				} else {
					_ = conn.Close()
				}
			})
		}
		burst.Wait()
		if n := b.metrics.Strangers(tracing.StrangerSilent); n > 0 {
			t.Errorf("%d were given up", n)
		}
	})
}

// Whoever dials must not be held up by a port that is closing, nor leave anything behind.
func TestClosingEndsWhatIsOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, d := &pipes{}, &directory{}
		a, b := openTestPeer(t, d, network.on("127.0.0.1:7947")), openTestPeer(t, d, network.on("127.0.0.1:7948"))
		stranger, err := network.dial(t.Context(), "tcp", "127.0.0.1:7948")
		if err != nil {
			t.Fatal(err)
		}
		conn, _, err := a.dial(t.Context(), b.id.node, peerForward)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.close(); err != nil {
			t.Fatal(err)
		}
		for _, c := range []net.Conn{conn, stranger} {
			if _, err := io.ReadAll(c); err != nil {
				t.Error(err)
			}
			_ = c.Close()
		}
		if n := b.metrics.Value(tracing.PeerConnections); n != 0 {
			t.Errorf("%d connections open", n)
		}
		_ = a.close()
		if _, _, err := a.dial(t.Context(), b.id.node, peerForward); err == nil {
			t.Error("dialled through a closed port")
		}
	})
}

func TestTooManyConnectionsAreClosed(t *testing.T) {
	d := &directory{}
	a, b := openTestPeer(t, d, nil), openTestPeer(t, d, nil)
	b.mu.Lock()
	for range maxPeerConnections {
		b.live[&incomingConn{raw: nowhere, Conn: nowhere, port: b.peerPort, gone: make(chan struct{})}] = struct{}{}
	}
	b.mu.Unlock()
	if _, _, err := a.dial(context.Background(), b.id.node, peerForward); err == nil {
		t.Fatal("welcome")
	}
	b.refusedFor(tracing.StrangerConnections, "over and over")
}

// nowhere is a connection that was closed long ago.
var nowhere = func() net.Conn { c, _ := net.Pipe(); _ = c.Close(); return c }()
