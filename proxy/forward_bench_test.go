package proxy_test

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// benchPair starts a sidecar with a coordinator on a log in memory, and one that forwards to it; it gives the addresses
// of their bootstrap listeners.
func benchPair(b *testing.B) (active, forwarding string) {
	b.Helper()
	node, err := replicate.Open(replicate.Config{RaftTimeout: 500 * time.Millisecond})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = node.Close() })
	coord := coordinator.New(coordinator.Config{Group: group.DefaultConfig(), CommitTimeout: 5 * time.Second}, node, anyTopic{}, discard, nil)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = coord.Run(ctx) })
	b.Cleanup(func() {
		cancel()
		running.Wait()
	})
	until(b, "it is active", func() bool { return coord.Status().Active })
	c := &cluster{t: b}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = ln.Close() })
	one := &sidecar{id: "a", coord: coord, ln: ln, peers: &board{}}
	one.side = start(b, config("127.0.0.1:1"), func(x *side) { x.coordinator = coord })
	c.all = []*sidecar{one}
	go one.acceptPeers()
	peers := &board{cluster: c, own: "b", changed: make(chan struct{}), term: coord.Status().Term, node: "a"}
	two := start(b, config("127.0.0.1:1"), func(x *side) { x.peers, x.echo = peers, newEcho(false) })
	return one.Addr().String(), two.Addr().String()
}

func commitLoop(b *testing.B, addr string, partition int32, more func() bool, took *[]time.Duration) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Error(err)
		return
	}
	defer conn.Close()
	request := kmsg.NewRequestFormatter().AppendRequest(nil, commitOf(partition, 5), 1)
	reply := make([]byte, 256)
	for more() {
		begin := time.Now()
		if _, err := conn.Write(request); err != nil {
			b.Error(err)
			return
		}
		if _, err := io.ReadFull(conn, reply[:4]); err != nil {
			b.Error(err)
			return
		}
		n := binary.BigEndian.Uint32(reply)
		if _, err := io.ReadFull(conn, reply[:n]); err != nil || binary.BigEndian.Uint32(reply) != 1 {
			b.Error("not the answer", err)
			return
		}
		*took = append(*took, time.Since(begin))
	}
}

// BenchmarkCommit is an OffsetCommit to the active sidecar and by way of another, one after the other and on 64
// connections at once. The CPU time is that of the whole process: the clients' and both sidecars'.
func BenchmarkCommit(b *testing.B) {
	active, forwarding := benchPair(b)
	for _, way := range []struct{ name, addr string }{{"active", active}, {"forwarded", forwarding}} {
		for _, connections := range []int{1, 64} {
			b.Run(way.name+"/"+itoa(connections), func(b *testing.B) {
				var left atomic.Int64
				left.Store(int64(b.N))
				times := make([][]time.Duration, connections)
				var all sync.WaitGroup
				b.ResetTimer()
				used, begin := cpu(), time.Now()
				for i := range connections {
					all.Go(func() {
						commitLoop(b, way.addr, int32(i), func() bool { return left.Add(-1) >= 0 }, &times[i])
					})
				}
				all.Wait()
				b.ReportMetric(float64(b.N)/time.Since(begin).Seconds(), "commits/s")
				b.ReportMetric(float64((cpu()-used).Nanoseconds())/float64(b.N)/1e3, "cpu-µs/op")
				took := slices.Sorted(slices.Values(slices.Concat(times...)))
				b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
				b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-µs")
			})
		}
	}
}
