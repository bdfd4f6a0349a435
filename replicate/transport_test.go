package replicate

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// cluster is a few raft members in one process, each behind our transport, over raft's in-memory one.
type cluster struct {
	*testing.T
	net     *network
	members []*raftMember
}

type raftMember struct {
	id    raft.ServerID
	raft  *raft.Raft
	t     *transport
	inner *raft.InmemTransport // nil over pipes
	log   *gatedLog
	fsm   *countFSM
}

// countFSM notes the index of the last command.
type countFSM struct{ index atomic.Uint64 }

func (f *countFSM) Apply(l *raft.Log) any               { f.index.Store(l.Index); return nil }
func (f *countFSM) Snapshot() (raft.FSMSnapshot, error) { return noSnapshot{}, nil }
func (f *countFSM) Restore(r io.ReadCloser) error       { return r.Close() }

type noSnapshot struct{}

func (noSnapshot) Persist(sink raft.SnapshotSink) error { return sink.Close() }
func (noSnapshot) Release()                             {}

// gatedLog is a log whose writes can be made to hang.
type gatedLog struct {
	*raft.InmemStore
	gate chan struct{} // whoever has taken its one value holds writes up
}

func newGatedLog() *gatedLog {
	g := &gatedLog{InmemStore: raft.NewInmemStore(), gate: make(chan struct{}, 1)}
	g.open()
	return g
}

func (g *gatedLog) shut() { <-g.gate }
func (g *gatedLog) open() { g.gate <- struct{}{} }

func (g *gatedLog) StoreLog(l *raft.Log) error { return g.StoreLogs([]*raft.Log{l}) }
func (g *gatedLog) StoreLogs(l []*raft.Log) error {
	g.shut()
	defer g.open()
	return g.InmemStore.StoreLogs(l)
}

func (g *gatedLog) last() uint64 { i, _ := g.LastIndex(); return i }

type link struct{ from, to raft.ServerID }

// network says what happens on each link.
type network struct {
	mu     sync.Mutex
	cut    map[link]bool          // requests are lost
	deaf   map[link]bool          // requests arrive, answers are lost
	double map[link]bool          // requests arrive twice
	delay  map[link]time.Duration // of requests
}

// lostAfter is how long a lost request takes to fail.
const lostAfter = 200 * time.Millisecond

type memberFaults struct {
	net *network
	id  raft.ServerID
}

func (f memberFaults) request(to raft.ServerID) int {
	f.net.mu.Lock()
	l := link{f.id, to}
	cut, double, delay := f.net.cut[l], f.net.double[l], f.net.delay[l]
	f.net.mu.Unlock()
	if delay > 0 {
		time.Sleep(delay)
	}
	if cut {
		time.Sleep(lostAfter)
		return 0
	}
	if double {
		return 2
	}
	return 1
}

func (f memberFaults) response(from raft.ServerID) bool {
	f.net.mu.Lock()
	defer f.net.mu.Unlock()
	return !f.net.deaf[link{f.id, from}] && !f.net.cut[link{from, f.id}]
}

func (n *network) set(which map[link]bool, on bool, links ...link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range links {
		which[l] = on
	}
}

// part cuts both ways, or mends, what lies between one member and others.
func (n *network) part(cut bool, one *raftMember, others ...*raftMember) {
	for _, o := range others {
		n.set(n.cut, cut, link{one.id, o.id}, link{o.id, one.id})
	}
}

