//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// sidecars starts a cluster with so many voters in front of Kafka, and ends it with the test, whose failure shows the logs.
func sidecars(t *testing.T, k *lab.Kafka, n, voters int, args ...string) *lab.Cluster {
	t.Helper()
	c := newCluster(t, k.Addrs(), n, args...)
	check(t, c.Up(voters))
	for _, s := range c.Sidecars {
		check(t, lab.Eventually(10*time.Second, func() error { // it is ready before it has asked its upstream
			_, err := askMetadata(s.Addr(), "")
			return err
		}))
	}
	return c
}

// newCluster is sidecars without starting them.
func newCluster(t *testing.T, upstream string, n int, args ...string) *lab.Cluster {
	t.Helper()
	c, err := lab.NewCluster("c-"+fmt.Sprint(time.Now().UnixNano()), upstream, n, n,
		append([]string{"--group-initial-rebalance-delay", "0s", "--max-drain", "2s"}, args...)...)
	check(t, err)
	t.Cleanup(func() {
		for i, s := range c.Sidecars {
			if t.Failed() && s.Process != nil && s.Alive() {
				m, err := s.Members()
				t.Logf("sidecar %d sees: %+v %v", i, m, err)
			}
		}
		c.Kill()
		for i, s := range c.Sidecars {
			if t.Failed() && s.Process != nil {
				t.Logf("last lines of sidecar %d (gossip %s):\n%s", i, s.Gossip, s.Tail(150))
			}
		}
	})
	return c
}

// active is the sidecar that is active; there must be one soon.
func active(t *testing.T, c *lab.Cluster) *lab.Sidecar {
	t.Helper()
	var s *lab.Sidecar
	check(t, lab.Eventually(20*time.Second, func() (err error) { s, err = c.Active(); return err }))
	return s
}

// others are those that run, but for one.
func others(c *lab.Cluster, but *lab.Sidecar) (all []*lab.Sidecar) {
	for _, s := range c.Sidecars {
		if s != but && s.Process != nil && s.Alive() {
			all = append(all, s)
		}
	}
	return all
}

// pulse is a client that commits ever higher offsets to a group of its own, one after another.
type pulse struct {
	at           *lab.Sidecar
	group, topic string
	stop         chan struct{}
	ended        chan struct{}

	mu          sync.Mutex
	sent, acked int64
	ackedAt     time.Time
	slowest     time.Duration // of the commits since it was last taken
	slow        []string      // errors since then: what a client does not forgive
	cut         []string      // connections that broke
}

// pulses lets a client commit at each of some sidecars until the test ends or halt is called.
func pulses(t *testing.T, topic string, at ...*lab.Sidecar) []*pulse {
	t.Helper()
	var all []*pulse
	for i, s := range at {
		p := &pulse{at: s, group: fmt.Sprintf("pulse-%s-%d", t.Name(), i), topic: topic, stop: make(chan struct{}), ended: make(chan struct{})}
		all = append(all, p)
		go p.run()
		t.Cleanup(p.halt)
	}
	rested(t, all...) // what it took to begin is no matter
	return all
}

func (p *pulse) halt() {
	select {
	case <-p.stop:
	default:
		close(p.stop)
	}
	<-p.ended
}

func (p *pulse) run() {
	defer close(p.ended)
	for {
		select {
		case <-p.stop:
			return
		default:
		}
		c, err := net.DialTimeout("tcp", p.at.Addr(), time.Second)
		if err != nil {
			time.Sleep(10 * time.Millisecond) // its sidecar is gone for a while
			continue
		}
		p.converse(&raw{Conn: c})
		_ = c.Close()
	}
}

func (p *pulse) converse(r *raw) {
	for {
		select {
		case <-p.stop:
			return
		default:
		}
		p.mu.Lock()
		p.sent++
		offset := p.sent
		p.mu.Unlock()
		sent := time.Now()
		err := r.simpleCommit(p.group, p.topic, offset)
		p.mu.Lock()
		switch {
		case isNetwork(err):
			p.cut = append(p.cut, err.Error())
			p.mu.Unlock()
			return
		case err != nil:
			p.slow = append(p.slow, err.Error())
		default:
			p.acked, p.ackedAt = offset, time.Now()
			p.slowest = max(p.slowest, time.Since(sent))
		}
		p.mu.Unlock()
		time.Sleep(time.Millisecond) // a client does something else, too; the machine is shared
	}
}

// beats waits for a commit that is sent from now on.
func (p *pulse) beats(t *testing.T, within time.Duration) {
	t.Helper()
	p.mu.Lock()
	from := p.sent
	p.mu.Unlock()
	check(t, lab.Eventually(within, func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.acked <= from {
			return fmt.Errorf("%s: no commit since %s (errors: %v, broken connections: %v)", p.group, p.ackedAt.Format(time.TimeOnly), p.slow, p.cut)
		}
		return nil
	}))
}

// taken gives the slowest commit since it was last called, and the errors.
func (p *pulse) taken() (slowest time.Duration, errors, cut []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	slowest, errors, cut = p.slowest, p.slow, p.cut
	p.slowest, p.slow, p.cut = 0, nil, nil
	return slowest, errors, cut
}

// rested waits until each has committed anew, and forgets what was before.
func rested(t *testing.T, all ...*pulse) {
	t.Helper()
	for _, p := range all {
		p.beats(t, 20*time.Second)
		p.taken()
	}
}

// undisturbed waits until each has committed anew, checks that none saw an error or lost its connection, and gives the
// slowest commit: the pause.
func undisturbed(t *testing.T, within time.Duration, all ...*pulse) (pause time.Duration) {
	t.Helper()
	for _, p := range all {
		p.beats(t, within)
	}
	for _, p := range all {
		slowest, errors, cut := p.taken()
		if len(errors)+len(cut) > 0 {
			t.Errorf("%s was told %v, and its connection broke: %v", p.group, errors, cut)
		}
		pause = max(pause, slowest)
	}
	return pause
}

// kept checks at each of the sidecars that run that what was acknowledged is there. Nothing may be on its way.
func kept(t *testing.T, c *lab.Cluster, all ...*pulse) {
	t.Helper()
	for _, p := range all {
		p.halt()
		for i, s := range others(c, nil) {
			have, err := dialRaw(t, s.Addr()).committed(p.group, p.topic)
			check(t, err)
			if have < p.acked || have > p.sent {
				t.Errorf("%s: sidecar %d has offset %d; %d was acknowledged, %d sent", p.group, i, have, p.acked, p.sent)
			}
		}
	}
}

// figure shows what was measured beside its goal. It fails only beyond a bound that a machine with too much to do keeps.
func figure(t *testing.T, what string, times []time.Duration, goalP50, goalWorst, bound time.Duration) {
	t.Helper()
	sorted := slices.Sorted(slices.Values(times))
	p50, worst := sorted[len(sorted)/2], sorted[len(sorted)-1]
	t.Logf("%s: p50 %s (goal %s), worst of %d %s (goal %s)", what, p50.Round(100*time.Microsecond), goalP50, len(sorted), worst.Round(100*time.Microsecond), goalWorst)
	if worst > bound {
		t.Errorf("%s took %s", what, worst)
	}
}
