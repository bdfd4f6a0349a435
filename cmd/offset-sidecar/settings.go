package main

import (
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// setting is one value that can be set: as flag --name, in the environment as OFFSET_SIDECAR_NAME, in the file as name.
type setting struct {
	name  string
	value string            // the default
	verbs map[string]string // defaults of single verbs that differ
	not   []string          // verbs that do not have it
	list  bool              // a flag that may be repeated; values are joined with commas
	flag  bool              // true or false; on the command line its name alone is true
	// secret: its value is never shown.
	secret bool
	arg    string // placeholder in the help
	usage  string
	empty  map[string]string // what an empty default means, by verb
	set    func(c *Config, value string) error
}

func (s *setting) in(verb string) bool { return !slices.Contains(s.not, verb) }

func (s *setting) env() string {
	return "OFFSET_SIDECAR_" + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

func (s *setting) defaultFor(verb string) string {
	if v, ok := s.verbs[verb]; ok {
		return v
	}
	return s.value
}

// settings is the one table of everything that can be set, in the order of the help.
var settings = []setting{
	{name: "upstream", list: true, arg: "HOST:PORT[,…]", not: []string{"dev"},
		usage: "brokers of the Kafka cluster to stand in front of",
		set:   func(c *Config, v string) error { return hostPorts(&c.Upstream.Seeds, v) }},
	{name: "listen", value: "127.0.0.1:19092", arg: "ADDR:PORT",
		usage: "where clients connect: their bootstrap.servers. Each broker gets a port of its own above it",
		set:   func(c *Config, v string) error { return listenAddr(&c.Proxy.Listen, v, false) }},
	{name: "advertise-clients", arg: "HOST", empty: map[string]string{"dev": "127.0.0.1", "run": "127.0.0.1"},
		usage: "host that clients are told; needed when --listen is not on loopback",
		set:   func(c *Config, v string) error { return host(&c.Proxy.AdvertiseHost, v) }},
	{name: "data-dir", arg: "DIR",
		empty: map[string]string{"dev": "in memory", "run": "~/.local/state/offset-sidecar/CLUSTER (or in $XDG_STATE_HOME), as root /var/lib/offset-sidecar/CLUSTER"},
		usage: "where offsets are kept",
		set:   func(c *Config, v string) error { c.DataDir = v; return nil }},
	{name: "cluster", value: "default", arg: "NAME",
		usage: "name of the sidecars that share their data, one for each application",
		set: func(c *Config, v string) error {
			c.Cluster = v
			if !clusterName.MatchString(v) {
				return fmt.Errorf("a name has 1 to 63 of the characters a-z A-Z 0-9 . _ - and begins with a letter or digit")
			}
			return nil
		}},
	{name: "join", list: true, arg: "HOST[:PORT][,…]", not: []string{"dev"},
		usage: "gossip addresses of other sidecars, or DNS names that have them; needs --cluster",
		set:   func(c *Config, v string) error { return joinAddrs(&c.Peers.Join, v) }},
	{name: "bootstrap-expect", value: "0", arg: "N", not: []string{"dev"},
		usage: "with --join: begin a new cluster once N empty sidecars have found each other and no other; 0: never, only join one",
		set:   func(c *Config, v string) error { return number(&c.Peers.BootstrapExpect, v, 0, 1000) }},
	{name: "bootstrap-arbiter", arg: "upstream", not: []string{"dev"},
		usage: "with --join: a record in a topic of the upstream decides who begins a new cluster",
		set: func(c *Config, v string) error {
			if c.Peers.Arbiter = v != ""; !c.Peers.Arbiter {
				return nil
			}
			return oneOf(v, "upstream")
		}},
	{name: "gossip", value: defaultGossip, arg: "ADDR:PORT", not: []string{"dev"},
		usage: "where sidecars find each other, TCP and UDP",
		set:   func(c *Config, v string) error { return listenAddr(&c.Peers.Gossip, v, false) }},
	{name: "peer", value: defaultPeer, arg: "ADDR:PORT", not: []string{"dev"},
		usage: "where sidecars replicate and forward requests",
		set:   func(c *Config, v string) error { return listenAddr(&c.Peers.Peer, v, false) }},
	{name: "advertise", arg: "HOST", not: []string{"dev"},
		empty: map[string]string{"run": "what --gossip is bound to, or $POD_IP"},
		usage: "host that the other sidecars are told",
		set:   func(c *Config, v string) error { return host(&c.Peers.Advertise, v) }},
	{name: "max-voters", value: "3", arg: "3|5", not: []string{"dev"},
		usage: "how many sidecars vote, if there are as many: with 3 one may fail, with 5 two",
		set: func(c *Config, v string) error {
			c.Peers.MaxVoters, _ = strconv.Atoi(v)
			return oneOf(v, "3", "5")
		}},
	{name: "commit-acks", value: "all", arg: "all|quorum", not: []string{"dev"},
		usage: "a commit is answered once every sidecar that keeps up has it on disk, or once a majority has",
		set: func(c *Config, v string) error {
			c.Peers.Quorum = v == "quorum"
			return oneOf(v, "all", "quorum")
		}},
	{name: "zone", arg: "NAME", not: []string{"dev"},
		usage: "where this sidecar runs; voters are spread over zones",
		set:   func(c *Config, v string) error { return place(&c.Peers.Zone, v) }},
	{name: "machine", arg: "NAME", not: []string{"dev"},
		empty: map[string]string{"run": "$NODE_NAME, or the host name"},
		usage: "on which machine; voters are spread over machines",
		set:   func(c *Config, v string) error { return place(&c.Peers.Machine, v) }},
	{name: "peer-cert", arg: "FILE", not: []string{"dev"},
		usage: "certificate of this sidecar for --peer (PEM); read again when it changes",
		set:   func(c *Config, v string) error { c.Peers.CertFile = v; return nil }},
	{name: "peer-key", arg: "FILE", not: []string{"dev"},
		usage: "its key (PEM)",
		set:   func(c *Config, v string) error { c.Peers.KeyFile = v; return nil }},
	{name: "peer-ca", arg: "FILE", not: []string{"dev"},
		usage: "certificates that have signed those of the other sidecars (PEM)",
		set:   func(c *Config, v string) error { c.Peers.CAFile = v; return nil }},
	{name: "gossip-key-file", arg: "FILE", not: []string{"dev"},
		usage: "keys that encrypt the gossip, one a line: 16, 24 or 32 bytes in base64; the first is used, all are understood",
		set:   func(c *Config, v string) error { c.Peers.GossipKeyFile = v; return nil }},
	{name: "join-token", arg: "TEXT", not: []string{"dev"}, secret: true,
		usage: "a secret that all sidecars of the cluster share: protects --gossip and --peer without certificates",
		set:   func(c *Config, v string) error { c.Peers.Token = v; return nil }},
	{name: "join-token-file", arg: "FILE", not: []string{"dev"},
		usage: "the same, from a file",
		set:   func(c *Config, v string) error { c.Peers.TokenFile = v; return nil }},
	{name: "insecure-peers", value: "false", not: []string{"dev"}, flag: true,
		usage: "--gossip and --peer may be on any address without certificates or token",
		set: func(c *Config, v string) error {
			c.Peers.Insecure = v == "true"
			return oneOf(v, "true", "false")
		}},
	{name: "http", value: "127.0.0.1:19090", arg: "ADDR:PORT|off",
		usage: "health and metrics: /startup /livez /readyz /metrics",
		set:   func(c *Config, v string) error { return listenAddr(&c.Admin.HTTP, v, true) }},
	{name: "admin", value: "127.0.0.1:19091", arg: "ADDR:PORT|off",
		usage: "status and profiles, loopback only: /status /debug/pprof/",
		set:   func(c *Config, v string) error { return listenAddr(&c.Admin.Admin, v, true) }},
	{name: "commit-timeout", value: "5s", arg: "TIME",
		usage: "how long a commit may take to be on disk before the client is told to retry",
		set: func(c *Config, v string) error {
			return duration(&c.Coordinator.CommitTimeout, v, time.Millisecond, time.Hour)
		}},
	{name: "fsync", value: "always", arg: "always|never",
		usage: "never: commits may be lost when the machine (not the process) crashes",
		set: func(c *Config, v string) error {
			c.Replicate.Fsync = v == "always"
			return oneOf(v, "always", "never")
		}},
	{name: "raft-timeout", value: "500ms", arg: "TIME",
		usage: "raft's election time-out",
		set: func(c *Config, v string) error {
			return duration(&c.Replicate.RaftTimeout, v, 20*time.Millisecond, time.Minute)
		}},
	{name: "max-frame", value: "100MiB", arg: "SIZE",
		usage: "largest request a client may send",
		set:   func(c *Config, v string) error { return size(&c.Proxy.MaxFrame, v, 1<<10, 1<<31-1) }},
	{name: "max-inflight", value: "64", arg: "N",
		usage: "requests a connection may have unanswered, at most 64",
		set:   func(c *Config, v string) error { return number(&c.Proxy.MaxInflight, v, 1, 64) }},
	{name: "max-connections", value: "4096", arg: "N",
		usage: "client connections at a time",
		set:   func(c *Config, v string) error { return number(&c.Proxy.MaxConnections, v, 1, 1<<20) }},
	{name: "upstream-timeout", value: "30s", arg: "TIME",
		usage: "how long a broker may leave a request unanswered, beyond the request's own wait",
		set: func(c *Config, v string) error {
			return duration(&c.Proxy.UpstreamTimeout, v, 100*time.Millisecond, time.Hour)
		}},
	{name: "group-initial-rebalance-delay", value: "3s", verbs: map[string]string{"dev": "0s"}, arg: "TIME",
		usage: "how long the first rebalance of a group waits for more members",
		set: func(c *Config, v string) error {
			return duration(&c.Coordinator.Group.InitialRebalanceDelay, v, 0, time.Hour)
		}},
	{name: "group-min-session-timeout", value: "6s", arg: "TIME",
		usage: "smallest session.timeout.ms a member may ask for",
		set: func(c *Config, v string) error {
			return duration(&c.Coordinator.Group.MinSessionTimeout, v, time.Millisecond, 24*time.Hour)
		}},
	{name: "group-max-session-timeout", value: "30m", arg: "TIME",
		usage: "largest session.timeout.ms a member may ask for",
		set: func(c *Config, v string) error {
			return duration(&c.Coordinator.Group.MaxSessionTimeout, v, time.Millisecond, 24*time.Hour)
		}},
	{name: "group-max-size", value: "2147483647", arg: "N",
		usage: "members a group may have",
		set:   func(c *Config, v string) error { return number(&c.Coordinator.Group.MaxSize, v, 1, math.MaxInt32) }},
	{name: "offset-metadata-max-bytes", value: "4096", arg: "N",
		usage: "largest metadata of a committed offset",
		set: func(c *Config, v string) error {
			return number(&c.Coordinator.Group.OffsetMetadataMaxSize, v, 0, 32767)
		}},
	{name: "offsets-retention", value: "7d", arg: "TIME",
		usage: "how long offsets of a group without members are kept",
		set: func(c *Config, v string) error {
			return duration(&c.Coordinator.Group.OffsetsRetention, v, time.Second, 100*365*24*time.Hour)
		}},
	{name: "max-drain", value: "25s", arg: "TIME",
		usage: "how long clients may stay after SIGTERM",
		set:   func(c *Config, v string) error { return duration(&c.MaxDrain, v, 0, 24*time.Hour) }},
	{name: "log-format", value: "auto", arg: "auto|json|text",
		usage: "auto: text on a terminal, else JSON",
		set:   func(c *Config, v string) error { c.Log.Format = v; return oneOf(v, "auto", "json", "text") }},
	{name: "log-level", value: "info", arg: "debug|info|warn|error",
		usage: "the least that is logged",
		set:   func(c *Config, v string) error { c.Log.Level = v; return oneOf(v, "debug", "info", "warn", "error") }},
}

// laterFlags are names of the design that this version does not have; what they belong to.
var laterFlags = map[string]string{
	"role": "anchors and clients among the sidecars", "upstream-offsets": "import and mirroring of offsets",
}

// laterNote explains a flag that is not there yet.
func laterNote(name string) string {
	if of, ok := laterFlags[name]; ok {
		return fmt.Sprintf("; %q belongs to %s, which this version does not have", name, of)
	}
	return ""
}

func oneOf(v string, allowed ...string) error {
	if !slices.Contains(allowed, v) {
		return fmt.Errorf("must be one of %s", strings.Join(allowed, ", "))
	}
	return nil
}

func number(to *int, v string, low, high int) (err error) {
	if *to, err = strconv.Atoi(v); err != nil {
		return fmt.Errorf("is not a whole number")
	}
	if *to < low || *to > high {
		return fmt.Errorf("must be between %d and %d", low, high)
	}
	return nil
}

// duration reads Go's form (1m30s) and days (7d).
func duration(to *time.Duration, v string, low, high time.Duration) (err error) {
	days, isDays := strings.CutSuffix(v, "d")
	if isDays {
		var n int
		if n, err = strconv.Atoi(days); err == nil && n >= 0 && n <= 36500 {
			*to = time.Duration(n) * 24 * time.Hour
		} else {
			err = strconv.ErrRange
		}
	} else {
		*to, err = time.ParseDuration(v)
	}
	if err != nil {
		return fmt.Errorf("is not a time such as 500ms, 5s, 30m or 7d")
	}
	if *to < low || *to > high {
		return fmt.Errorf("must be between %v and %v", low, high)
	}
	return nil
}

// size reads bytes, or KiB, MiB and GiB.
func size(to *int64, v string, low, high int64) error {
	digits, unit := v, int64(1)
	for suffix, u := range map[string]int64{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30} {
		if d, ok := strings.CutSuffix(v, suffix); ok {
			digits, unit = d, u
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > high {
		return fmt.Errorf("is not a size such as 1048576, 64KiB or 100MiB up to %d", high)
	}
	if *to = n * unit; *to < low || *to > high {
		return fmt.Errorf("must be between %d and %d bytes", low, high)
	}
	return nil
}

// hostPorts reads broker addresses, host:port, separated by commas.
func hostPorts(to *[]string, v string) error {
	*to = nil
	if v == "" {
		return nil
	}
	for _, addr := range strings.Split(v, ",") {
		addr = strings.TrimSpace(addr)
		if scheme, _, found := strings.Cut(addr, "://"); found {
			return fmt.Errorf("%q is a URL; write HOST:PORT, without %s://", addr, scheme)
		}
		h, p, err := net.SplitHostPort(addr)
		if err != nil {
			return fmt.Errorf("%q is not HOST:PORT (such as kafka:9092; an IPv6 address goes in brackets)", addr)
		}
		if port, err := strconv.Atoi(p); err != nil || port < 1 || port > 65535 {
			return fmt.Errorf("%q: the port must be a number from 1 to 65535", addr)
		}
		if net.ParseIP(h) == nil && !hostName.MatchString(h) {
			return fmt.Errorf("%q: %q is neither a host name nor an address", addr, h)
		}
		*to = append(*to, addr)
	}
	return nil
}

// joinAddrs is hostPorts with a default port.
func joinAddrs(to *[]string, v string) error {
	var all []string
	for _, addr := range strings.Split(v, ",") {
		addr = strings.TrimSpace(addr)
		bare := strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
		if ip := net.ParseIP(bare); ip != nil || addr != "" && !strings.Contains(addr, ":") {
			_, port, _ := net.SplitHostPort(defaultGossip)
			addr = net.JoinHostPort(bare, port)
		}
		all = append(all, addr)
	}
	return hostPorts(to, strings.Join(all, ","))
}

// place reads the name of a zone or machine. It is told in gossip, where all tags of a sidecar share 512 bytes.
func place(to *string, v string) error {
	if *to = v; len(v) > 63 || strings.ContainsFunc(v, unicode.IsControl) {
		return fmt.Errorf("must have at most 63 bytes, all of them to be read")
	}
	return nil
}

// listenAddr reads an address to bind: an IP address or localhost, and a port, 0 for any.
func listenAddr(to *string, v string, mayBeOff bool) error {
	*to = ""
	if v == "off" && mayBeOff {
		return nil
	}
	h, p, err := net.SplitHostPort(v)
	if err != nil {
		return fmt.Errorf("is not ADDR:PORT, such as 127.0.0.1:19092 or 127.0.0.1:0")
	}
	if port, err := strconv.Atoi(p); err != nil || port < 0 || port > 65535 {
		return fmt.Errorf("the port must be a number from 0 to 65535 (0 takes any free one)")
	}
	if h == "localhost" {
		h = "127.0.0.1" // a name may resolve to either family
	}
	if h != "" && net.ParseIP(h) == nil {
		return fmt.Errorf("%q is not an IP address of this machine; names are not resolved here", h)
	}
	*to = net.JoinHostPort(h, p)
	return nil
}

// host reads a name or address to tell clients. Kafka's strings hold up to 32,767 bytes; names are at most 253.
func host(to *string, v string) error {
	if v != "" && net.ParseIP(v) == nil && !hostName.MatchString(v) || utf8.RuneCountInString(v) > 253 {
		return fmt.Errorf("is neither a host name nor an address (no port here)")
	}
	*to = v
	return nil
}
