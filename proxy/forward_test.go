package proxy_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
)

func commitOf(partition int32, offset int64) *kmsg.OffsetCommitRequest {
	req := versioned(kmsg.NewPtrOffsetCommitRequest(), 8)
	req.Group, req.Generation = "g", -1
	p := kmsg.NewOffsetCommitRequestTopicPartition()
	p.Partition, p.Offset = partition, offset
	topic := kmsg.NewOffsetCommitRequestTopic()
	topic.Topic, topic.Partitions = "t", append(topic.Partitions, p)
	req.Topics = append(req.Topics, topic)
	return req
}

func fetchOf(partition int32) *kmsg.OffsetFetchRequest {
	req := versioned(kmsg.NewPtrOffsetFetchRequest(), 7)
	req.Group = "g"
	topic := kmsg.NewOffsetFetchRequestTopic()
	topic.Topic, topic.Partitions = "t", []int32{partition}
	req.Topics = append(req.Topics, topic)
	return req
}

// decoded reads a response to a request of that kind.
func decoded[R kmsg.Response](t testing.TB, like kmsg.Request, body []byte) R {
	t.Helper()
	resp := like.ResponseKind()
	if resp.IsFlexible() {
		body = body[1:]
	}
	if err := resp.ReadFrom(body); err != nil {
		t.Fatal(err)
	}
	return resp.(R)
}

// committedAs reads the answer to a commit with this correlation id.
func (c *client) committedAs(id int32, want int16) {
	c.t.Helper()
	got, body := c.receive()
	resp := decoded[*kmsg.OffsetCommitResponse](c.t, commitOf(0, 0), body)
	if code := resp.Topics[0].Partitions[0].ErrorCode; got != id || code != want {
		c.t.Fatalf("correlation id %d, not %d, or error %d, not %d", got, id, code, want)
	}
}

func (s *sidecar) client() *client { return dial(s.logs.t, s.Addr().String()) }

// untilActive waits until the coordinator is active in the newest term.
func (s *sidecar) untilActive() {
	s.logs.t.Helper()
	until(s.logs.t, "the coordinator is active", func() bool {
		s.log.mu.Lock()
		defer s.log.mu.Unlock()
		status := s.coord.Status()
		return status.Active && status.Term == s.log.term
	})
}

// untilWaiting waits until so many requests of a sidecar's clients have been read and not answered.
func (s *sidecar) untilWaiting(n int64) {
	s.logs.t.Helper()
	until(s.logs.t, fmt.Sprintf("%d requests wait", n), func() bool { return s.metrics.Value(tracing.RequestsInFlight) == n })
}

func untilSame(t testing.TB, what string, got func() []int64, want ...int64) {
	t.Helper()
	until(t, what, func() bool { return slices.Equal(got(), want) })
}

// A sidecar that is not active sends its clients' frames to the one that is, and passes the answers on.
func TestRequestsAreForwardedToTheActiveSidecar(t *testing.T) {
	c := startCluster(t, 2)
	a, b := c.all[0], c.all[1]
	cl := a.client()
	cl.send(1, commitOf(3, 41)) // held: nobody is active
	a.untilWaiting(1)
	c.lead(b)
	cl.committedAs(1, 0)
	if r := cl.call(fetchOf(3)).(*kmsg.OffsetFetchResponse); r.Topics[0].Partitions[0].Offset != 41 {
		t.Fatalf("%+v", r)
	}
	own := b.client()
	if r := own.call(fetchOf(3)).(*kmsg.OffsetFetchResponse); r.Topics[0].Partitions[0].Offset != 41 {
		t.Fatalf("%+v", r)
	}
	if r := cl.call(versioned(kmsg.NewPtrListGroupsRequest(), 4)).(*kmsg.ListGroupsResponse); len(r.Groups) != 1 || r.Groups[0].Group != "g" {
		t.Fatalf("%+v", r)
	}
	sent, taken := a.metrics.Value(tracing.ForwardedRequests), b.metrics.Value(tracing.PeerRequests)
	if links := a.metrics.Value(tracing.ForwardLinks); sent < 3 || taken < 3 || links != 1 || b.metrics.Value(tracing.ForwardedRequests) != 0 {
		t.Fatalf("%d sent, %d taken, %d links", sent, taken, links)
	}
}

