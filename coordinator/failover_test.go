package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Leadership is lost between a Step and its append, and regained: another coordinator has been active meanwhile, and what
// was computed before must not land on what it has done, wherever the entry got stuck.
func TestLeadershipLostAndRegainedBetweenStepAndAppend(t *testing.T) {
	for _, stuck := range []string{"with the coordinator", "with the appender"} {
		t.Run(stuck, func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				s, other := newSession(a.c, 1), newSession(b.c, 2)
				old := s.send(commit("orders", 5))
				if stuck == "with the appender" {
					a.mustAppend()
				}
				l.elect(b, 0)
				newer := other.send(commit("orders", 7))
				b.work()
				newer.is(t, "NONE")
				l.start(a, 0)
				if stuck == "with the appender" {
					a.replicate(1) // in a term that it was not computed in
				}
				l.activate()
				old.is(t, ErrInactive.Error())
				l.isCommitted("7")
				resent := s.again(old)
				a.work()
				resent.is(t, "NONE")
				l.isCommitted("5")
				l.failover(b, 0)
				l.isCommitted("5")
			})
		})
	}
}

// hashicorp/raft refuses entries while it transfers leadership, and takes them again when that has failed: a hole, under
// which nothing may be built.
func TestAHoleInTheAppendsEndsTheActivation(t *testing.T) {
	for _, order := range []string{"refusal first", "entry first"} {
		t.Run(order, func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				s := newSession(a.c, 1)
				first := s.send(commit("orders", 1))
				a.work()
				first.is(t, "NONE")
				all := []*sent{s.send(commit("orders", 2))}
				a.mustAppend()
				hole := a.tail[0]
				all = append(all, s.send(commit("orders", 3)))
				all = append(all, a.fill()...)
				a.mustAppend()
				a.tail = a.tail[1:]
				a.replicate(1)
				failed := replicate.Event{Kind: replicate.Failed, Term: hole.Term, Sequence: hole.Sequence, Err: replicate.ErrNotLeader}
				if order == "refusal first" {
					a.event(failed)
					a.deliver()
				} else {
					a.deliver()
					a.event(failed)
				}
				for _, r := range all {
					r.is(t, ErrInactive.Error())
				}
				if !slices.Equal(a.resigned, []uint64{1}) {
					t.Errorf("resigned from %v, want [1]", a.resigned)
				}
				l.failover(b, 0)
				l.isCommitted("1")
				s.c = b.c
				resent := s.again(all[0])
				b.work()
				resent.is(t, "NONE")
				l.isCommitted("2")
			})
		})
	}
}

// Two pipelined commits of one connection, of which the next coordinator finds none, the first or both.
func TestPipelinedCommitsOverAFailover(t *testing.T) {
	for live := range 3 {
		t.Run(fmt.Sprint(live, " replicated"), func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				s := newSession(a.c, 1)
				first := s.send(commit("orders", 1))
				a.mustAppend()
				second := s.send(commit("orders", 2))
				if a.append() {
					t.Fatal("the next entry does not grow")
				}
				a.fill()
				a.mustAppend()
				l.failover(b, live)
				first.is(t, ErrInactive.Error())
				second.is(t, ErrInactive.Error())
				s.c = b.c
				first, second = s.again(first), s.again(second)
				before := len(l.log)
				b.work()
				first.is(t, "NONE")
				second.is(t, "NONE")
				if live == 2 && len(l.log) > before {
					t.Error("what was replicated is appended again")
				}
				l.isCommitted("2")
				l.failover(a, 0)
				l.isCommitted("2")
			})
		})
	}
}

// The first of two pipelined commits is the older one, whatever was acknowledged of a third connection in between.
func TestAResentCommitDoesNotOverwriteANewerOne(t *testing.T) {
	withReplicas(t, 2, func(l *ledger) {
		a, b := l.replicas[0], l.replicas[1]
		s, newer := newSession(a.c, 1), newSession(b.c, 2)
		lost := s.send(commit("orders", 5))
		a.mustAppend()
		l.failover(b, 1)
		s.c = b.c
		acknowledged := newer.send(commit("orders", 9))
		b.work()
		acknowledged.is(t, "NONE")
		s.again(lost).is(t, "NONE")
		b.work()
		l.isCommitted("9")
	})
}

