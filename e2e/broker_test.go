//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// listeners are the bootstrap listener's address and each broker's, as the sidecar's own Metadata gives them.
func listeners(t *testing.T, s *lab.Sidecar) map[string]string {
	t.Helper()
	all := map[string]string{"bootstrap": s.Addr()}
	meta, err := askMetadata(s.Addr(), "")
	check(t, err)
	for _, b := range meta.Brokers {
		all[fmt.Sprintf("broker-%d", b.NodeID)] = fmt.Sprintf("%s:%d", b.Host, b.Port)
	}
	return all
}

// everyListener lives a group's life on a fresh connection to each listener, at once.
func everyListener(t *testing.T, state string, addrs map[string]string, topic string) {
	t.Helper()
	together(t, state, addrs, func(t *testing.T, addr string) {
		check(t, groupCalls(dialRaw(t, addr), "group "+t.Name(), topic))
	})
}

// again starts a killed sidecar and waits until all its listeners are bound again.
func again(t *testing.T, s *lab.Sidecar, addrs map[string]string) {
	t.Helper()
	s.Kill()
	check(t, s.Up())
	for _, addr := range addrs {
		check(t, lab.Eventually(10*time.Second, func() error {
			c, err := net.DialTimeout("tcp", addr, time.Second)
			if err == nil {
				_ = c.Close()
			}
			return err
		}))
	}
}

// TestEveryListenerTakesEveryGroupCall, whatever its broker does: it is alive, it is dead, it has stopped answering, its
// address swallows packets; and after a restart of the sidecar in each of these states.
func TestEveryListenerTakesEveryGroupCall(t *testing.T) {
	k := kafka(t, lab.Newest, 3)
	s := sidecar(t, k)
	name := topic(t, k, "listeners", 3)
	check(t, lab.Eventually(10*time.Second, func() error {
		if n := len(listeners(t, s)); n != 4 {
			return fmt.Errorf("%d listeners", n)
		}
		return nil
	}))
	addrs := listeners(t, s)
	if got := addrs["broker-1"]; got != s.BrokerAddr(1) {
		t.Errorf("broker 1 is at %s, by the rule it were %s", got, s.BrokerAddr(1))
	}
	addrs["bootstrap, IPv6"] = fmt.Sprintf("[::1]:%d", s.Port)
	everyListener(t, "all brokers live", addrs, name)

	victim := k.Brokers[1]
	check(t, victim.Signal(syscall.SIGSTOP))
	defer func() { _ = victim.Signal(syscall.SIGCONT) }()
	everyListener(t, "a broker is stopped", addrs, name)
	again(t, s, addrs)
	everyListener(t, "a broker is stopped and the sidecar restarted", addrs, name)
	check(t, victim.Signal(syscall.SIGCONT))

	victim.Kill()
	everyListener(t, "a broker is dead", addrs, name)
	again(t, s, addrs)
	everyListener(t, "a broker is dead and the sidecar restarted", addrs, name)
	hole := blackhole(t, victim.Port)
	everyListener(t, "a broker's address swallows packets", addrs, name)
	again(t, s, addrs)
	everyListener(t, "a broker's address swallows packets and the sidecar restarted", addrs, name)
	hole()
	restore(t, k)

	idle := map[string]*raw{}
	for which, addr := range addrs {
		idle[which] = dialRaw(t, addr)
		_, err := idle[which].metadata("") // so that it has an upstream leg, which the broker will cut
		check(t, err)
	}
	wait := 7 * time.Second // the brokers cut idle connections after 5 s
	if long {
		wait = time.Minute
	}
	time.Sleep(wait)
	together(t, "the connections were idle", idle, func(t *testing.T, r *raw) {
		check(t, groupCalls(r, "group "+t.Name(), name))
		_, err := r.metadata(name)
		check(t, err)
	})
}

// blackhole makes dials of a port hang: its accept queue is full, so the kernel drops every SYN. It returns the end.
func blackhole(t *testing.T, port int) func() {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	check(t, err)
	check(t, syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1))
	check(t, syscall.Bind(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}))
	check(t, syscall.Listen(fd, 0))
	var conns []net.Conn
	end := func() {
		for _, c := range conns {
			_ = c.Close()
		}
		_ = syscall.Close(fd)
	}
	for range 16 {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 300*time.Millisecond)
		if err != nil {
			return end
		}
		conns = append(conns, c)
	}
	t.Fatal("the kernel still accepts connections for a full queue")
	return nil
}

// leader asks the brokers themselves who leads a partition.
func leader(t *testing.T, k *lab.Kafka, topic string, partition int32) (int32, error) {
	t.Helper()
	for _, b := range k.Brokers {
		if !b.Alive() || stopped(b) {
			continue
		}
		meta, err := askMetadata(b.Addr(), topic)
		if err != nil {
			return -1, err
		}
		for _, p := range meta.Topics[0].Partitions {
			if p.Partition == partition {
				return p.Leader, nil
			}
		}
	}
	return -1, errors.New("no broker answers")
}

// stopped says whether a broker was sent SIGSTOP.
func stopped(b *lab.Broker) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", b.Cmd.Process.Pid))
	return err == nil && slices.Contains([]string{"T", "t"}, string(stat[slices.Index(stat, ')')+2]))
}

