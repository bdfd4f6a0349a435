package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/offset-sidecar/offset-sidecar/admin"
	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Limits without a flag.
const (
	maxGroupFrame = 8 << 20         // bytes of a group or offset request
	minFree       = 64 << 20        // bytes of the data directory's file system below which nothing is acknowledged
	activeWarning = 5 * time.Second // without an active coordinator, until the log says so

	leaveAtLeast = 3 * time.Second // for the other sidecars to take over, whatever --max-drain says
	leaveAtMost  = 10 * time.Second
)

// Sidecar is one sidecar in this process: the rooms, opened bottom up and closed top down. Several may live side by side.
type Sidecar struct {
	config  *Config
	logger  *slog.Logger
	metrics *tracing.Metrics

	telemetry   *tracing.Telemetry
	node        *replicate.Node
	coordinator *coordinator.Coordinator
	upstream    *upstream.Client
	proxy       *proxy.Proxy
	health      net.Listener
	pages       net.Listener
	admin       *admin.Server

	peered   bool          // there are other sidecars, or may be
	serving  chan struct{} // closed when proxy is there
	closing  chan struct{} // closed when the end has begun
	close    sync.Once
	opened   time.Time
	draining atomic.Bool
	closers  []func() // what to undo, in opening order
	unclosed error    // why the store could not be closed

	mu              sync.Mutex
	coordinatorDone error // why the coordinator's loop ended, if it did by itself
}

// Open starts a sidecar. When it returns the client listener is bound; the coordinator may not be active yet.
func Open(config *Config, logger *slog.Logger) (*Sidecar, error) {
	s := &Sidecar{config: config, logger: logger, metrics: new(tracing.Metrics), opened: time.Now(), serving: make(chan struct{}), closing: make(chan struct{})}
	for _, open := range []func() error{s.openTelemetry, s.openUpstream, s.openStore, s.openCoordinator, s.openProxy, s.openAdmin} {
		if err := open(); err != nil {
			return nil, errors.Join(err, s.closeAll())
		}
	}
	return s, nil
}

// onClose notes how to end what was just begun.
func (s *Sidecar) onClose(f func()) { s.closers = append(s.closers, f) }

func (s *Sidecar) closeAll() error {
	s.close.Do(func() { close(s.closing) })
	for i := len(s.closers) - 1; i >= 0; i-- {
		s.closers[i]()
	}
	s.closers = nil
	return s.unclosed
}

func (s *Sidecar) openTelemetry() (err error) {
	s.telemetry, err = tracing.New(tracing.Config{
		Version: versionText(),
		APIName: func(key int16) string { return kmsg.NameForKey(key) },
		ErrorName: func(code int16) string {
			if err := kerr.TypedErrorForCode(code); err != nil {
				return err.Message
			}
			return ""
		},
		Before: func() {
			if s.upstream != nil {
				s.metrics.Set(tracing.UpstreamBrokers, int64(len(s.upstream.Brokers().Brokers)))
			}
		},
	}, s.metrics)
	if err != nil {
		return err
	}
	s.onClose(func() { _ = s.telemetry.Close() })
	return nil
}

// openUpstream makes the client of the upstream, which does nothing yet.
func (s *Sidecar) openUpstream() (err error) {
	s.upstream, err = upstream.New(upstream.Config{
		Seeds: s.config.Upstream.Seeds, ClientID: "offset-sidecar/" + s.config.Cluster, Logger: s.logger, Dialer: s.dialer(),
	})
	if err != nil {
		return fmt.Errorf("--upstream: %w", err)
	}
	s.onClose(s.upstream.Close)
	return nil
}

// openStore opens the replicated log, and the way to the other sidecars.
func (s *Sidecar) openStore() error {
	cluster, err := s.peering()
	if err != nil {
		return err
	}
	acks := replicate.AcksAll
	if s.config.Peers.Quorum {
		acks = replicate.AcksQuorum
	}
	s.node, err = replicate.Open(replicate.Config{
		Dir: s.config.DataDir, Fsync: s.config.Replicate.Fsync, RaftTimeout: s.config.Replicate.RaftTimeout, MinFree: minFree,
		Acks: acks, Cluster: cluster, Logger: s.logger, Metrics: s.metrics,
	})
	if err != nil {
		return s.openingError(err)
	}
	s.onClose(func() {
		if err := s.node.Close(); err != nil {
			s.unclosed = fmt.Errorf("closing the store: %w", err)
		}
	})
	s.peered = cluster != nil
	return nil
}

// openCoordinator starts the coordinator.
func (s *Sidecar) openCoordinator() error {
	config := s.config.Coordinator
	config.ElectionTimeout = s.config.Replicate.RaftTimeout
	s.coordinator = coordinator.New(config, s.node, s.upstream, s.logger, s.metrics)
	s.start(s.runCoordinator)
	if s.peered {
		s.start(s.announceActive)
	}
	return nil
}

// start runs a goroutine that ends when its context does, at the latest on close.
func (s *Sidecar) start(run func(context.Context)) {
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		run(ctx)
	}()
	s.onClose(func() { stop(); <-done })
}

