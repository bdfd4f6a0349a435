package replicate

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
)

// lines is what a sidecar has logged.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), text)
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// A node that was taken out and comes back finds its own removal in the log that it catches up with.
func TestWhoComesBackIsNotDismissedByItsOwnPast(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	back := f.all[1]
	f.stopped(back, true)
	for i := range 200 { // more than raft sends at once
		f.put(fmt.Sprint("key", i), "value")
	}
	var log lines
	again := f.add(back.dir, func(_ int, c *Config) { c.Logger = log.logger() })
	f.await("three voters again", func() bool { return f.roles()[RoleVoter] == 3 })
	f.await("copy", func() bool { return again.value("key199") == "value" })
	if n := log.count("no longer a member"); n > 0 {
		t.Fatalf("dismissed %d times while it was taken in", n)
	}
}

// Its replica is ended wrongly, say by a configuration that was told late.
func TestWhoIsDismissedWronglyIsTakenInAgain(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	for range 3 {
		for _, s := range f.all { // both others at once: no quorum until one is back
			if r := s.n.running.Load(); r != nil && !s.active() {
				s.n.membership.dismiss(r)
			}
		}
		f.put("key", "value")
		f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	}
}

// It was down when it was taken out, and thinks that it is a voter until a leader says otherwise.
func TestWhoWasRemovedWhileAwayLearnsOfIt(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 6, nil)
	f.ranked(3, 2, 1)
	victim := f.replaced()
	f.ranked(3, 2, 0)
	for range 2 { // the second time it knows
		again := f.add(victim.dir, nil)
		f.await("forwarder", func() bool { return again.n.running.Load() == nil && again.n.Status().Role == RoleForwarder })
		f.await("no word of what is missing", func() bool { return again.n.Status().Waiting == "" })
		again.stop()
	}
}

func TestRecoverTakesASurvivorThatHadLeft(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("key", "value")
	for _, s := range f.all { // all copies
		f.await("copy", func() bool { return s.value("key") == "value" })
	}
	gone := f.all[2]
	f.stopped(gone, true)
	for _, s := range f.all[:2] {
		f.stopped(s, false)
	}
	if err := Recover(gone.dir, func(Survivor) error { return nil }); err != nil {
		t.Fatal(err)
	}
	f.all = nil
	s := f.add(gone.dir, nil)
	f.put("another", "value")
	if got := s.value("key"); got != "value" {
		t.Fatalf("key is %q", got)
	}
}

// The others of a cluster that was recovered are not heard, and told what to do; who has no copy of its state belongs to
// it without further ado.
func TestARecoveredClusterIsANewOne(t *testing.T) {
	t.Parallel()
	var logs [6]lines
	f := newFleet(t, 6, func(i int, c *Config) { c.Logger = logs[i].logger() })
	f.ranked(3, 2, 1)
	f.put("key", "value")
	var survivor, forwarder *sidecar
	for _, s := range f.all {
		if s.n.Status().Role == RoleForwarder {
			forwarder = s
			continue
		}
		f.await("copy", func() bool { return s.value("key") == "value" })
		if !s.active() {
			survivor = s
		}
	}
	// Elections that the survivor has not heard of.
	lost, _, _ := forwarder.n.Active()
	forwarder.n.membership.status.publish(true, lost+50)
	forwarder.n.membership.status.publish(false, lost+50)
	var old *sidecar
	for _, s := range f.all {
		if s != forwarder {
			f.stopped(s, false)
			if s != survivor {
				old = s
			}
		}
	}
	if err := Recover(survivor.dir, func(Survivor) error { return nil }); err != nil {
		t.Fatal(err)
	}
	f.all = []*sidecar{forwarder}
	s := f.add(survivor.dir, nil)
	f.put("another", "value")
	f.await("forwarder to know who is active", func() bool { _, node, _ := forwarder.n.Active(); return node == s.n.ID() })
	f.await("forwarder to be taken in", func() bool { return forwarder.n.Status().Role != RoleForwarder })
	var log lines
	again := f.add(old.dir, func(_ int, c *Config) { c.Logger = log.logger() })
	f.await("word of what to do", func() bool { return log.count(old.dir) > 0 })
	if _, node, _ := again.n.Active(); node != "" {
		t.Fatalf("the old one believes that %s is active", node)
	}
	fresh := f.add(t.TempDir(), nil)
	f.await("newcomer", func() bool { return fresh.value("another") == "value" })
	// The forwarder may still have told of it as it was before it was stopped.
	f.await("the old one to be no member", func() bool {
		return !slices.ContainsFunc(s.n.Members(), func(m MemberInfo) bool { return m.ID == again.n.ID() && m.State == gossipAlive.String() })
	})
}

