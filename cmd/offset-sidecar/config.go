package main

import (
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/proxy"
	"gopkg.in/yaml.v3"
)

// Config is everything that can be set, a struct for each room. There are no hidden defaults: each value comes from the
// table in settings.go, the file, the environment or a flag, in rising order.
type Config struct {
	Cluster  string        // names this sidecar's data
	DataDir  string        // "" = in memory, which only dev allows
	MaxDrain time.Duration // how long clients may stay after SIGTERM

	Log struct {
		Format string // auto, json or text
		Level  string // debug, info, warn or error
	}
	Upstream struct {
		Seeds []string // host:port
	}
	Proxy struct {
		Listen          string
		AdvertiseHost   string // "" = 127.0.0.1
		MaxFrame        int64
		MaxInflight     int
		MaxConnections  int
		UpstreamTimeout time.Duration
	}
	Coordinator coordinator.Config
	Replicate   struct {
		Fsync       bool
		RaftTimeout time.Duration
	}
	Peers PeersConfig
	Admin struct {
		HTTP  string // "" = off
		Admin string // "" = off
	}

	origins map[string]origin // by setting
}

// origin says where a setting's value came from, and the value as it was written there.
type origin struct {
	value string
	from  string // "--listen", "OFFSET_SIDECAR_LISTEN", "sidecar.yaml" or "default"
}

// source looks one setting up; ok is false if it has no value for it.
type source struct {
	from func(s *setting) string
	get  func(s *setting) (value string, ok bool)
}

// loadConfig fills a Config from the sources, the strongest first, and the defaults of the verb.
func loadConfig(verb string, sources []source) (*Config, error) {
	c := &Config{origins: map[string]origin{}}
	c.Coordinator.Group = group.DefaultConfig() // and in it what has no flag
	for i := range settings {
		s := &settings[i]
		if !s.in(verb) {
			continue
		}
		o := origin{s.defaultFor(verb), "default"}
		for _, src := range sources {
			if v, ok := src.get(s); ok {
				o = origin{v, src.from(s)}
				break
			}
		}
		if err := s.set(c, o.value); err != nil {
			return nil, fmt.Errorf("%s %q: %w", s.named(o), o.value, err)
		}
		c.origins[s.name] = o
	}
	return c, nil
}

// named gives a setting as the user wrote it, so that an error points at the place to mend.
func (s *setting) named(o origin) string {
	switch o.from {
	case "--" + s.name, "default":
		return "--" + s.name
	case s.env():
		return "--" + s.name + " (from the environment, " + s.env() + ")"
	}
	return "--" + s.name + " (from " + o.from + ")"
}

// fileSource reads a YAML file whose keys are the flags' names. A key that is no setting is refused.
func fileSource(path, verb string) (source, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return source{}, fmt.Errorf("--config: %w", err)
	}
	var keys map[string]yaml.Node
	if err := yaml.Unmarshal(content, &keys); err != nil {
		return source{}, fmt.Errorf("--config %s: %s", path, strings.Join(strings.Fields(err.Error()), " ")) // yaml's are of several lines
	}
	values := map[string]string{}
	for key, node := range keys {
		i := slices.IndexFunc(settings, func(s setting) bool { return s.name == key && s.in(verb) })
		if i < 0 {
			return source{}, fmt.Errorf("--config %s: line %d: unknown key %q; the keys are the names of the flags, see 'offset-sidecar config print'%s",
				path, node.Line, key, laterNote(key))
		}
		v, err := scalar(&node, settings[i].list)
		if err != nil {
			return source{}, fmt.Errorf("--config %s: line %d: %q: %w", path, node.Line, key, err)
		}
		values[key] = v
	}
	return source{
		from: func(*setting) string { return path },
		get:  func(s *setting) (string, bool) { v, ok := values[s.name]; return v, ok },
	}, nil
}

// scalar gives a YAML value as it would be written on the command line.
func scalar(node *yaml.Node, list bool) (string, error) {
	switch {
	case node.Kind == yaml.ScalarNode && node.Tag == "!!null":
		return "", fmt.Errorf("has no value; leave the key out to get the default")
	case node.Kind == yaml.ScalarNode:
		return node.Value, nil
	case node.Kind == yaml.SequenceNode && list:
		var all []string
		for _, item := range node.Content {
			v, err := scalar(item, false)
			if err != nil {
				return "", err
			}
			all = append(all, v)
		}
		return strings.Join(all, ","), nil
	}
	return "", fmt.Errorf("is not a single value")
}

// envSource reads OFFSET_SIDECAR_* variables. Names that are no setting are left alone: Kubernetes makes such variables
// for a Service called offset-sidecar.
func envSource(lookup func(string) (string, bool)) source {
	return source{
		from: func(s *setting) string { return s.env() },
		get:  func(s *setting) (string, bool) { v, ok := lookup(s.env()); return v, ok && v != "" },
	}
}

