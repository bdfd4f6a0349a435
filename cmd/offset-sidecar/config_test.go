package main

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
)

// Addresses that validate takes: --listen without a host is on loopback, and its ports clash with no others there.
func TestListenOnLoopback(t *testing.T) {
	for _, listen := range []string{":0", ":19092", "127.0.0.2:19092", "[::1]:19092"} {
		code, _, stderr := call(t, nil, "config", "print", "--upstream", "127.0.0.3:19092", "--listen", listen, "--data-dir", t.TempDir())
		if code != 0 {
			t.Errorf("--listen %s: exit code %d, %s", listen, code, stderr)
		}
	}
}

// read gives the configuration of a sidecar with peers that has nothing wrong with it.
func read(t *testing.T, env map[string]string, values map[string]string) *Config {
	t.Helper()
	values["upstream"], values["cluster"] = "a:1", "c"
	c, err := loadConfig("run", []source{{
		from: func(s *setting) string { return "--" + s.name },
		get:  func(s *setting) (string, bool) { v, ok := values[s.name]; return v, ok },
	}})
	if err == nil {
		err = c.fillPeers(func(name string) (string, bool) { v, ok := env[name]; return v, ok })
	}
	if err == nil {
		err = c.validate(true)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSidecarsOnOneMachineNeedNoSecret(t *testing.T) {
	c := read(t, nil, map[string]string{"join": "localhost:1,127.0.0.1,[::1]:3,::1", "bootstrap-expect": "3", "gossip": "127.0.0.1:0"})
	if want := []string{"localhost:1", "127.0.0.1:7946", "[::1]:3", "[::1]:7946"}; !slices.Equal(c.Peers.Join, want) {
		t.Errorf("%v", c.Peers.Join)
	}
}

// In Kubernetes POD_IP is all it takes, but for the secret; without others to join a pod stays on loopback.
func TestPodIPIsBoundAndTold(t *testing.T) {
	env := map[string]string{"POD_IP": "192.0.2.7", "NODE_NAME": "node-1"}
	c := read(t, env, map[string]string{"join": "192.0.2.1", "join-token": "s"})
	if p := c.Peers; p.Gossip != "192.0.2.7:7946" || p.Peer != "192.0.2.7:7947" || p.Machine != "node-1" {
		t.Errorf("%+v", p)
	}
	c = read(t, env, map[string]string{"join": "192.0.2.1", "join-token": "s", "gossip": "0.0.0.0:1", "machine": "m"})
	cluster, err := c.clusterConfig()
	if err != nil || cluster.Gossip != "0.0.0.0:1" || cluster.Advertise != "192.0.2.7" || cluster.Machine != "m" || cluster.Name != "c" {
		t.Errorf("%+v %v", cluster, err)
	}
	if c = read(t, env, map[string]string{}); c.Peers.Gossip != defaultGossip {
		t.Errorf("alone at %s", c.Peers.Gossip)
	}
}

func TestSecretsAreReadAndNotShown(t *testing.T) {
	token, keys := write(t, "token", " very secret\n"), write(t, "keys", "AAAAAAAAAAAAAAAAAAAAAA==\n\nAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n")
	c := read(t, nil, map[string]string{"gossip": "0.0.0.0:1", "peer": "0.0.0.0:2", "advertise": "192.0.2.9", "join-token-file": token, "gossip-key-file": keys})
	cluster, err := c.clusterConfig()
	if err != nil || cluster.Security.Token != "very secret" || len(cluster.Security.Keyring) != 2 || len(cluster.Security.Keyring[1]) != 32 {
		t.Errorf("%+v %v", cluster, err)
	}
	c = read(t, nil, map[string]string{"join-token": "hush"})
	var out strings.Builder
	c.print("run", func(format string, args ...any) { out.WriteString(format); out.WriteString(args[0].(string)) })
	if strings.Contains(out.String(), "hush") || c.shown()["join-token"].value == "hush" || c.Peers.Token != "hush" {
		t.Errorf("%s %+v", out.String(), c.shown()["join-token"])
	}
}

func TestBehindAWildcardTheOnlyAddressIsTold(t *testing.T) {
	nets := func(addrs ...string) func() ([]net.Addr, error) {
		return func() (all []net.Addr, err error) {
			for _, a := range addrs {
				all = append(all, &net.IPNet{IP: net.ParseIP(a)})
			}
			return all, nil
		}
	}
	for _, c := range []struct {
		config PeersConfig
		has    func() ([]net.Addr, error)
		want   string
		err    string
	}{
		{PeersConfig{Gossip: "192.0.2.1:1"}, nets("192.0.2.1", "192.0.2.2"), "", ""},
		{PeersConfig{Gossip: "0.0.0.0:1"}, nets("127.0.0.1", "192.0.2.1", "fe80::1", "2001:db8::1"), "192.0.2.1", ""},
		{PeersConfig{Gossip: "0.0.0.0:1"}, nets("127.0.0.1"), "127.0.0.1", ""},
		{PeersConfig{Gossip: "0.0.0.0:1"}, nets("192.0.2.1", "192.0.2.2"), "", "--advertise"},
		{PeersConfig{Gossip: "0.0.0.0:1"}, func() ([]net.Addr, error) { return nil, errors.New("none") }, "", "--gossip"},
		{PeersConfig{Gossip: "0.0.0.0:1", Advertise: "192.0.2.3"}, nets(), "192.0.2.3", ""},
		{PeersConfig{Gossip: "127.0.0.1:1", Advertise: "localhost"}, nets(), "127.0.0.1", ""},
		{PeersConfig{Gossip: "127.0.0.1:1", Advertise: "nowhere.invalid"}, nets(), "", "--advertise nowhere.invalid"},
	} {
		got, err := c.config.advertised(c.has)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%+v: %q %v", c.config, got, err)
		}
	}
}