func testLogger() *slog.Logger {
	if os.Getenv("REPLICATE_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.DiscardHandler)
}

// newCluster starts voters and standbys over raft's in-memory transport and waits for the first to lead.
func newCluster(t *testing.T, voters, standbys int) *cluster {
	t.Helper()
	return startCluster(t, voters, standbys, inMemory)
}

// inMemory connects a member to those before it.
func inMemory(c *cluster, m *raftMember) raft.Transport {
	_, m.inner = raft.NewInmemTransportWithTimeout(raft.ServerAddress(m.id), 3*time.Second)
	for _, o := range c.members {
		m.inner.Connect(raft.ServerAddress(o.id), o.inner)
		o.inner.Connect(raft.ServerAddress(m.id), m.inner)
	}
	return m.inner
}

// startCluster starts members that talk through what connect makes for each.
func startCluster(t *testing.T, voters, standbys int, connect func(*cluster, *raftMember) raft.Transport) *cluster {
	t.Helper()
	c := &cluster{T: t, net: &network{cut: map[link]bool{}, deaf: map[link]bool{}, double: map[link]bool{}, delay: map[link]time.Duration{}}}
	var all raft.Configuration
	for i := range voters + standbys {
		m := &raftMember{id: raft.ServerID(fmt.Sprintf("node-%d", i)), log: newGatedLog(), fsm: &countFSM{}}
		m.t = newTransport(connect(c, m))
		m.t.faults = memberFaults{c.net, m.id}
		m.t.insync.logger = testLogger().With("at", m.id)
		s := raft.Server{ID: m.id, Address: raft.ServerAddress(m.id)}
		if i >= voters {
			s.Suffrage = raft.Nonvoter
		}
		all.Servers = append(all.Servers, s)
		c.members = append(c.members, m)
	}
	for _, m := range c.members {
		rc := raftConfig(Config{RaftTimeout: 500 * time.Millisecond, Logger: testLogger().With("at", m.id)}, m.id)
		snapshots := raft.NewInmemSnapshotStore()
		if err := raft.BootstrapCluster(rc, m.log, m.log, snapshots, m.t, all); err != nil {
			t.Fatal(err)
		}
		var err error
		if m.raft, err = raft.NewRaft(rc, m.fsm, m.t.watch(m.log), m.log, snapshots, m.t); err != nil {
			t.Fatal(err)
		}
		m.t.attach(m.raft)
	}
	c.members[0].t.campaign(c.members[0].id)
	first := c.members[0]
	c.await("the first leader, followed by all", func() bool {
		last := first.log.last()
		for _, m := range c.members {
			if _, leader := m.raft.LeaderWithID(); leader != first.id || m.log.last() != last {
				return false
			}
		}
		return first.leads() && first.raft.CommitIndex() == last
	})
	return c
}

func (c *cluster) close() {
	c.Helper()
	for _, m := range c.members {
		if err := m.raft.Shutdown().Error(); err != nil {
			c.Error(err)
		}
	}
}

// await waits for a condition; generously, since the machine may be busy.
func (c *cluster) await(what string, ok func() bool) {
	c.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			c.Fatalf("%s: not within 30 s", what)
		}
	}
}

func (m *raftMember) leads() bool { return m.raft.State() == raft.Leader }

// another waits for somebody else to lead.
func (c *cluster) another(than *raftMember) (leader *raftMember) {
	c.Helper()
	c.await("another leader", func() bool {
		for _, m := range c.members {
			if m != than && m.leads() {
				leader = m
				return true
			}
		}
		return false
	})
	return leader
}

func (m *raftMember) term() uint64 { return m.raft.CurrentTerm() }

// apply commits an entry and gives its index.
func (c *cluster) apply(m *raftMember) uint64 {
	c.Helper()
	f := m.raft.Apply([]byte("entry"), 0)
	if err := f.Error(); err != nil {
		c.Fatalf("applying: %v", err)
	}
	return f.Index()
}

// fence begins one, and gives the channel with its outcome.
func (m *raftMember) fence() <-chan error {
	outcome := make(chan error, 2) // a second one would be seen
	m.t.fences.fence(m.term(), func(err error) { outcome <- err })
	return outcome
}

func (m *raftMember) insync(of *raftMember) bool {
	_, infos := m.t.insync.infos()
	for _, i := range infos {
		if i.ID == of.id {
			return i.InSync
		}
	}
	return false
}

func (c *cluster) outcome(f <-chan error) error {
	c.Helper()
	select {
	case err := <-f:
		return err
	case <-time.After(30 * time.Second):
		c.Fatal("a fence was not answered within 30 s")
		return nil
	}
}

// bubble runs a test of a cluster in a bubble, where time costs nothing.
func bubble(t *testing.T, voters, standbys int, test func(*cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, voters, standbys)
		defer c.close()
		test(c)
	})
}

func TestTheTransportLearnsWhatEachReplicaHasStored(t *testing.T) {
	bubble(t, 3, 1, func(c *cluster) {
		leader := c.members[0]
		for range 20 {
			index := c.apply(leader)
			c.await("all have it", func() bool {
				_, infos := leader.t.insync.infos()
				for _, i := range infos {
					if i.Match > index {
						c.Fatalf("%s: match %d, beyond %d", i.ID, i.Match, index)
					}
					if i.Match < index {
						return false
					}
				}
				return len(infos) == 3
			})
			for _, m := range c.members {
				if got := m.log.last(); got < index {
					c.Fatalf("%s: match is %d, its log ends at %d", m.id, index, got)
				}
			}
		}
	})
}

