//go:build e2e

package e2e

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kadm"
)

const (
	partitions = 4
	batch      = 100 // records written in each phase
)

// life is one client library's group: its members come, go, and are killed, and each record must be read once.
type life struct {
	client   client
	addr     string
	topic    string
	group    string
	adm      *kadm.Client
	produced int
	members  []*member // all that ever were
	a, b     *member
}

// more writes some more records, with the client itself or with franz-go, and waits until all are read once and committed.
func (l *life) more(t *testing.T, itself bool) {
	t.Helper()
	if itself {
		l.client.produce(t, l.addr, l.topic, l.produced, l.produced+batch)
	} else {
		produce(t, l.addr, l.topic, l.produced, l.produced+batch)
	}
	l.produced += batch
	l.settled(t)
}

// settled waits until everything is read and committed, and checks that nothing was read twice or skipped.
func (l *life) settled(t *testing.T) {
	t.Helper()
	defer func() {
		for _, m := range l.members {
			if t.Failed() {
				t.Logf("%s (alive: %v) owns %v:\n%s", m.Name, m.Alive(), m.owns(), m.Tail(25))
			}
		}
	}()
	check(t, lab.Eventually(40*time.Second, func() error {
		if n := len(l.read()); n < l.produced {
			return fmt.Errorf("%d of %d records read", n, l.produced)
		}
		return nil
	}))
	next := map[int]int64{}
	for _, p := range l.read() {
		if p.offset != next[p.partition] {
			t.Fatalf("partition %d: offset %d was read where %d was to come", p.partition, p.offset, next[p.partition])
		}
		next[p.partition]++
	}
	caughtUp(t, l.adm, l.group, l.topic, 20*time.Second)
}

// read is every record that some member showed, sorted.
func (l *life) read() []position {
	var all []position
	for _, m := range l.members {
		all = append(all, m.got()...)
	}
	slices.SortFunc(all, func(a, b position) int {
		return cmp.Or(cmp.Compare(a.partition, b.partition), cmp.Compare(a.offset, b.offset))
	})
	return all
}

func (l *life) join(t *testing.T) *member {
	t.Helper()
	m := l.client.consume(t, l.addr, l.topic, l.group)
	l.members = append(l.members, m)
	return m
}

// shared waits until these members and nobody else own all partitions, each at least one.
func (l *life) shared(t *testing.T, within time.Duration, members ...*member) {
	t.Helper()
	err := lab.Eventually(within, func() error {
		seen := map[string]bool{}
		for _, m := range members {
			owns := m.owns()
			if len(owns) == 0 {
				return fmt.Errorf("%s owns nothing", m.Name)
			}
			for _, p := range owns {
				if seen[p] {
					return fmt.Errorf("partition %s has two owners", p)
				}
				seen[p] = true
			}
		}
		if len(seen) != partitions {
			return fmt.Errorf("owned: %v", slices.Sorted(maps.Keys(seen)))
		}
		return nil
	})
	if err != nil {
		for _, m := range members {
			t.Logf("%s:\n%s", m.Name, m.Tail(30))
		}
		t.Fatal(err)
	}
}

// end kills what is left, so that the log of a broken life ends with it.
func (l *life) end() {
	for _, m := range l.members {
		if m.Alive() {
			m.Kill()
		}
	}
}

// TestLife: with every client library a group is consumed by one and two members, one leaves, one is killed, sidecar,
// broker and client are killed and restarted, and each record is read exactly once: it is committed before whatever
// happens, so a record read twice or never was committed wrongly or lost.
func TestLife(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	liveOn(t, k, clients())
}

// TestLifeOnOldKafka: the same, on the oldest Kafka, with three clients. Its broker is not killed under kcat, which ends
// when a topic is unknown: that is what Kafka with ZooKeeper says of all topics while it starts.
func TestLifeOnOldKafka(t *testing.T) {
	k := kafka(t, lab.Oldest, 1)
	some := clients()
	if !long {
		maps.DeleteFunc(some, func(name string, _ client) bool { return name != "franz-go" && name != "kcat" && name != "sarama" })
	}
	liveOn(t, k, some, "kcat")
}

// liveOn runs all phases; the last, a killed broker, without the frail.
func liveOn(t *testing.T, k *lab.Kafka, clients map[string]client, frail ...string) {
	var s *lab.Sidecar
	addr := k.Addrs()
	if !direct {
		s = sidecar(t, k)
		addr = s.Addr()
	}
	lives := map[string]*life{}
	for name, c := range clients {
		l := &life{client: c, addr: addr, topic: topic(t, k, "life-"+name, partitions), group: "group-" + name, adm: admin(t, addr)}
		defer l.end()
		lives[name] = l
	}

	lives = together(t, "one member reads", lives, func(t *testing.T, l *life) {
		l.a = l.join(t)
		l.shared(t, 30*time.Second, l.a)
		l.more(t, true)
	})
	lives = together(t, "a second joins", lives, func(t *testing.T, l *life) {
		l.b = l.join(t)
		l.shared(t, 30*time.Second, l.a, l.b)
		l.more(t, false)
	})
	lives = together(t, "and leaves", lives, func(t *testing.T, l *life) {
		l.b.leaves(t)
		l.shared(t, 5*time.Second, l.a) // sooner than its session could end
		l.more(t, false)
	})
	lives = together(t, "another is killed", lives, func(t *testing.T, l *life) {
		l.b = l.join(t)
		l.shared(t, 30*time.Second, l.a, l.b)
		l.more(t, false)
		l.b.Kill()
		l.shared(t, 30*time.Second, l.a)
		l.more(t, false)
	})
	if s != nil {
		s.Kill()
		check(t, s.Up())
		lives = together(t, "the sidecar is killed", lives, func(t *testing.T, l *life) { l.more(t, true) })
		_, err := s.Terminate(20 * time.Second)
		check(t, err)
		check(t, s.Up())
		lives = together(t, "the sidecar is restarted", lives, func(t *testing.T, l *life) { l.more(t, false) })
	}
	lives = together(t, "the client is killed", lives, func(t *testing.T, l *life) {
		l.a.Kill()
		produce(t, l.addr, l.topic, l.produced, l.produced+batch) // while nobody is there
		l.produced += batch
		l.a = l.join(t)
		l.shared(t, 30*time.Second, l.a)
		l.settled(t)
		l.more(t, false)
	})
	maps.DeleteFunc(lives, func(name string, _ *life) bool { return slices.Contains(frail, name) })
	k.Brokers[0].Kill()
	restore(t, k)
	lives = together(t, "the broker is killed", lives, func(t *testing.T, l *life) { l.more(t, true) })
	if long {
		check(t, k.Brokers[0].Signal(syscall.SIGTERM))
		_, err := k.Brokers[0].Wait(60 * time.Second)
		check(t, err)
		restore(t, k)
		lives = together(t, "the broker is restarted", lives, func(t *testing.T, l *life) { l.more(t, false) })
	}
	together(t, "all leave", lives, func(t *testing.T, l *life) { l.a.leaves(t) })
}