// runCoordinator is the coordinator's loop. Should it end by itself the data path goes on without it.
func (s *Sidecar) runCoordinator(ctx context.Context) {
	err := s.coordinator.Run(ctx)
	if ctx.Err() != nil {
		return
	}
	if err == nil {
		err = errors.New("it ended")
	}
	s.mu.Lock()
	s.coordinatorDone = err
	s.mu.Unlock()
	s.logger.Error("the coordinator has stopped: group calls are no longer served, data still is; restart the sidecar", "err", err)
}

// openProxy binds the listeners.
func (s *Sidecar) openProxy() error {
	c := s.config.Proxy
	var peers proxy.Peers
	if s.peered {
		peers = s.node
	}
	s.proxy = proxy.New(proxy.Config{
		Node:   s.node.ID(),
		Listen: c.Listen, AdvertiseHost: c.AdvertiseHost, Upstream: s.config.Upstream.Seeds,
		MaxFrame: int32(c.MaxFrame), MaxGroupFrame: maxGroupFrame,
		MaxInflight: c.MaxInflight, MaxConnections: c.MaxConnections, UpstreamTimeout: c.UpstreamTimeout,
		CommitTimeout: s.config.Coordinator.CommitTimeout, Logger: s.logger,
	}, s.coordinator, s.upstream, s.node.Local(), peers, s.metrics)
	if err := s.proxy.Start(); err != nil {
		return bindError("--listen", c.Listen, err)
	}
	s.onClose(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // whoever was to be waited for has been, in Drain
		_ = s.proxy.Shutdown(ctx)
	})
	close(s.serving)
	s.start(s.upstream.Run)
	return nil
}

// openAdmin serves health, metrics and the admin pages.
func (s *Sidecar) openAdmin() (err error) {
	if s.health, err = listen("--http", s.config.Admin.HTTP); err != nil {
		return err
	}
	if s.pages, err = listen("--admin", s.config.Admin.Admin); err != nil {
		if s.health != nil {
			_ = s.health.Close()
		}
		return err
	}
	s.admin = admin.Serve(s.health, s.pages, s.probe(), s.logger)
	s.onClose(s.admin.Close)
	return nil
}

// listen binds an address; none for "".
func listen(flag, addr string) (net.Listener, error) {
	if addr == "" {
		return nil, nil
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, bindError(flag, addr, err)
	}
	return l, nil
}

// bindError names the flag of an address that could not be bound, and the way out.
func bindError(flag, addr string, err error) error {
	_, port, _ := net.SplitHostPort(addr)
	op := (*net.OpError)(nil)
	if !errors.As(err, &op) {
		return err // not about binding
	}
	err = op // the room's own words would say the same again
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%s %s: the port is in use by another process (perhaps another sidecar); stop that one ('ss -ltnp sport = :%s' shows it), or choose another port with %s (0 takes any free one) (%w)",
			flag, addr, port, flag, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%s %s: this machine does not have that address; 127.0.0.1 is always there (%w)", flag, addr, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s %s: ports below 1024 need a right this user does not have; choose a higher one (%w)", flag, addr, err)
	}
	return fmt.Errorf("%s %s: %w", flag, addr, err)
}

// WaitActive returns when group calls are answered, by this sidecar or another, with an error when the coordinator has
// stopped or ctx is done. With others to join it returns at once: whoever of them is not there yet may come any time.
func (s *Sidecar) WaitActive(ctx context.Context) error {
	warning := time.NewTicker(activeWarning)
	defer warning.Stop()
	for {
		status := s.coordinator.Status()
		_, active, changed := s.node.Active()
		if status.Active || active != "" || len(s.config.Peers.Join) > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-status.Changed:
		case <-changed:
		case <-warning.C:
			s.logger.Warn("the coordinator is not active yet: group calls wait, data is served", "since", time.Since(s.opened).Round(time.Second))
		}
		if err := s.coordinatorErr(); err != nil {
			return err
		}
	}
}

func (s *Sidecar) coordinatorErr() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.coordinatorDone
}

// Leave hands over to the other sidecars what this one does for them. Its own clients are served on, through the others.
// It gives up after --max-drain, but no sooner than after leaveAtLeast and no later than after leaveAtMost.
func (s *Sidecar) Leave() error {
	s.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), min(max(s.config.MaxDrain, leaveAtLeast), leaveAtMost))
	defer cancel()
	return s.node.Leave(ctx)
}

// Drain lets clients finish: it returns when none is connected, or with an error when ctx is done. A consumer's last commit and its
// LeaveGroup come after SIGTERM, so everything is still served.
func (s *Sidecar) Drain(ctx context.Context) error {
	s.draining.Store(true)
	return s.proxy.Shutdown(ctx)
}

// Close ends the sidecar, whoever is connected. What was acknowledged is on disk before and after, whatever the error.
func (s *Sidecar) Close() error {
	s.draining.Store(true)
	return s.closeAll()
}

// Addr is where clients connect.
func (s *Sidecar) Addr() string { return s.proxy.Addr().String() }

// addrOf gives the address of a listener, "off" for none.
func addrOf(l net.Listener) string {
	if l == nil {
		return "off"
	}
	return l.Addr().String()
}
