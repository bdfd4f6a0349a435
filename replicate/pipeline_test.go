package replicate

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// pipeNet is a network of pipes for raft's network transport, in one process: each member listens by its id.
type pipeNet struct {
	mu      sync.Mutex
	streams map[string]*pipeStream
}

type pipeStream struct {
	net      *pipeNet
	node     string
	incoming chan net.Conn
	ended    func(from string) // may be nil

	mu     sync.Mutex
	conns  []net.Conn // ours, of both directions
	closed bool
	stop   chan struct{}
}

func (p *pipeNet) stream(node string) *pipeStream {
	s := &pipeStream{net: p, node: node, incoming: make(chan net.Conn), stop: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.streams[node] = s
	return s
}

func (s *pipeStream) Addr() net.Addr { return nodeAddr(s.node) }

func (s *pipeStream) Accept() (net.Conn, error) {
	select {
	case c := <-s.incoming:
		return c, nil
	case <-s.stop:
		return nil, net.ErrClosed
	}
}

// Close closes everything, as the end of a process does.
func (s *pipeStream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.stop)
		for _, c := range s.conns {
			_ = c.Close()
		}
	}
	return nil
}

func (s *pipeStream) keep(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.conns = append(s.conns, c)
	}
	return !s.closed
}

func (s *pipeStream) Dial(address raft.ServerAddress, _ time.Duration) (net.Conn, error) {
	s.net.mu.Lock()
	to := s.net.streams[string(address)]
	s.net.mu.Unlock()
	here, there := net.Pipe()
	if to == nil || !s.keep(here) || !to.keep(there) {
		return nil, &net.OpError{Op: "dial", Net: "pipe", Err: syscall.ECONNREFUSED}
	}
	select {
	case to.incoming <- &pipeEnd{Conn: there, to: to, from: s.node}:
		return here, nil
	case <-to.stop:
		return nil, &net.OpError{Op: "dial", Net: "pipe", Err: syscall.ECONNREFUSED}
	}
}

// pipeEnd is an incoming connection: it tells when the other side has closed it.
type pipeEnd struct {
	net.Conn
	to   *pipeStream
	from string
}

func (e *pipeEnd) Read(b []byte) (int, error) {
	n, err := e.Conn.Read(b)
	if err != nil && e.to.ended != nil && !errors.Is(err, net.ErrClosed) {
		e.to.ended(e.from)
	}
	return n, err
}

func (s *pipeStream) refuses(node string) bool {
	c, err := s.Dial(raft.ServerAddress(node), 0)
	if err == nil {
		_ = c.Close()
	}
	return err != nil
}

// overPipes runs a test of members whose connections close as those of processes do; elections are by them.
func overPipes(t *testing.T, voters, standbys, maxInFlight int, test func(c *cluster, kill func(*raftMember))) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := &pipeNet{streams: map[string]*pipeStream{}}
		c := startCluster(t, voters, standbys, func(_ *cluster, m *raftMember) raft.Transport {
			return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
				Stream: p.stream(string(m.id)), MaxPool: 3, MaxRPCsInFlight: maxInFlight, Timeout: 2 * time.Second,
				Logger: &raftLogger{log: testLogger().With("at", m.id)},
			})
		})
		for _, m := range c.members {
			s := p.streams[string(m.id)]
			s.ended = m.t.elections(nil, s.refuses, testLogger().With("at", m.id)).ended
		}
		defer func() {
			c.close()
			for _, s := range p.streams {
				_ = s.Close() // a raft transport leaves pooled connections open
			}
		}()
		test(c, func(m *raftMember) { _ = p.streams[string(m.id)].Close() })
	})
}

// reasons collects why replicas have left the in-sync set.
type reasons struct {
	slog.Handler
	mu  sync.Mutex
	all []string
}

func (r *reasons) Enabled(context.Context, slog.Level) bool { return true }
func (r *reasons) Handle(_ context.Context, rec slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec.Attrs(func(a slog.Attr) bool {
		if a.Key == "reason" {
			r.all = append(r.all, a.Value.String())
		}
		return true
	})
	return nil
}