// The active one turns from link to itself and back, and a client notices nothing.
func TestActiveSidecarMovesToAndFro(t *testing.T) {
	c := startCluster(t, 2)
	cl := c.all[0].client()
	var want []int64
	for i := range int64(10) {
		c.lead(c.all[i%2])
		cl.send(int32(i), commitOf(0, i))
		cl.committedAs(int32(i), 0)
		want = append(want, i)
	}
	untilSame(t, "each was executed once", func() []int64 { return c.committed(0) }, want...)
}

// (c): a commit lies unread in the socket of an active sidecar that is stopped; another takes over, and a newer commit is
// acknowledged; the stopped one leads again and reads on. The newer commit stands.
func TestCommitFrozenInASocketNeverOverwritesANewerOne(t *testing.T) {
	c := startCluster(t, 3)
	a, b, client := c.all[0], c.all[1], c.all[2]
	c.lead(a)
	cl := client.client()
	cl.send(1, commitOf(0, 1))
	cl.committedAs(1, 0)
	a.peers.gate.shut()
	a.log.freeze(true)
	cl.send(2, commitOf(0, 2))
	a.peers.gate.untilCaught(t)
	c.lead(b)
	cl.committedAs(2, 0)
	cl.send(3, commitOf(0, 3))
	cl.committedAs(3, 0)
	c.lead(a)
	a.log.freeze(false)
	a.untilActive()
	taken := a.metrics.Value(tracing.PeerRequests)
	a.peers.gate.thaw()
	cl.send(4, commitOf(1, 4))
	cl.committedAs(4, 0)
	until(t, "it has read on", func() bool { return a.metrics.Value(tracing.PeerRequests) > taken })
	untilSame(t, "the frozen one was executed once, by the new active sidecar", func() []int64 { return c.committed(0) }, 1, 2, 3)
}

// (d): two pipelined commits of one connection whose entries are lost, or whose answers are, with the active sidecar:
// both are executed once, in their order.
func TestPipelinedCommitsOverAFailover(t *testing.T) {
	for _, lost := range []string{"entries", "answers"} {
		t.Run(lost, func(t *testing.T) {
			c := startCluster(t, 3)
			a, b, client := c.all[0], c.all[1], c.all[2]
			c.lead(a)
			a.untilActive()
			cl := client.client()
			if lost == "entries" {
				c.locked(func() { c.blocked = true })
			} else {
				c.locked(func() { a.log.deaf = true })
			}
			cl.send(1, commitOf(0, 1))
			cl.send(2, commitOf(0, 2))
			if lost == "entries" {
				until(t, "both are with the coordinator", func() bool { return a.metrics.Value(tracing.PeerRequests) == 2 })
			} else {
				until(t, "one is replicated at least", func() bool { return len(c.committed(0)) >= 1 })
			}
			c.lead(b)
			c.locked(func() { c.blocked, a.log.deaf = false, false })
			cl.committedAs(1, 0)
			cl.committedAs(2, 0)
			untilSame(t, "each was executed once", func() []int64 { return c.committed(0) }, 1, 2)
		})
	}
}

// (f): the client of an unanswered commit closes, and commits something newer through another connection. Whoever is
// active next never executes the old one.
func TestCommitOfAClosedClientIsNotResent(t *testing.T) {
	c := startCluster(t, 3)
	a, b, client := c.all[0], c.all[1], c.all[2]
	c.lead(a)
	a.peers.gate.shut()
	a.log.freeze(true)
	old := client.client()
	old.send(1, commitOf(0, 1))
	a.peers.gate.untilCaught(t)
	_ = old.Close()
	newer := client.client()
	newer.send(1, commitOf(0, 2))
	c.lead(b)
	newer.committedAs(1, 0)
	a.log.freeze(false)
	a.peers.gate.thaw()
	until(t, "the old client is gone", func() bool { return client.Clients() == 1 })
	newer.send(2, commitOf(0, 3))
	newer.committedAs(2, 0)
	untilSame(t, "only the newer ones", func() []int64 { return c.committed(0) }, 2, 3)
}

