package replicate

import (
	"sync/atomic"
	"testing"
)

// smallDisks gives each sidecar a disk of 10 GiB with the free space that the test says.
func smallDisks(n int) (free []atomic.Int64, change func(i int, c *Config)) {
	free = make([]atomic.Int64, n)
	return free, func(i int, c *Config) {
		free[i].Store(roomy)
		c.MinFree = 64 << 20
		c.Cluster.seams.space = func(string) (int64, int64, error) { return free[i].Load(), 10 << 30, nil }
	}
}

const (
	roomy = 100 << 20 // too little for a ballast
	full  = 32 << 20
)

// A leader whose disk is full hands over to one that has room.
func TestALeaderWhoseDiskIsFullMakesWay(t *testing.T) {
	free, change := smallDisks(3)
	f := newFleet(t, 3, change)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("a", "1")
	old := f.active()
	for i, s := range f.all {
		if s == old {
			free[i].Store(full)
		}
	}
	f.await("another one that is active", func() bool { return !old.active() && f.active() != old })
	f.put("a", "2")
}

// A lone voter has nobody to hand over to: it leads on a full disk, and refuses entries.
func TestALoneVoterLeadsOnAFullDisk(t *testing.T) {
	free, change := smallDisks(1)
	f := newFleet(t, 1, change)
	f.put("a", "1")
	s := f.active()
	free[0].Store(full)
	for range 3 {
		if err := s.append(t.Context(), "a", "2"); err == nil {
			t.Fatal("taken")
		}
		f.active() // again
		if !s.n.Full() {
			t.Error("room")
		}
	}
	free[0].Store(roomy)
	f.put("a", "3")
	if s.n.Full() {
		t.Error("no room")
	}
}
