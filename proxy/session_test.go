package proxy_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// park keeps requests until the test answers them or gives them back.
type park struct {
	mu   sync.Mutex
	kept []*coordinator.Request
}

func (p *park) keep(r *coordinator.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kept = append(p.kept, r)
}

func (p *park) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.kept)
}

func (p *park) take() []*coordinator.Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := p.kept
	p.kept = nil
	return kept
}

func ordinals(all []*coordinator.Request) (n []uint64) {
	for _, r := range all {
		n = append(n, r.Client.Ordinal)
	}
	return n
}

func alone(t *testing.T, change ...func(*side)) *side {
	b := newBroker(t, 1, echoBody)
	change = append(change, func(s *side) { s.brokers.set(b.broker()) })
	return start(t, config(b.addr()), change...)
}

// While no coordinator is active requests are held, and sent in their order when one is.
func TestRequestsAreHeldWhileNobodyIsActive(t *testing.T) {
	s := alone(t, func(s *side) { s.echo = newEcho(false) })
	c := dial(t, s.Addrs()[1])
	for id := range int32(5) {
		c.send(id, heartbeat("m"))
	}
	find := versioned(kmsg.NewPtrFindCoordinatorRequest(), 2)
	find.CoordinatorKey = "g"
	if f := dial(t, s.Addr().String()).call(find).(*kmsg.FindCoordinatorResponse); f.ErrorCode != 0 || f.NodeID != 1 {
		t.Fatalf("FindCoordinator needs no coordinator: %+v", f)
	}
	s.echo.set(true, 2)
	for want := range int32(5) {
		if id, _ := c.receive(); id != want {
			t.Fatalf("correlation id %d, not %d", id, want)
		}
	}
	if got := ordinals(s.echo.requests()); !slices.Equal(got, []uint64{1, 2, 3, 4, 5}) {
		t.Fatal(got)
	}
}

// What comes back unanswered when an activation ends is sent again in order, before anything newer, and not before all
// of it is back.
func TestUnansweredRequestsAreResentInOrder(t *testing.T) {
	p := &park{}
	s := alone(t, func(s *side) { s.echo.answer = p.keep })
	c := dial(t, s.Addrs()[1])
	for id := range int32(4) {
		c.send(id, heartbeat("m"))
	}
	until(t, "all are with the coordinator", func() bool { return p.len() == 4 })
	first := p.take()
	first[1].Done(first[1].Body.ResponseKind(), nil) // one was answered in time
	s.echo.set(false, 1)
	first[3].Done(nil, coordinator.ErrInactive)
	s.echo.set(true, 2)
	c.send(4, heartbeat("m")) // newer
	first[0].Done(nil, coordinator.ErrInactive)
	if n := p.len(); n != 0 {
		t.Fatalf("%d were sent while one of the old activation is still out", n)
	}
	first[2].Done(nil, coordinator.ErrInactive)
	until(t, "they are sent again", func() bool { return p.len() == 4 })
	second := p.take()
	if got := ordinals(second); !slices.Equal(got, []uint64{1, 3, 4, 5}) {
		t.Fatal(got)
	}
	for _, r := range slices.Backward(second) {
		if r.Term != 2 || r.Client.Session != first[0].Client.Session {
			t.Fatalf("%+v", r)
		}
		r.Done(r.Body.ResponseKind(), nil)
	}
	for want := range int32(5) {
		if id, _ := c.receive(); id != want {
			t.Fatalf("correlation id %d, not %d", id, want)
		}
	}
}

// Each request is answered by its deadline, with the error that its clients retry.
func TestHeldRequestsAreAnsweredByTheirDeadline(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	conf := config(b.addr())
	conf.CommitTimeout = 200 * time.Millisecond
	s := start(t, conf, func(s *side) { s.echo = newEcho(false) })
	commit := versioned(kmsg.NewPtrOffsetCommitRequest(), 7)
	topic := kmsg.NewOffsetCommitRequestTopic()
	topic.Topic = "t"
	topic.Partitions = append(topic.Partitions, kmsg.NewOffsetCommitRequestTopicPartition())
	commit.Topics = append(commit.Topics, topic)
	begin := time.Now()
	resp := dial(t, s.Addr().String()).call(commit).(*kmsg.OffsetCommitResponse)
	if code := resp.Topics[0].Partitions[0].ErrorCode; code != kerr.CoordinatorNotAvailable.Code || time.Since(begin) < 200*time.Millisecond {
		t.Fatalf("error %d after %v", code, time.Since(begin))
	}
	join := versioned(kmsg.NewPtrJoinGroupRequest(), 5)
	join.RebalanceTimeoutMillis = 1000
	if resp := dial(t, s.Addr().String()).call(join).(*kmsg.JoinGroupResponse); resp.ErrorCode != kerr.CoordinatorNotAvailable.Code {
		t.Fatalf("error %d", resp.ErrorCode)
	}
	s.echo.set(true, 2)
	time.Sleep(20 * time.Millisecond) // time to do what it must not
	if n := len(s.echo.requests()); n != 0 {
		t.Fatalf("%d requests were executed after they had been answered", n)
	}
}

