package replicate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// sidecar drives a Node as a coordinator would, on a goroutine of its own: it takes events and, while active, appends
// what it is asked to.
type sidecar struct {
	*testing.T
	dir     string
	config  Config
	n       *Node
	appends chan *appendCall
	done    chan struct{}
	observe func(*sidecar, Event) // told of each event before it is handled; nil: nobody wants to know

	mu    sync.Mutex
	term  uint64 // active in it; 0: not
	state map[string]string
}

// appendCall is one entry to be appended; done gets nil once it is applied and stored.
type appendCall struct {
	records []Record
	done    chan error
	index   uint64 // raft's, once done has got nil

	sequence uint64
	stored   bool // no Stored has to be waited for
}

var (
	errNotActive = errors.New("not active")             // nothing was appended
	errUnknown   = errors.New("the outcome is unknown") // it may have been
)

func startSidecar(t *testing.T, c Config, observe func(*sidecar, Event)) *sidecar {
	t.Helper()
	s := &sidecar{T: t, dir: c.Dir, config: c, observe: observe, appends: make(chan *appendCall), done: make(chan struct{}), state: map[string]string{}}
	n, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	s.n = n
	go s.run()
	t.Cleanup(s.stop)
	return s
}

// stop ends it as a kill would, as far as the others can see; the store is flushed.
func (s *sidecar) stop() {
	if err := s.n.Close(); err != nil {
		s.Error(err)
	}
	<-s.done
}

func (s *sidecar) run() {
	defer close(s.done)
	a := &activation{sidecar: s}
	defer a.fail()
	for {
		var entries chan<- Entry
		var offer Entry
		appends := s.appends
		if a.next != nil {
			entries, offer, appends = s.n.Entries(), *a.next, nil
		}
		select {
		case entries <- offer:
			a.next = nil
		case call := <-appends:
			a.take(call)
		case e, open := <-s.n.Events():
			if !open {
				return
			}
			if s.observe != nil {
				s.observe(s, e)
			}
			a.handle(e)
		}
	}
}

// activation is what run knows of the term it is active in.
type activation struct {
	*sidecar
	term, sequence, stored uint64
	queue                  []*appendCall // those without an outcome, in their order
	next                   *Entry        // to be offered
}

// fail ends the term.
func (a *activation) fail() {
	for _, call := range a.queue {
		call.done <- errUnknown
	}
	a.queue, a.next, a.term = nil, nil, 0
	a.set(0)
}

func (a *activation) take(call *appendCall) {
	if a.term == 0 {
		call.done <- errNotActive
		return
	}
	a.sequence++
	call.sequence = a.sequence
	a.queue = append(a.queue, call)
	a.next = &Entry{Term: a.term, Sequence: a.sequence, Records: call.records}
}

func (a *activation) handle(e Event) {
	switch e.Kind {
	case Reset:
		a.fail()
		a.reload()
	case Applied:
		a.apply(e.Records)
		for _, call := range a.queue {
			if e.Term == a.term && call.sequence == e.Sequence {
				call.index, call.stored = e.Index, e.Stored
			}
		}
		a.settle()
	case Stored:
		if e.Term == a.term {
			a.stored = max(a.stored, e.Index)
			a.settle()
		}
	case Active:
		a.fail()
		a.term, a.sequence, a.stored = e.Term, 0, 0
		a.set(e.Term)
	case Inactive, Failed, Ignored:
		if e.Term != a.term {
			return
		}
		a.fail()
		if e.Kind != Inactive {
			a.n.Resign(e.Term)
		}
	}
}

// settle answers those whose entries are applied and stored.
func (a *activation) settle() {
	a.queue = slices.DeleteFunc(a.queue, func(call *appendCall) bool {
		settled := call.index > 0 && (call.stored || call.index <= a.stored)
		if settled {
			call.done <- nil
		}
		return settled
	})
}

func (s *sidecar) set(term uint64) {
	s.mu.Lock()
	s.term = term
	s.mu.Unlock()
	if s.n.membership != nil {
		s.n.Announce(term != 0, term)
	}
}

func (s *sidecar) active() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term != 0
}

func (s *sidecar) reload() {
	state := map[string]string{}
	if err := s.n.Latest(func(r Record) error { state[string(r.Key)] = string(r.Value); return nil }); err != nil {
		s.Error(err)
	}
	s.mu.Lock()
	s.state = state
	s.mu.Unlock()
}

func (s *sidecar) apply(records []Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range records {
		if r.Value == nil {
			delete(s.state, string(r.Key))
		} else {
			s.state[string(r.Key)] = string(r.Value)
		}
	}
}

