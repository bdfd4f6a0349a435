package proxy_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
)

// A real client produces to and consumes from a fake Kafka of three brokers through the proxy, in a bubble with a clock
// of its own, and sees addresses of ours only. (The network is one of pipes: splice and half-close have tests on sockets.)
func TestFranzGoInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := &kfake.VirtualNetwork{}
		cluster, err := kfake.NewCluster(kfake.NumBrokers(3), kfake.SeedTopics(6, "t"), kfake.Ports(9001, 9002, 9003), kfake.ListenFn(network.Listen))
		if err != nil {
			t.Fatal(err)
		}
		defer cluster.Close()
		c := config("127.0.0.1:9001")
		c.Listen = "127.0.0.1:19092"
		c.Listener, c.Dial = network.Listen, network.DialContext
		s := start(t, c)
		dialled := func(ctx context.Context, kind, addr string) (conn netConn, err error) {
			if addr == "127.0.0.1:9001" || addr == "127.0.0.1:9002" || addr == "127.0.0.1:9003" {
				t.Errorf("the client dialled a real broker, %s", addr)
			}
			return network.DialContext(ctx, kind, addr)
		}
		cl, err := kgo.NewClient(kgo.SeedBrokers("127.0.0.1:19092"), kgo.Dialer(dialled), kgo.ConsumeTopics("t"),
			kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.RecordPartitioner(kgo.RoundRobinPartitioner()), kgo.DefaultProduceTopic("t"))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		const records = 200
		for i := range records {
			cl.Produce(ctx, kgo.StringRecord(fmt.Sprint(i)), func(_ *kgo.Record, err error) {
				if err != nil {
					t.Error(err)
				}
			})
		}
		if err := cl.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for len(seen) < records {
			fetches := cl.PollFetches(ctx)
			if err := fetches.Err0(); err != nil {
				t.Fatal(err)
			}
			fetches.EachRecord(func(r *kgo.Record) {
				if seen[string(r.Value)] {
					t.Errorf("record %s came twice", r.Value)
				}
				seen[string(r.Value)] = true
			})
		}
		cl.Close()
		s.stop()
	})
}

// A broker that is gone for a day gives its port back; one that is only down does not.
func TestPortOfABrokerLongGoneIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := &kfake.VirtualNetwork{}
		c := config("127.0.0.1:9001")
		c.Listen = "127.0.0.1:19092"
		c.Listener, c.Dial = network.Listen, network.DialContext
		broker := func(id int32) upstream.Broker { return upstream.Broker{ID: id, Host: "127.0.0.1", Port: 9000 + id} }
		s := start(t, c, func(s *side) { s.brokers.set(broker(1), broker(2), broker(258)) })
		if got := s.Addrs(); got[258] != "127.0.0.1:19096" {
			t.Fatalf("%v", got)
		}
		s.brokers.set(broker(1), broker(258))
		time.Sleep(23 * time.Hour)
		if got := s.Addrs(); got[2] != "127.0.0.1:19095" {
			t.Fatalf("its port was given back too early: %v", got)
		}
		time.Sleep(3 * time.Hour)
		if got := s.Addrs(); len(got) != 2 || got[1] == "" || got[258] != "127.0.0.1:19096" {
			t.Fatalf("%v", got)
		}
		s.brokers.set(broker(1), broker(2), broker(258))
		if got := s.Addrs(); got[2] != "127.0.0.1:19095" {
			t.Fatalf("%v", got)
		}
		s.stop()
	})
}

// inBubble runs a test with a network and a clock of its own, and a configuration for them.
func inBubble(t *testing.T, f func(*testing.T, *kfake.VirtualNetwork, proxy.Config)) {
	synctest.Test(t, func(t *testing.T) {
		network := &kfake.VirtualNetwork{}
		c := config("127.0.0.1:9001")
		c.Listen = "127.0.0.1:19092"
		c.Listener, c.Dial = network.Listen, network.DialContext
		f(t, network, c)
	})
}

func dialIn(t *testing.T, network *kfake.VirtualNetwork, addr string) *client {
	t.Helper()
	c, err := network.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &client{c, t}
}
