package replicate

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// nodeRole is what raft's configuration says of a node.
type nodeRole uint8

const (
	forwarder nodeRole = iota // not in the configuration: it runs no raft
	standby                   // a non-voter
	voter
)

func (r nodeRole) String() string { return [...]string{RoleForwarder, RoleStandby, RoleVoter}[r] }

// roleNode is all that is known of one node: raft's configuration, gossip and health put together.
type roleNode struct {
	id      string
	process string // what gossip calls this run of it
	role    nodeRole
	state   gossipState // 0: gossip does not know it
	since   time.Time   // of state, as far as this leader knows

	contact      bool          // it has answered raft within the last second
	contactSince time.Time     // contact has been what it is since
	ready        bool          // autopilot calls it healthy: in contact, in our term, not far behind
	readySince   time.Time     // ready has been what it is since
	match        uint64        // of our log, what it has
	steady       time.Duration // for how long it has answered in time for raft's lease

	zone, machine, version string
	barred                 bool          // it could not be reached as a standby, or did not answer when it was to become one
	silence                time.Duration // how long it was barred when it last did not answer; 0: it did, or was not asked
}

// roleView is what plan looks at: every node of the configuration and of gossip, once.
type roleView struct {
	self      string
	maxVoters int
	now       time.Time
	nodes     []roleNode // ordered by id
	handed    int        // how often leadership could not be handed over
	offer     time.Time  // when that may be tried again
	timing    roleTiming
}

// roleTiming holds what plan waits for.
type roleTiming struct {
	stable      time.Duration // how long a standby must have been ready to grow beyond three voters, or for a better spread
	steady      time.Duration // how long a standby must have answered as a voter has to, for one voter to become three at once
	replacement time.Duration // how long a standby must have been ready to take a dead voter's place
	dead        time.Duration // how long a voter must be dead before a ready standby takes its place, or a standby to be dropped
	deadAlone   time.Duration // the same for a voter that nobody can replace; and how long a ready standby may be too slow to vote
	absent      time.Duration // how long a standby must be unknown to gossip to be dropped
	patience    time.Duration // how long a leaver is kept for its replacement
	unreached   time.Duration // how long a server that gossip calls alive may be out of contact
	barred      time.Duration // how long a standby that could not be reached is not tried again
	unanswered  time.Duration // the same for a forwarder that did not answer when it was wanted, doubling up to barred
	handover    time.Duration // raft takes entries for so long after leadership could not be handed over, doubling
}

// In a fresh cluster nothing but the standbys' catching up is waited for.
var defaultRoleTiming = roleTiming{
	stable: 10 * time.Second, steady: time.Second, replacement: 2 * time.Second, dead: 5 * time.Second, deadAlone: 30 * time.Second,
	absent: 2 * time.Second, patience: 2 * time.Second, unreached: 15 * time.Second, barred: time.Minute, unanswered: 5 * time.Second, handover: 500 * time.Millisecond,
}

// Limits of a configuration.
const (
	maxStandbys     = 2
	maxHandovers    = 2           // attempts, if it can go without; raft takes no entries meanwhile
	maxTrailingLogs = 250         // a standby this far behind may still become a voter
	maxContact      = time.Second // 200 ms, autopilot's default, is too tight under a CPU quota
)

// changeKind is what is done to one server.
type changeKind uint8

const (
	noChange       changeKind = iota
	addStandby                // AddNonvoter
	promote                   // AddVoter
	demote                    // DemoteVoter
	removeServer              // RemoveServer
	handLeadership            // LeadershipTransferToServer
)

func (k changeKind) String() string {
	return [...]string{"none", "add", "promote", "demote", "remove", "transfer"}[k]
}

// roleChange is one step. Why is for the log.
type roleChange struct {
	kind changeKind
	id   string
	why  string
	// newcomer is the forwarder in whose favour the change is, if there is one. That gossip names it says little: it has to
	// answer first.
	newcomer roleNode
}

// unreached says that gossip thinks well of a server, but raft has not heard of it for too long.
func (v *roleView) unreached(n roleNode) bool {
	return n.id != v.self && n.role != forwarder && !n.contact && v.age(n.contactSince) >= v.timing.unreached
}

