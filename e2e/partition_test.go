//go:build e2e

package e2e

import (
	"slices"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// islands starts three sidecars, each in a network of its own, where they can be cut off from each other but not from
// their clients. No Kafka is in reach: groups and offsets do without.
func islands(t *testing.T) (*lab.Cluster, *lab.Network) {
	t.Helper()
	w, err := lab.NewNetwork(3)
	check(t, err)
	t.Cleanup(w.Remove)
	c := newCluster(t, "127.0.0.1:1", 3, "--join-token", "islands")
	for i, s := range c.Sidecars {
		s.Net, s.Host = w.Nets[i], w.Nets[i].Host
		check(t, s.Move())
	}
	c.Introduce()
	check(t, c.Up(3))
	return c, w
}

// silent checks that a sidecar gives no offset: what it knows may be old.
func silent(t *testing.T, s *lab.Sidecar, group, topic string) {
	t.Helper()
	r := dialRaw(t, s.Addr())
	defer func() { _ = r.Close() }()
	sent := time.Now()
	if offset, err := r.committed(group, topic); err == nil {
		t.Errorf("a sidecar that is cut off from the others gave offset %d after %s", offset, time.Since(sent))
	}
}

// cut is one way to part sidecars.
type cut struct {
	name string
	// part cuts, and says which sidecar is cut off: nil, if each still has a way to another, or one may have two leaders.
	part       func(leader *lab.Sidecar) (off *lab.Sidecar, err error)
	staysAlone bool // the leader stays what it is
	short      bool // tried in CI, too
}

func cuts(c *lab.Cluster, w *lab.Network) []cut {
	first := func(s *lab.Sidecar) *lab.Sidecar { return others(c, s)[0] }
	return []cut{
		{"the active one", func(l *lab.Sidecar) (*lab.Sidecar, error) { return l, w.Cut(l.Net) }, false, true},
		{"a follower", func(l *lab.Sidecar) (*lab.Sidecar, error) { return first(l), w.Cut(first(l).Net) }, true, true},
		{"the active one is not heard", func(l *lab.Sidecar) (*lab.Sidecar, error) {
			for _, s := range others(c, l) {
				if err := w.Drop(l.Net, s.Net); err != nil {
					return nil, err
				}
			}
			return l, nil
		}, false, true},
		{"the active one does not hear", func(l *lab.Sidecar) (*lab.Sidecar, error) {
			for _, s := range others(c, l) {
				if err := w.Drop(s.Net, l.Net); err != nil {
					return nil, err
				}
			}
			return l, nil
		}, false, false},
		{"a follower is not heard", func(l *lab.Sidecar) (*lab.Sidecar, error) {
			for _, s := range others(c, first(l)) {
				if err := w.Drop(first(l).Net, s.Net); err != nil {
					return nil, err
				}
			}
			return first(l), nil
		}, true, false},
		{"the active one and a follower from each other", func(l *lab.Sidecar) (*lab.Sidecar, error) {
			if err := w.Drop(l.Net, first(l).Net); err != nil {
				return nil, err
			}
			return nil, w.Drop(first(l).Net, l.Net)
		}, false, true},
	}
}

// TestPartitions: whoever is cut off, in both directions or in one, the majority goes on, the minority answers no reads,
// and afterwards they are one again.
func TestPartitions(t *testing.T) {
	c, w := islands(t)
	const topic = "partitions"
	all := pulses(t, topic, c.Sidecars...)
	h, nextKeys, stop := historians(t, topic, 1, c.Sidecars...)
	for _, cut := range cuts(c, w) {
		if !long && !cut.short {
			continue
		}
		t.Run(cut.name, func(t *testing.T) {
			check(t, c.Settled(60*time.Second, 3))
			leader := active(t, c)
			rested(t, all...)
			off, err := cut.part(leader)
			check(t, err)
			left := slices.DeleteFunc(slices.Clone(all), func(p *pulse) bool { return p.at == off })
			if off == nil { // either of the two may be the one that finds no way
				left = slices.DeleteFunc(left, func(p *pulse) bool { return p.at == leader || p.at == others(c, leader)[0] })
			}
			pause := undisturbed(t, 30*time.Second, left...)
			t.Logf("the slowest commit at the others took %s", pause)
			if off != nil {
				silent(t, off, all[0].group, topic)
			}
			h.more(t, 50, 30*time.Second)
			check(t, w.Heal())
			for _, p := range all {
				p.beats(t, 30*time.Second)
			}
			check(t, c.Settled(60*time.Second, 3))
			if now := active(t, c); cut.staysAlone && now != leader {
				t.Error("a follower that was cut off made another sidecar active when it came back")
			}
			nextKeys()
		})
	}
	stop()
	h.check(t)
	kept(t, c, all...)
}
