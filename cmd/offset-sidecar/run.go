package main

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
)

// run is the verb: a sidecar in front of a Kafka cluster, until a signal.
func (p *program) run(c *cli.Context) error {
	config, err := p.config(c, "run")
	if err != nil {
		return err
	}
	if err := config.validate(true); err != nil {
		return usageError{err}
	}
	return p.serve(config, p.logger(config))
}

// serve opens a sidecar and keeps it until the first signal, then drains it. A second signal ends the wait at once.
func (p *program) serve(config *Config, logger *slog.Logger) error {
	s, err := Open(config, logger)
	if err != nil {
		return err
	}
	defer s.Close()
	if p.opened != nil {
		p.opened()
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ready := make(chan error, 1)
	go func() { ready <- s.WaitActive(ctx) }()
	for {
		select {
		case err := <-ready:
			if err == nil {
				p.announce(s)
			}
		case sig := <-p.signals:
			return p.drain(s, sig)
		}
	}
}

// announce writes the line that scripts wait for.
func (p *program) announce(s *Sidecar) {
	data := s.config.DataDir
	if data == "" {
		data = "in memory"
	}
	s.logger.Info("ready", "listen", s.Addr(), "http", addrOf(s.health), "admin", addrOf(s.pages), "upstream", strings.Join(s.config.Upstream.Seeds, ","),
		"gossip", cmp.Or(s.node.GossipAddr(), "off"), "peer", cmp.Or(s.node.PeerAddr(), "off"), "node", s.node.ID(), "cluster", s.config.Cluster, "data_dir", data, "term", s.coordinator.Status().Term, "version", versionText())
	if p.started != nil {
		p.started(s)
	}
}

// drain serves on until the clients have gone. A second signal ends the process at once, which costs clients an error but
// loses nothing that was acknowledged.
func (p *program) drain(s *Sidecar, sig os.Signal) error {
	s.logger.Info("stopping: clients may finish", "signal", sig.String(), "clients", s.proxy.Clients(), "max_drain", s.config.MaxDrain)
	ended := make(chan struct{})
	defer close(ended)
	go p.watchSecondSignal(s.logger, ended)
	if err := s.Leave(); err != nil {
		s.logger.Warn("the other sidecars could not be told in time, and find out for themselves that this one is gone", "err", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.config.MaxDrain)
	defer cancel()
	if err := s.Drain(ctx); err != nil {
		s.logger.Warn("clients are still connected after --max-drain and are cut off", "max_drain", s.config.MaxDrain, "err", err)
	}
	if err := s.Close(); err != nil {
		return err
	}
	s.logger.Info("stopped")
	return nil
}

// sameSignal is how long after the first signal another one is taken for its echo: timeout(1) sends its signal to the
// process and then to the group it is in.
const sameSignal = 100 * time.Millisecond

// watchSecondSignal ends the process at a second signal, unless it has ended before.
func (p *program) watchSecondSignal(logger *slog.Logger, ended <-chan struct{}) {
	first := time.Now()
	for {
		select {
		case <-p.signals:
			if time.Since(first) < sameSignal {
				continue
			}
			logger.Warn("stopped at once by a second signal; clients were not waited for")
			p.exit(exitFailed)
			return
		case <-ended:
			return
		}
	}
}

// logger makes the one logger of the process.
func (p *program) logger(config *Config) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(config.Log.Level)) // checked with the setting
	options := &slog.HandlerOptions{Level: level}
	if config.Log.Format == "text" || config.Log.Format == "auto" && terminal(p.stderr) {
		return slog.New(slog.NewTextHandler(p.stderr, options))
	}
	return slog.New(slog.NewJSONHandler(p.stderr, options))
}

func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// dialer dials upstream brokers. Inside a container localhost is the container, which is the likeliest mistake there.
func (s *Sidecar) dialer() func(ctx context.Context, network, addr string) (net.Conn, error) {
	dialer, once := new(net.Dialer), sync.OnceFunc(func() {
		s.logger.Warn("--upstream is on localhost, which inside a container is the container itself: name the Kafka container or service " +
			"(kafka:9092), or host.docker.internal for a Kafka on the host, whose advertised.listeners must be reachable from here too")
	})
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dialer.DialContext(ctx, network, addr)
		if host, _, _ := net.SplitHostPort(addr); errors.Is(err, syscall.ECONNREFUSED) && loopback(host) && inContainer() {
			once()
		}
		return conn, err
	}
}

// inContainer recognises Docker, Podman and Kubernetes by what they leave in the file system.
var inContainer = sync.OnceValue(func() bool {
	for _, path := range []string{"/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io"} {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	groups, err := os.ReadFile("/proc/1/cgroup")
	text := string(groups)
	return err == nil && (strings.Contains(text, "docker") || strings.Contains(text, "kubepods") || strings.Contains(text, "containerd"))
})
