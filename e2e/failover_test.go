//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// kills is how often something is killed: in CI, and in the long form.
func kills(short int) int {
	if long {
		return 50
	}
	return short
}

// calm is a group that nothing may disturb: two members at different sidecars, with a client library's driver. Their own
// sidecars stay: most libraries join again when they have found nobody to talk to for a second.
type calm struct {
	*life
	before string
}

// calmGroups starts one for each driver, at two sidecars that nothing happens to.
func calmGroups(t *testing.T, k *lab.Kafka, hosts []*lab.Sidecar, drivers ...string) []*calm {
	t.Helper()
	var all []*calm
	for _, name := range drivers {
		l := &life{client: clients()[name], topic: topic(t, k, "calm-"+name+"-"+strings.ToLower(t.Name()), partitions), group: "calm-" + name,
			adm: admin(t, hosts[0].Addr())}
		t.Cleanup(l.end)
		all = append(all, &calm{life: l})
		l.addr = hosts[0].Addr()
		l.a = l.join(t)
		l.addr = hosts[1].Addr()
		l.b = l.join(t)
	}
	for _, g := range all {
		g.shared(t, 60*time.Second, g.a, g.b)
		g.addr = k.Addrs()
		g.more(t, false)
		g.before = g.snapshot(t)
	}
	return all
}

// standbys are the two or more sidecars that run and are no voters.
func standbys(t *testing.T, c *lab.Cluster) (all []*lab.Sidecar) {
	t.Helper()
	for _, s := range others(c, nil) {
		m, err := s.Members()
		check(t, err)
		if !slices.ContainsFunc(m.Members, func(o lab.Member) bool { return o.Self && o.Role == "voter" }) {
			all = append(all, s)
		}
	}
	if len(all) < 2 {
		t.Fatalf("%d sidecars are no voters", len(all))
	}
	return all
}

// addrs is the bootstrap list of all sidecars.
func addrs(c *lab.Cluster) string {
	var all []string
	for _, s := range c.Sidecars {
		all = append(all, s.Addr())
	}
	return strings.Join(all, ",")
}

// snapshot is what a rebalance would change: the members, how often they were told what they own, and what they take for
// their generation, where the driver shows it.
func (g *calm) snapshot(t *testing.T) string {
	t.Helper()
	groups, err := g.adm.DescribeGroups(within(t, 20*time.Second), g.group)
	check(t, err)
	check(t, groups.Error())
	var ids []string
	for _, m := range groups[g.group].Members {
		ids = append(ids, m.MemberID)
	}
	slices.Sort(ids)
	told := fmt.Sprint(assignments(g.a), " ", assignments(g.b))
	if strings.HasPrefix(g.client.name, "franz") || g.client.name == "sarama" {
		told += shown(t, g.a) + shown(t, g.b)
	}
	return fmt.Sprint(groups[g.group].State, " ", ids, " told ", told)
}

// undisturbedGroups checks that each still reads and commits, and had no rebalance.
func undisturbedGroups(t *testing.T, groups []*calm) {
	t.Helper()
	var disturbed []string
	for _, g := range groups {
		g.more(t, false)
		if after := g.snapshot(t); after != g.before {
			disturbed = append(disturbed, fmt.Sprintf("%s: before: %s\nafter: %s\n%s\n%s", g.group, g.before, after, said(g.a), said(g.b)))
		}
	}
	for _, g := range disturbed {
		t.Error(g)
	}
}

// said is what a member has printed besides records.
func said(m *member) string {
	lines := slices.DeleteFunc(m.Lines(), func(l string) bool { return strings.HasPrefix(l, "got ") || l == "committed" })
	return "    " + strings.Join(lines[max(0, len(lines)-60):], "\n    ")
}

