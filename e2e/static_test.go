//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kadm"
)

// shown asks a Go driver for its member id and generation.
func shown(t *testing.T, m *member) string {
	t.Helper()
	mark := m.Mark()
	check(t, m.Say("show"))
	line, err := m.Line(mark, 5*time.Second, func(l string) bool { return strings.HasPrefix(l, "member ") })
	check(t, err)
	return line
}

// assignments counts how often a member was told what it owns.
func assignments(m *member) int {
	n := 0
	for _, line := range m.protocol() {
		if line == "assigned" || strings.HasPrefix(line, "assigned ") {
			n++
		}
	}
	return n
}

// staticGroup is two static members that share a topic and have read it all.
func staticGroup(t *testing.T, k *lab.Kafka, s *lab.Sidecar, driver string) *life {
	t.Helper()
	name := "static-" + driver + "-" + strings.ToLower(t.Name())
	l := &life{client: clients()[driver], addr: s.Addr(), topic: topic(t, k, name, partitions), group: name, adm: admin(t, s.Addr())}
	t.Cleanup(l.end)
	l.client.flavour = "static:one"
	l.a = l.join(t)
	l.shared(t, 30*time.Second, l.a)
	l.client.flavour = "static:two"
	l.b = l.join(t)
	l.shared(t, 30*time.Second, l.a, l.b)
	l.more(t, false)
	return l
}

// unchanged checks that what happens costs neither member its id, nor the group a generation.
func (l *life) unchanged(t *testing.T, happens func()) {
	t.Helper()
	type snapshot struct {
		a, b         string
		told1, told2 int
		members      string
	}
	take := func() snapshot {
		return snapshot{shown(t, l.a), shown(t, l.b), assignments(l.a), assignments(l.b), instances(t, l.adm, l.group)}
	}
	before := take()
	happens()
	l.more(t, false)
	if after := take(); after != before {
		t.Errorf("before: %+v\nafter:  %+v", before, after)
	}
}

func instances(t *testing.T, adm *kadm.Client, group string) string {
	t.Helper()
	groups, err := adm.DescribeGroups(within(t, 10*time.Second), group)
	check(t, err)
	check(t, groups.Error())
	var all []string
	for _, m := range groups[group].Members {
		if m.InstanceID == nil {
			t.Fatalf("member %s is not static", m.MemberID)
		}
		all = append(all, *m.InstanceID+"="+m.MemberID)
	}
	slices.Sort(all)
	return fmt.Sprint(all)
}

// TestStaticMembersOutliveIdleConnections: franz-go reaps connections idle for a second, its join connection among them.
func TestStaticMembersOutliveIdleConnections(t *testing.T) {
	k := kafka(t, lab.Newest, 3)
	l := staticGroup(t, k, sidecar(t, k), "franz-go")
	wait := 5 * time.Second
	if long {
		wait = 2 * time.Minute
	}
	l.unchanged(t, func() { time.Sleep(wait) })
}

// TestStaticMembersOutliveTheirBroker: sarama shares one connection between fetches and group calls; the broker behind
// it, which is the group's coordinator in the client's eyes, is killed and comes back.
func TestStaticMembersOutliveTheirBroker(t *testing.T) {
	k := kafka(t, lab.Newest, 3)
	s := sidecar(t, k)
	l := staticGroup(t, k, s, "sarama")
	coordinators := l.adm.FindGroupCoordinators(within(t, 10*time.Second), l.group)
	check(t, coordinators.Error())
	victim := k.Brokers[coordinators[l.group].NodeID-1]
	l.unchanged(t, func() {
		victim.Kill()
		check(t, lab.Eventually(30*time.Second, func() error {
			for p := range int32(partitions) {
				if now, err := leader(t, k, l.topic, p); err != nil || now < 0 || now == int32(victim.ID) {
					return fmt.Errorf("partition %d is led by %d (%v)", p, now, err)
				}
			}
			return nil
		}))
		l.more(t, false)
		restore(t, k)
	})
}

// TestMembersOutliveTheSidecar: its restart costs no generation, whether it was killed or asked.
func TestMembersOutliveTheSidecar(t *testing.T) {
	k := kafka(t, lab.Newest, 3)
	s := sidecar(t, k)
	l := staticGroup(t, k, s, "franz-go")
	times := 3
	if long {
		times = 50
	}
	l.unchanged(t, func() {
		for range times {
			s.Kill()
			check(t, s.Up())
			l.more(t, false)
		}
		_, err := s.Terminate(20 * time.Second)
		check(t, err)
		check(t, s.Up())
	})
}