// TestDeadBrokersListenerKnowsTheNewLeader: a client that knows nothing but the listener of a broker that is dead, or
// silent, writes to the new leader within 3 s of its election.
func TestDeadBrokersListenerKnowsTheNewLeader(t *testing.T) {
	k := kafka(t, lab.Newest, 3)
	s := sidecar(t, k)
	name := topic(t, k, "leaders", 3)
	for _, how := range []string{"killed", "stopped"} {
		t.Run(how, func(t *testing.T) {
			restore(t, k)
			check(t, lab.Eventually(30*time.Second, func() error { // also waits for the preferred leaders to be in sync again
				_, err := leader(t, k, name, 0)
				return err
			}))
			old, err := leader(t, k, name, 0)
			check(t, err)
			addr := listeners(t, s)[fmt.Sprintf("broker-%d", old)]
			victim := k.Brokers[old-1]
			before := dialRaw(t, addr) // a connection from better days
			_, err = before.metadata(name)
			check(t, err)

			if how == "killed" {
				victim.Kill()
			} else {
				check(t, victim.Signal(syscall.SIGSTOP))
				defer func() { _ = victim.Signal(syscall.SIGCONT) }()
			}
			// Not idempotent: a producer id needs Kafka's controller, which may be the very broker that is silent.
			cl := franz(t, addr, kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ProducerLinger(0), kgo.DialTimeout(2*time.Second),
				kgo.DisableIdempotentWrite(), kgo.MaxProduceRequestsInflightPerBroker(1))
			var acked atomic.Int64
			cl.Produce(t.Context(), &kgo.Record{Topic: name, Partition: 0, Value: []byte("x")}, func(_ *kgo.Record, err error) {
				if err == nil {
					acked.Store(time.Now().UnixNano())
				} else {
					t.Errorf("producing: %v", err)
				}
			})
			check(t, lab.Eventually(30*time.Second, func() error {
				now, err := leader(t, k, name, 0)
				if err != nil {
					return err
				}
				if now == old || now < 0 {
					return fmt.Errorf("the leader is %d", now)
				}
				return nil
			}))
			elected := time.Now()
			check(t, lab.Eventually(3*time.Second, func() error {
				meta, err := askMetadata(addr, name)
				if err != nil {
					return err
				}
				if now := meta.Topics[0].Partitions; now[slices.IndexFunc(now, func(p kmsg.MetadataResponseTopicPartition) bool { return p.Partition == 0 })].Leader == old {
					return errors.New("the listener still names the dead leader")
				}
				return nil
			}))
			t.Logf("the listener named the new leader %s after its election", time.Since(elected))
			patience := 3 * time.Second
			if how == "stopped" {
				patience = 15 * time.Second // the record may lie in the silent broker's hands until a time-out
			}
			check(t, lab.Eventually(time.Until(elected.Add(patience)), func() error {
				if acked.Load() == 0 {
					return errors.New("the record is not yet written")
				}
				return nil
			}))
			t.Logf("the record was written %s after the election", time.Unix(0, acked.Load()).Sub(elected))
		})
	}
	restore(t, k)
}

// TestPortsStayTheSame after a kill -9 with an emptied data directory: a running consumer and producer go on.
func TestPortsStayTheSame(t *testing.T) {
	k := kafka(t, lab.Newest, 3)
	s := sidecar(t, k)
	name := topic(t, k, "ports", partitions)
	before := listeners(t, s)

	l := &life{client: clients()["franz-go"], addr: s.Addr(), topic: name, group: "ports", adm: admin(t, s.Addr())}
	defer l.end()
	m := l.join(t)
	l.shared(t, 20*time.Second, m)
	l.more(t, false)
	producer := franz(t, s.Addr(), kgo.DefaultProduceTopic(name))
	check(t, producer.ProduceSync(within(t, 10*time.Second), kgo.StringRecord("before")).FirstErr())

	s.Kill()
	check(t, os.RemoveAll(s.Dir))
	check(t, os.MkdirAll(s.Dir, 0o755))
	check(t, s.Up())
	check(t, producer.ProduceSync(within(t, 20*time.Second), kgo.StringRecord("after")).FirstErr())
	check(t, lab.Eventually(10*time.Second, func() error {
		if after := listeners(t, s); fmt.Sprint(after) != fmt.Sprint(before) {
			return fmt.Errorf("listeners were %v, are %v", before, after)
		}
		return nil
	}))
	n := len(m.got())
	produce(t, s.Addr(), name, 1000, 1100)
	check(t, lab.Eventually(30*time.Second, func() error {
		if got := len(m.got()); got < n+100 {
			return fmt.Errorf("the running consumer got %d records more", got-n)
		}
		return nil
	}))
	caughtUp(t, l.adm, "ports", name, 20*time.Second)
}

// TestNewBroker: the listener of a broker that joins is there before the first reply that names it.
func TestNewBroker(t *testing.T) {
	k := kafka(t, lab.Newest, 3)
	s := sidecar(t, k)
	real := map[int32]bool{}
	ended, named := make(chan struct{}), make(chan error, 1)
	watch := dialRaw(t, s.Addr())
	go func() {
		for {
			select {
			case <-ended:
				named <- errors.New("no reply ever named broker 4")
				return
			default:
			}
			meta, err := watch.metadata("")
			if err != nil {
				named <- err
				return
			}
			for _, b := range meta.Brokers {
				if b.NodeID != 4 {
					continue
				}
				c, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", b.Host, b.Port), time.Second)
				if err == nil {
					_ = c.Close()
				}
				real[b.Port] = true
				named <- err
				return
			}
		}
	}()
	added, err := k.Add()
	check(t, err)
	defer func() { check(t, k.Remove(added)) }()
	time.AfterFunc(20*time.Second, func() { close(ended) })
	check(t, <-named)
	if real[int32(added.Port)] {
		t.Error("the reply named the broker's real port")
	}
	check(t, groupCalls(dialRaw(t, listeners(t, s)["broker-4"]), "new broker", topic(t, k, "new-broker", 1)))
}