// The only copy is damaged: an empty cluster in its place would be silent loss.
func TestAQuarantinedStoreIsNoReasonForASecondBirth(t *testing.T) {
	t.Parallel()
	change := func(_ int, c *Config) {
		c.Cluster.Join, c.Cluster.BootstrapExpect = []string{"127.0.0.1:1"}, 1
	}
	f := newFleet(t, 1, change)
	f.put("key", "value")
	dir := f.all[0].dir
	f.all[0].stop()
	if err := os.WriteFile(filepath.Join(dir, "db", "MANIFEST"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // nor at the start after that
		s := f.add(dir, change)
		f.await("reason", func() bool { return s.n.Status().Waiting != "" || s.active() })
		f.await("look for others", func() bool { return strings.Contains(s.n.Status().Waiting, "has belonged to a cluster") || s.active() })
		if s.active() {
			t.Fatal("a cluster was born in place of the one that is lost")
		}
		s.stop()
	}
}

func TestOneClusterAtATime(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1, nil)
	f.put("key", "value")
	m := f.all[0].n.membership
	if err := m.adopt(uuid.New()); err == nil {
		t.Fatal("a connection welcomed before our cluster was born brings another one's log")
	}
	if err := m.adopt(uuid.UUID(m.identity().clusterID)); err != nil {
		t.Fatal(err)
	}
}

// A leader has found us while we were about to found a cluster of our own.
func TestWhoWasFoundFoundsNothing(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1, func(_ int, c *Config) { c.Cluster.Join = []string{"127.0.0.1:1"} })
	m := f.all[0].n.membership
	if err := m.adopt(uuid.New()); err != nil {
		t.Fatal(err)
	}
	if err := m.found(); err != nil {
		t.Fatal(err)
	}
	if fresh, err := m.node.store.Fresh(); err != nil || !fresh {
		t.Fatalf("it has made itself a voter in the log that it was to be given: %v %v", fresh, err)
	}
}

// The others look for it only when its next process is there.
func TestALeaderThatIsBackAtOnceIsReplacedAtOnce(t *testing.T) {
	t.Parallel()
	var unreachable atomic.Bool // by silence, which is no certainty
	patient := func(_ int, c *Config) {
		c.RaftTimeout = time.Hour // whoever waits for raft's time-outs waits for ever
		c.Cluster.seams.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if unreachable.Load() {
				return nil, os.ErrDeadlineExceeded
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
	}
	f := newFleet(t, 3, patient)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("before", "1")
	old := f.active()
	for _, s := range f.all {
		f.await("copy", func() bool { return s.value("before") == "1" })
		if gone := s.n.membership.gone(old.n.ID()); gone {
			t.Fatal("one that leads is thought to be gone")
		}
	}
	unreachable.Store(true)
	f.stopped(old, false)
	f.all = slices.DeleteFunc(f.all, func(s *sidecar) bool { return s == old })
	again := f.add(old.dir, patient)
	for _, s := range f.all {
		f.await("address", func() bool { addr, _ := s.n.membership.resolve(old.n.ID()); return addr == again.n.PeerAddr() })
	}
	unreachable.Store(false)
	for _, s := range f.all[:2] {
		s.n.membership.ended(old.n.ID())
	}
	f.put("after", "2")
}

// It has the key of gossip, and neither the token nor a certificate.
func TestAnImpostorInGossipGetsNoRole(t *testing.T) {
	t.Parallel()
	keyed := func(token string) func(int, *Config) {
		return func(_ int, c *Config) {
			c.Cluster.Security = Security{Token: token, Keyring: [][]byte{[]byte("0123456789abcdef")}}
		}
	}
	f := newFleet(t, 1, keyed("correct horse"))
	leader := f.active()
	impostor := f.add(t.TempDir(), keyed("battery staple"))
	f.await("impostor in gossip", func() bool { return leader.n.membership.alive(impostor.n.ID()) })
	other := f.add(t.TempDir(), keyed("correct horse"))
	f.await("standby", func() bool { return f.configuration()[other.n.ID()] == RoleStandby }) // it came later
	if role := f.configuration()[impostor.n.ID()]; role != "" {
		t.Fatalf("the impostor is a %s", role)
	}
}

// Not parallel: it counts what the process has.
func TestClosedNodesLeaveNothingBehind(t *testing.T) {
	life := func() {
		f := newFleet(t, 2, nil)
		f.await("voter and standby", func() bool { r := f.roles(); return r[RoleVoter] == 1 && r[RoleStandby] == 1 })
		f.put("key", "value")
		f.stopped(f.active(), true)
		f.put("key", "another")
		f.add(t.TempDir(), nil).stop() // in the middle of whatever it has begun
		for _, s := range f.all {
			s.stop()
		}
	}
	files := func() int {
		open, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return 0 // not Linux
		}
		return len(open)
	}
	life() // what is made once and for all
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which closes what was forgotten
	goroutines, opened := runtime.NumGoroutine(), files()
	life()
	deadline := time.Now().Add(20 * time.Second)
	for runtime.NumGoroutine() > goroutines || files() > opened {
		if time.Sleep(10 * time.Millisecond); time.Now().After(deadline) {
			var all bytes.Buffer
			_ = pprof.Lookup("goroutine").WriteTo(&all, 1)
			t.Fatalf("%d goroutines, %d before; %d files, %d before\n%s", runtime.NumGoroutine(), goroutines, files(), opened, all.String())
		}
	}
}

