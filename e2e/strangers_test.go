//go:build e2e

package e2e

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// secrets makes a cluster that keeps strangers out, with what the sidecar needs on its command line.
func secrets(t *testing.T, token string) []string {
	t.Helper()
	keys := filepath.Join(dir(t, "keys"), "gossip")
	check(t, os.WriteFile(keys, []byte(base64.StdEncoding.EncodeToString([]byte((token + strings.Repeat("-", 32))[:32]))), 0o600))
	return []string{"--gossip-key-file", keys, "--join-token", token}
}

// told gives the answer of a port to somebody who is no sidecar: it should be none.
func told(network, addr string, words []byte) (answer []byte, err error) {
	c, err := net.DialTimeout(network, addr, 2*time.Second)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(300 * time.Millisecond))
	if _, err := c.Write(words); err != nil {
		return nil, nil // it was closed: no answer either
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.CloseWrite()
	}
	answer, _ = io.ReadAll(io.LimitReader(c, 1<<16))
	return answer, nil
}

// TestStrangersGetNothing: whoever is no sidecar of this cluster, on the gossip and on the peer port, is told nothing, is
// counted, and changes nothing.
func TestStrangersGetNothing(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3, secrets(t, "right")...)
	name := topic(t, k, "strangers", 1)
	all := pulses(t, name, c.Sidecars...)
	leader := active(t, c)
	before, err := leader.Members()
	check(t, err)

	noise := make([]byte, 4096)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	for what, words := range map[string][]byte{
		"noise": noise, "HTTP": []byte("GET / HTTP/1.1\r\nHost: sidecar\r\n\r\n"), "nothing": {}, "zeroes": make([]byte, 64),
		"TLS":             {0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03},
		"a cut hello":     []byte("OSP1\x01\x01\x00"),
		"a hello's magic": append([]byte("OSP1"), noise...),
	} {
		for _, s := range c.Sidecars {
			if answer, err := told("tcp", s.Peer, words); err != nil || strings.Contains(string(answer), before.ClusterID) || len(answer) > 128 {
				t.Errorf("%s on the peer port: answered with %q (%v)", what, answer, err)
			}
			// memberlist answers what it does not understand with one encrypted message at most.
			if answer, err := told("tcp", s.Gossip, words); err != nil || strings.Contains(string(answer), before.ClusterID) || strings.Contains(string(answer), s.Peer) {
				t.Errorf("%s on the gossip port: answered with %q (%v)", what, answer, err)
			}
			if answer, err := told("udp", s.Gossip, words); err != nil || len(answer) > 0 {
				t.Errorf("%s in a gossip packet: answered with %q (%v)", what, answer, err)
			}
		}
	}
	counted, err := leader.Metric("offset_sidecar_peers_refused_total")
	check(t, err)
	if counted < 5 {
		t.Errorf("%v strangers were counted on the peer port", counted)
	}

	impostors(t, k, c, before, all[0].group, name)
	after, err := leader.Members()
	check(t, err)
	if fmt.Sprint(voterIDs(after)) != fmt.Sprint(voterIDs(before)) {
		t.Errorf("voters before: %v\nafter: %v", voterIDs(before), voterIDs(after))
	}
	if now := active(t, c); now != leader {
		t.Error("strangers made another sidecar active")
	}
	undisturbed(t, 10*time.Second, all...)
	kept(t, c, all...)
}

// impostors are sidecars that lack a secret, or are of another cluster: they find each other's ports, and stay alone.
func impostors(t *testing.T, k *lab.Kafka, c *lab.Cluster, before lab.Members, group, topic string) {
	t.Helper()
	t.Run("impostors", func(t *testing.T) {
		for what, args := range map[string][]string{
			"another cluster":    append([]string{"--cluster", "another"}, secrets(t, "right")...),
			"another gossip key": append([]string{"--cluster", c.Name}, secrets(t, "wrong")...),
			"another token":      {"--cluster", c.Name, "--gossip-key-file", keyFile(c), "--join-token", "wrong"},
			"no token":           {"--cluster", c.Name, "--gossip-key-file", keyFile(c)},
			"no secret at all":   {"--cluster", c.Name},
		} {
			t.Run(what, func(t *testing.T) {
				t.Parallel()
				s := newSidecar(t, k.Addrs(), args...)
				s.Join = c.Sidecars[0].Gossip
				check(t, s.Up())
				deadline := time.Now().Add(5 * time.Second) // it tries again and again all the time
				for time.Now().Before(deadline) {
					if offset, err := dialRaw(t, s.Addr()).committed(group, topic); err == nil && offset >= 0 {
						t.Fatalf("it was told offset %d", offset)
					}
					m, err := s.Members()
					check(t, err)
					if m.ClusterID == before.ClusterID {
						t.Fatalf("it is in the cluster: %s", m.Summary)
					}
				}
			})
		}
	})
}

func keyFile(c *lab.Cluster) string {
	for i, arg := range c.Sidecars[0].Args {
		if arg == "--gossip-key-file" {
			return c.Sidecars[0].Args[i+1]
		}
	}
	return ""
}

// voterIDs are the voters that are there.
func voterIDs(m lab.Members) (all []string) {
	for _, o := range m.Members {
		if o.State == "alive" && o.Role == "voter" {
			all = append(all, o.ID)
		}
	}
	return all
}

// TestCertificates: with mutual TLS on the peer port, certificates may be replaced while the sidecars run; one that
// another authority has signed gets nowhere.
func TestCertificates(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := newCluster(t, k.Addrs(), 3)
	authority, folder := newAuthority(t), dir(t, "certificates")
	for i, s := range c.Sidecars {
		s.Args = append(s.Args, authority.write(t, folder, fmt.Sprint("sidecar-", i), "node."+c.Name)...)
	}
	check(t, c.Up(3))
	name := topic(t, k, "certificates", 1)
	eventuallyCommits(t, c.Sidecars[0], "certificates", name, 1)
	finds(t, c, "certificates", name, 1)

	stranger := newSidecar(t, k.Addrs(), append([]string{"--cluster", c.Name}, newAuthority(t).write(t, folder, "stranger", "node."+c.Name)...)...)
	stranger.Join = c.Sidecars[0].Gossip
	check(t, stranger.Up())
	leader := active(t, c)
	check(t, lab.Eventually(30*time.Second, func() error {
		counted, err := leader.Metric("offset_sidecar_peers_refused_total")
		if err == nil && counted == 0 {
			err = errors.New("no stranger was counted")
		}
		return err
	}))
	if offset, err := dialRaw(t, stranger.Addr()).committed("certificates", name); err == nil {
		t.Errorf("a sidecar with another authority's certificate was told offset %d", offset)
	}
	stranger.Kill()

	// Each gets a certificate of a new authority, which the others trust already, while it runs.
	next := newAuthority(t)
	for i := range c.Sidecars {
		authority.trust(t, folder, fmt.Sprint("sidecar-", i), next)
	}
	for i := range c.Sidecars {
		next.write(t, folder, fmt.Sprint("sidecar-", i), "node."+c.Name)
		next.trust(t, folder, fmt.Sprint("sidecar-", i), authority)
	}
	active(t, c).Kill() // all connections to it are made anew
	eventuallyCommits(t, others(c, nil)[0], "certificates", name, 2)
	finds(t, c, "certificates", name, 2)
}
