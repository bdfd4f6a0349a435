package replicate

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// ranks is a cluster of bare raft nodes, in memory and in a bubble of synctest, whose leaders keep the roles. Gossip is a
// list that the test writes.
type ranks struct {
	t       *testing.T
	mu      sync.Mutex
	nodes   map[string]*rankNode
	changed chan struct{}
	workers sync.WaitGroup
}

type rankNode struct {
	id        string
	raft      *raft.Raft
	transport *raft.InmemTransport
	store     *raft.InmemStore
	member    gossipMember
	up        bool
	mute      bool // it does not answer on its peer port
	asked     int  // to answer
	late      bool // it answers raft later than a voter may
	cancel    context.CancelFunc

	mu            sync.Mutex
	configuration raft.Configuration
	index         uint64
}

// Apply, Snapshot, Restore: there is no state but the configuration.
func (n *rankNode) Apply(*raft.Log) any { return nil }
func (n *rankNode) StoreConfiguration(index uint64, c raft.Configuration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.index, n.configuration = index, c
}
func (n *rankNode) Snapshot() (raft.FSMSnapshot, error) { return n, nil }
func (n *rankNode) Persist(s raft.SnapshotSink) error   { return s.Close() }
func (n *rankNode) Release()                            {}
func (n *rankNode) Restore(r io.ReadCloser) error       { return r.Close() }

func (n *rankNode) configured() (uint64, raft.Configuration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.index, n.configuration
}

func newRanks(t *testing.T) *ranks {
	return &ranks{t: t, nodes: map[string]*rankNode{}, changed: make(chan struct{})}
}

// start runs a node; the first is a cluster of one, the others wait to be added.
func (k *ranks) start(id string) {
	k.t.Helper()
	_, transport := raft.NewInmemTransportWithTimeout(raft.ServerAddress(id), 200*time.Millisecond)
	n := &rankNode{id: id, transport: transport, store: raft.NewInmemStore(), up: true}
	c := raft.DefaultConfig()
	c.LocalID, c.LogOutput, c.LogLevel = raft.ServerID(id), io.Discard, "off"
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = 500*time.Millisecond, 500*time.Millisecond, 250*time.Millisecond
	snapshots := raft.NewInmemSnapshotStore()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.nodes) == 0 {
		one := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(id), Address: raft.ServerAddress(id)}}}
		if err := raft.BootstrapCluster(c, n.store, n.store, snapshots, transport, one); err != nil {
			k.t.Fatal(err)
		}
	}
	var err error
	if n.raft, err = raft.NewRaft(c, n, n.store, n.store, snapshots, transport); err != nil {
		k.t.Fatal(err)
	}
	for _, o := range k.nodes {
		if o.up {
			o.transport.Connect(raft.ServerAddress(id), transport)
			transport.Connect(raft.ServerAddress(o.id), o.transport)
		}
	}
	k.nodes[id] = n
	n.member = gossipMember{ID: id, State: gossipAlive, Since: time.Now(), Tags: map[string]string{}}
	k.tell()
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	k.workers.Go(func() { k.lead(ctx, n) })
}

// lead keeps the roles while n leads.
func (k *ranks) lead(ctx context.Context, n *rankNode) {
	r := newRoles(rolesConfig{
		node: n.id, maxVoters: 3, raft: n.raft, configuration: n.configured, members: k.members,
		changed: func() <-chan struct{} {
			k.mu.Lock()
			defer k.mu.Unlock()
			return k.changed
		},
		progress: k.progress, answers: k.answers, log: slog.New(slog.DiscardHandler), timing: defaultRoleTiming,
	})
	var leading sync.WaitGroup
	stop := func() {}
	for {
		select {
		case is := <-n.raft.LeaderCh():
			stop()
			leading.Wait()
			if is {
				var term context.Context
				term, stop = context.WithCancel(ctx)
				leading.Go(func() { r.reconcileRoles(term) })
			}
		case <-ctx.Done():
			stop()
			leading.Wait()
			return
		}
	}
}

func (k *ranks) tell() {
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *ranks) members() (all []gossipMember) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(k.nodes)) {
		all = append(all, k.nodes[id].member)
	}
	return all
}

// progress: whoever is up answers at once.
func (k *ranks) progress() map[string]peerProgress {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := map[string]peerProgress{}
	for id, n := range k.nodes {
		if n.up {
			p := peerProgress{match: n.raft.LastIndex(), contact: time.Now(), steady: time.Hour}
			if n.late {
				p.steady = 0
			}
			all[id] = p
		}
	}
	return all
}

