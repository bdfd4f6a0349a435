package proxy_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/replicate"
)

// trunk is a replicated log in memory, with a replica for each sidecar of a test. The test says who leads, which is what
// no real election does on demand.
type trunk struct {
	mu       sync.Mutex
	moved    sync.Cond // a queue has grown, or something has thawed or stopped
	term     uint64
	sequence uint64
	index    uint64
	leader   *replica
	records  []replicate.Record // all that were replicated, in order
	blocked  bool               // entries are taken and nothing becomes of them, until it ends
	stopped  bool
}

// replica is the log as one sidecar's coordinator sees it.
type replica struct {
	*trunk
	events  chan replicate.Event
	entries chan replicate.Entry
	queue   []replicate.Event
	frozen  bool // as its process is when it is stopped: nothing reaches its coordinator
	deaf    bool // its coordinator does not hear of what is replicated
}

var errNotLeader = errors.New("not the leader")

func newTrunk() *trunk {
	l := &trunk{}
	l.moved.L = &l.mu
	return l
}

func (l *trunk) replica() *replica {
	return &replica{
		trunk: l, events: make(chan replicate.Event), entries: make(chan replicate.Entry),
		queue: []replicate.Event{{Kind: replicate.Reset}},
	}
}

func (r *replica) Events() <-chan replicate.Event            { return r.events }
func (r *replica) Entries() chan<- replicate.Entry           { return r.entries }
func (r *replica) Latest(func(replicate.Record) error) error { return nil }
func (r *replica) Resign(uint64)                             {}
func (r *replica) Full() bool                                { return false }
func (r *replica) push(e replicate.Event)                    { r.queue = append(r.queue, e); r.moved.Broadcast() }
func (l *trunk) locked(f func())                             { l.mu.Lock(); defer l.mu.Unlock(); f(); l.moved.Broadcast() }
func (r *replica) freeze(frozen bool)                        { r.locked(func() { r.frozen = frozen }) }

func (r *replica) Fence(term uint64, done func(error)) {
	r.mu.Lock()
	ok := r.leader == r && r.term == term
	r.mu.Unlock()
	if ok {
		done(nil)
		return
	}
	done(errNotLeader)
}

// deliver hands the events to the coordinator.
func (r *replica) deliver(ctx context.Context) {
	for {
		r.mu.Lock()
		for (len(r.queue) == 0 || r.frozen || r.deaf) && !r.stopped {
			r.moved.Wait()
		}
		if r.stopped {
			r.mu.Unlock()
			return
		}
		e := r.queue[0]
		r.queue = r.queue[1:]
		r.mu.Unlock()
		select {
		case r.events <- e:
		case <-ctx.Done():
			return
		}
	}
}

// append takes the coordinator's entries.
func (r *replica) append(ctx context.Context, all []*sidecar) {
	for {
		var e replicate.Entry
		select {
		case e = <-r.entries:
		case <-ctx.Done():
			return
		}
		r.mu.Lock()
		for (r.frozen || r.blocked && r.leader == r && r.term == e.Term) && !r.stopped {
			r.moved.Wait()
		}
		if r.leader == r && r.term == e.Term && r.sequence+1 == e.Sequence {
			r.sequence++
			r.index++
			r.records = append(r.records, e.Records...)
			for _, s := range all {
				s.log.push(replicate.Event{Kind: replicate.Applied, Term: e.Term, Sequence: e.Sequence, Index: r.index, Records: e.Records, Stored: true})
			}
		} else {
			r.push(replicate.Event{Kind: replicate.Failed, Term: e.Term, Sequence: e.Sequence, Err: errNotLeader})
		}
		r.mu.Unlock()
	}
}

// committed gives the offsets that were ever committed for a partition of topic t by group g, in their order.
func (l *trunk) committed(partition int32) (offsets []int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		k := r.Key
		if len(k) != 2+3+3+4 || k[1] != 1 || int32(binary.BigEndian.Uint32(k[8:])) != partition {
			continue
		}
		if r.Value == nil {
			offsets = append(offsets, -1)
		} else {
			offsets = append(offsets, int64(binary.BigEndian.Uint64(r.Value[2:])))
		}
	}
	return offsets
}

// sidecar is a proxy with a real coordinator, on a shared log.
type sidecar struct {
	*side
	id    string
	coord *coordinator.Coordinator
	log   *replica
	ln    net.Listener // its peer port
	peers *board
}

// cluster is some sidecars that forward to the one that leads.
type cluster struct {
	*trunk
	t   testing.TB
	all []*sidecar
}

// board is what a sidecar knows of who is active, and its way to the others.
type board struct {
	cluster *cluster
	own     string

	mu      sync.Mutex
	term    uint64
	node    string
	changed chan struct{}
	conns   []net.Conn // dialled
	gate    *gate      // of what the next connections read; nil: none
}