func TestAKilledFollowerHoldsNothingUp(t *testing.T) {
	for _, inFlight := range []int{1, 2} { // without and with raft's pipeline
		overPipes(t, 3, 1, inFlight, func(c *cluster, kill func(*raftMember)) {
			leader := c.members[0]
			why := &reasons{}
			leader.t.insync.mu.Lock()
			leader.t.insync.logger = slog.New(why)
			leader.t.insync.mu.Unlock()
			c.await("all are in sync", func() bool {
				return leader.insync(c.members[1]) && leader.insync(c.members[2]) && leader.insync(c.members[3])
			})
			stored := func(within time.Duration) {
				c.Helper()
				start := time.Now()
				index := c.apply(leader)
				c.await("all that are there have it", func() bool { return leader.t.insync.has(index) })
				if took := time.Since(start); took > within {
					c.Errorf("an entry took %v", took)
				}
			}
			for range 30 {
				stored(2 * time.Millisecond)
			}
			kill(c.members[3])
			stored(2 * time.Millisecond)
			kill(c.members[1])
			stored(2 * time.Millisecond)
			if err := c.outcome(leader.fence()); err != nil {
				c.Error(err)
			}
			why.mu.Lock()
			defer why.mu.Unlock()
			if len(why.all) != 2 || strings.Join(why.all, "") != strings.Repeat("its connection has closed", 2) {
				c.Errorf("left because of %q", why.all)
			}
		})
	}
}

func TestAKilledLeadersClosedConnectionsElectTheNext(t *testing.T) {
	for _, inFlight := range []int{1, 2} {
		overPipes(t, 3, 2, inFlight, func(c *cluster, kill func(*raftMember)) {
			old := c.members[0]
			for range 30 {
				c.apply(old)
			}
			start := time.Now()
			kill(old)
			leader := c.another(old)
			took := time.Since(start)
			c.apply(leader)
			if took > 3*electionStep {
				c.Errorf("a new leader after %v", took)
			}
			if err := c.outcome(leader.fence()); err != nil {
				c.Error(err)
			}
			c.await("the rest is in sync", func() bool {
				n := 0
				for _, m := range c.members {
					if leader.insync(m) {
						n++
					}
				}
				return n == 3
			})
		})
	}
}

// Stepping down closes raft's connections: that is our doing, and bars nobody.
func TestWhoStepsDownBarsNobody(t *testing.T) {
	overPipes(t, 3, 0, 2, func(c *cluster, _ func(*raftMember)) {
		leader := c.members[0]
		for range 6 {
			c.await("both others are in sync", func() bool {
				n := 0
				for _, m := range c.members {
					if leader.insync(m) {
						n++
					}
				}
				return n == 2
			})
			c.apply(leader)
			start := time.Now()
			if err := leader.raft.LeadershipTransfer().Error(); err != nil {
				c.Fatal(err)
			}
			leader = c.another(leader)
			c.await("both others are in sync", func() bool {
				n := 0
				for _, m := range c.members {
					if leader.insync(m) {
						n++
					}
				}
				return n == 2
			})
			if took := time.Since(start); took > barFirst/2 {
				c.Errorf("it took %v", took)
			}
		}
	})
}

// The leader's disk and the others' write at the same time; the entry is committed when the leader has it too.
func TestEntriesGoAheadOfTheLeadersOwnWrite(t *testing.T) {
	bubble(t, 3, 1, func(c *cluster) {
		leader := c.members[0]
		c.await("all are in sync", func() bool {
			return leader.insync(c.members[1]) && leader.insync(c.members[2]) && leader.insync(c.members[3])
		})
		for range 3 {
			before := c.apply(leader)
			leader.log.shut()
			applied := leader.raft.Apply([]byte("entry"), 0)
			c.await("the others have it", func() bool {
				return c.members[1].log.last() > before && c.members[2].log.last() > before && c.members[3].log.last() > before
			})
			synctest.Wait()
			if leader.log.last() != before || leader.fsm.index.Load() != before || leader.raft.CommitIndex() != before || leader.t.insync.has(before+1) {
				c.Error("the leader counts an entry that it has not written")
			}
			if last, infos := leader.t.insync.infos(); last != before || infos[0].Match != before+1 || infos[0].lag(last) != 0 {
				c.Errorf("%s is shown at %d, %d behind, and the leader is at %d", infos[0].ID, infos[0].Match, infos[0].lag(last), last)
			}
			leader.log.open()
			if err := applied.Error(); err != nil {
				c.Fatal(err)
			}
			c.await("all copies count", func() bool { return leader.t.insync.has(before + 1) })
		}
	})
}