func joinOf(member string) *kmsg.JoinGroupRequest {
	req := versioned(kmsg.NewPtrJoinGroupRequest(), 3) // without KIP-394's second step
	req.Group, req.MemberID, req.ProtocolType = "j", member, "consumer"
	req.SessionTimeoutMillis, req.RebalanceTimeoutMillis = 30_000, 60_000
	p := kmsg.NewJoinGroupRequestProtocol()
	p.Name = "range"
	req.Protocols = append(req.Protocols, p)
	return req
}

// (l): a JoinGroup is parked at the active sidecar, and a commit waits behind it on the same connection. After a failover
// both are answered rightly, and the resent join leaves no phantom member.
func TestParkedJoinWithACommitBehindItOverAFailover(t *testing.T) {
	c := startCluster(t, 3)
	a, b, client := c.all[0], c.all[1], c.all[2]
	c.lead(a)
	first := client.client()
	led := first.call(joinOf("")).(*kmsg.JoinGroupResponse)
	if led.ErrorCode != 0 || led.Generation != 1 {
		t.Fatalf("%+v", led)
	}
	sync := versioned(kmsg.NewPtrSyncGroupRequest(), 2)
	sync.Group, sync.MemberID, sync.Generation = "j", led.MemberID, 1
	if r := first.call(sync).(*kmsg.SyncGroupResponse); r.ErrorCode != 0 {
		t.Fatalf("%+v", r)
	}
	second := client.client()
	c.locked(func() { a.log.deaf = true }) // the commit is replicated, and not answered
	second.send(1, joinOf(""))             // parked until the first has joined again
	second.send(2, commitOf(0, 7))
	untilSame(t, "the commit was executed", func() []int64 { return c.committed(0) }, 7)
	term := c.elect(b)
	b.untilActive() // else both might come back once more, and the first join before them
	c.tell(term, b)
	until(t, "both are sent to the new one", func() bool { return b.metrics.Value(tracing.PeerRequests) >= 2 })
	again := first.call(joinOf(led.MemberID)).(*kmsg.JoinGroupResponse)
	id, body := second.receive()
	joined := decoded[*kmsg.JoinGroupResponse](t, joinOf(""), body)
	if id != 1 || joined.ErrorCode != 0 || again.ErrorCode != 0 || joined.Generation != again.Generation || len(again.Members)+len(joined.Members) != 2 {
		t.Fatalf("%+v\n%+v", joined, again)
	}
	second.committedAs(2, 0)
	untilSame(t, "it was executed once", func() []int64 { return c.committed(0) }, 7)
}

// (m): the connection between two sidecars is cut while frames are queued on it, and the activation goes on: they are sent
// again on another, and executed once.
func TestConnectionCutWithinAnActivation(t *testing.T) {
	c := startCluster(t, 2)
	a, client := c.all[0], c.all[1]
	c.lead(a)
	cl := client.client()
	var want []int64
	id := int32(0)
	for round := range 5 {
		if round%2 == 0 {
			c.locked(func() { c.blocked = true }) // executed, not answered
		} else {
			a.peers.gate.shut() // not even read
		}
		for range 20 {
			id++
			cl.send(id, commitOf(0, int64(id)))
			want = append(want, int64(id))
		}
		client.untilWaiting(20)
		client.peers.cut()
		if round%2 == 0 {
			c.locked(func() { c.blocked = false })
		} else {
			a.peers.gate.thaw()
		}
		for i := range int32(20) {
			cl.committedAs(id-19+i, 0)
		}
	}
	if got := c.committed(0); !slices.Equal(got, want) {
		t.Fatalf("%v", got)
	}
	if n := client.metrics.Value(tracing.ResentRequests); n == 0 {
		t.Fatal("nothing was sent again")
	}
}