func deleteGroup() *kmsg.DeleteGroupsRequest {
	r := kmsg.NewPtrDeleteGroupsRequest()
	r.Version, r.Groups = 2, []string{"g"}
	return r
}

// DeleteGroups was executed and its answer lost; the group was born anew, of commits or of members, before it came again.
func TestAResentDeleteSparesTheGroupBornAnew(t *testing.T) {
	for _, born := range []string{"of commits", "of members"} {
		t.Run(born, func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				s := newSession(a.c, 1)
				s.send(commit("orders", 5))
				a.work()
				deleted := s.send(deleteGroup())
				a.mustAppend()
				l.failover(b, 1)
				deleted.is(t, ErrInactive.Error())
				l.isCommitted("-1")
				m := newConsumer(b, 2, 3)
				if born == "of members" {
					l.stable(m)
				}
				again := commit("orders", 1).(*kmsg.OffsetCommitRequest)
				if born == "of members" {
					again.Generation, again.MemberID = m.generation, m.member
				}
				m.send(again)
				b.work()
				s.c = b.c
				resent := s.again(deleted)
				b.work()
				synctest.Wait()
				if r := resent.response.(*kmsg.DeleteGroupsResponse); r.Groups[0].ErrorCode != 0 {
					t.Errorf("the delete that was executed is answered %s", errorName(r.Groups[0].ErrorCode))
				}
				l.isCommitted("1")
				if born == "of members" {
					l.isDescribed("Stable 1")
					m.heartbeat().is(t, "NONE")
				}
			})
		})
	}
}

// Appends are blocked, a hundred commits and a new group are speculative, then the coordinator is deposed: nobody was ever
// told of them, and no log holds them.
func TestNoSurfaceShowsWhatIsNotReplicated(t *testing.T) {
	withReplicas(t, 2, func(l *ledger) {
		a, b := l.replicas[0], l.replicas[1]
		s, reader := newSession(a.c, 1), newSession(a.c, 2)
		s.send(commit("orders", 5))
		a.work()
		var lost []*sent
		var shown []*sent
		list := kmsg.NewPtrListGroupsRequest()
		list.Version = 4
		describe := kmsg.NewPtrDescribeGroupsRequest()
		describe.Version, describe.Groups = 5, []string{"h"}
		for i := range 100 {
			lost = append(lost, s.send(commit("orders", int64(100+i))))
			newGroup := commit("orders", 1).(*kmsg.OffsetCommitRequest)
			newGroup.Group = "h"
			lost = append(lost, s.send(newGroup))
			if i == 50 {
				a.mustAppend()
			}
			shown = append(shown, reader.send(fetch()), reader.send(list), reader.send(describe))
		}
		for _, r := range shown {
			r.is(t, "parked")
		}
		l.elect(b, 0)
		for range 3 { // nor to those who ask meanwhile, and the log has yet to tell
			shown = append(shown, reader.send(fetch()), reader.send(list), reader.send(describe))
		}
		a.fail()
		a.depose()
		for _, r := range append(lost, shown...) {
			r.is(t, ErrInactive.Error())
		}
		for _, r := range []*replica{b, a} {
			l.failover(r, 0)
			l.isCommitted("5")
			listed := newSession(r.c, 3).send(list)
			synctest.Wait()
			if groups := listed.response.(*kmsg.ListGroupsResponse).Groups; len(groups) != 1 || groups[0].Group != "g" {
				t.Errorf("listed %+v, want g alone", groups)
			}
		}
		if len(l.log) != 1 {
			t.Errorf("the log has %d entries, want 1", len(l.log))
		}
	})
}