// A leader is cut off with an entry that went ahead and that it has not written yet. Another replica has it, so nobody
// without it can lead, and it is committed, by the next leader or by both.
func TestAnEntryThatWentAheadSurvivesItsLeader(t *testing.T) {
	bubble(t, 3, 0, func(c *cluster) {
		old, follower := c.members[0], c.members[1]
		c.net.set(c.net.cut, true, link{old.id, c.members[2].id})
		time.Sleep(lostAfter)
		before := c.apply(old)
		old.log.shut()
		applied := old.raft.Apply([]byte("ahead"), 0)
		c.await("one other has it", func() bool { return follower.log.last() > before })
		c.kill(old)
		leader := c.another(old)
		if leader != follower {
			c.Errorf("%s leads, and lacks what was stored elsewhere", leader.id)
		}
		index := c.apply(leader)
		old.log.open()
		c.net.part(false, old, c.members[1:]...)
		_ = applied.Error() // committed, or leadership lost
		c.await("all have the same", func() bool {
			for _, m := range c.members {
				if m.fsm.index.Load() < index {
					return false
				}
			}
			return true
		})
		for _, m := range c.members {
			var entry raft.Log
			if err := m.log.GetLog(before+1, &entry); err != nil || string(entry.Data) != "ahead" {
				c.Errorf("%s has %q at %d (%v)", m.id, entry.Data, before+1, err)
			}
		}
	})
}

// countingTransport counts what raft's pipelines are given.
type countingTransport struct {
	*raft.InmemTransport
	mu   sync.Mutex
	sent map[uint64]int // by the index of an entry
}

func (n *countingTransport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := n.InmemTransport.AppendEntriesPipeline(id, target)
	return countingPipeline{p, n}, err
}

type countingPipeline struct {
	raft.AppendPipeline
	n *countingTransport
}

func (p countingPipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	p.n.mu.Lock()
	for _, e := range args.Entries {
		p.n.sent[e.Index]++
	}
	p.n.mu.Unlock()
	return p.AppendPipeline.AppendEntries(args, resp)
}

func TestWhatWentAheadIsNotSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		counting := &countingTransport{sent: map[uint64]int{}} // the leader's
		c := startCluster(t, 3, 0, func(c *cluster, m *raftMember) raft.Transport {
			inner := inMemory(c, m)
			if len(c.members) > 0 {
				return inner
			}
			counting.InmemTransport = m.inner
			return counting
		})
		defer c.close()
		leader := c.members[0]
		for range 20 { // raft opens its pipelines when it has sent something
			c.apply(leader)
			time.Sleep(10 * time.Millisecond)
		}
		first := leader.log.last() + 1
		for range 50 {
			index := c.apply(leader)
			c.await("all copies count", func() bool { return leader.t.insync.has(index) })
		}
		counting.mu.Lock()
		defer counting.mu.Unlock()
		for index := first; index < first+50; index++ {
			if counting.sent[index] != 2 {
				c.Errorf("entry %d was sent %d times to two replicas", index, counting.sent[index])
			}
		}
	})
}

// narrowPipeline takes a request when the answer before it has been taken.
type narrowPipeline struct{ answers chan raft.AppendFuture }

func (n narrowPipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	c := &call{args: args, resp: resp, complete: make(chan struct{})}
	resp.Success = true
	close(c.complete)
	n.answers <- c
	return c, nil
}

func (n narrowPipeline) Consumer() <-chan raft.AppendFuture { return n.answers }
func (n narrowPipeline) Close() error                       { return nil }