// print writes the configuration as YAML that --config would take, with the origin of each value.
func (c *Config) print(verb string, write func(format string, args ...any)) {
	for i := range settings {
		s := &settings[i]
		if !s.in(verb) {
			continue
		}
		o := c.origins[s.name]
		value := o.value
		if _, err := strconv.Atoi(value); err != nil { // a number needs no quotes
			if quoted, err := yaml.Marshal(value); err == nil {
				value = strings.TrimSpace(string(quoted))
			}
		}
		note, line := "", s.name+": "+value
		if s.secret && o.value != "" {
			line, note = "# "+s.name+":", ": not shown"
		} else if o.value == "" {
			line = "# " + s.name + ":"
			meaning := s.empty[verb]
			if s.name == "data-dir" && c.DataDir != "" {
				meaning = c.DataDir
			}
			if meaning != "" {
				note = ": " + meaning
			}
		}
		write("%-44s # %s%s\n", line, o.from, note)
	}
}

// shown gives where each setting comes from, without the secrets.
func (c *Config) shown() map[string]origin {
	all := maps.Clone(c.origins)
	for i := range settings {
		if o := all[settings[i].name]; settings[i].secret && o.value != "" {
			all[settings[i].name] = origin{"(not shown)", o.from}
		}
	}
	return all
}

// Shapes of names.
var (
	clusterName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)
	hostName    = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9._-]{0,251}[a-zA-Z0-9])?\.?$`)
)

// validate checks what single values cannot tell. upstreamNeeded is false for a verb that brings its own.
func (c *Config) validate(upstreamNeeded bool) error {
	if upstreamNeeded && len(c.Upstream.Seeds) == 0 {
		return fmt.Errorf("--upstream is missing: name brokers of your Kafka, as in --upstream kafka:9092 (or set OFFSET_SIDECAR_UPSTREAM, " +
			"or \"upstream\" in the file of --config); without a Kafka at hand, try 'offset-sidecar dev'")
	}
	if _, _, _, err := proxy.ReadListen(c.Proxy.Listen, c.Proxy.AdvertiseHost); err != nil {
		return err
	}
	if host, _, _ := net.SplitHostPort(c.Admin.Admin); c.Admin.Admin != "" && !loopback(host) {
		return fmt.Errorf("--admin %s: the admin pages are for loopback addresses only (health and metrics may be elsewhere: --http)", c.Admin.Admin)
	}
	if err := c.validatePeers(); err != nil {
		return err
	}
	if g := c.Coordinator.Group; g.MinSessionTimeout > g.MaxSessionTimeout {
		return fmt.Errorf("--group-min-session-timeout %v is above --group-max-session-timeout %v", g.MinSessionTimeout, g.MaxSessionTimeout)
	}
	return c.validatePorts()
}

// validatePorts finds two of our own listeners on one port, and an upstream that is one of them.
func (c *Config) validatePorts() error {
	listen := c.Proxy.Listen
	if host, port, _, err := proxy.ReadListen(listen, c.Proxy.AdvertiseHost); err == nil {
		listen = net.JoinHostPort(host, strconv.Itoa(port)) // without a host it is not on all addresses, as the others are
	}
	listeners := []struct{ flag, addr string }{{"--listen", listen}, {"--http", c.Admin.HTTP}, {"--admin", c.Admin.Admin},
		{"--gossip", c.Peers.Gossip}, {"--peer", c.Peers.Peer}}
	for i, a := range listeners {
		for _, b := range listeners[i+1:] {
			if a.addr != "" && b.addr != "" && sameListener(a.addr, b.addr) {
				return fmt.Errorf("%s %s and %s %s are the same port: give one of them another (0 takes any free one)", a.flag, a.addr, b.flag, b.addr)
			}
		}
	}
	for _, seed := range c.Upstream.Seeds {
		if host, _, _ := net.SplitHostPort(seed); loopback(host) && sameListener(seed, listen) {
			return selfLoop(seed, c.Proxy.Listen)
		}
	}
	return nil
}

func selfLoop(seed, listen string) error {
	return fmt.Errorf("--upstream %s leads back to this sidecar, which listens on %s: --upstream must name the Kafka brokers themselves "+
		"(if Kafka is on this machine at that port, move the sidecar with --listen)", seed, listen)
}

// sameListener says whether two addresses cannot both be bound, or the one reaches the other, on this machine.
func sameListener(a, b string) bool {
	hostA, portA, _ := net.SplitHostPort(a)
	hostB, portB, _ := net.SplitHostPort(b)
	return portA == portB && portA != "0" && (plain(hostA) == plain(hostB) || wildcard(hostA) || wildcard(hostB))
}

// plain gives one name to the loopback addresses that --listen binds together.
func plain(host string) string {
	if strings.EqualFold(host, "localhost") || host == "::1" {
		return "127.0.0.1"
	}
	return host
}

func wildcard(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return strings.EqualFold(host, "localhost") || ip != nil && ip.IsLoopback()
}

// defaultDataDir is where the data of a cluster is kept when --data-dir is not given.
func defaultDataDir(cluster string, lookup func(string) (string, bool), root bool) (string, error) {
	if root {
		return filepath.Join("/var/lib/offset-sidecar", cluster), nil
	}
	if dir, ok := lookup("XDG_STATE_HOME"); ok && filepath.IsAbs(dir) { // relative ones are to be ignored, says the XDG specification
		return filepath.Join(dir, "offset-sidecar", cluster), nil
	}
	if home, ok := lookup("HOME"); ok && filepath.IsAbs(home) {
		return filepath.Join(home, ".local", "state", "offset-sidecar", cluster), nil
	}
	return "", fmt.Errorf("--data-dir is missing, and there is no home directory for a default: name a directory that survives restarts")
}
