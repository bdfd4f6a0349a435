package replicate

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// simNode is a sidecar as it is; what the leader knows of it is made of that.
type simNode struct {
	id, zone, machine, version string
	role                       nodeRole
	state                      gossipState
	since, contactSince        time.Time
	joined                     time.Time // as a standby
	unreachable                bool      // by raft, not by gossip
	barred                     time.Time // until
	slow                       time.Duration
	ready                      bool
	readySince                 time.Time
	contact                    bool
}

// roleSim carries plans out on a cluster that exists on paper.
type roleSim struct {
	start, now time.Time
	self       string
	max        int
	nodes      map[string]*simNode
	log        strings.Builder
	check      func(before, after roleView, c roleChange)
}

const simStep = 100 * time.Millisecond

func newRoleSim(max int) *roleSim {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	return &roleSim{start: start, now: start, max: max, nodes: map[string]*simNode{}}
}

func (s *roleSim) join(id string) *simNode {
	n := &simNode{id: id, state: gossipAlive, since: s.now, slow: 300 * time.Millisecond}
	s.nodes[id] = n
	if s.self == "" {
		s.self, n.role = id, voter
	}
	return n
}

func (s *roleSim) set(n *simNode, state gossipState) {
	if n.state != state {
		n.state, n.since = state, s.now
	}
}

func (s *roleSim) runs(n *simNode) bool { return n.state == gossipAlive || n.state == gossipLeaving }

// observe brings what raft knows of each node up to date.
func (s *roleSim) observe() {
	for _, n := range s.nodes {
		contact := n.role != forwarder && s.runs(n) && !n.unreachable
		if contact != n.contact {
			n.contact, n.contactSince = contact, s.now
		}
		ready := contact && (n.role == voter || s.now.Sub(n.joined) >= n.slow)
		if ready != n.ready {
			n.ready, n.readySince = ready, s.now
		}
	}
}

func (s *roleSim) view() roleView {
	v := roleView{self: s.self, maxVoters: s.max, now: s.now, timing: defaultRoleTiming}
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		n := s.nodes[id]
		v.nodes = append(v.nodes, roleNode{
			id: id, role: n.role, state: n.state, since: n.since, contact: n.contact, contactSince: n.contactSince,
			ready: n.ready, readySince: n.readySince, steady: time.Hour, barred: s.now.Before(n.barred), zone: n.zone, machine: n.machine, version: n.version,
		})
	}
	return v
}

// elect lets the voters that run choose another leader if ours does not run.
func (s *roleSim) elect() {
	if n := s.nodes[s.self]; n != nil && s.runs(n) && n.role == voter && !n.unreachable {
		return
	}
	voters, alive := 0, []string{}
	for _, n := range s.nodes {
		if n.role == voter {
			voters++
			if s.runs(n) && !n.unreachable {
				alive = append(alive, n.id)
			}
		}
	}
	if len(alive) > voters/2 {
		slices.Sort(alive)
		s.lead(alive[0])
	}
}

func (s *roleSim) lead(id string) {
	s.self = id
	for _, n := range s.nodes { // a new leader has heard of nobody yet
		n.contact, n.contactSince, n.ready, n.readySince = false, s.now, false, s.now
	}
	fmt.Fprintf(&s.log, "%7s  %s leads\n", s.now.Sub(s.start), id)
	s.observe()
}

// step carries one change out at most; false: nothing is planned.
func (s *roleSim) step() bool {
	s.elect()
	s.observe()
	before := s.view()
	c := before.plan()
	if c.kind == noChange {
		return false
	}
	fmt.Fprintf(&s.log, "%7s  %s %s: %s\n", s.now.Sub(s.start), c.kind, c.id, c.why)
	n := s.nodes[c.id]
	switch c.kind {
	case addStandby:
		n.role, n.joined, n.contactSince = standby, s.now, s.now
	case promote:
		n.role = voter
	case demote:
		n.role = standby
	case removeServer:
		n.role = forwarder
		if n.unreachable {
			n.barred = s.now.Add(defaultRoleTiming.barred)
		}
	case handLeadership:
		s.lead(c.id)
	}
	s.observe()
	if s.check != nil {
		s.check(before, s.view(), c)
	}
	return true
}