// (m), for what is safe to repeat: a JoinGroup and a SyncGroup that are parked at the active sidecar are sent again when
// the connection is cut, and answered once; the join that has no member id yet leaves no phantom.
func TestParkedRequestsOfAConnectionThatIsCut(t *testing.T) {
	c := startCluster(t, 2)
	a, client := c.all[0], c.all[1]
	c.lead(a)
	a.untilActive()
	first, second := client.client(), client.client()
	led := first.call(joinOf("")).(*kmsg.JoinGroupResponse)
	syncOf := func(member string, generation int32) *kmsg.SyncGroupRequest {
		req := versioned(kmsg.NewPtrSyncGroupRequest(), 2)
		req.Group, req.MemberID, req.Generation = "j", member, generation
		return req
	}
	first.call(syncOf(led.MemberID, 1))
	cut := func() {
		taken := a.metrics.Value(tracing.PeerRequests)
		client.peers.cut()
		until(t, "the parked request is sent again", func() bool { return a.metrics.Value(tracing.PeerRequests) > taken })
	}
	sent := a.metrics.Value(tracing.PeerRequests)
	second.send(1, joinOf(""))
	until(t, "the join is parked", func() bool { return a.metrics.Value(tracing.PeerRequests) > sent })
	cut()
	cut()
	again := first.call(joinOf(led.MemberID)).(*kmsg.JoinGroupResponse)
	id, body := second.receive()
	joined := decoded[*kmsg.JoinGroupResponse](t, joinOf(""), body)
	if id != 1 || again.ErrorCode != 0 || joined.ErrorCode != 0 || again.Generation != 2 || joined.Generation != 2 || len(again.Members) != 2 {
		t.Fatalf("%+v\n%+v", again, joined)
	}
	sent = a.metrics.Value(tracing.PeerRequests)
	second.send(2, syncOf(joined.MemberID, 2)) // parked until the leader has sent the assignment
	until(t, "the sync is parked", func() bool { return a.metrics.Value(tracing.PeerRequests) > sent })
	cut()
	assign := syncOf(led.MemberID, 2)
	for _, m := range again.Members {
		x := kmsg.NewSyncGroupRequestGroupAssignment()
		x.MemberID, x.MemberAssignment = m.MemberID, []byte("of "+m.MemberID)
		assign.GroupAssignment = append(assign.GroupAssignment, x)
	}
	first.call(assign)
	id, body = second.receive()
	if r := decoded[*kmsg.SyncGroupResponse](t, assign, body); id != 2 || r.ErrorCode != 0 || string(r.MemberAssignment) != "of "+joined.MemberID {
		t.Fatalf("correlation id %d, %+v", id, r)
	}
}

// A client that goes while its requests are held, at a sidecar that is not active, takes them along.
func TestHeldRequestsOfAGoneClientAreNeverForwarded(t *testing.T) {
	c := startCluster(t, 2)
	a, b := c.all[0], c.all[1]
	cl := a.client()
	cl.send(1, commitOf(0, 1))
	a.untilWaiting(1)
	_ = cl.Close()
	until(t, "it is gone", func() bool { return a.Clients() == 0 })
	c.lead(b)
	other := a.client()
	other.send(1, commitOf(1, 1))
	other.committedAs(1, 0)
	if n := b.metrics.Value(tracing.PeerRequests); n != 1 || len(c.committed(0)) != 0 {
		t.Fatalf("%d requests were forwarded, %v executed", n, c.committed(0))
	}
}

