package replicate

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
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

// As long as a majority of the disks is full no leader could have anything replicated, and none hands over, also when an
// entry has failed; as soon as a majority has room, one of those leads.
func TestLeadershipDoesNotWanderBetweenFullDisks(t *testing.T) {
	free, change := smallDisks(3)
	said := &messages{said: map[string]bool{}}
	f := newFleet(t, 3, func(i int, c *Config) {
		change(i, c)
		c.Logger = slog.New(said)
	})
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("a", "1")
	for i := range free {
		free[i].Store(full)
	}
	f.await("a new term of the same leader", func() bool {
		if err := f.active().append(t.Context(), "a", "2"); err == nil {
			t.Error("taken")
		}
		return said.some("forcing a new term")
	})
	f.await("leader that stays", func() bool { return said.some("leadership stays") })
	if said.some("leadership is handed") {
		t.Error("leadership was handed to a full disk")
	}
	old := f.active()
	for i, s := range f.all {
		if s != old {
			free[i].Store(roomy)
		}
	}
	f.await("another one that is active", func() bool { return !old.active() && f.active() != old })
	f.put("a", "3")
}

// A leader whose entries the others have no room for ends in time: it stops leading, or raft would never answer for them.
func TestALeaderThatCannotReplicateEndsInTime(t *testing.T) {
	free, change := smallDisks(3)
	f := newFleet(t, 3, change)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("a", "1")
	leader := f.active()
	for i, s := range f.all {
		if s != leader {
			free[i].Store(full)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := leader.append(ctx, "a", "2"); err == nil {
		t.Error("acknowledged by one of three")
	}
	leader.stop()
}

func TestWhoTakesOverFromAFullDisk(t *testing.T) {
	for _, c := range []struct {
		heirs string
		room  string
		want  string // "": nobody
	}{
		{"", "", ""}, {"B", "B", ""}, {"BC", "", ""}, {"BC", "B", ""}, {"BC", "BC", "B"}, {"CB", "BC", "C"},
		{"BCDE", "BC", ""}, {"BCDE", "CDE", "C"},
	} {
		var heirs []raft.ServerID
		for _, id := range c.heirs {
			heirs = append(heirs, raft.ServerID(id))
		}
		to, found := successor(heirs, func(node string) bool { return strings.Contains(c.room, node) })
		if found != (c.want != "") || found && string(to) != c.want {
			t.Errorf("%+v: %s, %t", c, to, found)
		}
	}
}

// messages keeps the log records' messages.
type messages struct {
	mu   sync.Mutex
	said map[string]bool
}

// some says whether there was one that contains this.
func (m *messages) some(text string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for message := range m.said {
		if strings.Contains(message, text) {
			return true
		}
	}
	return false
}

func (m *messages) Enabled(context.Context, slog.Level) bool { return true }
func (m *messages) WithAttrs([]slog.Attr) slog.Handler       { return m }
func (m *messages) WithGroup(string) slog.Handler            { return m }
func (m *messages) Handle(_ context.Context, r slog.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.said[r.Message] = true
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
