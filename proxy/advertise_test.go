package proxy_test

import (
	"context"
	"encoding/json"
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

func findGroup(c *client) *kmsg.FindCoordinatorResponse {
	find := versioned(kmsg.NewPtrFindCoordinatorRequest(), 2)
	find.CoordinatorKey = "g"
	return c.call(find).(*kmsg.FindCoordinatorResponse)
}

// holder takes the port behind a bootstrap listener's, as a sidecar of another cluster might.
func holder(t *testing.T, listen string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:"+itoa(portOf(listen)+1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// A port that another process holds is never told to a client: a new broker gets the next free one, and keeps it.
func TestPortOfAnotherProcessIsNotAdvertised(t *testing.T) {
	var b *fakeBroker
	b = newBroker(t, 0, func(r request) []byte { return metadataOf(b)(r) })
	c := config(b.addr())
	c.Listen = "127.0.0.1:" + freePorts(t)
	other := holder(t, c.Listen)
	store := &memory{}
	for range 2 {
		s := start(t, c, func(s *side) { s.store = store; s.brokers.set(b.broker()) })
		client := dial(t, s.Addr().String())
		m, f := client.call(metadata()).(*kmsg.MetadataResponse), findGroup(client)
		if want := portOf(c.Listen) + 2; int(m.Brokers[0].Port) != want || int(f.Port) != want {
			t.Fatalf("Metadata names port %d, FindCoordinator %d, want %d", m.Brokers[0].Port, f.Port, want)
		}
		s.stop()
		_ = other.Close()
	}
}

// A port that clients may remember from an earlier run is waited for, and taken when it is free.
func TestRememberedPortIsNamedAndTriedAgain(t *testing.T) {
	c := config("127.0.0.1:1")
	c.Listen = "127.0.0.1:" + freePorts(t)
	store := &memory{}
	known := func(s *side) { s.store = store; s.brokers.set(upstream.Broker{ID: 0, Host: "127.0.0.1", Port: 1}) }
	start(t, c, known).stop()
	other := holder(t, c.Listen)
	s := start(t, c, known)
	if len(s.Addrs()) != 0 || !strings.Contains(s.logs.String(), "--listen") {
		t.Fatalf("%v, %s", s.Addrs(), s.logs)
	}
	_ = other.Close()
	until(t, "the port is taken", func() bool { return portOf(s.Addrs()[0]) == portOf(c.Listen)+1 })
}

// If its broker has to be named before that, it moves.
func TestRememberedPortThatIsHeldIsNotAdvertised(t *testing.T) {
	var b *fakeBroker
	b = newBroker(t, 0, func(r request) []byte { return metadataOf(b)(r) })
	c := config(b.addr())
	c.Listen = "127.0.0.1:" + freePorts(t)
	store := &memory{}
	known := func(s *side) { s.store = store; s.brokers.set(b.broker()) }
	start(t, c, known).stop()
	holder(t, c.Listen)
	for name, ask := range map[string]func(*client) int{
		"Metadata":        func(cl *client) int { return int(cl.call(metadata()).(*kmsg.MetadataResponse).Brokers[0].Port) },
		"FindCoordinator": func(cl *client) int { return int(findGroup(cl).Port) },
	} {
		s := start(t, c, known)
		if port := ask(dial(t, s.Addr().String())); port == portOf(c.Listen)+1 || port != portOf(s.Addrs()[0]) {
			t.Fatalf("%s names port %d, the listener is %v", name, port, s.Addrs())
		}
		s.stop()
	}
}

// A broker that is down after a restart keeps its listener for a day, however long ago it was last seen.
func TestBrokerThatIsDownAfterARestartKeepsItsListener(t *testing.T) {
	inBubble(t, func(t *testing.T, network *kfake.VirtualNetwork, c proxy.Config) {
		broker := func(id int32) upstream.Broker { return upstream.Broker{ID: id, Host: "127.0.0.1", Port: 9000 + id} }
		store := &memory{}
		first := start(t, c, func(s *side) { s.store = store; s.brokers.set(broker(1), broker(2)) })
		first.stop()
		time.Sleep(48 * time.Hour)
		s := start(t, c, func(s *side) { s.store = store })
		s.brokers.set(broker(1))
		time.Sleep(23 * time.Hour)
		if len(s.Addrs()) != 2 {
			t.Fatalf("%v", s.Addrs())
		}
		time.Sleep(3 * time.Hour)
		if len(s.Addrs()) != 1 {
			t.Fatalf("%v", s.Addrs())
		}
		s.stop()
	})
}

// While our own client gets no answers, clients' Metadata replies say which brokers there are and where.
func TestBrokersAreLearntFromClientsReplies(t *testing.T) {
	var list atomic.Pointer[[]*fakeBroker]
	handle := func(r request) []byte {
		if r.APIKey == 3 {
			return metadataOf(*list.Load()...)(r)
		}
		return echoBody(r)
	}
	a, b := newBroker(t, 1, handle), newBroker(t, 2, handle)
	list.Store(&[]*fakeBroker{a, b})
	s := start(t, config(a.addr()))
	cl := dial(t, s.Addr().String())
	coordinators := func() map[int32]bool {
		cl.call(metadata())
		all := map[int32]bool{}
		for i := range 30 {
			find := versioned(kmsg.NewPtrFindCoordinatorRequest(), 2)
			find.CoordinatorKey = "g" + itoa(i)
			all[cl.call(find).(*kmsg.FindCoordinatorResponse).NodeID] = true
		}
		return all
	}
	if got := coordinators(); !got[1] || !got[2] {
		t.Fatalf("%v", got)
	}
	list.Store(&[]*fakeBroker{a})
	b.kill()
	if got := coordinators(); !got[1] || got[2] {
		t.Fatalf("groups are placed on a broker that has gone: %v", got)
	}
	moved := newBroker(t, 2, handle)
	list.Store(&[]*fakeBroker{a, moved})
	if got := coordinators(); !got[1] || !got[2] {
		t.Fatalf("%v", got)
	}
	c := dial(t, s.Addrs()[2])
	c.sendBytes(frame(2, 0, 5, []byte("hello")))
	c.receive()
}

// slowStore is a disk that hangs.
type slowStore struct {
	memory
	until chan struct{}
}

func (m *slowStore) Put(key string, value []byte) error {
	<-m.until
	return m.memory.Put(key, value)
}

// A disk that hangs keeps no client waiting, and what was to be stored is stored in the end.
func TestHangingStoreKeepsNobodyWaiting(t *testing.T) {
	var a, b *fakeBroker
	handle := func(r request) []byte {
		if r.APIKey == 3 {
			return metadataOf(a, b)(r)
		}
		return echoBody(r)
	}
	a, b = newBroker(t, 1, handle), newBroker(t, 2, handle)
	store := &slowStore{until: make(chan struct{})}
	s := &side{brokers: &brokers{}, echo: newEcho(true)}
	s.brokers.set(a.broker(), b.broker())
	c := config(a.addr())
	c.Logger = discard
	s.Proxy = proxy.New(c, s.echo, s.brokers, store, nil, nil)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	for _, addr := range s.Addrs() {
		cl := dial(t, addr)
		cl.call(metadata())
		cl.sendBytes(frame(2, 0, 1, nil))
		cl.receive()
	}
	close(store.until)
	s.stop()
	var stored struct{ Brokers []struct{ ID int32 } }
	if raw, _ := store.Get("proxy/brokers"); json.Unmarshal(raw, &stored) != nil || len(stored.Brokers) != 2 {
		t.Fatalf("%s", raw)
	}
}

// What a broker speaks is forgotten with it.
func TestVersionsAreForgottenWithTheirBroker(t *testing.T) {
	inBubble(t, func(t *testing.T, network *kfake.VirtualNetwork, c proxy.Config) {
		cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.Ports(9002), kfake.ListenFn(network.Listen))
		if err != nil {
			t.Fatal(err)
		}
		defer cluster.Close()
		broker := func(id int32) upstream.Broker { return upstream.Broker{ID: id, Host: "127.0.0.1", Port: 9000 + id} }
		s := start(t, c, func(s *side) { s.brokers.set(broker(1), broker(2)) })
		dialIn(t, network, s.Addrs()[2]).call(versioned(kmsg.NewPtrApiVersionsRequest(), 2))
		synctest.Wait()
		if raw, _ := s.store.Get("proxy/apiversions/2"); len(raw) == 0 {
			t.Fatal("they were not stored")
		}
		s.brokers.set(broker(1))
		time.Sleep(26 * time.Hour)
		if raw, _ := s.store.Get("proxy/apiversions/2"); len(raw) != 0 {
			t.Fatal("they are still stored")
		}
		s.stop()
	})
}

// The bootstrap listener leads to any broker, so it shows what all of them have in common.
func TestBootstrapListenerShowsWhatAllBrokersHave(t *testing.T) {
	limited := func(newest int16, keys ...int16) func(request) []byte {
		return func(r request) []byte {
			resp := kmsg.NewPtrApiVersionsResponse()
			resp.Version = r.APIVersion
			for _, key := range keys {
				k := kmsg.NewApiVersionsResponseApiKey()
				k.ApiKey, k.MaxVersion = key, newest
				resp.ApiKeys = append(resp.ApiKeys, k)
			}
			return wire.AppendResponse(nil, r.CorrelationID, resp)
		}
	}
	older, newer := newBroker(t, 1, echoBody), newBroker(t, 2, echoBody)
	oldVersions, newVersions := limited(9, 0, 1, 3), limited(12, 0, 1, 3, 75)
	older.versions.Store(&oldVersions)
	newer.versions.Store(&newVersions)
	s := start(t, config(newer.addr()), func(s *side) { s.brokers.set(older.broker(), newer.broker()) })
	shown := func(addr string) map[int16]int16 {
		c := dial(t, addr)
		c.sendBytes(frame(2, 0, 1, nil)) // so that its broker is reached
		c.receive()
		all := map[int16]int16{}
		for _, k := range c.call(versioned(kmsg.NewPtrApiVersionsRequest(), 2)).(*kmsg.ApiVersionsResponse).ApiKeys {
			all[k.ApiKey] = k.MaxVersion
		}
		return all
	}
	if got := shown(s.Addrs()[2]); got[3] != 12 || got[75] != 12 {
		t.Fatalf("%v", got)
	}
	if got := shown(s.Addrs()[1]); got[3] != 9 {
		t.Fatalf("%v", got)
	}
	got := shown(s.Addr().String())
	if _, known := got[75]; known || got[3] != 9 || got[0] != 9 {
		t.Fatalf("%v", got)
	}
}

// --listen without a host is the default's two loopback addresses; 127.0.0.0/8 is all loopback, and any other address is
// bound as it is.
func TestReadListen(t *testing.T) {
	for _, c := range []struct {
		listen, advertise string
		host, advertised  string // no host: an error
	}{
		{":0", "", "127.0.0.1", "127.0.0.1"},
		{":19092", "", "127.0.0.1", "127.0.0.1"},
		{"localhost:1", "", "127.0.0.1", "127.0.0.1"},
		{"[::1]:1", "", "127.0.0.1", "127.0.0.1"},
		{"127.0.0.1:1", "name", "127.0.0.1", "name"},
		{"127.0.0.2:1", "", "127.0.0.2", "127.0.0.2"},
		{"0.0.0.0:1", "", "", ""},
		{"[::]:1", "", "", ""},
		{"192.0.2.1:1", "", "", ""},
		{"0.0.0.0:1", "name", "0.0.0.0", "name"},
		{"192.0.2.1:1", "192.0.2.1", "192.0.2.1", "192.0.2.1"},
	} {
		host, _, advertised, err := proxy.ReadListen(c.listen, c.advertise)
		if host != c.host || advertised != c.advertised || (err != nil) != (c.host == "") {
			t.Errorf("--listen %s --advertise-clients %q: %q %q %v", c.listen, c.advertise, host, advertised, err)
		}
	}
}

// Listeners that become free while the proxy ends are not bound any more.
func TestNothingIsBoundOnceTheProxyEnds(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.Shutdown(ctx)
	s.brokers.set(b.broker())
	if len(s.Addrs()) != 0 {
		t.Fatalf("%v", s.Addrs())
	}
}