func (b *board) Active() (uint64, string, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.term, b.node, b.changed
}

// tell is a status message: the highest term wins, and in it who is active over nobody.
func (b *board) tell(term uint64, node string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if term < b.term || term == b.term && node == "" {
		return
	}
	b.term, b.node = term, node
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *board) Dial(ctx context.Context, node string) (net.Conn, error) {
	for _, s := range b.cluster.all {
		if s.id != node {
			continue
		}
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.ln.Addr().String())
		if err != nil {
			return nil, err
		}
		if _, err := conn.Write([]byte(b.own)); err != nil {
			return nil, err
		}
		b.mu.Lock()
		b.conns = append(b.conns, conn)
		b.mu.Unlock()
		return conn, nil
	}
	return nil, errors.New("no such node")
}

// cut closes every connection that this sidecar has dialled.
func (b *board) cut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.conns {
		_ = c.Close()
	}
	b.conns = nil
}

// gate stops what is read through it: bytes that have arrived are neither lost nor delivered until it opens.
type gate struct {
	mu     sync.Mutex
	open   chan struct{} // nil: it is open
	caught int           // bytes, since it was shut
}

func (g *gate) untilCaught(t testing.TB) {
	t.Helper()
	until(t, "bytes wait at the gate", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.caught > 0
	})
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open, g.caught = make(chan struct{}), 0
}

func (g *gate) thaw() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.open)
	g.open = nil
}

func (g *gate) wait(n int) {
	g.mu.Lock()
	open := g.open
	if open != nil {
		g.caught += n
	}
	g.mu.Unlock()
	if open != nil {
		<-open
	}
}

type gated struct {
	net.Conn
	gate *gate
}

func (c gated) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.gate.wait(n)
	return n, err
}

// anyTopic is an upstream where each topic has a hundred partitions.
type anyTopic struct{}

func (anyTopic) Topic(string) ([16]byte, int32, bool)               { return [16]byte{1}, 100, true }
func (anyTopic) TopicName([16]byte) (string, bool)                  { return "", false }
func (anyTopic) Refresh(_ []string, _ [][16]byte, done func(error)) { done(nil) }

// startCluster runs sidecars named "a", "b"… that know of no leader yet.
func startCluster(t testing.TB, n int, change ...func(*proxy.Config)) *cluster {
	t.Helper()
	c := &cluster{trunk: newTrunk(), t: t}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		c.locked(func() { c.stopped = true })
		cancel()
		running.Wait()
	})
	for i := range n {
		s := &sidecar{id: string(rune('a' + i)), log: c.replica()}
		s.peers = &board{cluster: c, own: s.id, changed: make(chan struct{}), gate: &gate{}}
		c.all = append(c.all, s)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.ln = ln
		t.Cleanup(func() { _ = ln.Close() })
		conf := coordinator.Config{Group: group.DefaultConfig(), CommitTimeout: 20 * time.Second}
		conf.Group.InitialRebalanceDelay = 0
		s.coord = coordinator.New(conf, s.log, anyTopic{}, discard, nil)
		conf2 := config("127.0.0.1:1")
		conf2.Node, conf2.CommitTimeout = s.id, 20*time.Second
		for _, f := range change {
			f(&conf2)
		}
		s.side = start(t, conf2, func(x *side) { x.peers, x.coordinator = s.peers, s.coord })
	}
	for _, s := range c.all {
		running.Go(func() { _ = s.coord.Run(ctx) })
		running.Go(func() { s.log.deliver(ctx) })
		running.Go(func() { s.log.append(ctx, c.all) })
		go s.acceptPeers()
	}
	return c
}

func (s *sidecar) acceptPeers() {
	for {
		conn, err := s.ln.Accept()
		if err != nil {
			return
		}
		go func() {
			var from [1]byte
			if _, err := io.ReadFull(conn, from[:]); err != nil {
				return
			}
			if s.peers.gate == nil {
				s.ServePeer(conn, string(from[:]))
			} else {
				s.ServePeer(gated{conn, s.peers.gate}, string(from[:]))
			}
		}()
	}
}

// elect makes s the leader of a new term, which nobody is told yet; nil: nobody leads.
func (c *cluster) elect(s *sidecar) (term uint64) {
	c.locked(func() {
		c.term++
		c.sequence = 0
		if old := c.leader; old != nil {
			old.push(replicate.Event{Kind: replicate.Inactive, Term: c.term - 1})
		}
		if c.leader = nil; s != nil {
			c.leader = s.log
			s.log.push(replicate.Event{Kind: replicate.Active, Term: c.term})
		}
		term = c.term
	})
	return term
}

// lead makes s the leader and tells all sidecars.
func (c *cluster) lead(s *sidecar) {
	c.tell(c.elect(s), s)
}

func (c *cluster) tell(term uint64, s *sidecar) {
	for _, other := range c.all {
		other.peers.tell(term, s.id)
	}
}
