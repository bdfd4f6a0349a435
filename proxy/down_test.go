package proxy_test

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// groupCalls sends one of each kind of group call on a fresh connection, as a client does that has just connected.
func groupCalls(t *testing.T, addr string) {
	t.Helper()
	c := dial(t, addr)
	v := c.call(versioned(kmsg.NewPtrApiVersionsRequest(), 2)).(*kmsg.ApiVersionsResponse)
	if v.ErrorCode != 0 || len(v.ApiKeys) < 20 {
		t.Fatalf("ApiVersions: error %d, %d keys", v.ErrorCode, len(v.ApiKeys))
	}
	find := versioned(kmsg.NewPtrFindCoordinatorRequest(), 2)
	find.CoordinatorKey = "g"
	if f := c.call(find).(*kmsg.FindCoordinatorResponse); f.ErrorCode != 0 || f.Host != "127.0.0.1" {
		t.Fatalf("FindCoordinator: %+v", f)
	}
	for _, req := range []kmsg.Request{
		versioned(kmsg.NewPtrJoinGroupRequest(), 5), versioned(kmsg.NewPtrSyncGroupRequest(), 3), heartbeat("m"),
		versioned(kmsg.NewPtrOffsetCommitRequest(), 7), versioned(kmsg.NewPtrOffsetFetchRequest(), 5),
		versioned(kmsg.NewPtrLeaveGroupRequest(), 3), versioned(kmsg.NewPtrDescribeGroupsRequest(), 4),
		versioned(kmsg.NewPtrListGroupsRequest(), 2), versioned(kmsg.NewPtrDeleteGroupsRequest(), 1),
		kmsg.NewPtrOffsetDeleteRequest(),
	} {
		c.call(req)
	}
}

// quickly fails if f takes as long as a dial may.
func quickly(t *testing.T, what string, f func()) {
	t.Helper()
	begin := time.Now()
	f()
	if d := time.Since(begin); d > 2500*time.Millisecond {
		t.Fatalf("%s took %v", what, d)
	}
}

func namesLeader(m *kmsg.MetadataResponse) bool { return m.ControllerID == 2 }

// twoBrokers starts a proxy before two brokers of which the second answers Metadata with itself as controller.
func twoBrokers(t *testing.T) (a, b *fakeBroker, s *side) {
	var all []*fakeBroker
	handle := answer(func(req kmsg.Request) kmsg.Response {
		resp := req.ResponseKind()
		if m, ok := resp.(*kmsg.MetadataResponse); ok {
			m.ControllerID = 2
			for _, x := range all {
				y := kmsg.NewMetadataResponseBroker()
				y.NodeID, y.Host, y.Port = x.id, "127.0.0.1", x.broker().Port
				m.Brokers = append(m.Brokers, y)
			}
		}
		return resp
	})
	a, b = newBroker(t, 1, handle), newBroker(t, 2, handle)
	all = []*fakeBroker{a, b}
	s = start(t, config(a.addr(), b.addr()), func(s *side) { s.brokers.set(a.broker(), b.broker()) })
	for _, addr := range s.Addrs() { // so that each was reached once
		dial(t, addr).call(metadata())
	}
	return a, b, s
}

// The listener of a broker that was killed takes every group call, and asks another broker for Metadata.
func TestKilledBroker(t *testing.T) {
	a, _, s := twoBrokers(t)
	a.kill()
	quickly(t, "group calls", func() { groupCalls(t, s.Addrs()[1]) })
	quickly(t, "Metadata", func() {
		m := dial(t, s.Addrs()[1]).call(metadata()).(*kmsg.MetadataResponse)
		if !namesLeader(m) || len(m.Brokers) != 2 || m.Brokers[0].Host != "127.0.0.1" {
			t.Fatalf("%+v", m)
		}
		for _, x := range m.Brokers {
			if x.Port != int32(portOf(s.Addrs()[x.NodeID])) {
				t.Fatalf("broker %d is named with port %d", x.NodeID, x.Port)
			}
		}
	})
}

