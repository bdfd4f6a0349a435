package replicate

import (
	"context"
	"log/slog"
	"strings"
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

// As long as a majority of the disks is full no leader could have anything replicated, and leadership stays where it is,
// also when an entry has failed; as soon as a majority has room, one of those leads.
func TestLeadershipDoesNotWanderBetweenFullDisks(t *testing.T) {
	free, change := smallDisks(3)
	kept := &countingHandler{message: "leadership stays"}
	f := newFleet(t, 3, func(i int, c *Config) {
		change(i, c)
		c.Logger = slog.New(kept)
	})
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("a", "1")
	old := f.active()
	for i := range free {
		free[i].Store(full)
	}
	if err := old.append(t.Context(), "a", "2"); err == nil {
		t.Error("taken")
	}
	stays := func() {
		t.Helper()
		before := kept.n.Load()
		f.await("nobody who takes over", func() bool { return kept.n.Load() >= before+2 })
		if now := f.active(); now != old {
			t.Error("another one leads")
		}
	}
	stays()
	var others []int
	for i, s := range f.all {
		if s != old {
			others = append(others, i)
		}
	}
	free[others[0]].Store(roomy)
	stays()
	free[others[1]].Store(roomy)
	f.await("another one that is active", func() bool { return !old.active() && f.active() != old })
	f.put("a", "3")
}

// countingHandler counts the log records that have a message.
type countingHandler struct {
	message string
	n       atomic.Int64
}

func (h *countingHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h *countingHandler) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h *countingHandler) WithGroup(string) slog.Handler            { return h }
func (h *countingHandler) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, h.message) {
		h.n.Add(1)
	}
	return nil
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