func (s *sidecar) value(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state[key]
}

// append appends one record and waits for it.
func (s *sidecar) append(ctx context.Context, key, value string) error {
	return s.call(ctx, &appendCall{records: []Record{{Partition: 0, Key: []byte(key), Value: []byte(value)}}, done: make(chan error, 1)})
}

// call appends, and says what became of it: errNotActive is certainty that nothing did.
func (s *sidecar) call(ctx context.Context, call *appendCall) error {
	select {
	case s.appends <- call:
	case <-s.done:
		return errNotActive
	case <-ctx.Done():
		return errNotActive
	}
	select {
	case err := <-call.done:
		return err
	case <-ctx.Done():
		return errUnknown
	}
}

// inAHurry lets a fleet grow and heal in seconds. Nothing but time-outs is shorter.
var inAHurry = seams{
	gossip: &gossipTiming{
		firstJoin: 20 * time.Millisecond, lastJoin: 200 * time.Millisecond, rejoin: time.Second, lostRejoin: time.Second,
		gather: time.Millisecond, probe: 300 * time.Millisecond,
	},
	birth: &birthTiming{
		join: 300 * time.Millisecond, settle: 10 * time.Millisecond, again: 100 * time.Millisecond, answer: 2 * time.Second,
		report: 30 * time.Second, endorse: time.Second,
	},
	roles: &roleTiming{
		stable: 2 * time.Second, steady: 200 * time.Millisecond, replacement: 200 * time.Millisecond, dead: time.Second, deadAlone: 3 * time.Second,
		absent: time.Second, patience: 2 * time.Second, unreached: 15 * time.Second, barred: 5 * time.Second, unanswered: 500 * time.Millisecond, handover: 50 * time.Millisecond,
	},
}

// fleet is a cluster in this process, over loopback.
type fleet struct {
	*testing.T
	all     []*sidecar
	observe func(*sidecar, Event)
}

func newFleet(t *testing.T, n int, change func(i int, c *Config)) *fleet {
	t.Helper()
	f := &fleet{T: t}
	for range n {
		f.add(t.TempDir(), change)
	}
	return f
}

// add starts one more, which joins those that there are; the first founds the cluster.
func (f *fleet) add(dir string, change func(i int, c *Config)) *sidecar {
	f.Helper()
	c := testConfig(dir)
	// A name of its own: the ports of one fleet may soon be another's.
	c.Cluster = &ClusterConfig{Name: f.Name(), Gossip: "127.0.0.1:0", Peer: "127.0.0.1:0", MaxVoters: 3, seams: inAHurry}
	for _, s := range f.all {
		if !s.ended() {
			c.Cluster.Join = append(c.Cluster.Join, s.n.GossipAddr())
		}
	}
	if change != nil {
		change(len(f.all), &c)
	}
	s := startSidecar(f.T, c, f.observe)
	f.all = append(f.all, s)
	return s
}

func (s *sidecar) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// await waits for a condition, generously: the machine may be slow.
func (f *fleet) await(what string, ok func() bool) {
	f.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, s := range f.all {
				if !s.ended() {
					f.Logf("%s: %+v", s.n.ID(), s.n.Status())
				}
			}
			f.Fatalf("no %s after 60 s", what)
		}
	}
}

// roles counts the living by role, as each says of itself.
func (f *fleet) roles() map[string]int {
	roles := map[string]int{}
	for _, s := range f.all {
		if !s.ended() {
			roles[s.n.Status().Role]++
		}
	}
	return roles
}

// active gives the one that answers; it waits until there is one.
func (f *fleet) active() *sidecar {
	f.Helper()
	var found *sidecar
	f.await("active sidecar", func() bool {
		for _, s := range f.all {
			if !s.ended() && s.active() {
				found = s
				return true
			}
		}
		return false
	})
	return found
}

// put appends on whoever is active, until it succeeds.
func (f *fleet) put(key, value string) {
	f.Helper()
	f.await("append of "+key, func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		return f.active().append(ctx, key, value) == nil
	})
}

// stopped ends one of them, cleanly or as a crash would.
func (f *fleet) stopped(s *sidecar, leave bool) {
	f.Helper()
	if leave {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		if err := s.n.Leave(ctx); err != nil {
			f.Fatal(err)
		}
	}
	s.stop()
}

// ranked waits until so many of the living hold each role.
func (f *fleet) ranked(voters, standbys, forwarders int) {
	f.Helper()
	f.await(fmt.Sprintf("%d voters, %d standbys and %d forwarders", voters, standbys, forwarders), func() bool {
		r := f.roles()
		return r[RoleVoter] == voters && r[RoleStandby] == standbys && r[RoleForwarder] == forwarders
	})
}