// live says that a node runs. What answers raft lives, whatever gossip has heard.
func (v *roleView) live(n roleNode) bool {
	switch {
	case n.id == v.self:
		return true
	case n.state == gossipAlive || n.state == gossipLeaving:
		return !v.unreached(n)
	}
	return n.contact && n.state != gossipLeft
}

// staying says that a node runs and does not want to go.
func (v *roleView) staying(n roleNode) bool { return v.live(n) && !v.going(n) }

// going says that a node has said that it goes.
func (v *roleView) going(n roleNode) bool { return n.state == gossipLeaving || n.state == gossipLeft }

// crashed says that a server is dead without having said so.
func (v *roleView) crashed(n roleNode) bool { return !v.live(n) && !v.going(n) }

// deadFor is how long a crashed server has been so.
func (v *roleView) deadFor(n roleNode) time.Duration {
	if v.unreached(n) {
		return v.age(n.contactSince)
	}
	return v.age(n.since)
}

func (v *roleView) age(since time.Time) time.Duration { return v.now.Sub(since) }

func (v *roleView) which(role nodeRole, is func(roleNode) bool) (found []roleNode) {
	for _, n := range v.nodes {
		if n.role == role && (is == nil || is(n)) {
			found = append(found, n)
		}
	}
	return found
}

// votersFor is how many voters a cluster of n has. Two have no failover in any case; one voter at least does not need
// the other.
func votersFor(n, most int) int {
	switch {
	case n <= 0:
		return 0
	case n <= 2:
		return 1
	case n <= 4:
		return 3
	}
	return most
}

// plan gives the next change, one at a time: the configuration is looked at again after each. It is only asked on the
// leader.
//
//   - Whoever leaves is taken out at once, after a replacement has become a voter if there is one; the voters then shrink
//     with the cluster, down to one.
//   - A voter that crashed is demoted when a ready standby can take its place, and then that is promoted: the other order
//     would raise the quorum while a voter is missing (as raft-autopilot does it). Without a replacement it stays, unless
//     three voters remain; its death alone never makes the cluster smaller.
//   - Growth goes by two, when both candidates have caught up and would have kept the lease. A lone voter leads however slow
//     everything is; one of three has to hear from another in time, and elections cost a slow cluster what it is short of.
//
// No change is planned after which the voters that answer would not be a majority.
func (v *roleView) plan() roleChange {
	self, there := v.find(v.self)
	if !there || self.role != voter || !v.quorate(noChange, "") {
		return roleChange{}
	}
	if v.stayers() == 0 {
		return roleChange{} // everybody goes: what is there is kept as it is
	}
	rules := []func() roleChange{v.planExit, v.planStandbyGone, v.planLeaver, v.planDead, v.planGrowth, v.planShrink, v.planStandbys, v.planSpread}
	for i, rule := range rules {
		if i > 0 && v.going(self) {
			break // whoever leads next goes on
		}
		if c := rule(); c.kind != noChange && v.quorate(c.kind, c.id) {
			return c
		}
	}
	return roleChange{}
}

func (v *roleView) sort() {
	slices.SortFunc(v.nodes, func(a, b roleNode) int { return cmp.Compare(a.id, b.id) })
}

func (v *roleView) find(id string) (roleNode, bool) {
	i, found := slices.BinarySearchFunc(v.nodes, id, func(n roleNode, id string) int { return cmp.Compare(n.id, id) })
	if !found {
		return roleNode{}, false
	}
	return v.nodes[i], true
}

// stayers counts. Who is not to be had as a standby cannot become a voter either.
func (v *roleView) stayers() (count int) {
	for _, n := range v.nodes {
		if v.staying(n) && (n.role != forwarder || !n.barred) {
			count++
		}
	}
	return count
}

// quorate says whether the voters that answer are a majority once a change is made.
func (v *roleView) quorate(kind changeKind, id string) bool {
	voters, answer := 0, 0
	for _, n := range v.nodes {
		votes := n.role == voter
		if n.id == id {
			switch kind {
			case promote:
				votes = true
			case demote, removeServer:
				votes = false
			}
		}
		if votes {
			voters++
			if n.contact || n.id == v.self {
				answer++
			}
		}
	}
	return answer > voters/2
}