// Requests held for a client that has gone are never executed.
func TestHeldRequestsOfAClosedClientAreDropped(t *testing.T) {
	s := alone(t, func(s *side) { s.echo = newEcho(false) })
	gone, stays := dial(t, s.Addrs()[1]), dial(t, s.Addrs()[1])
	gone.send(1, heartbeat("gone"))
	stays.send(1, heartbeat("stays"))
	until(t, "both are held", func() bool { return s.metrics.Value(tracing.RequestsInFlight) == 2 })
	_ = gone.Close()
	until(t, "it has gone", func() bool { return s.Clients() == 1 })
	s.echo.set(true, 2)
	stays.receive()
	if got := s.echo.requests(); len(got) != 1 || got[0].Body.(*kmsg.HeartbeatRequest).MemberID != "stays" {
		t.Fatalf("%d requests were executed", len(got))
	}
}

// Each session has an id of its own, and says who the client is.
func TestSessionNamesTheClient(t *testing.T) {
	s := alone(t)
	a, b := dial(t, s.Addrs()[1]), dial(t, s.Addr().String())
	a.call(heartbeat("m"))
	b.call(heartbeat("m"))
	b.call(heartbeat("m"))
	got := s.echo.requests()
	if got[0].Client.Session == got[1].Client.Session || got[1].Client.Session != got[2].Client.Session {
		t.Fatal("sessions are not connections")
	}
	if c := got[2].Client; c.Ordinal != 2 || c.ID != "raw" || c.Host != "/127.0.0.1" {
		t.Fatalf("%+v", c)
	}
}

// ListGroups shows each group on the listener of the node that FindCoordinator names for it, and all on the bootstrap
// listener.
func TestListGroupsShowsEachGroupOnItsNode(t *testing.T) {
	var all []upstream.Broker
	for id := range int32(3) {
		all = append(all, upstream.Broker{ID: id, Host: "127.0.0.1", Port: 1})
	}
	s := start(t, config("127.0.0.1:1"), func(s *side) {
		s.brokers.set(all...)
		s.echo.answer = func(r *coordinator.Request) {
			resp := r.Body.ResponseKind().(*kmsg.ListGroupsResponse)
			for i := range 30 {
				g := kmsg.NewListGroupsResponseGroup()
				g.Group = fmt.Sprintf("group %d", i)
				resp.Groups = append(resp.Groups, g)
			}
			r.Done(resp, nil)
		}
	})
	list := func(addr string) *kmsg.ListGroupsResponse {
		return dial(t, addr).call(versioned(kmsg.NewPtrListGroupsRequest(), 2)).(*kmsg.ListGroupsResponse)
	}
	if n := len(list(s.Addr().String()).Groups); n != 30 {
		t.Fatalf("the bootstrap listener shows %d", n)
	}
	total := 0
	for node, addr := range s.Addrs() {
		groups := list(addr).Groups
		total += len(groups)
		if len(groups) == 0 {
			t.Errorf("node %d has none of 30 groups", node)
		}
		for _, g := range groups {
			find := versioned(kmsg.NewPtrFindCoordinatorRequest(), 2)
			find.CoordinatorKey = g.Group
			f := dial(t, s.Addr().String()).call(find).(*kmsg.FindCoordinatorResponse)
			if f.NodeID != node || int(f.Port) != portOf(addr) {
				t.Fatalf("%q is listed on node %d and found on %d", g.Group, node, f.NodeID)
			}
		}
	}
	if total != 30 {
		t.Fatalf("the broker listeners show %d", total)
	}
}

// A join that comes back unanswered, however long its group has kept it, is held no longer than a rebalance may take.
func TestJoinWhoseActivationEndsIsAnsweredByItsDeadline(t *testing.T) {
	inBubble(t, func(t *testing.T, network *kfake.VirtualNetwork, c proxy.Config) {
		p := &park{}
		s := start(t, c, func(s *side) { s.echo.answer = p.keep })
		cl := dialIn(t, network, c.Listen)
		join := versioned(kmsg.NewPtrJoinGroupRequest(), 5)
		join.RebalanceTimeoutMillis = 300_000
		cl.send(1, join)
		synctest.Wait()
		time.Sleep(time.Hour) // parked: a group may take as long as it likes
		s.echo.set(false, 1)
		begin := time.Now()
		p.take()[0].Done(nil, coordinator.ErrInactive)
		if id, _ := cl.receive(); id != 1 || time.Since(begin) != 5*time.Minute {
			t.Fatalf("correlation id %d after %v", id, time.Since(begin))
		}
		s.stop()
	})
}