// TestTheActiveSidecarIsKilled again and again: commits through the others go on after a moment, without an error;
// nothing acknowledged is lost; no group over it has a rebalance, whatever its client library.
func TestTheActiveSidecarIsKilled(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 5, 3)
	groups := calmGroups(t, k, standbys(t, c), "franz-go", "sarama", "java", "kcat")
	name := topic(t, k, "killed-active", 1)
	all := pulses(t, name, c.Sidecars...)
	var pauses []time.Duration
	for range kills(5) {
		check(t, c.Settled(60*time.Second, 3))
		victim := active(t, c)
		left := slices.DeleteFunc(slices.Clone(all), func(p *pulse) bool { return p.at == victim })
		rested(t, all...)
		victim.Kill()
		pauses = append(pauses, undisturbed(t, 20*time.Second, left...))
		check(t, victim.Up())
	}
	check(t, c.Settled(60*time.Second, 3))
	figure(t, "pause when the active sidecar is killed", pauses, 100*time.Millisecond, 300*time.Millisecond, 5*time.Second)
	kept(t, c, all...)
	undisturbedGroups(t, groups)
}

// TestTheActiveSidecarIsStopped: one that hangs is replaced; when it goes on it finds that it is no longer active.
func TestTheActiveSidecarIsStopped(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 5, 3)
	groups := calmGroups(t, k, standbys(t, c), "franz-go")
	name := topic(t, k, "stopped-active", 1)
	all := pulses(t, name, c.Sidecars...)
	h, nextKeys, stop := historians(t, name, 2, c.Sidecars...)
	var pauses []time.Duration
	for range kills(3) {
		check(t, c.Settled(60*time.Second, 3))
		victim := active(t, c)
		left := slices.DeleteFunc(slices.Clone(all), func(p *pulse) bool { return p.at == victim })
		rested(t, all...)
		check(t, victim.Signal(syscall.SIGSTOP))
		pauses = append(pauses, undisturbed(t, 20*time.Second, left...))
		h.more(t, 50, 20*time.Second)
		check(t, victim.Signal(syscall.SIGCONT))
		for _, p := range all {
			p.beats(t, 20*time.Second) // its own clients go on, too
		}
		undisturbed(t, 10*time.Second, left...)
		nextKeys()
	}
	stop()
	h.check(t)
	figure(t, "pause when the active sidecar hangs", pauses, 1200*time.Millisecond, 2500*time.Millisecond, 6*time.Second)
	kept(t, c, all...)
	undisturbedGroups(t, groups)
}

// TestAFollowerIsKilled: that is hardly noticed.
func TestAFollowerIsKilled(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	all := pulses(t, topic(t, k, "killed-follower", 1), c.Sidecars...)
	var pauses []time.Duration
	for n := range kills(4) {
		check(t, c.Settled(60*time.Second, 3))
		leader := active(t, c)
		victim := others(c, leader)[n%2]
		left := slices.DeleteFunc(slices.Clone(all), func(p *pulse) bool { return p.at == victim })
		rested(t, all...)
		victim.Kill()
		pauses = append(pauses, undisturbed(t, 20*time.Second, left...))
		if now := active(t, c); now != leader {
			t.Errorf("another sidecar became active because a follower was killed")
		}
		check(t, victim.Up())
	}
	check(t, c.Settled(60*time.Second, 3))
	figure(t, "slowest commit when a follower is killed", pauses, 100*time.Millisecond, 100*time.Millisecond, 3*time.Second)
	kept(t, c, all...)
}