// So does that of a broker that takes connections and says nothing (SIGSTOP): the first question waits a little, later
// ones do not.
func TestStoppedBroker(t *testing.T) {
	a, _, s := twoBrokers(t)
	open := dial(t, s.Addrs()[1])
	open.call(metadata())
	a.deaf.Store(true)
	quickly(t, "group calls", func() { groupCalls(t, s.Addrs()[1]) })
	quickly(t, "Metadata on an open connection", func() { open.call(metadata()) })
	quickly(t, "Metadata on a new connection", func() { dial(t, s.Addrs()[1]).call(metadata()) })
	before := a.dials.Load()
	a.deaf.Store(false)
	until(t, "the broker is asked again", func() bool {
		n := len(a.requests())
		dial(t, s.Addrs()[1]).call(metadata())
		return a.dials.Load() > before && len(a.requests()) > n
	})
	// The reply that came after all is not taken for another's.
	for range 3 {
		open.call(metadata())
	}
}

// After a restart with all brokers down the listeners are the same, every one takes all group calls, and Metadata names
// the brokers as they were. Topics that are not known have no leader, and a list of all topics is not made up.
func TestRestartWhileUpstreamIsDown(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		a, b := newBroker(t, 1, echoBody), newBroker(t, 2, echoBody)
		store := &memory{}
		c := config(a.addr(), b.addr())
		c.Listen = net.JoinHostPort("127.0.0.1", freePorts(t))
		first := start(t, c, func(s *side) { s.store = store; s.brokers.set(a.broker(), b.broker()) })
		for _, addr := range first.Addrs() {
			dial(t, addr).sendBytes(frame(2, 0, 1, nil))
		}
		until(t, "both were reached", func() bool { return a.dials.Load() > 0 && b.dials.Load() > 0 })
		addrs := first.Addrs()
		first.stop()
		for _, x := range []*fakeBroker{a, b} {
			x.deaf.Store(stopped)
			if !stopped {
				x.kill()
			}
		}
		second := start(t, c, func(s *side) { s.store = store })
		for id, addr := range addrs {
			if second.Addrs()[id] != addr {
				t.Fatalf("broker %d was at %s and is at %s", id, addr, second.Addrs()[id])
			}
			quickly(t, "group calls", func() { groupCalls(t, addr) })
		}
		req := metadata()
		topic := kmsg.NewMetadataRequestTopic()
		topic.Topic = kmsg.StringPtr("t")
		req.Topics = append(req.Topics, topic)
		m := dial(t, addrs[1]).call(req).(*kmsg.MetadataResponse)
		if len(m.Brokers) != 2 || len(m.Topics) != 1 || m.Topics[0].ErrorCode != 5 {
			t.Fatalf("%+v", m)
		}
		all := dial(t, addrs[1])
		all.send(1, versioned(kmsg.NewPtrMetadataRequest(), 9))
		all.closed()
		second.stop()
	}
}

// freePorts finds a port that is free with the next few.
func freePorts(t testing.TB) string {
	t.Helper()
	for {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(ln.Addr().String())
		_ = ln.Close()
		free := true
		for i := range 4 {
			ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", itoa(portOf(":"+port)+i)))
			if err != nil {
				free = false
				break
			}
			_ = ln.Close()
		}
		if free {
			return port
		}
	}
}

// A request that is bound to a broker which cannot be reached ends the connection, not at once, and what came before it
// is answered.
func TestBoundRequestToADeadBrokerClosesAfterADelay(t *testing.T) {
	a, _, s := twoBrokers(t)
	a.kill()
	c := dial(t, s.Addrs()[1])
	begin := time.Now()
	c.send(1, heartbeat("m"))
	c.sendBytes(frame(2, 0, 2, nil))
	c.send(3, heartbeat("m"))
	if id, _ := c.receive(); id != 1 {
		t.Fatalf("correlation id %d", id)
	}
	c.closed()
	if d := time.Since(begin); d < 200*time.Millisecond || d > 3*time.Second {
		t.Fatalf("closed after %v", d)
	}
	if n := len(s.echo.requests()); n != 2 {
		t.Fatalf("%d heartbeats reached the coordinator, not 2", n)
	}
}