// Frames larger than any buffer, both ways.
func TestLargeFramesAreForwarded(t *testing.T) {
	c := startCluster(t, 2)
	a, b := c.all[0], c.all[1]
	c.lead(b)
	cl := a.client()
	commit, fetch := commitOf(0, 1), fetchOf(0)
	text := strings.Repeat("x", 4096)
	for i := range int32(100) {
		p := kmsg.NewOffsetCommitRequestTopicPartition()
		p.Partition, p.Offset, p.Metadata = i, int64(i), &text
		commit.Topics[0].Partitions = append(commit.Topics[0].Partitions, p)
		fetch.Topics[0].Partitions = append(fetch.Topics[0].Partitions, i)
	}
	for range 3 {
		for _, p := range cl.call(commit).(*kmsg.OffsetCommitResponse).Topics[0].Partitions {
			if p.ErrorCode != 0 {
				t.Fatalf("%+v", p)
			}
		}
		got := cl.call(fetch).(*kmsg.OffsetFetchResponse).Topics[0].Partitions
		if len(got) != 101 || got[100].Offset != 99 || *got[100].Metadata != text {
			t.Fatalf("%d partitions, %+v", len(got), got[len(got)-1])
		}
	}
}

// A broker's listener shows its own groups also when the list comes from a peer.
func TestForwardedListGroupsShowsEachGroupOnItsNode(t *testing.T) {
	c := startCluster(t, 2)
	a, b := c.all[0], c.all[1]
	a.brokers.set(upstream.Broker{ID: 1, Host: "127.0.0.1", Port: 1}, upstream.Broker{ID: 2, Host: "127.0.0.1", Port: 1})
	c.lead(b)
	cl := a.client()
	for i := range 20 {
		req := commitOf(0, 1)
		req.Group = fmt.Sprint("group ", i)
		cl.call(req)
	}
	total := 0
	for node, addr := range a.Addrs() {
		n := len(dial(t, addr).call(versioned(kmsg.NewPtrListGroupsRequest(), 4)).(*kmsg.ListGroupsResponse).Groups)
		if total += n; n == 0 {
			t.Errorf("node %d has none of 20 groups", node)
		}
	}
	if n := len(cl.call(versioned(kmsg.NewPtrListGroupsRequest(), 4)).(*kmsg.ListGroupsResponse).Groups); total != 20 || n != 20 {
		t.Errorf("%d and %d of 20 groups", total, n)
	}
}

// wall is a peer that can be reached, takes everything, and answers nothing but signs of life, if any.
type wall struct {
	alive bool
	dials atomic.Int32
}

func (w *wall) Active() (uint64, string, <-chan struct{}) { return 1, "wall", nil }

func (w *wall) Dial(context.Context, string) (net.Conn, error) {
	if w.dials.Add(1) > 1 {
		return nil, errNotLeader
	}
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		for {
			message, err := readFrame(far)
			if err != nil {
				return
			}
			if m, _ := wire.ParsePeer(message); m.Kind == wire.PeerPing && w.alive {
				_, _ = far.Write(wire.AppendPeer(nil, &wire.PeerMessage{Kind: wire.PeerPong}))
			}
		}
	}()
	return near, nil
}

// A join waits for its group at the active sidecar as long as that shows signs of life; if it shows none, and nobody takes
// its place, the join is answered when a rebalance has had its time.
func TestJoinAtASilentPeerIsAnsweredInTime(t *testing.T) {
	for _, alive := range []bool{true, false} {
		inBubble(t, func(t *testing.T, network *kfake.VirtualNetwork, c proxy.Config) {
			w := &wall{alive: alive}
			s := start(t, c, func(s *side) { s.peers, s.echo = w, newEcho(false) })
			cl := dialIn(t, network, c.Listen)
			begin := time.Now()
			cl.send(1, joinOf(""))
			if alive {
				time.Sleep(time.Hour)
				if w.dials.Load() != 1 || s.metrics.Value(tracing.RequestsInFlight) != 1 {
					t.Fatal("the join is not parked any more")
				}
			} else if id, _ := cl.receive(); id != 1 || time.Since(begin) < 70*time.Second || time.Since(begin) > 75*time.Second {
				t.Fatalf("correlation id %d after %v", id, time.Since(begin))
			}
			s.stop()
		})
	}
}