// TestTheActiveSidecarIsAskedToStop, each time: it hands over; who is connected to the others hardly notices, and who is
// connected to it is served until it ends. The groups' own sidecars, standbys at first, become active in their turn: with
// that the groups have seen enough.
func TestTheActiveSidecarIsAskedToStop(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 5, 3)
	hosts := standbys(t, c)
	groups := calmGroups(t, k, hosts, "franz-go", "java", "kcat")
	all := pulses(t, topic(t, k, "asked-to-stop", 1), c.Sidecars...)
	var pauses []time.Duration
	for range kills(2) {
		check(t, c.Settled(60*time.Second, 3))
		victim := active(t, c)
		if slices.Contains(hosts, victim) {
			undisturbedGroups(t, groups)
			for _, g := range groups {
				g.end()
			}
			groups = nil
		}
		pauses = append(pauses, retired(t, all, victim))
		check(t, victim.Up())
	}
	check(t, c.Settled(60*time.Second, 3))
	figure(t, "slowest commit when the active sidecar hands over", pauses, 200*time.Millisecond, 200*time.Millisecond, 3*time.Second)
	kept(t, c, all...)
	undisturbedGroups(t, groups)
}

// retired asks a sidecar to stop and waits for its end, and gives the slowest commit at the others.
func retired(t *testing.T, all []*pulse, victim *lab.Sidecar) time.Duration {
	t.Helper()
	rested(t, all...)
	code, err := victim.Terminate(20 * time.Second)
	check(t, err)
	if code != 0 {
		t.Errorf("exit status %d", code)
	}
	var left []*pulse
	for _, p := range all {
		if p.at != victim {
			left = append(left, p)
		} else if _, errors, _ := p.taken(); len(errors) > 0 {
			t.Errorf("who was connected to it was told %v", errors)
		}
	}
	return undisturbed(t, 20*time.Second, left...)
}

// TestRollingRestart: all sidecars are restarted in turn, under load: no rebalance, no error, hardly a slow commit.
func TestRollingRestart(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 5, 3)
	hosts := standbys(t, c)
	groups := calmGroups(t, k, hosts, "franz-go", "sarama", "java", "kcat")
	name := topic(t, k, "rolling", 1)
	all := pulses(t, name, c.Sidecars...)
	h, nextKeys, stop := historians(t, name, 1, c.Sidecars...)
	var pauses []time.Duration
	restart := func(s *lab.Sidecar) {
		check(t, c.Settled(60*time.Second, 3))
		pauses = append(pauses, retired(t, all, s))
		check(t, s.Up())
	}
	rounds := 1
	if long {
		rounds = 10
	}
	for range rounds {
		for _, s := range c.Sidecars {
			if !slices.Contains(hosts, s) {
				restart(s)
			}
		}
		nextKeys()
	}
	undisturbedGroups(t, groups)
	for _, s := range hosts { // their own clients join again, and read on where they were
		restart(s)
	}
	check(t, c.Settled(60*time.Second, 3))
	for _, g := range groups {
		g.more(t, false)
	}
	stop()
	h.check(t)
	figure(t, "slowest commit in a rolling restart", pauses, 500*time.Millisecond, 500*time.Millisecond, 4*time.Second)
	kept(t, c, all...)
}

// TestHistoryUnderKills: what clients of all three sidecars are told is linearizable while any of them is killed, stopped
// or asked to stop.
func TestHistoryUnderKills(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	h, nextKeys, stop := historians(t, topic(t, k, "history", 1), 3, c.Sidecars...)
	for n := range kills(4) {
		check(t, c.Settled(60*time.Second, 3))
		h.more(t, 200, 30*time.Second)
		victim := active(t, c)
		if n%4 == 3 {
			victim = others(c, victim)[0]
		}
		switch n % 3 {
		case 0, 1:
			victim.Kill()
			h.more(t, 50, 30*time.Second)
			check(t, victim.Up())
		case 2:
			check(t, victim.Signal(syscall.SIGSTOP))
			h.more(t, 50, 30*time.Second)
			check(t, victim.Signal(syscall.SIGCONT))
		}
		if n%4 == 3 {
			nextKeys()
		}
	}
	check(t, c.Settled(60*time.Second, 3))
	h.more(t, 200, 30*time.Second)
	stop()
	h.check(t)
	for what, times := range h.errors {
		t.Errorf("clients were told %d times: %s", times, what)
	}
}