// A leg that the broker closes while nothing is outstanding on it (connections.max.idle.ms) does not end the client's
// connection, neither one that only made group calls nor one that goes on asking.
func TestIdleLegIsReplaced(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker()) })
	c := dial(t, s.Addrs()[1])
	for id := range int32(3) {
		c.sendBytes(frame(2, 0, id, []byte("x")))
		if got, _ := c.receive(); got != id {
			t.Fatalf("correlation id %d", got)
		}
		b.closeConns()
		time.Sleep(1100 * time.Millisecond) // what counts as idle
		c.call(heartbeat("m"))
	}
	if b.dials.Load() != 3 {
		t.Fatalf("%d dials, not 3", b.dials.Load())
	}
}

// A broker tells the failure of a request without a reply by closing the connection. The client is closed then, and not
// when it sends the next: it has to look for the new leader.
func TestRejectedProduceWithoutAcksClosesTheClient(t *testing.T) {
	b := newBroker(t, 1, func(r request) []byte {
		if r.APIKey == 0 {
			return []byte{}
		}
		return echoBody(r)
	})
	eachWay(t, config(b.addr()), func(t *testing.T, c proxy.Config) {
		for name, before := range map[string]int{"first": 0, "after another": 1, "after many": 10} {
			for size, produce := range map[string][]byte{"small": largeProduce(0, 100), "large": largeProduce(0, 1<<20)} {
				t.Run(name+", "+size, func(t *testing.T) {
					s := start(t, c, func(s *side) { s.brokers.set(b.broker()) })
					c := dial(t, s.Addrs()[1])
					for id := range before {
						c.sendBytes(frame(2, 0, int32(id), nil))
						c.receive()
					}
					c.sendBytes(produce)
					c.closed()
					until(t, "it is named", func() bool {
						return strings.Contains(s.logs.String(), "broker "+b.addr()+" has closed the connection upon a Produce request without acks (api key 0, version 8)")
					})
				})
			}
		}
	})
}

// A broker that has answered since, or that closes only much later, has not failed the request without a reply: it has
// found the connection idle (connections.max.idle.ms), and the client goes on.
func TestLegThatEndsIdleAfterAProduceWithoutAcks(t *testing.T) {
	handle := func(r request) []byte {
		if r.APIKey == 0 {
			return nil
		}
		return echoBody(r)
	}
	t.Run("answered since", func(t *testing.T) {
		b := newBroker(t, 1, handle)
		s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker()) })
		c := dial(t, s.Addrs()[1])
		c.sendBytes(largeProduce(0, 100))
		c.sendBytes(frame(2, 0, 1, nil))
		c.receive()
		b.closeConns()
		time.Sleep(1100 * time.Millisecond) // what counts as idle
		c.sendBytes(frame(2, 0, 2, nil))
		c.receive()
	})
	t.Run("much later", func(t *testing.T) {
		inBubble(t, func(t *testing.T, network *kfake.VirtualNetwork, config proxy.Config) {
			ln, err := network.Listen("tcp", config.Upstream[0])
			if err != nil {
				t.Fatal(err)
			}
			b := &fakeBroker{id: 1, conns: map[net.Conn]struct{}{}}
			b.handle.Store(&handle)
			b.accept(ln)
			defer b.kill()
			s := start(t, config)
			c := dialIn(t, network, config.Listen)
			for id := range int32(10) {
				c.sendBytes(frame(2, 0, id, nil))
				c.receive()
			}
			c.sendBytes(largeProduce(0, 100))
			time.Sleep(5 * time.Second)
			b.closeConns()
			synctest.Wait()
			c.call(heartbeat("m"))
			c.sendBytes(frame(2, 0, 11, nil))
			c.receive()
			s.stop()
		})
	})
}