// grow is how many voters there should be; keep, below how many the cluster does not shrink: the dead count there.
func (v *roleView) grow() int { return votersFor(v.stayers(), v.maxVoters) }
func (v *roleView) keep() int {
	return votersFor(v.stayers()+len(v.which(voter, v.crashed)), v.maxVoters)
}

// planExit: we ourselves want to go. Somebody else has to lead first, and to be a voter before that. If nobody takes the
// lead, we give up our vote, and so the lead with it: the others then elect a leader by themselves, a time-out later.
func (v *roleView) planExit() roleChange {
	if self, _ := v.find(v.self); !v.going(self) {
		return roleChange{}
	}
	if heirs := v.which(voter, v.staying); len(heirs) > 0 {
		if v.handed >= maxHandovers && v.quorate(demote, v.self) {
			return roleChange{kind: demote, id: v.self, why: "the leader leaves, and nobody takes the lead from it"}
		}
		if v.now.Before(v.offer) {
			return roleChange{}
		}
		heir := slices.MaxFunc(heirs, func(a, b roleNode) int {
			return cmp.Or(boolCompare(a.ready, b.ready), cmp.Compare(a.match, b.match), cmp.Compare(b.id, a.id))
		})
		return roleChange{kind: handLeadership, id: heir.id, why: "the leader leaves"}
	}
	if ready := v.candidates(0); len(ready) > 0 {
		return roleChange{kind: promote, id: ready[0].id, why: "the only voter leaves"}
	}
	return v.planStandbys()
}

// planStandbyGone drops standbys that went, or died.
func (v *roleView) planStandbyGone() roleChange {
	idle := v.idle()
	for _, n := range v.which(standby, nil) {
		switch {
		case v.going(n):
			return roleChange{kind: removeServer, id: n.id, why: "a standby leaves"}
		case v.unreached(n) && len(idle) > 0:
			return roleChange{kind: removeServer, id: n.id, why: "a standby cannot be reached", newcomer: slices.MinFunc(idle, v.audience)}
		case v.live(n):
		case n.state == 0 && v.age(n.since) >= v.timing.absent:
			return roleChange{kind: removeServer, id: n.id, why: "a standby is unknown"}
		case n.state == gossipFailed && v.age(n.since) >= v.timing.dead:
			return roleChange{kind: removeServer, id: n.id, why: "a standby is dead"}
		}
	}
	return roleChange{}
}

// planLeaver takes voters out that want to go or are gone, the first to say so first.
func (v *roleView) planLeaver() roleChange {
	leavers := v.which(voter, v.going)
	if len(leavers) == 0 {
		return roleChange{}
	}
	leaver := slices.MinFunc(leavers, func(a, b roleNode) int {
		return cmp.Or(boolCompare(b.state == gossipLeft, a.state == gossipLeft), a.since.Compare(b.since), cmp.Compare(a.id, b.id))
	})
	if len(v.which(voter, v.staying)) < v.grow() && len(v.which(voter, nil)) <= v.grow() {
		if ready := v.candidates(0); len(ready) > 0 {
			return roleChange{kind: promote, id: ready[0].id, why: "a voter leaves"}
		}
		if leaver.state == gossipLeaving && v.age(leaver.since) < v.timing.patience {
			if c := v.planStandbys(); c.kind == addStandby {
				return c
			}
			if len(v.which(standby, v.staying)) > 0 {
				return roleChange{} // it will have caught up soon
			}
		}
	}
	if v.quorate(removeServer, leaver.id) {
		return roleChange{kind: removeServer, id: leaver.id, why: "a voter leaves"}
	}
	// A dead voter is in the way. If the leaver went all the same there would be no quorum any more.
	for _, n := range v.which(voter, v.crashed) {
		return roleChange{kind: demote, id: n.id, why: "a dead voter keeps others from leaving"}
	}
	return roleChange{}
}