// As above, but it is the commit time-out that ends the waiting: an error is all that may be told.
func TestWhatTimesOutShowsNothing(t *testing.T) {
	withReplicas(t, 2, func(l *ledger) {
		a := l.replicas[0]
		s, reader := newSession(a.c, 1), newSession(a.c, 2)
		s.send(commit("orders", 5))
		a.work()
		s.send(commit("orders", 6))
		a.mustAppend()
		fetched := reader.send(fetch())
		time.Sleep(5 * time.Second)
		fetched.is(t, "NOT_COORDINATOR")
		l.failover(l.replicas[1], 0)
		l.isCommitted("5")
	})
}

// An activation ends by a fault of its own while its sidecar still leads: nothing is answered in that term any more, and
// whoever begins the next one, it or a peer, goes on where the log is.
func TestAnActivationThatEndsWhileItsSidecarLeads(t *testing.T) {
	for next := range 2 {
		t.Run([]string{"no peer takes over", "a peer takes over"}[next], func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, r := l.replicas[0], l.replicas[next]
				m := newConsumer(a, 1, 3)
				l.stable(m)
				c := commit("orders", 2).(*kmsg.OffsetCommitRequest)
				c.Generation, c.MemberID = m.generation, m.member
				lost := m.send(c)
				a.mustAppend()
				e := a.tail[0]
				a.event(replicate.Event{Kind: replicate.Failed, Term: 1, Sequence: e.Sequence, Err: errors.New("disk full")})
				a.tail = nil
				lost.is(t, ErrInactive.Error())
				m.heartbeat().is(t, ErrInactive.Error())
				if !slices.Equal(a.resigned, []uint64{1}) || a.c.Status().Active {
					t.Fatalf("resigned %v, active %t", a.resigned, a.c.Status().Active)
				}
				time.Sleep(4 * time.Second)
				l.failover(r, 0)
				m.c = r.c
				lost = m.again(lost)
				r.work()
				lost.is(t, "NONE")
				m.heartbeat().is(t, "NONE")
				l.isCommitted("2")
				l.isDescribed("Stable 1")
			})
		})
	}
}

// brokenTopics panics while it is broken, which breaks an invariant of the coordinator.
type brokenTopics struct {
	onlyOrders
	broken atomic.Bool
}

func (b *brokenTopics) Topic(name string) ([16]byte, int32, bool) {
	if b.broken.Load() {
		panic("broken")
	}
	return b.onlyOrders.Topic(name)
}

// The same with the real log of a sidecar that has no peers: it is active again in a new term.
func TestAnActivationThatEndsIsFollowedByAnother(t *testing.T) {
	node, err := replicate.Open(replicate.DefaultConfig(""))
	if err != nil {
		t.Fatal(err)
	}
	topics := &brokenTopics{}
	c := New(Config{Group: group.DefaultConfig(), CommitTimeout: time.Minute}, node, topics, slog.New(slog.DiscardHandler), nil)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- c.Run(ctx) }()
	ordinal := uint64(0)
	call := func(body kmsg.Request) kmsg.Response {
		for {
			ordinal++
			status := c.Status()
			if !status.Active {
				<-status.Changed
				continue
			}
			answers := make(chan kmsg.Response, 1)
			client := group.Client{Session: group.Session{1}, Ordinal: ordinal}
			c.Submit(&Request{Body: body, Client: client, Term: status.Term, Done: func(r kmsg.Response, _ error) { answers <- r }})
			if r := <-answers; r != nil {
				return r
			}
		}
	}
	call(commit("orders", 5))
	term := c.Status().Term
	for range 3 {
		topics.broken.Store(true)
		r := call(commit("orders", 6)).(*kmsg.OffsetCommitResponse)
		if code := r.Topics[0].Partitions[0].ErrorCode; errorName(code) != "UNKNOWN_SERVER_ERROR" {
			t.Errorf("the request that broke it is answered %s", errorName(code))
		}
		topics.broken.Store(false)
		if o := call(fetch()).(*kmsg.OffsetFetchResponse).Groups[0].Topics[0].Partitions[0].Offset; o != 5 {
			t.Errorf("the offset is %d, want 5", o)
		}
		now := c.Status().Term
		if now <= term {
			t.Errorf("active in term %d after term %d had ended", now, term)
		}
		term = now
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := node.Close(); err != nil {
		t.Error(err)
	}
}