// A broker that goes closes the connection upon whatever is outstanding: that is no client's mistake.
func TestClientsAreNotBlamedForABrokerThatGoes(t *testing.T) {
	b := newBroker(t, 1, func(request) []byte { return nil })
	s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker()) })
	c := dial(t, s.Addrs()[1])
	c.sendBytes(frame(1, 4, 1, make([]byte, 30)))
	until(t, "the request arrives", func() bool { return len(b.requests()) == 1 })
	b.kill()
	c.closed()
	until(t, "it has gone", func() bool { return s.Clients() == 0 })
	if strings.Contains(s.logs.String(), "upon a Fetch") {
		t.Fatal(s.logs)
	}
}

// An upstream that makes no progress for --upstream-timeout beyond the request's own wait ends the connection.
func TestStalledUpstreamClosesTheConnection(t *testing.T) {
	b := newBroker(t, 1, func(request) []byte { return nil })
	c := config(b.addr())
	c.UpstreamTimeout = 300 * time.Millisecond
	s := start(t, c, func(s *side) { s.brokers.set(b.broker()) })
	begin := time.Now()
	plain := dial(t, s.Addrs()[1])
	plain.sendBytes(frame(2, 0, 1, nil))
	plain.closed()
	if d := time.Since(begin); d > 2*time.Second {
		t.Fatalf("closed after %v", d)
	}
	begin = time.Now()
	fetch := dial(t, s.Addrs()[1])
	fetch.sendBytes(frame(1, 4, 1, append([]byte{255, 255, 255, 255, 0, 0, 3, 232}, make([]byte, 20)...))) // waits 1 s
	fetch.closed()
	if d := time.Since(begin); d < time.Second {
		t.Fatalf("a fetch that may wait 1 s was given %v", d)
	}
}

// A client that does not read for longer than any time-out is no error.
func TestPausedClientIsLeftAlone(t *testing.T) {
	const size = 32 << 20
	large := request{RequestHeader: wire.RequestHeader{CorrelationID: 1}}.reply(make([]byte, size))
	b := newBroker(t, 1, func(request) []byte { return large })
	c := config(b.addr())
	c.UpstreamTimeout = time.Second
	s := start(t, c, func(s *side) { s.brokers.set(b.broker()) })
	cl := dial(t, s.Addrs()[1])
	cl.sendBytes(frame(2, 0, 1, nil))
	time.Sleep(2500 * time.Millisecond) // the pause
	if id, body := cl.receive(); id != 1 || len(body) != size {
		t.Fatalf("%d, %d bytes", id, len(body))
	}
}

// A Metadata reply without brokers is not passed on: another broker is asked, or the connection closed.
func TestMetadataWithoutBrokersIsNotPassedOn(t *testing.T) {
	a := newBroker(t, 1, answer(func(req kmsg.Request) kmsg.Response { return req.ResponseKind() }))
	b := newBroker(t, 2, metadataOf(a))
	s := start(t, config(a.addr(), b.addr()), func(s *side) { s.brokers.set(a.broker(), b.broker()) })
	if m := dial(t, s.Addrs()[1]).call(metadata()).(*kmsg.MetadataResponse); len(m.Brokers) != 1 {
		t.Fatalf("%+v", m)
	}
	lonely := start(t, config(a.addr()))
	c := dial(t, lonely.Addr().String())
	c.send(1, metadata())
	c.closed()
}