// A newcomer whose leader's log begins later gets a snapshot: that, too, says what it has.
func TestAnInstalledSnapshotCountsAsStored(t *testing.T) {
	bubble(t, 1, 0, func(c *cluster) {
		leader := c.members[0]
		var last uint64
		for range 50 {
			last = c.apply(leader)
		}
		rc := leader.raft.ReloadableConfig()
		rc.TrailingLogs = 1
		if err := leader.raft.ReloadConfig(rc); err != nil {
			c.Fatal(err)
		}
		if err := leader.raft.Snapshot().Error(); err != nil {
			c.Fatal(err)
		}
		if first, _ := leader.log.FirstIndex(); first < last {
			c.Fatalf("the log still begins at %d", first)
		}
		m := &raftMember{id: "late", log: newGatedLog(), fsm: &countFSM{}}
		_, m.inner = raft.NewInmemTransport("late")
		m.t = newTransport(m.inner)
		rc2 := raftConfig(Config{RaftTimeout: 500 * time.Millisecond, Logger: testLogger()}, m.id)
		var err error
		if m.raft, err = raft.NewRaft(rc2, m.fsm, m.t.watch(m.log), m.log, raft.NewInmemSnapshotStore(), m.t); err != nil {
			c.Fatal(err)
		}
		m.t.attach(m.raft)
		leader.inner.Connect("late", m.inner)
		m.inner.Connect("node-0", leader.inner)
		c.members = append(c.members, m)
		if err := leader.raft.AddNonvoter(m.id, "late", 0, 0).Error(); err != nil {
			c.Fatal(err)
		}
		c.await("it is in sync", func() bool { return leader.insync(m) })
		index := c.apply(leader)
		c.await("it has all", func() bool { _, stored := leader.t.insync.stored(); return stored >= index && m.log.last() >= index })
	})
}

// A leader whose heartbeats and their answers take long, since each process is held up by its quota, stays what it is.
func TestSlowAnswersEndNoLeadership(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		leader := c.members[0]
		term := leader.term()
		c.net.mu.Lock()
		for _, m := range c.members[1:] {
			c.net.delay[link{leader.id, m.id}] = 300 * time.Millisecond
		}
		c.net.mu.Unlock()
		time.Sleep(time.Minute)
		if !leader.leads() || leader.term() != term {
			c.Fatalf("it is %s in term %d, was the leader of term %d", leader.raft.State(), leader.term(), term)
		}
	})
}

func TestDuplicatesAndDelaysHurtNobody(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		leader := c.members[0]
		for _, o := range c.members[1:] {
			c.net.set(c.net.double, true, link{leader.id, o.id}, link{o.id, leader.id})
			c.net.mu.Lock()
			c.net.delay[link{leader.id, o.id}] = 3 * time.Millisecond
			c.net.mu.Unlock()
		}
		for range 50 {
			index := c.apply(leader)
			if err := c.outcome(leader.fence()); err != nil {
				c.Fatal(err)
			}
			c.await("all have it", func() bool {
				return c.members[1].fsm.index.Load() == index && c.members[2].fsm.index.Load() == index
			})
		}
		if !leader.leads() {
			c.Fatal("the leader has changed")
		}
	})
}

// A link that works one way only: the follower hears the leader, the leader does not hear it.
func TestAReplicaThatIsHeardNoMoreStopsCounting(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		leader, b := c.members[0], c.members[2]
		c.apply(leader)
		c.await("both are in sync", func() bool { return leader.insync(b) && leader.insync(c.members[1]) })
		c.net.set(c.net.deaf, true, link{leader.id, b.id})
		index := c.apply(leader)
		c.await("it has it", func() bool { return b.log.last() >= index })
		if _, stored := leader.t.insync.stored(); stored >= index {
			c.Fatalf("%d is stored, though nobody can know", stored)
		}
		c.await("it left", func() bool { return !leader.insync(b) })
		if _, stored := leader.t.insync.stored(); stored < index {
			c.Fatalf("stored up to %d only", stored)
		}
	})
}

type nullTransport struct {
	raft.Transport
	consumer chan raft.RPC
}

func (n *nullTransport) LocalAddr() raft.ServerAddress { return "me" }
func (n *nullTransport) Consumer() <-chan raft.RPC     { return n.consumer }
func (n *nullTransport) AppendEntries(_ raft.ServerID, _ raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	resp.Term, resp.Success = args.Term, true
	return nil
}

// What the decorator costs one AppendEntries.
func BenchmarkAppendEntriesThroughTheTransport(b *testing.B) {
	inner := &nullTransport{consumer: make(chan raft.RPC)}
	t := newTransport(inner)
	b.Cleanup(func() { t.Close() })
	log := t.watch(raft.NewInmemStore())
	args := &raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 1, PrevLogTerm: 1, Entries: []*raft.Log{{Index: 2, Term: 1}}}
	_ = log.StoreLogs([]*raft.Log{{Index: 2, Term: 1}})
	var resp raft.AppendEntriesResponse
	b.Run("bare", func(b *testing.B) {
		for b.Loop() {
			_ = inner.AppendEntries("a", "a", args, &resp)
		}
	})
	b.Run("decorated", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = t.AppendEntries("a", "a", args, &resp)
		}
	})
}