// planDead replaces voters that crashed.
func (v *roleView) planDead() roleChange {
	dead := v.which(voter, v.crashed)
	if len(dead) == 0 {
		return roleChange{}
	}
	first := slices.MinFunc(dead, func(a, b roleNode) int {
		return cmp.Or(cmp.Compare(v.deadFor(b), v.deadFor(a)), cmp.Compare(a.id, b.id))
	})
	age, left := v.deadFor(first), len(v.which(voter, nil))-1
	odd := left%2 == 1
	if age >= v.timing.dead && (odd && left >= v.leastVoters() || len(v.candidates(v.timing.replacement)) > 0) {
		return roleChange{kind: demote, id: first.id, why: "a dead voter is replaced"}
	}
	if age >= v.timing.deadAlone && left >= v.leastVoters() && (left >= v.grow() || len(dead) > 1) {
		return roleChange{kind: demote, id: first.id, why: "a voter is dead"}
	}
	return roleChange{}
}

// leastVoters: crashes leave no fewer.
func (v *roleView) leastVoters() int { return min(3, v.maxVoters) }

// planGrowth promotes standbys.
func (v *roleView) planGrowth() roleChange {
	voters := len(v.which(voter, nil))
	if voters >= v.grow() || len(v.which(voter, v.crashed)) > 0 {
		return roleChange{}
	}
	stable, steady, needed := time.Duration(0), time.Duration(0), 1
	if voters%2 == 1 { // to the next odd number, or not at all
		steady, needed = v.timing.steady, 2
		if voters >= 3 {
			stable = v.timing.stable
		}
	}
	ready := slices.DeleteFunc(v.candidates(stable), func(n roleNode) bool {
		return n.steady < steady && v.age(n.readySince) < v.timing.deadAlone // who is slow for good is better than nobody
	})
	if len(ready) >= needed {
		return roleChange{kind: promote, id: ready[0].id, why: "more voters are wanted"}
	}
	return roleChange{}
}

// planShrink demotes voters that are too many: the one whose loss narrows the spread least.
func (v *roleView) planShrink() roleChange {
	voters := v.which(voter, nil)
	if len(voters) <= v.keep() || len(v.which(voter, v.crashed)) > 0 {
		return roleChange{}
	}
	others := slices.DeleteFunc(slices.Clone(voters), func(n roleNode) bool { return n.id == v.self })
	if len(others) == 0 {
		return roleChange{}
	}
	worst := slices.MaxFunc(others, func(a, b roleNode) int {
		return cmp.Or(spreadOf(without(voters, a.id)).compare(spreadOf(without(voters, b.id))), boolCompare(!a.ready, !b.ready),
			compareVersions(b.version, a.version), cmp.Compare(b.match, a.match), cmp.Compare(a.id, b.id))
	})
	return roleChange{kind: demote, id: worst.id, why: "fewer voters are wanted"}
}

// planStandbys keeps two standbys, if there is anybody.
func (v *roleView) planStandbys() roleChange {
	standbys := v.which(standby, v.staying)
	if len(standbys) > maxStandbys {
		worst := slices.MaxFunc(standbys, v.preference)
		return roleChange{kind: removeServer, id: worst.id, why: "too many standbys"}
	}
	if len(standbys) == maxStandbys {
		return roleChange{}
	}
	if idle := v.idle(); len(idle) > 0 {
		best := slices.MinFunc(idle, v.audience)
		return roleChange{kind: addStandby, id: best.id, why: "a standby is wanted", newcomer: best}
	}
	return roleChange{}
}

// idle are those who could become standbys.
func (v *roleView) idle() []roleNode {
	return v.which(forwarder, func(n roleNode) bool { return n.state == gossipAlive && !n.barred })
}

