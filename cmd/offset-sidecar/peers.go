package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate"
)

// Where sidecars meet when nothing else is said.
const (
	defaultGossip = "127.0.0.1:7946"
	defaultPeer   = "127.0.0.1:7947"
)

// lookupTimeout is how long one name of the configuration may take to be looked up.
const lookupTimeout = 3 * time.Second

// PeersConfig is what a sidecar says to and of the others of its cluster.
type PeersConfig struct {
	Join            []string // host:port
	BootstrapExpect int
	Arbiter         bool // the upstream decides who gives birth
	Gossip, Peer    string
	Advertise       string // "" = the bound address
	MaxVoters       int
	Quorum          bool // --commit-acks quorum
	Zone, Machine   string

	CertFile, KeyFile, CAFile string
	GossipKeyFile             string
	Token, TokenFile          string
	Insecure                  bool

	keyring [][]byte // of GossipKeyFile
	podIP   string   // $POD_IP, where it is an address
}

// mutualTLS says whether the peer port has certificates.
func (p *PeersConfig) mutualTLS() bool { return p.CertFile != "" && p.KeyFile != "" && p.CAFile != "" }

// given says whether a setting was set at all.
func (c *Config) given(name string) bool {
	o, ok := c.origins[name]
	return ok && o.from != "default"
}

// fillPeers reads what the environment and files say about the peers: after it the Config depends on neither.
func (c *Config) fillPeers(lookup func(string) (string, bool)) error {
	p := &c.Peers
	if ip, ok := lookup("POD_IP"); ok && net.ParseIP(ip) != nil {
		p.podIP = ip
	}
	if p.Machine == "" {
		if name, ok := lookup("NODE_NAME"); ok && place(&p.Machine, name) == nil {
			p.Machine = name
		} else if name, err := os.Hostname(); err == nil && place(&p.Machine, name) == nil {
			p.Machine = name
		}
	}
	if p.podIP != "" && slices.ContainsFunc(p.Join, elsewhere) {
		if !c.given("gossip") {
			p.Gossip = net.JoinHostPort(p.podIP, portOf(defaultGossip))
		}
		if !c.given("peer") {
			p.Peer = net.JoinHostPort(p.podIP, portOf(defaultPeer))
		}
	}
	if err := p.readToken(); err != nil {
		return err
	}
	return p.readKeyring()
}

func (p *PeersConfig) readToken() error {
	if p.TokenFile == "" {
		return nil
	}
	if p.Token != "" {
		return fmt.Errorf("--join-token and --join-token-file say the same: leave one out")
	}
	content, err := os.ReadFile(p.TokenFile)
	if err != nil {
		return fmt.Errorf("--join-token-file: %w", err)
	}
	if p.Token = strings.TrimSpace(string(content)); p.Token == "" {
		return fmt.Errorf("--join-token-file %s is empty", p.TokenFile)
	}
	return nil
}

func (p *PeersConfig) readKeyring() error {
	p.keyring = nil
	if p.GossipKeyFile == "" {
		return nil
	}
	content, err := os.ReadFile(p.GossipKeyFile)
	if err != nil {
		return fmt.Errorf("--gossip-key-file: %w", err)
	}
	for n, line := range strings.Split(string(content), "\n") {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		key, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(key) != 16 && len(key) != 24 && len(key) != 32 {
			return fmt.Errorf("--gossip-key-file %s: line %d is not 16, 24 or 32 bytes in base64; 'openssl rand -base64 32' makes a key", p.GossipKeyFile, n+1)
		}
		p.keyring = append(p.keyring, key)
	}
	if len(p.keyring) == 0 {
		return fmt.Errorf("--gossip-key-file %s has no key; 'openssl rand -base64 32' makes one", p.GossipKeyFile)
	}
	return nil
}

// validatePeers checks what the settings about peers mean together.
func (c *Config) validatePeers() error {
	p := &c.Peers
	if p.Gossip == "" { // dev has no peers
		return nil
	}
	switch {
	case len(p.Join) > 0 && !c.given("cluster"):
		return fmt.Errorf("--join needs --cluster NAME: the name that all sidecars of one application share, and no others; " +
			"its default, \"default\", is not taken, so that two applications never become one by mistake")
	case p.BootstrapExpect > 0 && p.Arbiter:
		return fmt.Errorf("--bootstrap-expect and --bootstrap-arbiter are two ways to decide the same: leave one out")
	case p.BootstrapExpect > 1 && len(p.Join) == 0:
		return fmt.Errorf("--bootstrap-expect %d needs --join with the gossip addresses of the others (its own among them does no harm)", p.BootstrapExpect)
	case p.Arbiter && len(p.Join) == 0:
		return fmt.Errorf("--bootstrap-arbiter needs --join with the gossip addresses of the others: without it a sidecar is alone and needs no arbiter")
	}
	if err := p.validateReach(); err != nil {
		return err
	}
	return p.validateSecurity()
}

// validateReach finds sidecars that are to meet others elsewhere, and listen only at home.
func (p *PeersConfig) validateReach() error {
	bound := []struct{ flag, addr string }{{"--gossip", p.Gossip}, {"--peer", p.Peer}}
	if p.Advertise != "" {
		bound = append(bound, struct{ flag, addr string }{"--advertise", net.JoinHostPort(p.Advertise, "0")})
	}
	for _, b := range bound {
		host, _, _ := net.SplitHostPort(b.addr)
		if !loopback(host) {
			continue
		}
		i := slices.IndexFunc(p.Join, elsewhere)
		if i < 0 {
			return nil
		}
		return fmt.Errorf("--join %s is not on this machine, but %s %s is on loopback, where no other machine reaches this sidecar: "+
			"set --gossip and --peer to an address of this machine, as in --gossip 10.0.0.5:%s --peer 10.0.0.5:%s (or 0.0.0.0, with --advertise where the machine has several addresses); "+
			"in Kubernetes it is enough to set the variable POD_IP from status.podIP",
			p.Join[i], b.flag, strings.TrimSuffix(b.addr, ":0"), portOf(defaultGossip), portOf(defaultPeer))
	}
	return nil
}

