//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// TestTheActiveSidecarIsKilledOrAskedToStopWithManyOffsets: what the cluster keeps does not make it slower to take over,
// since every replica has it in memory, once it has loaded it; 40 thousand offsets, or a million in the long form.
func TestTheActiveSidecarIsKilledOrAskedToStopWithManyOffsets(t *testing.T) {
	const perGroup = 100
	groups, rounds := 400, 1
	if long {
		groups, rounds = 10_000, 3
	}
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	name := topic(t, k, "many", perGroup)
	began := time.Now()
	fill(t, c, name, groups, perGroup)
	t.Logf("%d offsets committed in %s", groups*perGroup, time.Since(began).Round(time.Second))
	all := pulses(t, name, c.Sidecars...)
	var killed, stopped []time.Duration
	for range rounds {
		killed = append(killed, over(t, c, all, func(victim *lab.Sidecar) { victim.Kill() }))
		stopped = append(stopped, over(t, c, all, func(victim *lab.Sidecar) {
			code, err := victim.Terminate(20 * time.Second)
			if check(t, err); code != 0 {
				t.Errorf("exit status %d", code)
			}
		}))
	}
	figure(t, "pause when the active sidecar is killed", killed, 100*time.Millisecond, 300*time.Millisecond, 5*time.Second)
	figure(t, "slowest commit when the active sidecar hands over", stopped, 200*time.Millisecond, 200*time.Millisecond, 3*time.Second)
	kept(t, c, all...)
	for _, g := range []int{0, groups / 2, groups - 1} {
		finds(t, c, manyGroup(g), name, int64(g))
	}
}

// over ends the active sidecar, gives the slowest commit at the others, and starts it again.
func over(t *testing.T, c *lab.Cluster, all []*pulse, ends func(*lab.Sidecar)) time.Duration {
	t.Helper()
	check(t, c.Settled(60*time.Second, 3))
	for _, s := range c.Sidecars {
		loaded(t, s)
	}
	check(t, c.Settled(60*time.Second, 3))
	victim := active(t, c)
	for i, s := range c.Sidecars {
		t.Logf("sidecar %d, active %v: %d MB, %s of processor time", i, s == victim, resident(t, s), processorTime(t, s))
	}
	rested(t, all...)
	ends(victim)
	left := slices.DeleteFunc(slices.Clone(all), func(p *pulse) bool { return p.at == victim })
	pause := undisturbed(t, 20*time.Second, left...)
	began := time.Now()
	check(t, victim.Up())
	t.Logf("started again in %s", time.Since(began).Round(time.Millisecond))
	return pause
}

func manyGroup(g int) string { return fmt.Sprintf("many-%d", g) }

// fill commits an offset, the number of the group, for each partition of a topic in each of so many groups.
func fill(t *testing.T, c *lab.Cluster, topic string, groups, partitions int) {
	t.Helper()
	todo := make(chan int)
	var mu sync.Mutex
	var failed error
	var clients sync.WaitGroup
	for i := range 12 {
		clients.Go(func() {
			if err := fillFrom(todo, c.Sidecars[i%len(c.Sidecars)].Addr(), topic, partitions); err != nil {
				mu.Lock()
				failed = errors.Join(failed, err)
				mu.Unlock()
				for range todo {
				}
			}
		})
	}
	for g := range groups {
		todo <- g
	}
	close(todo)
	clients.Wait()
	check(t, failed)
}

func fillFrom(todo <-chan int, addr, topic string, partitions int) error {
	conn, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	r := &raw{Conn: conn}
	for g := range todo {
		req := commitRequest(manyGroup(g), topic, int64(g))
		first := req.Topics[0].Partitions[0]
		for p := range partitions - 1 {
			next := first
			next.Partition = int32(p + 1)
			req.Topics[0].Partitions = append(req.Topics[0].Partitions, next)
		}
		resp, err := r.ask(req, 10*time.Second)
		if err != nil {
			return err
		}
		for _, p := range resp.(*kmsg.OffsetCommitResponse).Topics[0].Partitions {
			if p.ErrorCode != 0 {
				return fmt.Errorf("%s, partition %d: error %d", req.Group, p.Partition, p.ErrorCode)
			}
		}
	}
	return nil
}

// loaded waits until a sidecar has all it keeps in memory.
func loaded(t *testing.T, s *lab.Sidecar) {
	t.Helper()
	check(t, lab.Eventually(60*time.Second, func() error {
		stacks, err := s.Stacks()
		if err == nil && strings.Contains(stacks, "(*Coordinator).rebuild") {
			err = errors.New("it still reads what it keeps")
		}
		return err
	}))
}

// resident is what a sidecar has in memory, in MB.
func resident(t *testing.T, s *lab.Sidecar) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Cmd.Process.Pid))
	check(t, err)
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kb, err := strconv.Atoi(strings.Fields(rest)[0])
	check(t, err)
	return kb / 1000
}

// processorTime is what a sidecar has used.
func processorTime(t *testing.T, s *lab.Sidecar) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.Cmd.Process.Pid))
	check(t, err)
	fields := strings.Fields(string(stat)[strings.LastIndexByte(string(stat), ')')+1:])
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	check(t, errors.Join(err1, err2))
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}
