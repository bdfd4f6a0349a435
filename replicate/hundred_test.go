package replicate

import (
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// A hundred sidecars (25 unless E2E_LONG is set) are three voters and two standbys; the others forward: they run no raft,
// know who is active, and take a dead voter's place. What one more of them costs at rest, itself and all the others, is
// the difference between a small fleet and a large one, by number.
func TestAHundredSidecarsAreThreeVotersTwoStandbysAndForwardersAtRest(t *testing.T) {
	size, timing := 25, inAHurry
	if os.Getenv("E2E_LONG") != "" {
		size, timing = 100, seams{}
	}
	f := &fleet{T: t}
	grow := func(to int) {
		for len(f.all) < to {
			f.add("", func(i int, c *Config) { // in memory: nobody here comes back
				c.Cluster.Join = c.Cluster.Join[:min(3, len(c.Cluster.Join))]
				c.Cluster.seams = timing
			})
			// All in one process and at once, their full exchanges would keep two busy cores from raft for longer than its
			// time-outs.
			if n := len(f.all); n == to || n > 5 && n%10 == 0 {
				f.settled(3, 2, n-5)
			}
		}
	}
	const small = 6
	grow(small)
	before := atRest(t)
	grow(size)
	after := atRest(t)
	per := float64(size - small)
	t.Logf("each of %d forwarders more costs %.2f millicores, %.1f goroutines, %.0f KiB of heap, %.0f KiB of stacks", size-small,
		1000*(after.cpu-before.cpu)/per, float64(after.goroutines-before.goroutines)/per, (after.heap-before.heap)/per/1024, (after.stacks-before.stacks)/per/1024)
	if cpu := (after.cpu - before.cpu) / per; cpu > 0.1 {
		t.Errorf("a forwarder at rest takes %.0f millicores", 1000*cpu)
	}
	if n := float64(after.goroutines-before.goroutines) / per; n > 100 {
		t.Errorf("a forwarder has %.0f goroutines", n)
	}

	f.put("key", "value")
	dead := f.voter()
	f.stopped(dead, false)
	f.settled(3, 2, size-6)
	f.await("everyone to know that it is no voter any more", func() bool {
		return !slices.ContainsFunc(f.all, func(s *sidecar) bool {
			return !s.ended() && slices.ContainsFunc(s.n.Members(), func(m MemberInfo) bool { return m.ID == dead.n.ID() && m.Role != RoleForwarder })
		})
	})
	f.stopped(f.active(), false)
	f.put("another", "value")
	f.settled(3, 2, size-7)
	var ending sync.WaitGroup // each takes a moment
	for _, s := range f.all {
		ending.Go(s.stop)
	}
	ending.Wait()
}

// settled waits until the fleet has its roles, none but replicas run raft, and everybody knows who is active.
func (f *fleet) settled(voters, standbys, forwarders int) {
	f.Helper()
	f.await("fleet with its roles", func() bool {
		time.Sleep(20 * time.Millisecond) // to look at everybody is work
		r := f.roles()
		return r[RoleVoter] == voters && r[RoleStandby] == standbys && r[RoleForwarder] == forwarders
	})
	f.await("everyone to know who is active", func() bool {
		active := f.active().n.ID()
		replicas := 0
		for _, s := range f.all {
			if s.ended() {
				continue
			}
			if _, node, _ := s.n.Active(); node != active {
				return false
			}
			if s.n.running.Load() != nil {
				replicas++
			}
		}
		return replicas == voters+standbys
	})
}

// voter gives one that is not active.
func (f *fleet) voter() *sidecar {
	f.Helper()
	for _, s := range f.all {
		if !s.ended() && s.n.Status().Role == RoleVoter && !s.active() {
			return s
		}
	}
	f.Fatal("no voter but the active one")
	return nil
}

// cost of this process.
type cost struct {
	cpu          float64 // cores
	goroutines   int
	heap, stacks float64 // bytes
}

// atRest measures it, over the calmest of some moments.
func atRest(t *testing.T) (c cost) {
	t.Helper()
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	c.heap, c.stacks, c.goroutines = float64(m.HeapAlloc), float64(m.StackInuse), runtime.NumGoroutine()
	c.cpu = float64(runtime.NumCPU())
	for range 4 {
		began, used := time.Now(), cpuTime()
		time.Sleep(250 * time.Millisecond)
		c.cpu = min(c.cpu, float64(cpuTime()-used)/float64(time.Since(began)))
	}
	return c
}
