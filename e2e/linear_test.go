//go:build e2e

package e2e

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// historians lets n clients at each of some sidecars commit and fetch, until the function that it returns is called. A
// client whose sidecar is gone waits for it.
func historians(t *testing.T, topic string, n int, sidecars ...*lab.Sidecar) (h *history, nextKeys func(), stop func()) {
	t.Helper()
	h = newHistory()
	var keys atomic.Pointer[[]string]
	var generation atomic.Int64
	nextKeys = func() { // a history grows with each connection: now and then it goes on with other keys
		var names []string
		for i := range 4 {
			names = append(names, fmt.Sprintf("history-%s-%d-%d", t.Name(), generation.Load(), i))
		}
		generation.Add(1)
		keys.Store(&names)
	}
	nextKeys()
	end := make(chan struct{})
	var running sync.WaitGroup
	for _, s := range sidecars {
		for range n {
			g := &historian{history: h, topic: topic, stop: end, at: s.Addr, keys: func() []string { return *keys.Load() }}
			running.Go(g.run)
		}
	}
	var once sync.Once
	stop = func() { once.Do(func() { close(end); running.Wait() }) }
	t.Cleanup(stop)
	return h, nextKeys, stop
}

// more waits until so many further calls have been answered: what happened before is over for the clients.
func (h *history) more(t *testing.T, n int, within time.Duration) {
	t.Helper()
	count := func() (all int) {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, ops := range h.calls {
			all += len(ops)
		}
		return all
	}
	from := count()
	check(t, lab.Eventually(within, func() error {
		if now := count(); now < from+n {
			return fmt.Errorf("%d calls were answered, %d were waited for", now-from, n)
		}
		return nil
	}))
}

// TestHistoryOfOneSidecar: what clients are told is linearizable while the sidecar is killed and restarted.
func TestHistoryOfOneSidecar(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k)
	h, _, stop := historians(t, topic(t, k, "history-one", 1), 4, s)
	for range 4 {
		h.more(t, 300, 20*time.Second)
		time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond) // the moment of the kill is what is random here
		s.Kill()
		check(t, s.Up())
	}
	h.more(t, 300, 20*time.Second)
	stop()
	h.check(t)
}