// Raft's decoder ends at an answer that it does not like, while its sender may be waiting for room on the wire.
func TestAPipelineTakesAnswersThatRaftLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		transport := newTransport(&nullTransport{})
		defer transport.Close()
		p := newPipeline(narrowPipeline{make(chan raft.AppendFuture)}, transport, "other")
		go p.relay()
		defer p.Close()
		for i := range uint64(5) {
			args := &raft.AppendEntriesRequest{Term: 1, PrevLogEntry: i, Entries: []*raft.Log{{Index: i + 1, Term: 1}}}
			if _, err := p.AppendEntries(args, new(raft.AppendEntriesResponse)); err != nil {
				t.Fatal(err)
			}
		}
		for i := range uint64(5) {
			if f := <-p.Consumer(); f.Request().PrevLogEntry != i || !f.Response().Success || f.Error() != nil {
				t.Fatalf("answer %d: %+v, %+v", i, f.Request(), f.Response())
			}
		}
	})
}

// handPipeline is a wire whose other side is the test.
type handPipeline struct {
	requests chan *call
	answers  chan raft.AppendFuture
	broken   error // of the next request
}

func (h *handPipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	c := &call{args: args, resp: resp, complete: make(chan struct{})}
	close(c.complete)
	h.requests <- c
	return c, h.broken
}

func (h *handPipeline) Consumer() <-chan raft.AppendFuture { return h.answers }
func (h *handPipeline) Close() error                       { return nil }

// aheadOnce begins a pipeline over which entry 1 was sent and accepted, and 2 went ahead.
func aheadOnce(t *testing.T, broken error) (p *pipeline, wire *handPipeline) {
	t.Helper()
	transport := newTransport(&nullTransport{})
	t.Cleanup(func() { _ = transport.Close() })
	wire = &handPipeline{requests: make(chan *call, 2), answers: make(chan raft.AppendFuture)}
	p = newPipeline(wire, transport, "other")
	t.Cleanup(func() { _ = p.Close() })
	go p.relay()
	go p.goAhead()
	p.ask(t, 1)
	wire.answer(true)
	<-p.Consumer()
	wire.broken = broken
	p.offer(requestFor(2))
	synctest.Wait()
	return p, wire
}

func requestFor(index uint64) *raft.AppendEntriesRequest {
	return &raft.AppendEntriesRequest{Term: 1, PrevLogEntry: index - 1, Entries: []*raft.Log{{Index: index, Term: 1}}}
}

// ask is raft's request for one entry.
func (p *pipeline) ask(t *testing.T, index uint64) {
	t.Helper()
	if _, err := p.AppendEntries(requestFor(index), new(raft.AppendEntriesResponse)); err != nil {
		t.Fatal(err)
	}
}

func (h *handPipeline) answer(accepted bool) {
	c := <-h.requests
	*c.resp = raft.AppendEntriesResponse{Term: 1, Success: accepted}
	h.answers <- c
}

// Raft waits for the answer to what went ahead: it gets it although that is a refusal, or nobody will ever answer.
func TestWhatWentAheadAndWasRefusedFailsRaftsRequest(t *testing.T) {
	for _, broken := range []error{nil, errors.New("the connection is gone")} {
		synctest.Test(t, func(t *testing.T) {
			p, wire := aheadOnce(t, broken)
			p.ask(t, 2)
			if broken == nil {
				wire.answer(false)
			}
			select {
			case f := <-p.Consumer():
				if f.Request().Entries[0].Index != 2 || f.Response().Success {
					t.Fatalf("%+v has the answer %+v", f.Request(), f.Response())
				}
			case <-time.After(time.Hour):
				t.Fatal("raft has no answer")
			}
		})
	}
}

// Why no read may rest on raft's lease: raft takes now for the time of an answer that is old.
func TestTheAnswerToWhatWentAheadMayBeOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, wire := aheadOnce(t, nil)
		wire.answer(true)
		time.Sleep(hungAfter) // the other side is silent, our own write goes on
		asked := time.Now()
		p.ask(t, 2)
		if f := <-p.Consumer(); !f.Response().Success || !f.Start().Equal(asked) || time.Since(asked) > 0 || len(wire.requests) > 0 {
			t.Errorf("raft has waited for %v: %+v", time.Since(f.Start()), f.Response())
		}
	})
}