// A node id that nobody has seen gets its listener before the reply that names it is written, and no real address ever
// reaches a client.
func TestNewBrokerHasAListenerBeforeItIsNamed(t *testing.T) {
	c := newBroker(t, 3, echoBody)
	var a *fakeBroker
	a = newBroker(t, 1, func(r request) []byte { return metadataOf(a, c)(r) })
	s := start(t, config(a.addr()))
	m := dial(t, s.Addr().String()).call(metadata()).(*kmsg.MetadataResponse)
	for _, x := range m.Brokers {
		if x.Port == a.broker().Port || x.Port == c.broker().Port {
			t.Fatalf("broker %d is named with its real port", x.NodeID)
		}
		if x.NodeID == 3 {
			cl := dial(t, net.JoinHostPort(x.Host, itoa(int(x.Port))))
			cl.sendBytes(frame(2, 0, 9, nil))
			if id, _ := cl.receive(); id != 9 || len(c.requests()) != 1 {
				t.Fatal("the new listener does not lead to its broker")
			}
		}
	}
}

// Ports follow from the node ids: the same after a restart with nothing kept, in ascending order where ids clash.
func TestPortsAreTheSameWithAnEmptiedDirectory(t *testing.T) {
	c := config("127.0.0.1:1")
	c.Listen = "127.0.0.1:" + freePorts(t)
	base := portOf(c.Listen)
	named := func(ids ...int32) (all []upstream.Broker) {
		for _, id := range ids {
			all = append(all, upstream.Broker{ID: id, Host: "127.0.0.1", Port: 1})
		}
		return all
	}
	for range 2 {
		s := start(t, c, func(s *side) { s.brokers.set(named(257, 1, 0)...) })
		for id, want := range map[int32]int{0: base + 1, 1: base + 2, 257: base + 3} {
			if got := portOf(s.Addrs()[id]); got != want {
				t.Fatalf("broker %d has port %d, not %d", id, got, want)
			}
		}
		s.stop()
	}
}

func TestBootstrapPortInUseIsAnError(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := config("127.0.0.1:1")
	c.Listen = ln.Addr().String()
	err = newProxy(c).Start()
	if err == nil || !strings.Contains(err.Error(), "--listen "+c.Listen) {
		t.Fatalf("%v", err)
	}
}

// An upstream that is this sidecar itself is refused: at the start if it is the bootstrap listener, else when it is
// dialled.
func TestSelfLoopIsRefused(t *testing.T) {
	c := config()
	port := freePorts(t)
	c.Listen = "127.0.0.1:" + port
	c.Upstream = []string{"localhost:" + port}
	if err := newProxy(c).Start(); err == nil || !strings.Contains(err.Error(), "--upstream localhost:"+port) {
		t.Fatalf("%v", err)
	}
	c.Upstream = []string{"127.0.0.1:" + itoa(portOf(c.Listen)+1)}
	s := start(t, c, func(s *side) {
		s.brokers.set(upstream.Broker{ID: 0, Host: "127.0.0.1", Port: int32(portOf(c.Listen) + 1)})
	})
	cl := dial(t, s.Addrs()[0])
	cl.sendBytes(frame(2, 0, 1, nil))
	cl.closed()
	if !strings.Contains(s.logs.String(), "leads back to this sidecar") {
		t.Fatal(s.logs)
	}
}

// Clients on ::1 are served as well, where there is IPv6.
func TestBothLoopbackAddresses(t *testing.T) {
	if ln, err := net.Listen("tcp", "[::1]:0"); err != nil {
		return // no IPv6 here
	} else {
		_ = ln.Close()
	}
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker()) })
	for _, addr := range []string{s.Addr().String(), s.Addrs()[1]} {
		c := dial(t, net.JoinHostPort("::1", itoa(portOf(addr))))
		c.call(heartbeat("m"))
	}
}