// planSpread moves a vote to a zone or machine that has none, once all is calm.
func (v *roleView) planSpread() roleChange {
	voters := v.which(voter, nil)
	if len(voters) != v.grow() || len(v.which(voter, v.staying)) != len(voters) {
		return roleChange{}
	}
	if !v.wider(voters) {
		return roleChange{}
	}
	standbys := v.which(standby, v.staying)
	for _, n := range v.candidates(v.timing.stable) {
		if v.improves(voters, n) {
			return roleChange{kind: promote, id: n.id, why: "voters of another zone or machine are wanted"}
		}
	}
	if len(standbys) < maxStandbys || slices.ContainsFunc(standbys, func(n roleNode) bool { return v.improves(voters, n) }) {
		return roleChange{}
	}
	idle := slices.DeleteFunc(v.idle(), func(n roleNode) bool { return v.age(n.since) < v.timing.stable || !v.improves(voters, n) })
	if len(idle) > 0 {
		worst := slices.MaxFunc(standbys, v.preference)
		return roleChange{kind: removeServer, id: worst.id, why: "a standby of another zone or machine is wanted", newcomer: slices.MinFunc(idle, v.audience)}
	}
	return roleChange{}
}

// wider says whether the voters could be spread over more zones or machines at all.
func (v *roleView) wider(voters []roleNode) bool {
	now := spreadOf(voters)
	return slices.ContainsFunc(v.nodes, func(n roleNode) bool {
		if n.role == voter || !v.staying(n) {
			return false
		}
		zone := slices.ContainsFunc(voters, func(o roleNode) bool { return o.zone == n.zone })
		machine := zone && slices.ContainsFunc(voters, func(o roleNode) bool { return o.zone == n.zone && o.machine == n.machine })
		return now.zones < len(voters) && !zone || now.machines < len(voters) && !machine
	})
}

// improves says whether there is a voter, not ourselves, in whose place n would widen the spread.
func (v *roleView) improves(voters []roleNode, n roleNode) bool {
	now := spreadOf(voters)
	return slices.ContainsFunc(voters, func(out roleNode) bool {
		return out.id != v.self && spreadOf(append(without(voters, out.id), n)).compare(now) > 0
	})
}

// candidates are the standbys that may become voters, best first: ready for so long at least, and none that leaves.
func (v *roleView) candidates(stable time.Duration) []roleNode {
	found := v.which(standby, func(n roleNode) bool {
		return n.state == gossipAlive && n.ready && v.age(n.readySince) >= stable
	})
	slices.SortFunc(found, v.preference)
	return found
}

// preference orders nodes, the best voter first: by what they would add to the spread, then the newest version, since an
// older one is about to be replaced, and then the one that has been there for longest.
func (v *roleView) preference(a, b roleNode) int {
	voters := v.which(voter, v.staying)
	return cmp.Or(spreadOf(append(without(voters, b.id), b)).compare(spreadOf(append(without(voters, a.id), a))),
		compareVersions(b.version, a.version), a.since.Compare(b.since), cmp.Compare(a.id, b.id))
}

// audience orders forwarders that may become standbys: whoever was not silent yet is asked before those who were, or a zone
// that cannot be reached would keep all others waiting.
func (v *roleView) audience(a, b roleNode) int {
	return cmp.Or(cmp.Compare(a.silence, b.silence), v.preference(a, b))
}

// spread is over how many zones, and then machines, nodes are spread.
type spread struct{ zones, machines int }

func (s spread) compare(o spread) int {
	return cmp.Or(cmp.Compare(s.zones, o.zones), cmp.Compare(s.machines, o.machines))
}

func spreadOf(nodes []roleNode) spread {
	zones, machines := map[string]bool{}, map[[2]string]bool{}
	for _, n := range nodes {
		zones[n.zone] = true
		machines[[2]string{n.zone, n.machine}] = true
	}
	return spread{len(zones), len(machines)}
}

// without copies.
func without(nodes []roleNode, id string) []roleNode {
	return slices.DeleteFunc(slices.Clone(nodes), func(n roleNode) bool { return n.id == id })
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// compareVersions compares dotted numbers, and what is none as text.
func compareVersions(a, b string) int {
	return slices.CompareFunc(strings.FieldsFunc(a, isDot), strings.FieldsFunc(b, isDot), func(a, b string) int {
		x, errX := strconv.Atoi(strings.TrimPrefix(a, "v"))
		y, errY := strconv.Atoi(strings.TrimPrefix(b, "v"))
		if errX != nil || errY != nil {
			return cmp.Compare(a, b)
		}
		return cmp.Compare(x, y)
	})
}

func isDot(r rune) bool { return r == '.' || r == '-' || r == '+' }
