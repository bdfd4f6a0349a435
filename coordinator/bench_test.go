package coordinator

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// instant is a log that replicates each entry as soon as it is offered.
type instant struct {
	events  chan replicate.Event
	entries chan replicate.Entry
}

func (i *instant) Events() <-chan replicate.Event            { return i.events }
func (i *instant) Entries() chan<- replicate.Entry           { return i.entries }
func (i *instant) Latest(func(replicate.Record) error) error { return nil }
func (i *instant) Fence(_ uint64, done func(error))          { done(nil) }
func (i *instant) Resign(uint64)                             {}
func (i *instant) Full() bool                                { return false }

// replicate applies what is offered; the replicas have it at once, or are told of one event later.
func (i *instant) replicate(ctx context.Context, stored bool) {
	i.events <- replicate.Event{Kind: replicate.Reset}
	i.events <- replicate.Event{Kind: replicate.Active, Term: 1}
	for index := uint64(1); ; index++ {
		select {
		case e := <-i.entries:
			i.events <- replicate.Event{Kind: replicate.Applied, Term: 1, Sequence: e.Sequence, Index: index, Records: e.Records, Stored: stored}
			if !stored {
				i.events <- replicate.Event{Kind: replicate.Stored, Term: 1, Index: index}
			}
		case <-ctx.Done():
			return
		}
	}
}

// BenchmarkCommit is 64 clients in a closed loop: what a commit costs in the coordinator and its core, log excluded.
func BenchmarkCommit(b *testing.B) {
	b.Run("alone", func(b *testing.B) { benchmarkCommit(b, true) })
	b.Run("replicated", func(b *testing.B) { benchmarkCommit(b, false) })
}

func benchmarkCommit(b *testing.B, stored bool) {
	i := &instant{events: make(chan replicate.Event, 16), entries: make(chan replicate.Entry)}
	c := New(Config{Group: group.DefaultConfig(), CommitTimeout: 5 * time.Second}, i, &onlyOrders{}, slog.New(slog.DiscardHandler), nil)
	ctx, cancel := context.WithCancel(b.Context())
	var running sync.WaitGroup
	running.Go(func() { i.replicate(ctx, stored) })
	running.Go(func() {
		if err := c.Run(ctx); err != nil {
			b.Error(err)
		}
	})
	for !c.Status().Active {
		<-c.Status().Changed
	}
	b.ReportAllocs()
	b.ResetTimer()
	var clients sync.WaitGroup
	for n := range 64 {
		clients.Go(func() {
			s := newSession(c, byte(n))
			body, answered := commit("orders", 5), make(chan error, 1)
			for range b.N/64 + 1 {
				s.ordinal++
				client := s.client
				client.Ordinal = s.ordinal
				c.Submit(&Request{Body: body, Client: client, Term: 1, Done: func(_ kmsg.Response, err error) { answered <- err }})
				if err := <-answered; err != nil {
					b.Error(err)
				}
			}
		})
	}
	clients.Wait()
	b.StopTimer()
	cancel()
	running.Wait()
}
