package lab

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

// Cluster is several sidecars that are one coordinator.
type Cluster struct {
	Name     string
	Sidecars []*Sidecar
}

// Members is what the sidecar's page /members says, as far as it is of use here.
type Members struct {
	Summary   string   `json:"summary"`
	ClusterID string   `json:"cluster_id"`
	Term      uint64   `json:"term"`
	Members   []Member `json:"members"`
}

// Member is one line of it.
type Member struct {
	ID     string `json:"id"`
	Self   bool   `json:"self"`
	State  string `json:"state"`
	Role   string `json:"role"`
	Active bool   `json:"active"`
	Lag    *int64 `json:"lag"`
	InSync *bool  `json:"in_sync"`
	Zone   string `json:"zone"`
}

// NewCluster prepares sidecars that know each other's gossip addresses; the first expect of them may found the cluster.
// Further arguments are given to all.
func NewCluster(name, upstream string, n, expect int, args ...string) (*Cluster, error) {
	c := &Cluster{Name: name}
	for range n {
		dir, err := TempDir("data")
		if err != nil {
			return nil, err
		}
		c.Sidecars = append(c.Sidecars, &Sidecar{Upstream: upstream, Dir: dir})
	}
	for _, s := range c.Sidecars {
		if err := s.Move(); err != nil {
			return nil, err
		}
	}
	for i, s := range c.Sidecars {
		s.Args = append(s.Args, "--cluster", name, "--machine", fmt.Sprint("machine-", i))
		if expect > 0 {
			s.Args = append(s.Args, "--bootstrap-expect", fmt.Sprint(expect))
		}
		s.Args = append(s.Args, args...)
	}
	c.Introduce()
	return c, nil
}

// Move gives a sidecar other ports for gossip and peers, from its next start on.
func (s *Sidecar) Move() error {
	port, err := Ports(2)
	if err != nil {
		return err
	}
	host := cmp.Or(s.Host, "127.0.0.1")
	s.Gossip, s.Peer = fmt.Sprintf("%s:%d", host, port), fmt.Sprintf("%s:%d", host, port+1)
	return nil
}

// Wipe empties a sidecar's data directory: at its next start it is a new one.
func (s *Sidecar) Wipe() error {
	if err := os.RemoveAll(s.Dir); err != nil {
		return err
	}
	return os.MkdirAll(s.Dir, 0o755)
}

// Introduce tells all of them where the others are, from their next start on.
func (c *Cluster) Introduce() {
	var all []string
	for _, s := range c.Sidecars {
		all = append(all, s.Gossip)
	}
	for _, s := range c.Sidecars {
		s.Join = strings.Join(all, ",")
	}
}

// Up starts all and waits until they are one cluster with so many voters.
func (c *Cluster) Up(voters int) error {
	for _, s := range c.Sidecars {
		if err := s.Start(); err != nil {
			return err
		}
	}
	for _, s := range c.Sidecars {
		if err := s.Ready(30 * time.Second); err != nil {
			return err
		}
	}
	return c.Settled(60*time.Second, voters)
}

// Kill ends all that run.
func (c *Cluster) Kill() {
	for _, s := range c.Sidecars {
		if s.Process != nil && s.Alive() {
			_ = s.Signal(syscall.SIGCONT) // one that is stopped
			s.Kill()
		}
	}
}

// Active is the sidecar whose coordinator answers; an error if there is none, or more than one says so.
func (c *Cluster) Active() (*Sidecar, error) {
	var active *Sidecar
	var failed error
	for i, s := range c.Sidecars {
		if s.Process == nil || !s.Alive() {
			continue
		}
		value, err := s.Metric("offset_sidecar_active")
		switch {
		case err != nil: // it may be stopped, or not ready yet
			failed = errors.Join(failed, fmt.Errorf("sidecar %d: %w", i, err))
		case value == 1 && active != nil:
			return nil, errors.New("two sidecars are active")
		case value == 1:
			active = s
		}
	}
	if active == nil {
		return nil, errors.Join(errors.New("no sidecar is active"), failed)
	}
	return active, nil
}

// Members asks for the cluster as this sidecar sees it.
func (s *Sidecar) Members() (m Members, err error) {
	return m, s.page("/members", &m)
}

// Settled waits until one of the sidecars that run is active, and all of them know it; so many voters run, and none of
// them lacks much. One that was killed several times may be kept out of the in-sync set for longer.
func (c *Cluster) Settled(within time.Duration, voters int) error {
	return Eventually(within, func() error {
		active, err := c.Active()
		if err != nil {
			return err
		}
		seen, err := active.Members()
		if err != nil {
			return err
		}
		id, have := "", 0
		for _, m := range seen.Members {
			if m.Self {
				id = m.ID
			}
			if m.Role == "voter" && m.State == "alive" {
				have++
			}
			if m.State == "alive" && m.Role == "voter" && !m.Self && (m.Lag == nil || *m.Lag > 100) {
				return fmt.Errorf("%s has not caught up: %s", m.ID, seen.Summary)
			}
		}
		if have != voters {
			return fmt.Errorf("%d voters run, not %d: %s", have, voters, seen.Summary)
		}
		for i, s := range c.Sidecars {
			if s.Process == nil || !s.Alive() {
				continue
			}
			if err := s.follows(id, seen.ClusterID); err != nil {
				return fmt.Errorf("sidecar %d: %w", i, err)
			}
		}
		return nil
	})
}

// follows says whether the sidecar takes that one for active.
func (s *Sidecar) follows(id, clusterID string) error {
	m, err := s.Members()
	if err != nil {
		return err
	}
	for _, o := range m.Members {
		if o.ID == id && o.Active && m.ClusterID == clusterID {
			return nil
		}
	}
	return fmt.Errorf("it does not know that %s is active in the cluster %s: %s", id, clusterID, m.Summary)
}
