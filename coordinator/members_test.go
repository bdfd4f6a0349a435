package coordinator

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// A coordinator is stopped with a SyncGroup in its queue, and resumed when another one has led the group through a
// rebalance: no assignment of the old generation may be given out, to a follower or to the leader that brings it.
func TestADeposedCoordinatorGivesOutNoAssignment(t *testing.T) {
	for _, state := range []string{"Stable", "CompletingRebalance"} {
		t.Run(state, func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				m, other := newConsumer(a, 1, 3), newConsumer(b, 2, 3)
				if state == "Stable" {
					l.stable(m)
					m.heartbeat().is(t, "NONE") // with a fence that is a moment old when the coordinator is deposed
				} else {
					l.join(m)
				}
				frozen := *m
				l.elect(b, 0)
				m.c = b.c
				l.stable(other, m)
				if other.generation != m.generation || m.generation <= frozen.generation {
					t.Fatalf("generations %d and %d", m.generation, other.generation)
				}
				frozen.session = &session{c: a.c, client: m.client, ordinal: m.ordinal}
				queued := frozen.sync() // a is resumed
				synctest.Wait()
				a.append()
				a.fail()
				a.depose()
				queued.is(t, ErrInactive.Error())
				other.heartbeat().is(t, "NONE")
			})
		})
	}
}

// The active sidecar dies between Join and Sync: the round was replicated before it was told, so the rebalance goes on.
func TestARebalanceGoesOnAfterAFailover(t *testing.T) {
	for _, lost := range []string{"nothing", "the followers' syncs", "the answers to the joins"} {
		t.Run(lost, func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				one, two := newConsumer(a, 1, 3), newConsumer(a, 2, 3)
				l.join(one)
				joins := []*sent{two.join()}
				a.work()
				joins = append(joins, one.join()) // told by its heartbeat
				a.mustAppend()
				var syncs []*sent
				if lost == "the answers to the joins" {
					l.failover(b, 1)
				} else {
					a.replicate(1)
					a.deliver()
					two.joined(joins[0])
					one.joined(joins[1])
					if lost == "the followers' syncs" {
						syncs = append(syncs, two.sync())
						syncs[0].is(t, "parked")
					}
					l.failover(b, 0)
				}
				one.c, two.c = b.c, b.c
				if lost == "the answers to the joins" {
					for i, m := range []*consumer{two, one} {
						joins[i].is(t, ErrInactive.Error())
						joins[i] = m.again(joins[i])
						b.work()
						joins[i].is(t, "NONE generation 2")
						m.joined(joins[i])
					}
				}
				if one.generation != 2 || two.generation != 2 || !one.leader || len(one.members) != 2 {
					t.Fatalf("%+v, %+v", one, two)
				}
				if syncs != nil {
					syncs[0] = two.again(syncs[0])
				} else {
					syncs = append(syncs, two.sync())
				}
				syncs[0].is(t, "parked")
				synced := one.sync()
				b.work()
				one.isAssigned(t, synced)
				two.isAssigned(t, syncs[0])
				l.isDescribed("Stable 2")
			})
		})
	}
}

// A member id was handed out (KIP-394) and not used when the active sidecar died: the client that comes with it is told
// that nobody knows it, and joins anew.
func TestAFailoverBetweenTheStepsOfAJoinLeavesNoPhantom(t *testing.T) {
	for _, step := range []string{"first answer lost", "second join on its way", "second join executed"} {
		t.Run(step, func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				m := newConsumer(a, 1, 9)
				join := m.join()
				a.mustAppend() // the group's birth
				if step == "first answer lost" {
					l.failover(b, 1)
					m.c = b.c
					join = m.again(join)
					join.is(t, "MEMBER_ID_REQUIRED generation -1")
					m.joined(join)
					l.stable(m)
					l.isDescribed("Stable 1")
					return
				}
				a.replicate(1)
				a.deliver()
				join.is(t, "MEMBER_ID_REQUIRED generation -1")
				m.joined(join)
				join = m.join()
				if step == "second join executed" {
					a.mustAppend()
					l.failover(b, 1)
				} else {
					l.failover(b, 0)
				}
				join.is(t, ErrInactive.Error())
				m.c = b.c
				join = m.again(join)
				b.work()
				if step == "second join executed" {
					join.is(t, "NONE generation 1")
					m.joined(join)
				} else {
					join.is(t, "UNKNOWN_MEMBER_ID generation -1")
					m.member = ""
				}
				l.stable(m)
				l.isDescribed("Stable 1")
			})
		})
	}
}

// A join without a member id comes again, executed or not: it is one member.
func TestAResentJoinLeavesNoPhantom(t *testing.T) {
	instance := "i"
	for _, instanceID := range []*string{nil, &instance} {
		for live := range 2 {
			t.Run(fmt.Sprint("static ", instanceID != nil, ", executed ", live == 1), func(t *testing.T) {
				withReplicas(t, 2, func(l *ledger) {
					a, b := l.replicas[0], l.replicas[1]
					m := newConsumer(a, 1, 3)
					m.version, m.instance = 3, instanceID
					if instanceID != nil {
						m.version = 9
					}
					join := m.join()
					a.mustAppend()
					l.failover(b, live)
					m.c = b.c
					join = m.again(join)
					b.work()
					join.is(t, "NONE generation 1")
					m.joined(join)
					l.isDescribed("CompletingRebalance 1")
					l.failover(a, 0) // and once more
					m.c = a.c
					join = m.again(join)
					a.work()
					join.is(t, "NONE generation 1")
					before := m.member
					m.joined(join)
					if m.member != before {
						t.Errorf("the member is %s, was %s", m.member, before)
					}
					l.stable(m)
					l.isDescribed("Stable 1")
				})
			})
		}
	}
}

