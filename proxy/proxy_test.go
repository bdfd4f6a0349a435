package proxy_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/offset-sidecar/offset-sidecar/upstream"
)

// echo stands in for the coordinator: it answers each request with its empty response, whenever it is told to. It is no
// mock of the coordinator's behaviour, of which these tests need none but that and the handing back.
type echo struct {
	mu      sync.Mutex
	status  coordinator.Status
	changed chan struct{}
	seen    []*coordinator.Request
	answer  func(*coordinator.Request) // nil: at once
}

func newEcho(active bool) *echo {
	changed := make(chan struct{})
	return &echo{changed: changed, status: coordinator.Status{Active: active, Term: 1, Changed: changed}}
}

func (e *echo) Status() coordinator.Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.status
}

func (e *echo) set(active bool, term uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.changed
	e.changed = make(chan struct{})
	e.status = coordinator.Status{Active: active, Term: term, Changed: e.changed}
	close(old)
}

func (e *echo) Submit(r *coordinator.Request) {
	e.mu.Lock()
	if !e.status.Active || e.status.Term != r.Term {
		e.mu.Unlock()
		r.Done(nil, coordinator.ErrInactive)
		return
	}
	e.seen = append(e.seen, r)
	answer := e.answer
	e.mu.Unlock()
	if answer == nil {
		r.Done(r.Body.ResponseKind(), nil)
		return
	}
	answer(r)
}

func (e *echo) requests() []*coordinator.Request {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]*coordinator.Request(nil), e.seen...)
}

// brokers stands in for the sidecar's own client of the upstream: a list of brokers that tests change.
type brokers struct {
	mu   sync.Mutex
	now  upstream.Brokers
	hook func(upstream.Brokers)
}

func (b *brokers) OnBrokers(hook func(upstream.Brokers)) {
	b.mu.Lock()
	b.hook = hook
	b.mu.Unlock()
}

func (b *brokers) Brokers() upstream.Brokers {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now
}

func (b *brokers) set(all ...upstream.Broker) {
	b.mu.Lock()
	b.now = upstream.Brokers{ClusterID: "a-cluster", ControllerID: 1, Brokers: all, At: time.Now()}
	hook, now := b.hook, b.now
	b.mu.Unlock()
	if hook != nil {
		hook(now)
	}
}

func (b *brokers) Nudge()                               {}
func (b *brokers) Topic(string) ([16]byte, int32, bool) { return [16]byte{}, 0, false }
func (b *brokers) TopicName([16]byte) (string, bool)    { return "", false }

// memory is a Store without a disk.
type memory struct{ m sync.Map }

func (m *memory) Get(key string) ([]byte, error) {
	if v, ok := m.m.Load(key); ok {
		return v.([]byte), nil
	}
	return nil, nil
}

func (m *memory) Put(key string, value []byte) error {
	m.m.Store(key, value)
	return nil
}

// logs collects the log for tests that read it.
type logs struct {
	t  testing.TB
	mu sync.Mutex
	b  []byte
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, b...)
	return len(b), nil
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}

// side is a proxy with what stands in for its neighbours.
type side struct {
	*proxy.Proxy
	echo    *echo
	brokers *brokers
	store   *memory
	metrics *tracing.Metrics
	peers   proxy.Peers

	coordinator proxy.Coordinator // nil: echo
	logs        *logs
}

func config(upstreams ...string) proxy.Config {
	return proxy.Config{
		Listen: ":0", Upstream: upstreams, MaxFrame: 100 << 20, MaxGroupFrame: 8 << 20, MaxInflight: 64,
		MaxConnections: 4096, UpstreamTimeout: 30 * time.Second, CommitTimeout: 5 * time.Second,
	}
}

// start runs a proxy until the test ends.
func start(t testing.TB, c proxy.Config, change ...func(*side)) *side {
	t.Helper()
	s := &side{echo: newEcho(true), brokers: &brokers{}, store: &memory{}, metrics: &tracing.Metrics{}, logs: &logs{t: t}}
	for _, f := range change {
		f(s)
	}
	c.Logger = slog.New(slog.NewTextHandler(s.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if s.coordinator == nil {
		s.coordinator = s.echo
	}
	s.Proxy = proxy.New(c, s.coordinator, s.brokers, s.store, s.peers, s.metrics)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Log(s.logs.String())
		}
	})
	return s
}

var discard = slog.New(slog.DiscardHandler)

func newProxy(c proxy.Config) *proxy.Proxy {
	c.Logger = discard
	return proxy.New(c, newEcho(true), &brokers{}, &memory{}, nil, nil)
}

func (s *side) stop() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.Shutdown(ctx)
}