func (s *roleSim) run(d time.Duration) {
	for end := s.now.Add(d); ; s.now = s.now.Add(simStep) {
		for n := 0; s.step(); n++ {
			if n > 50 {
				panic("no end of changes:\n" + s.log.String())
			}
		}
		if !s.now.Before(end) {
			return
		}
	}
}

func (s *roleSim) roles() string {
	byRole := map[nodeRole][]string{}
	for _, n := range s.nodes {
		id := n.id
		if !s.runs(n) {
			id += "(" + n.state.String() + ")"
			if n.role == forwarder {
				continue
			}
		}
		byRole[n.role] = append(byRole[n.role], id)
	}
	for _, ids := range byRole {
		slices.Sort(ids)
	}
	text := "leader " + s.self + ", voters " + strings.Join(byRole[voter], " ") + ", standbys " + strings.Join(byRole[standby], " ")
	if n := len(byRole[forwarder]); n > 0 {
		text += fmt.Sprint(", forwarders ", n)
	}
	return text
}

// Each script is a story of one cluster: who comes, crashes and leaves, and what its leader does about it.
//
//	cluster [max=5]             a new one
//	join IDs [zone=] [machine=] [version=] [slow=]   sidecars come; the first has given birth
//	crash | back | leave | gone | forget | cut | heal IDs
//	run 10s                     time passes; what is done is shown, and the roles at the end
func TestRolesFollowTheCluster(t *testing.T) {
	datadriven.Walk(t, "testdata/roles", func(t *testing.T, path string) {
		var s *roleSim
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			args := map[string]string{}
			var ids []string
			for _, a := range d.CmdArgs {
				if len(a.Vals) == 0 {
					ids = append(ids, a.Key)
				} else {
					args[a.Key] = a.Vals[0]
				}
			}
			if d.Cmd == "cluster" {
				s = newRoleSim(3)
				if most := args["max"]; most != "" {
					s.max, _ = strconv.Atoi(most)
				}
				return ""
			}
			if d.Cmd == "run" {
				for _, in := range ids {
					length, err := time.ParseDuration(in)
					if err != nil {
						t.Fatal(err)
					}
					s.run(length)
				}
				defer s.log.Reset()
				return s.log.String() + s.roles() + "\n"
			}
			for _, id := range expandIDs(ids) {
				simCommand(t, s, d.Cmd, id, args)
			}
			return ""
		})
	})
}

// expandIDs makes f01..f03 of "f01-03".
func expandIDs(ids []string) (all []string) {
	for _, id := range ids {
		first, last, found := strings.Cut(id, "-")
		if !found {
			all = append(all, id)
			continue
		}
		from, _ := strconv.Atoi(first[1:])
		to, _ := strconv.Atoi(last)
		for i := from; i <= to; i++ {
			all = append(all, fmt.Sprintf("%s%0*d", first[:1], len(last), i))
		}
	}
	return all
}

func simCommand(t *testing.T, s *roleSim, command, id string, args map[string]string) {
	t.Helper()
	n := s.nodes[id]
	if n == nil && command != "join" {
		t.Fatalf("nobody is called %s", id)
	}
	switch command {
	case "join":
		n = s.join(id)
		n.zone, n.machine, n.version = args["zone"], args["machine"], args["version"]
		if slow := args["slow"]; slow != "" {
			n.slow, _ = time.ParseDuration(slow)
		}
	case "crash":
		s.set(n, gossipFailed)
	case "forget":
		s.set(n, 0)
	case "back":
		s.set(n, gossipAlive)
		n.joined = s.now
	case "leave":
		s.set(n, gossipLeaving)
	case "gone":
		s.set(n, gossipLeft)
	case "cut":
		n.unreachable = true
	case "heal":
		n.unreachable = false
	default:
		t.Fatalf("unknown command %s", command)
	}
}