// replaced ends a voter that is not active, as a crash would, and waits until another has its place.
func (f *fleet) replaced() (victim *sidecar) {
	f.Helper()
	voters := f.roles()[RoleVoter]
	for _, s := range f.all {
		if s.n.Status().Role == RoleVoter && !s.active() {
			victim = s
		}
	}
	f.stopped(victim, false)
	f.await("dead voter to be replaced", func() bool {
		return f.roles()[RoleVoter] == voters && f.configuration()[victim.n.ID()] == ""
	})
	return victim
}

// configuration gives the roles by raft's configuration, as the active one knows it.
func (f *fleet) configuration() map[string]string {
	found := map[string]string{}
	for _, m := range f.active().n.Members() {
		if m.Role == RoleVoter || m.Role == RoleStandby {
			found[m.ID] = m.Role
		}
	}
	return found
}

func TestThreeSidecarsBecomeThreeVotersByThemselves(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	for i := range 20 {
		f.put(fmt.Sprint("key", i), "value")
	}
	for _, s := range f.all {
		f.await("copy on every replica", func() bool { return s.value("key19") == "value" })
	}
}

func TestKillOfTheActiveOneLosesNothingAndAnotherTakesOver(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("before", "1")
	f.stopped(f.active(), false)
	f.put("after", "2")
	if got := f.active().value("before"); got != "1" {
		t.Fatalf("before is %q", got)
	}
}

func TestTwoSidecarsAreAVoterAndAStandby(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, nil)
	f.await("voter and standby", func() bool { r := f.roles(); return r[RoleVoter] == 1 && r[RoleStandby] == 1 })
	f.put("key", "value")
	f.await("copy on the standby", func() bool { return f.all[0].value("key") == "value" && f.all[1].value("key") == "value" })
}

func TestSixSidecarsHaveThreeVotersTwoStandbysAndOneForwarder(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 6, nil)
	f.ranked(3, 2, 1)
	f.put("key", "value")
	f.await("everyone to know who is active", func() bool {
		active := f.active().n.ID()
		for _, s := range f.all {
			if _, node, _ := s.n.Active(); node != active {
				return false
			}
		}
		return true
	})
	f.replaced()
	f.ranked(3, 2, 0)
}

func TestExactlyOneOfThreeThatExpectEachOtherFoundsTheCluster(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, func(i int, c *Config) { c.Cluster.BootstrapExpect = 3 })
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	id := f.all[0].n.Status().ClusterID
	for _, s := range f.all {
		if got := s.n.Status().ClusterID; got != id || id == "" {
			t.Fatalf("cluster ids %q and %q", id, got)
		}
	}
}

func TestCleanExitsShrinkTheClusterToOneAndWhoComesBackIsTakenIn(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("key", "value")
	var dirs []string
	for _, s := range f.all[:2] { // the first is the active one
		f.stopped(s, true)
		dirs = append(dirs, s.dir)
		f.put("key", "value of those who stay")
	}
	last := f.all[2]
	f.await("cluster of one", func() bool { return len(f.configuration()) == 1 && f.configuration()[last.n.ID()] == RoleVoter })
	for _, dir := range dirs {
		f.add(dir, nil)
	}
	f.await("three voters again", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("another", "value")
	for _, s := range f.all[2:] {
		f.await("copy on every replica", func() bool { return s.value("another") == "value" })
	}
}

func TestAWipedMemberComesBackAsANewNode(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("key", "value")
	old := f.all[1]
	f.stopped(old, false)
	fresh := f.add(t.TempDir(), nil)
	f.await("new voter in the old one's place", func() bool {
		c := f.configuration()
		return c[fresh.n.ID()] == RoleVoter && c[old.n.ID()] == "" && len(c) == 3
	})
	f.await("copy", func() bool { return fresh.value("key") == "value" })
}

func TestAllRestartedWithOtherAddressesFindEachOther(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil)
	f.await("three voters", func() bool { return f.roles()[RoleVoter] == 3 })
	f.put("key", "value")
	old := f.all
	for _, s := range old {
		f.stopped(s, false)
	}
	f.all = nil
	for _, s := range old { // ports are new: each is bound to 0
		f.add(s.dir, nil)
	}
	f.put("another", "value")
	for _, s := range f.all {
		f.await("copy on every replica", func() bool { return s.value("key") == "value" && s.value("another") == "value" })
	}
}