func (p *PeersConfig) validateSecurity() error {
	if some := p.CertFile + p.KeyFile + p.CAFile; some != "" && !p.mutualTLS() {
		for _, f := range []struct{ flag, value string }{{"--peer-cert", p.CertFile}, {"--peer-key", p.KeyFile}, {"--peer-ca", p.CAFile}} {
			if f.value == "" {
				return fmt.Errorf("%s is missing: --peer-cert, --peer-key and --peer-ca go together", f.flag)
			}
		}
	}
	if p.Token != "" || p.Insecure {
		return nil
	}
	if p.mutualTLS() {
		if host, _, _ := net.SplitHostPort(p.Gossip); !loopback(host) && p.GossipKeyFile == "" {
			return fmt.Errorf("--gossip %s is not on loopback, and certificates protect --peer alone: give the gossip a key that all sidecars share "+
				"(--gossip-key-file; 'head -c 32 /dev/urandom | base64' makes one), or, in a network that you trust, --insecure-peers", p.Gossip)
		}
		return nil
	}
	for _, b := range []struct{ flag, addr string }{{"--gossip", p.Gossip}, {"--peer", p.Peer}} {
		if host, _, _ := net.SplitHostPort(b.addr); !loopback(host) {
			return fmt.Errorf("%s %s is not on loopback, and nothing keeps strangers out: give certificates (--peer-cert, --peer-key, --peer-ca; with --gossip-key-file for the gossip), "+
				"or a secret that all sidecars share (--join-token-file or --join-token), or, in a network that you trust, --insecure-peers", b.flag, b.addr)
		}
	}
	return nil
}

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

// elsewhere says whether an address to join is on another machine, or may be: a name that cannot be looked up yet.
func elsewhere(addr string) bool {
	host, _, _ := net.SplitHostPort(addr)
	if loopback(host) || net.ParseIP(host) != nil {
		return !loopback(host)
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	found, err := net.DefaultResolver.LookupHost(ctx, host)
	return err != nil || slices.ContainsFunc(found, func(ip string) bool { return !loopback(ip) })
}

// advertised gives the address that peers are told: as it was set, $POD_IP or the only address there is behind a
// wildcard, or "" for the one that is bound.
func (p *PeersConfig) advertised(interfaces func() ([]net.Addr, error)) (string, error) {
	if host, _, _ := net.SplitHostPort(p.Gossip); p.Advertise == "" && !wildcard(host) {
		return "", nil
	}
	if p.Advertise == "" && p.podIP != "" {
		return p.podIP, nil
	}
	if p.Advertise == "" {
		return onlyAddress(p.Gossip, interfaces)
	}
	if net.ParseIP(p.Advertise) != nil {
		return p.Advertise, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	found, err := net.DefaultResolver.LookupHost(ctx, p.Advertise)
	if err != nil {
		return "", fmt.Errorf("--advertise %s: %w", p.Advertise, err)
	}
	// Of several the first of IPv4: the others would need luck to reach one that is not bound.
	if i := slices.IndexFunc(found, func(ip string) bool { return net.ParseIP(ip).To4() != nil }); i > 0 {
		return found[i], nil
	}
	return found[0], nil
}

// onlyAddress is the one address of this machine that others may reach; more than one is the user's choice.
func onlyAddress(bound string, interfaces func() ([]net.Addr, error)) (string, error) {
	addrs, err := interfaces()
	if err != nil {
		return "", fmt.Errorf("--gossip %s: looking for an address that others reach: %w", bound, err)
	}
	var four, six []string
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		switch {
		case !ok || !n.IP.IsGlobalUnicast():
		case n.IP.To4() != nil:
			four = append(four, n.IP.String())
		default:
			six = append(six, n.IP.String())
		}
	}
	all := append(four, six...)
	switch {
	case len(all) == 0:
		return "127.0.0.1", nil
	case len(four) == 1 || len(all) == 1:
		return all[0], nil
	}
	return "", fmt.Errorf("--gossip %s is every address of this machine, and it has several (%s): say with --advertise which of them the other sidecars reach",
		bound, strings.Join(all, ", "))
}

// clusterConfig is what replicate is told about the peers; nil where there are none.
func (c *Config) clusterConfig() (*replicate.ClusterConfig, error) {
	p := &c.Peers
	if p.Gossip == "" {
		return nil, nil
	}
	advertise, err := p.advertised(net.InterfaceAddrs)
	if err != nil {
		return nil, err
	}
	return &replicate.ClusterConfig{
		Name: c.Cluster, Gossip: p.Gossip, Peer: p.Peer, Advertise: advertise, Join: p.Join, BootstrapExpect: p.BootstrapExpect,
		MaxVoters: p.MaxVoters, Zone: p.Zone, Machine: p.Machine, Version: versionText(),
		Security: replicate.Security{Keyring: p.keyring, CertFile: p.CertFile, KeyFile: p.KeyFile, CAFile: p.CAFile, Token: p.Token, Insecure: p.Insecure},
	}, nil
}