// Whatever happens in whatever order, no change takes the majority away that there was, and once all is calm the roles
// are those of the table.
func TestPlansNeverCostTheQuorum(t *testing.T) {
	rounds := 60
	if os.Getenv("ROLES_SOAK") != "" {
		rounds *= 50
	}
	for seed := range rounds {
		random := rand.New(rand.NewPCG(uint64(seed), 5))
		s := newRoleSim(3 + 2*random.IntN(2))
		failed := ""
		s.check = func(before, after roleView, c roleChange) {
			voters, answer, standbys := 0, 0, 0
			for _, n := range after.nodes {
				switch {
				case n.role == voter:
					voters++
					if s.runs(s.nodes[n.id]) && !s.nodes[n.id].unreachable {
						answer++
					}
				case n.role == standby && after.staying(n) && n.contact:
					standbys++
				}
			}
			left, _ := before.find(c.id)
			switch {
			case answer <= voters/2:
				failed = fmt.Sprintf("%s %s leaves %d of %d voters", c.kind, c.id, answer, voters)
			case c.id == before.self:
				failed = "the leader did something to itself"
			case voters > s.max+1 || c.kind == addStandby && standbys > maxStandbys:
				failed = fmt.Sprintf("%d voters, %d standbys", voters, standbys)
			case (c.kind == promote || c.kind == addStandby) && left.state != gossipAlive:
				failed = c.kind.String() + " of somebody who is not there"
			}
		}
		var story []string
		id := 0
		for range 5 + random.IntN(40) {
			event := randomEvent(random, s, &id)
			story = append(story, event)
			s.run(time.Duration(random.IntN(60)) * simStep)
			if failed != "" {
				t.Fatalf("seed %d: %s\nafter %s\n%s", seed, failed, strings.Join(story, ", "), s.log.String())
			}
		}
		calm(t, seed, s, story)
	}
}

func randomEvent(random *rand.Rand, s *roleSim, id *int) string {
	if len(s.nodes) == 0 || random.IntN(3) == 0 {
		*id++
		n := s.join(fmt.Sprintf("n%02d", *id))
		n.slow = time.Duration(random.IntN(30)) * simStep
		n.zone, n.machine = string(rune('x'+random.IntN(3))), strconv.Itoa(random.IntN(4))
		return "join " + n.id
	}
	all := slices.Sorted(maps.Keys(s.nodes))
	n := s.nodes[all[random.IntN(len(all))]]
	alive := s.runs(n)
	switch what := random.IntN(5); {
	case what == 0 && alive && !lastMajority(s, n):
		s.set(n, gossipFailed)
		return "crash " + n.id
	case what <= 2 && n.state == gossipFailed:
		s.set(n, gossipAlive)
		n.joined = s.now
		return "back " + n.id
	case what == 3 && n.state == gossipAlive:
		s.set(n, gossipLeaving)
		return "leave " + n.id
	case what == 4 && n.state == gossipLeaving && n.role == forwarder:
		s.set(n, gossipLeft)
		return "gone " + n.id
	}
	return "-"
}

// lastMajority: without n the cluster would be lost, which is not what is tried here.
func lastMajority(s *roleSim, n *simNode) bool {
	voters, alive := 0, 0
	for _, o := range s.nodes {
		if o.role == voter {
			voters++
			if s.runs(o) && o != n {
				alive++
			}
		}
	}
	return alive <= voters/2
}

// calm lets the dead come back or be gone, and expects the roles of the table.
func calm(t *testing.T, seed int, s *roleSim, story []string) {
	t.Helper()
	s.run(2 * time.Minute)
	staying, voters, standbys, crashed := 0, 0, 0, 0
	for _, n := range s.nodes {
		switch {
		case n.state == gossipAlive:
			staying++
			if n.role == voter {
				voters++
			}
			if n.role == standby {
				standbys++
			}
		case n.role == voter && n.state == gossipFailed:
			crashed++
		case n.role != forwarder && n.id != s.self && staying > 0:
			t.Fatalf("seed %d: %s, which is %v, is still a %v\nafter %s\n%s", seed, n.id, n.state, n.role, strings.Join(story, ", "), s.log.String())
		}
	}
	want := votersFor(staying, s.max)
	if staying == 0 || crashed > 0 && voters+crashed >= want {
		return
	}
	if voters != want || standbys != min(maxStandbys, staying-want) {
		t.Fatalf("seed %d: of %d there are %d voters and %d standbys\n%s\nafter %s\n%s", seed, staying, voters, standbys, s.roles(), strings.Join(story, ", "), s.log.String())
	}
}

// The leader plans five times a second.
func BenchmarkPlan(b *testing.B) {
	s := newRoleSim(3)
	for i := range 100 {
		s.join(fmt.Sprintf("n%03d", i)).machine = strconv.Itoa(i)
	}
	s.run(time.Minute)
	v := s.view()
	for b.Loop() {
		v.plan()
	}
}
