//go:build e2e

package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

var (
	long   = os.Getenv("E2E_LONG") != ""
	direct = os.Getenv("E2E_DIRECT") != ""
)

func TestMain(m *testing.M) {
	flag.Parse()
	// Parallel subtests mostly wait for each other's clients: the number of cores says nothing about them.
	if err := flag.Set("test.parallel", "32"); err != nil {
		panic(err)
	}
	code := m.Run()
	for _, k := range clusters {
		k.Stop()
	}
	lab.Cleanup()
	os.Exit(code)
}

// clusters are shared by all tests: starting Kafka costs ten seconds. Whoever stops a broker starts it again.
var clusters = map[string]*lab.Kafka{}

// kafka gives the shared cluster of that version and size, all of whose brokers are up.
func kafka(t *testing.T, version string, brokers int) *lab.Kafka {
	t.Helper()
	name := fmt.Sprintf("%s-%d", version, brokers)
	k := clusters[name]
	if k == nil {
		var err error
		if k, err = lab.StartKafka(lab.KafkaConfig{Version: version, Brokers: brokers, Dir: dir(t, "kafka"), Props: map[string]string{
			// The connections of idle clients are cut after 5 s, in all tests: nobody may notice.
			"connections.max.idle.ms": "5000",
		}}); err != nil {
			t.Fatal(err)
		}
		clusters[name] = k
	}
	restore(t, k)
	t.Cleanup(func() {
		if t.Failed() {
			for _, b := range k.Brokers {
				t.Logf("last lines of broker %d:\n%s", b.ID, b.Tail(10))
			}
		}
	})
	return k
}

// restore starts the brokers that do not run.
func restore(t *testing.T, k *lab.Kafka) {
	t.Helper()
	check(t, k.Restore(90*time.Second))
}

// dir is a folder that outlives the test, as the shared Kafka does.
func dir(t *testing.T, name string) string {
	t.Helper()
	d, err := lab.TempDir(name)
	check(t, err)
	return d
}

// sidecar starts one in front of a cluster and ends it with the test, whose failure shows its log.
func sidecar(t *testing.T, k *lab.Kafka, args ...string) *lab.Sidecar {
	t.Helper()
	s := newSidecar(t, k.Addrs(), args...)
	check(t, s.Up())
	check(t, lab.Eventually(10*time.Second, func() error { // it is ready before it has asked its upstream
		meta, err := askMetadata(s.Addr(), "")
		if err == nil && len(meta.Brokers) != len(k.Brokers) {
			err = fmt.Errorf("%d brokers are known", len(meta.Brokers))
		}
		return err
	}))
	return s
}

// newSidecar is sidecar without starting it.
func newSidecar(t *testing.T, upstream string, args ...string) *lab.Sidecar {
	t.Helper()
	s := &lab.Sidecar{Upstream: upstream, Dir: dir(t, "data"),
		Args: append([]string{"--group-initial-rebalance-delay", "0s", "--max-drain", "2s"}, args...)}
	t.Cleanup(func() {
		if s.Process == nil {
			return
		}
		s.Kill()
		if t.Failed() {
			t.Logf("last lines of the sidecar:\n%s", s.Tail(60))
		}
	})
	return s
}

// check ends the test on an error.
func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within is a context for one question.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// franz is a franz-go client of an address, closed with the test.
func franz(t *testing.T, addr string, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	cl, err := kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(strings.Split(addr, ",")...), kgo.MetadataMinAge(100 * time.Millisecond)}, opts...)...)
	check(t, err)
	t.Cleanup(cl.CloseAllowingRebalance)
	return cl
}

func admin(t *testing.T, addr string, opts ...kgo.Opt) *kadm.Client {
	t.Helper()
	return kadm.NewClient(franz(t, addr, opts...))
}

// topic creates a topic, named after the test, that all brokers know.
func topic(t *testing.T, k *lab.Kafka, name string, partitions int32) string {
	t.Helper()
	adm := admin(t, k.Addrs())
	_, err := adm.CreateTopic(within(t, 30*time.Second), partitions, -1, nil, name)
	check(t, err)
	check(t, lab.Eventually(20*time.Second, func() error {
		for _, b := range k.Brokers {
			if !b.Alive() {
				continue
			}
			one, err := kgo.NewClient(kgo.SeedBrokers(b.Addr()))
			if err != nil {
				return err
			}
			topics, err := kadm.NewClient(one).ListTopics(within(t, 5*time.Second), name)
			one.Close()
			if err != nil {
				return err
			}
			if err := topics.Error(); err != nil {
				return err
			}
			for _, p := range topics[name].Partitions {
				if p.Leader < 0 {
					return errors.New("a partition has no leader yet")
				}
			}
		}
		return nil
	}))
	return name
}

// produce writes the keys k<from> to k<to-1>, spread over the partitions.
func produce(t *testing.T, addr, topic string, from, to int) {
	t.Helper()
	cl := franz(t, addr, kgo.RecordPartitioner(kgo.RoundRobinPartitioner()),
		kgo.ProducerBatchCompression(kgo.NoCompression())) // not every client knows snappy
	var rs []*kgo.Record
	for i := from; i < to; i++ {
		rs = append(rs, &kgo.Record{Topic: topic, Key: fmt.Appendf(nil, "k%d", i), Value: fmt.Appendf(nil, "v%d", i)})
	}
	check(t, cl.ProduceSync(within(t, 30*time.Second), rs...).FirstErr())
	cl.Close()
}

// caughtUp waits until a group has committed all there is in a topic.
func caughtUp(t *testing.T, adm *kadm.Client, group, topic string, within time.Duration) {
	t.Helper()
	check(t, lab.Eventually(within, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		ends, err := adm.ListEndOffsets(ctx, topic)
		if err != nil {
			return err
		}
		committed, err := adm.FetchOffsets(ctx, group)
		if err != nil {
			return err
		}
		for p, end := range ends[topic] {
			if end.Err != nil {
				return end.Err
			}
			if have, ok := committed.Lookup(topic, p); end.Offset > 0 && (!ok || have.At != end.Offset) {
				return fmt.Errorf("group %s has committed %d of %d in %s/%d", group, have.At, end.Offset, topic, p)
			}
		}
		return nil
	}))
}

// together runs a function for each of some things at once, each as a subtest of its own, and returns those that did not fail.
func together[T any](t *testing.T, phase string, things map[string]T, f func(t *testing.T, thing T)) map[string]T {
	t.Helper()
	var mu sync.Mutex
	failed := map[string]bool{}
	began := time.Now()
	t.Run(phase, func(t *testing.T) {
		for _, name := range slices.Sorted(maps.Keys(things)) {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				t.Cleanup(func() {
					if t.Failed() {
						mu.Lock()
						failed[name] = true
						mu.Unlock()
					}
				})
				f(t, things[name])
			})
		}
	})
	t.Logf("%s: %.1f s", phase, time.Since(began).Seconds())
	rest := maps.Clone(things)
	maps.DeleteFunc(rest, func(name string, _ T) bool { return failed[name] })
	return rest
}