// Everybody is told to stop at once: nobody waits for another, and what is there is there again afterwards.
func TestAllLeaveAtOnceAndComeBack(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("key", "value")
	old := f.all
	var leaving sync.WaitGroup
	for _, s := range old {
		leaving.Go(func() { f.stopped(s, true) })
	}
	leaving.Wait()
	f.all = nil
	for _, s := range old {
		f.add(s.dir, nil)
	}
	f.put("another", "value")
	if got := f.active().value("key"); got != "value" {
		t.Fatalf("key is %q", got)
	}
	f.await("three voters again", func() bool { return f.roles()[RoleVoter] == 3 })
}

func TestTheOnlyVoterLeavesItsPlaceToTheStandby(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, nil)
	f.await("voter and standby", func() bool { r := f.roles(); return r[RoleVoter] == 1 && r[RoleStandby] == 1 })
	f.put("key", "value")
	f.stopped(f.active(), true)
	f.put("another", "value")
	last := f.active()
	if got := last.value("key"); got != "value" {
		t.Fatalf("key is %q", got)
	}
	f.await("cluster of one", func() bool { return len(f.configuration()) == 1 && f.configuration()[last.n.ID()] == RoleVoter })
}

func TestOneOfSeveralVotersSaysThatItIsAlone(t *testing.T) {
	t.Parallel()
	dir, _ := bereaved(t)
	var log lines
	c := testConfig(dir)
	c.Logger = log.logger()
	h := openHarness(t, c)
	defer h.close()
	if log.count("without a way to the others") != 1 || log.count("voters=3") != 1 {
		t.Fatal(log.buf.String())
	}
}

func TestADamagedMemberComesBackAsANewNode(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("key", "value")
	old := f.all[1]
	f.stopped(old, false)
	if err := os.WriteFile(filepath.Join(old.dir, "db", "MANIFEST"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := f.add(old.dir, nil)
	f.await("new voter in the old one's place", func() bool {
		c := f.configuration()
		return fresh.n.ID() != old.n.ID() && c[fresh.n.ID()] == RoleVoter && c[old.n.ID()] == "" && len(c) == 3
	})
	f.await("copy", func() bool { return fresh.value("key") == "value" })
}

// All have the same command line, and each is named in its own --join. The founder is killed as soon as it has founded.
func TestOneCommandLineForAll(t *testing.T) {
	t.Parallel()
	var seeds []string
	for range 3 {
		l, err := net.Listen("tcp", "127.66.0.1:0") // where nobody else takes the port before it is bound again
		if err != nil {
			l, err = net.Listen("tcp", "127.0.0.1:0")
		}
		if err != nil {
			t.Fatal(err)
		}
		seeds = append(seeds, l.Addr().String())
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	f := &fleet{T: t}
	start := func(i int, dir string) *sidecar {
		return f.add(dir, func(_ int, c *Config) {
			c.Cluster.Gossip, c.Cluster.Join, c.Cluster.BootstrapExpect = seeds[i], seeds, 3
		})
	}
	dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
	for i, dir := range dirs {
		start(i, dir)
	}
	founder := f.active()
	at := slices.Index(f.all, founder)
	f.stopped(founder, false)
	f.all[at] = start(at, dirs[at])
	f.all = f.all[:3]
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 && len(f.configuration()) == 3 })
	f.put("key", "value")
	id := f.active().n.Status().ClusterID
	for _, s := range f.all {
		f.await("copy", func() bool { return s.value("key") == "value" && s.n.Status().ClusterID == id })
	}
}

func TestAForwarderThatLeavesHasNotFailed(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 6, nil)
	f.ranked(3, 2, 1)
	at := slices.IndexFunc(f.all, func(s *sidecar) bool { return s.n.Status().Role == RoleForwarder })
	gone := f.all[at]
	f.stopped(gone, true)
	f.await("word of its end", func() bool {
		members := f.active().n.Members()
		i := slices.IndexFunc(members, func(m MemberInfo) bool { return m.ID == gone.n.ID() })
		if i >= 0 && members[i].State == gossipFailed.String() {
			t.Fatal("it has failed")
		}
		return i < 0 || members[i].State == gossipLeft.String()
	})
}