// A static member comes back while the sidecar dies: its place is one place, and the others do not rebalance.
func TestAStaticMemberThatComesBackOverAFailoverKeepsItsPlace(t *testing.T) {
	instance := "i"
	for live := range 2 {
		t.Run(fmt.Sprint("executed ", live == 1), func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				other, m := newConsumer(a, 1, 3), newConsumer(a, 2, 9)
				m.instance = &instance
				l.stable(other, m)
				back := newConsumer(a, 2, 9) // with the same subscription
				back.instance, back.client.Session = &instance, [16]byte{2, 1}
				join := back.join()
				a.mustAppend()
				l.failover(b, live)
				other.c, back.c = b.c, b.c
				join = back.again(join)
				b.work()
				join.is(t, fmt.Sprint("NONE generation ", m.generation))
				back.joined(join)
				back.isAssignedAs(l, m.member)
				l.isDescribed("Stable 2")
				other.heartbeat().is(t, "NONE")
				back.heartbeat().is(t, "NONE")
				m.c = b.c
				m.heartbeat().is(t, "FENCED_INSTANCE_ID")
			})
		})
	}
}

func (m *consumer) isAssignedAs(l *ledger, assignment string) {
	l.t.Helper()
	a := m.sync()
	l.leader.work()
	synctest.Wait()
	if r, ok := a.response.(*kmsg.SyncGroupResponse); !ok || string(r.MemberAssignment) != assignment {
		l.t.Errorf("synced: %v, %+v", a, a.response)
	}
}

// Whatever dies: stable groups keep their members and their generation, and no heartbeat fails.
func TestAStableGroupOutlivesFailovers(t *testing.T) {
	withReplicas(t, 3, func(l *ledger) {
		instance := "i"
		members := []*consumer{newConsumer(l.leader, 1, 3), newConsumer(l.leader, 2, 9), newConsumer(l.leader, 3, 9)}
		members[2].instance = &instance
		l.stable(members...)
		generation := members[0].generation
		for i := range 20 {
			r := l.replicas[(i+1)%3]
			var before []*sent
			if i%2 == 1 {
				l.leader.holdFences(true) // they are on their way when the sidecar dies
				for _, m := range members {
					before = append(before, m.heartbeat())
				}
			}
			l.leader.holdFences(false)
			l.failover(r, 0)
			for j, m := range members {
				m.c = r.c
				var beat *sent
				if before != nil {
					before[j].is(t, ErrInactive.Error())
					beat = m.again(before[j])
				} else {
					beat = m.heartbeat()
				}
				beat.is(t, "NONE")
				c := commit("orders", int64(i)).(*kmsg.OffsetCommitRequest)
				c.Generation, c.MemberID, c.InstanceID = generation, m.member, m.instance
				committed := m.send(c)
				r.work()
				committed.is(t, "NONE")
			}
			time.Sleep(8 * time.Second) // each coordinator gives sessions their full time of 10 s
			l.isDescribed("Stable 3")
			time.Sleep(time.Second) // no fence is recent
		}
	})
}

// A process that is stopped for longer than the session time-out, active or not, costs nobody its membership.
func TestAPausedSidecarAmongPeersExpelsNobody(t *testing.T) {
	withReplicas(t, 2, func(l *ledger) {
		a, b := l.replicas[0], l.replicas[1]
		m := newConsumer(a, 1, 3)
		l.stable(m)
		wake := make(chan struct{})
		a.c.Submit(&Request{Body: fetch(), Client: newSession(a.c, 9).client, Term: 1, Done: func(kmsg.Response, error) { <-wake }})
		synctest.Wait() // a's loop stands still
		l.start(b, 0)
		l.activate()
		m.c = b.c
		for range 5 {
			time.Sleep(5 * time.Second)
			m.heartbeat().is(t, "NONE")
		}
		close(wake)
		synctest.Wait()
		a.append() // if it were to expel the member now, the entry would be lost
		a.fail()
		a.depose()
		l.failover(a, 0) // it leads again
		m.c = a.c
		m.heartbeat().is(t, "NONE")
		l.isDescribed("Stable 1")
		time.Sleep(9 * time.Second)
		m.heartbeat().is(t, "NONE")
	})
}

// A join is parked and a commit waits behind it on one connection when the sidecar dies: both are answered rightly.
func TestACommitBehindAParkedJoinOverAFailover(t *testing.T) {
	for live := range 2 {
		t.Run(fmt.Sprint("commit replicated ", live == 1), func(t *testing.T) {
			withReplicas(t, 2, func(l *ledger) {
				a, b := l.replicas[0], l.replicas[1]
				one, two := newConsumer(a, 1, 3), newConsumer(a, 2, 3)
				l.stable(one, two)
				three := newConsumer(a, 3, 3)
				joining := []*sent{three.join(), two.join()} // one has yet to come
				synctest.Wait()
				c := commit("orders", 7).(*kmsg.OffsetCommitRequest)
				c.Generation, c.MemberID = two.generation, two.member
				committed := two.send(c)
				a.mustAppend()
				l.failover(b, live)
				one.c, two.c, three.c = b.c, b.c, b.c
				for i, m := range []*consumer{three, two} {
					joining[i].is(t, ErrInactive.Error())
					joining[i] = m.again(joining[i])
				}
				committed = two.again(committed)
				b.work()
				committed.is(t, "NONE")
				l.isCommitted("7")
				one.heartbeat().is(t, "REBALANCE_IN_PROGRESS")
				last := one.join()
				b.work()
				for _, a := range []*sent{joining[0], joining[1], last} {
					a.is(t, fmt.Sprint("NONE generation ", one.generation+1))
				}
				l.isDescribed("CompletingRebalance 3")
			})
		})
	}
}