// answers: whoever is up does, at once, unless it is mute.
func (k *ranks) answers(ctx context.Context, id string) error {
	k.mu.Lock()
	n := k.nodes[id]
	n.asked++
	answers := n.up && !n.mute
	k.mu.Unlock()
	if !answers {
		<-ctx.Done()
	}
	return ctx.Err()
}

// mute lets a node answer no longer, or again.
func (k *ranks) mute(id string, mute bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.nodes[id].mute = mute
}

func (k *ranks) gossip(id string, state gossipState) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.nodes[id].member.State, k.nodes[id].member.Since = state, time.Now()
	k.tell()
}

// crash cuts a node off; gossip notices after a while.
func (k *ranks) crash(id string) {
	k.stop(id)
	time.Sleep(5 * time.Second)
	k.gossip(id, gossipFailed)
}

func (k *ranks) stop(id string) {
	k.mu.Lock()
	n := k.nodes[id]
	n.up = false
	n.transport.DisconnectAll()
	for _, o := range k.nodes {
		o.transport.Disconnect(raft.ServerAddress(id))
	}
	k.mu.Unlock()
	n.cancel()
	if err := n.raft.Shutdown().Error(); err != nil {
		k.t.Error(err)
	}
}

// leave is a clean exit.
func (k *ranks) leave(id string) {
	k.t.Helper()
	n := k.nodes[id]
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := leaver{
		node: id, members: k.members,
		announce: func() error { k.gossip(id, gossipLeaving); return nil },
		enlisted: func() bool { return k.enlisted(id) },
	}.leave(ctx)
	if err != nil {
		k.t.Error(id, err)
	}
	if n.raft.State() == raft.Leader && k.other() != "" {
		k.t.Errorf("%s leads on its way out", id)
	}
	k.stop(id)
	k.gossip(id, gossipLeft)
}

// enlisted says whether the leader's configuration has a node, as its push would tell.
func (k *ranks) enlisted(id string) bool {
	_, c := k.nodes[k.leader()].configured()
	return suffrage(c, raft.ServerID(id)) != ""
}