// Shutdown serves clients until the last one has gone.
func TestShutdownWaitsForClients(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker()) })
	c := dial(t, s.Addrs()[1])
	c.call(heartbeat("m"))
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		done <- s.Shutdown(ctx)
	}()
	c.call(heartbeat("m"))
	late := dial(t, s.Addrs()[1]) // a client that leaves its group opens a new connection for it
	late.call(versioned(kmsg.NewPtrLeaveGroupRequest(), 3))
	_ = late.Close()
	select {
	case err := <-done:
		t.Fatalf("shut down with a client connected: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	_ = c.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// An address that is not on loopback must be given a name under which clients reach it.
func TestListeningElsewhereNeedsAName(t *testing.T) {
	c := config("127.0.0.1:1")
	c.Listen = "0.0.0.0:0"
	if err := newProxy(c).Start(); err == nil || !strings.Contains(err.Error(), "--advertise-clients") {
		t.Fatalf("%v", err)
	}
	c.AdvertiseHost = "sidecar.example"
	s := start(t, c, func(s *side) { s.brokers.set(upstream.Broker{ID: 5, Host: "127.0.0.1", Port: 1}) })
	if addr := s.Addrs()[5]; !strings.HasPrefix(addr, "sidecar.example:") {
		t.Fatal(addr)
	}
	for _, listen := range []string{"19092", "127.0.0.1:port", "127.0.0.1:70000"} {
		c.Listen = listen
		if err := newProxy(c).Start(); err == nil || !strings.Contains(err.Error(), "--listen "+listen) {
			t.Fatalf("%s: %v", listen, err)
		}
	}
}

// The more often a broker could not be dialled, the later a client that needs it is closed; that another broker answers
// what any can does not count.
func TestDelayBeforeTheCloseGrows(t *testing.T) {
	a, _, s := twoBrokers(t)
	a.kill()
	var took time.Duration
	for range 3 {
		dial(t, s.Addrs()[1]).call(metadata())
		c := dial(t, s.Addrs()[1])
		begin := time.Now()
		c.sendBytes(frame(2, 0, 1, nil))
		c.closed()
		took = time.Since(begin)
	}
	if took < 900*time.Millisecond {
		t.Fatalf("closed after %v", took)
	}
}

func saslHandshake(correlation int32) []byte {
	return frame(17, 1, correlation, []byte{0, 5, 'P', 'L', 'A', 'I', 'N'})
}

// A client that authenticates is not closed at once either while no broker can be reached.
func TestClientsWithSASLDoNotStormWhileUpstreamIsDown(t *testing.T) {
	s := start(t, config("127.0.0.1:1"))
	c := dial(t, s.Addr().String())
	c.call(versioned(kmsg.NewPtrApiVersionsRequest(), 2))
	begin := time.Now()
	c.sendBytes(saslHandshake(1))
	c.closed()
	if d := time.Since(begin); d < 200*time.Millisecond {
		t.Fatalf("closed after %v", d)
	}
}

// What a client that authenticated by itself asks cannot be asked elsewhere: its broker gets all the time it may have,
// and if its answer is none the client is closed.
func TestClientsWithSASLAreAnsweredByTheirBrokerAlone(t *testing.T) {
	var all atomic.Pointer[[]*fakeBroker]
	other := newBroker(t, 2, func(r request) []byte { return metadataOf(*all.Load()...)(r) })
	b := newBroker(t, 1, func(r request) []byte {
		if r.APIKey != 3 {
			return echoBody(r)
		}
		time.Sleep(repeatAfter + 200*time.Millisecond)
		return metadataOf(*all.Load()...)(r)
	})
	all.Store(&[]*fakeBroker{b, other})
	s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker(), other.broker()) })
	c := dial(t, s.Addrs()[1])
	c.sendBytes(saslHandshake(1))
	c.receive()
	if m := c.call(metadata()).(*kmsg.MetadataResponse); len(m.Brokers) != 2 || len(other.requests()) != 0 {
		t.Fatalf("%d brokers, %d requests elsewhere", len(m.Brokers), len(other.requests()))
	}
	all.Store(new([]*fakeBroker))
	c.send(2, metadata())
	c.closed()
	if strings.Contains(s.logs.String(), "panic") {
		t.Fatal(s.logs)
	}
}