// What nobody answers is answered by its deadline; and later, when it can be executed, it is not.
func TestForwardedCommitIsAnsweredByItsDeadline(t *testing.T) {
	c := startCluster(t, 2, func(c *proxy.Config) { c.CommitTimeout = 300 * time.Millisecond })
	a, b := c.all[0], c.all[1]
	c.lead(b)
	b.peers.gate.shut()
	cl := a.client()
	begin := time.Now()
	cl.send(1, commitOf(0, 1))
	cl.committedAs(1, kerr.CoordinatorNotAvailable.Code)
	if took := time.Since(begin); took < 300*time.Millisecond {
		t.Fatalf("after %v", took)
	}
	a.peers.cut()
	b.peers.gate.thaw()
	until(t, "commits are answered in time again", func() bool {
		return cl.call(commitOf(0, 2)).(*kmsg.OffsetCommitResponse).Topics[0].Partitions[0].ErrorCode == 0
	})
	if got := c.committed(0); got[len(got)-1] != 2 {
		t.Fatal(got)
	}
}

// Clients commit through every sidecar, pipelined, while the active one changes, is stopped, or loses its connections.
// Each commit is answered in its order, and the log has each once, in order. FORWARD_SEED repeats a seed that failed.
func TestEachCommitIsExecutedOnceAndInOrder(t *testing.T) {
	seeds := []uint64{rand.Uint64(), rand.Uint64()}
	if s := os.Getenv("FORWARD_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = []uint64{seed}
	}
	for _, seed := range seeds {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) { changesOfTheActive(t, seed) })
	}
}

func changesOfTheActive(t *testing.T, seed uint64) {
	const clients, commits = 6, 400
	c := startCluster(t, 3)
	rng := rand.New(rand.NewPCG(seed, 1))
	var all sync.WaitGroup
	for i := range int32(clients) {
		commitAll(&all, c.all[i%3].client(), i, commits)
	}
	left := make(chan struct{})
	go func() {
		all.Wait()
		close(left)
	}()
	var stopped *sidecar
	thaw := func() {
		if stopped != nil {
			stopped.log.freeze(false)
			stopped.peers.gate.thaw()
			stopped = nil
		}
	}
	defer thaw()
	for busy := true; busy; {
		pick := c.all[rng.IntN(3)]
		what := rng.IntN(6)
		if pick == stopped || what >= 4 {
			thaw()
		}
		switch what {
		case 0, 1:
			c.lead(pick)
		case 2: // told late, and one after the other
			term := c.elect(pick)
			for _, i := range rng.Perm(3) {
				time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
				c.all[i].peers.tell(term, pick.id)
			}
		case 3:
			pick.peers.cut()
		case 5: // stopped, and another takes over
			stopped = pick
			pick.peers.gate.shut()
			pick.log.freeze(true)
			c.lead(c.all[(slices.Index(c.all, pick)+1+rng.IntN(2))%3])
		}
		select {
		case <-left:
			busy = false
		case <-time.After(time.Duration(rng.IntN(8000)) * time.Microsecond):
		}
	}
	for i := range int32(clients) {
		if got := c.committed(i); len(got) != commits || !slices.IsSorted(got) {
			t.Errorf("seed %d: client %d: %d commits were executed, of %d, or not in order: %v", seed, i, len(got), commits, got)
		}
	}
}

// commitAll has a client commit the offsets from 0 to n-1, several of them on their way at a time.
func commitAll(all *sync.WaitGroup, cl *client, partition int32, n int32) {
	room := make(chan struct{}, 16)
	all.Go(func() {
		for i := range n {
			room <- struct{}{}
			if _, err := cl.Write(kmsg.NewRequestFormatter().AppendRequest(nil, commitOf(partition, int64(i)), i)); err != nil {
				return // the reader says so, too
			}
		}
	})
	all.Go(func() {
		for i := range n {
			id, body := cl.receive()
			resp := commitOf(0, 0).ResponseKind().(*kmsg.OffsetCommitResponse)
			if err := resp.ReadFrom(body[1:]); err != nil || id != i || resp.Topics[0].Partitions[0].ErrorCode != 0 {
				cl.t.Errorf("correlation id %d, not %d, or %+v, %v", id, i, resp, err)
			}
			<-room
		}
	})
}