// leader waits until there is one.
func (k *ranks) leader() string {
	for range 1000 {
		for id, n := range k.nodes {
			if n.up && n.raft.State() == raft.Leader {
				return id
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	k.t.Fatal("no leader")
	return ""
}

func (k *ranks) await(within time.Duration, want string) {
	k.t.Helper()
	got := ""
	for began := time.Now(); time.Since(began) <= within; time.Sleep(50 * time.Millisecond) {
		_, c := k.nodes[k.leader()].configured()
		roles := map[raft.ServerSuffrage][]string{}
		for _, s := range c.Servers {
			roles[s.Suffrage] = append(roles[s.Suffrage], string(s.ID))
		}
		slices.Sort(roles[raft.Voter])
		slices.Sort(roles[raft.Nonvoter])
		if got = strings.TrimSpace(strings.Join(roles[raft.Voter], " ") + " | " + strings.Join(roles[raft.Nonvoter], " ")); got == want {
			return
		}
	}
	k.t.Fatalf("%q, not %q", got, want)
}

func (k *ranks) end() {
	for _, n := range k.nodes {
		n.cancel()
		if n.up {
			if err := n.raft.Shutdown().Error(); err != nil {
				k.t.Error(err)
			}
		}
	}
	k.workers.Wait()
}

func inRanks(t *testing.T, story func(k *ranks)) {
	synctest.Test(t, func(t *testing.T) {
		k := newRanks(t)
		defer k.end()
		story(k)
	})
}

func TestThreeThatStartTogetherAreVotersWithinSeconds(t *testing.T) {
	inRanks(t, func(k *ranks) {
		for _, id := range []string{"a", "b", "c"} {
			k.start(id)
		}
		k.leader() // a bare raft takes a while to elect itself
		k.await(3*time.Second, "a b c |")
	})
}

// A lone voter leads however late the others answer; one of three does not.
func TestOneVoterBecomesThreeOnlyWhenTheOthersKeepItsLease(t *testing.T) {
	inRanks(t, func(k *ranks) {
		k.start("a")
		k.start("b")
		k.mu.Lock()
		k.nodes["b"].late = true
		k.mu.Unlock()
		k.start("c")
		k.leader()
		k.await(3*time.Second, "a | b c")
		time.Sleep(20 * time.Second)
		k.await(0, "a | b c")
		k.mu.Lock()
		k.nodes["b"].late = false
		k.mu.Unlock()
		k.await(3*time.Second, "a b c |")
	})
}

// One that stays slow does not keep the cluster without a failover for ever.
func TestASlowStandbyVotesInTheEnd(t *testing.T) {
	inRanks(t, func(k *ranks) {
		k.start("a")
		k.start("b")
		k.mu.Lock()
		k.nodes["b"].late = true
		k.mu.Unlock()
		k.start("c")
		k.leader()
		k.await(3*time.Second, "a | b c")
		k.await(40*time.Second, "a b c |")
	})
}

func TestAHundredSidecarsHaveThreeVotersAndTwoStandbys(t *testing.T) {
	inRanks(t, func(k *ranks) {
		k.start("a")
		for i := range 6 {
			k.start("b" + string(rune('0'+i)))
		}
		k.mu.Lock()
		for i := range 93 { // these run no raft: forwarders
			id := "f" + string(rune('0'+i/10)) + string(rune('0'+i%10))
			k.nodes[id] = &rankNode{id: id, member: gossipMember{ID: id, State: gossipAlive, Since: time.Now().Add(time.Hour)}, cancel: func() {}}
		}
		k.tell()
		k.mu.Unlock()
		k.await(20*time.Second, "a b0 b1 | b2 b3")
		index, _ := k.nodes["a"].configured()
		time.Sleep(time.Minute)
		if now, c := k.nodes["a"].configured(); now != index {
			t.Errorf("the configuration went on changing: %v", c)
		}
	})
}

func TestADeadVoterIsReplaced(t *testing.T) {
	inRanks(t, func(k *ranks) {
		for _, id := range []string{"a", "b", "c", "d"} {
			k.start(id)
		}
		k.await(20*time.Second, "a b c | d")
		k.crash(k.leader())
		k.await(20*time.Second, "b c d |")
		k.start("e")
		k.await(10*time.Second, "b c d | e")
	})
}

func TestCleanExitsShrinkTheClusterToOne(t *testing.T) {
	inRanks(t, func(k *ranks) {
		for _, id := range []string{"a", "b", "c", "d"} {
			k.start(id)
		}
		k.await(20*time.Second, "a b c | d")
		k.leave("b") // d takes its place
		k.await(5*time.Second, "a c d |")
		k.leave(k.leader())
		k.await(5*time.Second, map[string]string{"a": "a |", "c": "c |", "d": "d |"}[k.leader()]+" "+k.other())
		k.leave(k.leader()) // the only voter: the standby is promoted first
		k.await(5*time.Second, k.leader()+" |")
		k.leave(k.leader()) // the last: it just goes
	})
}

// Gossip names it, and it may be anybody: whoever does not answer on the peer port takes nobody's place.
func TestWhoDoesNotAnswerGetsNoRoleUntilItDoes(t *testing.T) {
	inRanks(t, func(k *ranks) {
		k.start("a")
		k.leader()
		k.start("b")
		k.mute("b", true)
		time.Sleep(time.Minute)
		k.start("c")
		k.await(5*time.Second, "a | c")
		k.mute("b", false)
		k.await(time.Minute+5*time.Second, "a b c |")
	})
}

// A zone whose peer ports drop what is sent to them, say, and whose sidecars would be the best by everything else.
func TestWhoDoesNotAnswerKeepsNobodyWaiting(t *testing.T) {
	inRanks(t, func(k *ranks) {
		k.start("a")
		k.leader()
		const silent = 40 // to ask them all takes longer than any of them is barred
		k.mu.Lock()
		for i := range silent {
			id := fmt.Sprintf("b%02d", i)
			k.nodes[id] = &rankNode{id: id, mute: true, member: gossipMember{ID: id, State: gossipAlive, Since: time.Now(), Tags: map[string]string{tagZone: "dark"}}, cancel: func() {}}
		}
		k.tell()
		k.mu.Unlock()
		time.Sleep(5 * time.Minute)
		k.start("c")
		k.await(2*vetTimeout, "a | c")
		k.mu.Lock()
		defer k.mu.Unlock()
		for id, n := range k.nodes {
			if n.mute && n.asked < 3 {
				t.Errorf("%s was asked %d times in five minutes", id, n.asked)
			}
		}
	})
}

func TestWhoDoesNotAnswerIsAskedEverLessOftenUntilItIsStartedAgain(t *testing.T) {
	inRanks(t, func(k *ranks) {
		k.start("a")
		k.leader()
		k.start("b")
		k.mute("b", true)
		asked := func() int {
			k.mu.Lock()
			defer k.mu.Unlock()
			return k.nodes["b"].asked
		}
		time.Sleep(10 * time.Minute)
		if n := asked(); n < 10 || n > 15 {
			t.Errorf("it was asked %d times in ten minutes", n)
		}
		k.mu.Lock()
		k.nodes["b"].mute, k.nodes["b"].member.Name = false, "another process"
		k.tell()
		k.mu.Unlock()
		k.await(vetTimeout, "a | b")
	})
}

// A zone of its own would make it the best of all.
func TestWhoDoesNotAnswerPushesNobodyOut(t *testing.T) {
	inRanks(t, func(k *ranks) {
		for _, id := range []string{"a", "b", "c", "d", "e"} {
			k.start(id)
		}
		k.await(20*time.Second, "a b c | d e")
		index, _ := k.nodes[k.leader()].configured()
		k.start("f")
		k.mu.Lock()
		k.nodes["f"].mute = true
		k.nodes["f"].member.Tags = map[string]string{tagZone: "elsewhere"}
		k.tell()
		k.mu.Unlock()
		time.Sleep(time.Minute)
		if now, c := k.nodes[k.leader()].configured(); now != index {
			t.Errorf("the configuration has changed: %v", c)
		}
		k.mute("f", false)
		k.await(time.Minute, "a b f | c d") // who comes last by name makes room
	})
}

// other gives who is up and does not lead.
func (k *ranks) other() string {
	var others []string
	for id, n := range k.nodes {
		if n.up && id != k.leader() {
			others = append(others, id)
		}
	}
	slices.Sort(others)
	return strings.Join(others, " ")
}

// A transfer that fails stops raft's entries for a while, and the leaver's vote may be half of all there are.
func TestALeaderThatNobodyRelievesGivesUpItsVote(t *testing.T) {
	for _, all := range [][]string{{"a", "b"}, {"a", "b", "c"}} {
		inRanks(t, func(k *ranks) {
			for _, id := range all {
				k.start(id)
			}
			k.await(20*time.Second, map[int]string{2: "a | b", 3: "a b c |"}[len(all)])
			refusing := k.refused("a", maxHandovers+1)
			for began := time.Now(); k.enlisted("a"); time.Sleep(50 * time.Millisecond) {
				if time.Since(began) > 5*time.Second {
					t.Fatal("a is still there")
				}
			}
			if len(refusing.asked) != maxHandovers {
				t.Errorf("%d attempts", len(refusing.asked))
			}
		})
	}
}

// Without the leaver's vote the one that is left would be no majority.
func TestALeaderWhoseVoteIsNeededOffersItsLeadAgainAndAgain(t *testing.T) {
	inRanks(t, func(k *ranks) {
		for _, id := range []string{"a", "b", "c"} {
			k.start(id)
		}
		k.await(20*time.Second, "a b c |")
		k.crash("c")
		refusing := k.refused("a", 5)
		for began := time.Now(); k.leader() == "a"; time.Sleep(50 * time.Millisecond) {
			if time.Since(began) > 20*time.Second {
				t.Fatalf("a still leads after %d attempts", len(refusing.asked))
			}
		}
		for i := 1; i < len(refusing.asked); i++ {
			if pause, least := refusing.asked[i].Sub(refusing.asked[i-1]), defaultRoleTiming.handover<<(i-1); pause < least {
				t.Errorf("attempt %d comes %v after the one before", i+1, pause)
			}
		}
	})
}

// refused lets the leader leave, with a raft that refuses so many times to hand leadership over.
func (k *ranks) refused(id string, times int) *refusingRaft {
	leader := k.nodes[id]
	leader.cancel() // its own keeping of the roles ends
	refusing := &refusingRaft{Raft: leader.raft, refusals: times}
	r := newRoles(rolesConfig{
		node: id, maxVoters: 3, raft: refusing, configuration: leader.configured, members: k.members,
		changed: func() <-chan struct{} { return make(chan struct{}) }, progress: k.progress, answers: k.answers,
		log: slog.New(slog.DiscardHandler), timing: defaultRoleTiming,
	})
	var ctx context.Context
	ctx, leader.cancel = context.WithCancel(context.Background())
	k.workers.Go(func() { r.reconcileRoles(ctx) })
	k.gossip(id, gossipLeaving)
	return refusing
}

type refusingRaft struct {
	*raft.Raft
	refusals int
	asked    []time.Time
}

func (r *refusingRaft) LeadershipTransferToServer(id raft.ServerID, address raft.ServerAddress) raft.Future {
	r.asked = append(r.asked, time.Now())
	if len(r.asked) <= r.refusals {
		return done{raft.ErrLeadershipTransferInProgress}
	}
	return r.Raft.LeadershipTransferToServer(id, address)
}
