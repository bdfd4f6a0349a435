package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"

	"github.com/offset-sidecar/offset-sidecar/replicate"
)

// peering is what replicate is told of the other sidecars; nil for a sidecar that stays alone.
func (s *Sidecar) peering() (*replicate.ClusterConfig, error) {
	cluster, err := s.config.clusterConfig()
	if cluster == nil || err != nil {
		return nil, err
	}
	p := &s.config.Peers
	for _, bound := range []struct{ flag, addr string }{{"--gossip", p.Gossip}, {"--peer", p.Peer}} {
		l, err := net.Listen("tcp", bound.addr)
		if err == nil {
			_ = l.Close() // replicate binds it again
			continue
		}
		if errors.Is(err, syscall.EADDRINUSE) && len(p.Join) == 0 && !s.config.given("gossip") && !s.config.given("peer") {
			s.logger.Warn("another process uses the default port of "+bound.flag+", perhaps another sidecar: this one runs alone, and none can join it; "+
				"to have them joined set --gossip and --peer", "addr", bound.addr)
			return nil, nil
		}
		return nil, bindError(bound.flag, bound.addr, err)
	}
	if host, _, _ := net.SplitHostPort(p.Gossip); len(p.keyring) == 0 && p.Token == "" && !loopback(host) {
		s.logger.Warn("the gossip is not encrypted: whoever reaches --gossip can see and change who belongs to the cluster; set --gossip-key-file", "gossip", p.Gossip)
	}
	if p.Arbiter {
		cluster.Arbiter = func(ctx context.Context, proposal string) (string, error) {
			return s.upstream.Decide(ctx, "__offset_sidecar."+s.config.Cluster, proposal)
		}
	}
	cluster.Forwarded = func(conn net.Conn, from string) {
		select {
		case <-s.serving:
			s.proxy.ServePeer(conn, from)
		case <-s.closing:
			_ = conn.Close()
		}
	}
	return cluster, nil
}

// openingError names the flag behind an error of replicate.Open, which names those of the peers itself.
func (s *Sidecar) openingError(err error) error {
	p := &s.config.Peers
	for _, bound := range []struct{ flag, addr string }{{"--gossip", p.Gossip}, {"--peer", p.Peer}} {
		if strings.HasPrefix(err.Error(), bound.flag) {
			if named := bindError(bound.flag, bound.addr, err); errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EADDRNOTAVAIL) {
				return named
			}
			return err
		}
	}
	return fmt.Errorf("--data-dir: %w", err)
}

// announceActive tells the other sidecars, at once, whenever this one's coordinator becomes active or no longer is.
func (s *Sidecar) announceActive(ctx context.Context) {
	for {
		status := s.coordinator.Status()
		s.node.Announce(status.Active, status.Term)
		select {
		case <-status.Changed:
		case <-ctx.Done():
			return
		}
	}
}
