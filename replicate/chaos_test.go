package replicate

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// The chaos test is a fleet, clients, and a nemesis that a seed tells what to do: it cuts ways, one or both, breaks
// connections, drops and repeats requests, makes the network and disks slow, lets disks hang, and stops sidecars, which
// come back with other addresses, with what they had or with nothing. A seed fixes what is done, not how goroutines
// run: a failure may take a few repetitions.
//
//	CHAOS_SEED=7 go test -run Chaos -count 20 ./replicate   one seed again
//	E2E_LONG=1 go test -run Chaos -timeout 1h ./replicate    more seeds, longer, and at the pace of a real cluster
const (
	chaosSeed    = "CHAOS_SEED"
	chaosClients = 7 // each other one writes
	chaosKeys    = 3
)

// quick is a cluster in a hurry; with the pace of a real one what takes 2 s here takes 15.
var (
	quickRoles = roleTiming{
		stable: 500 * time.Millisecond, steady: 100 * time.Millisecond, replacement: 200 * time.Millisecond, dead: 700 * time.Millisecond, deadAlone: 3 * time.Second,
		absent: 500 * time.Millisecond, patience: 500 * time.Millisecond, unreached: 3 * time.Second, barred: time.Second, unanswered: 500 * time.Millisecond, handover: 50 * time.Millisecond,
	}
	quickGossip = gossipTiming{
		firstJoin: 20 * time.Millisecond, lastJoin: 200 * time.Millisecond, rejoin: time.Second, lostRejoin: 500 * time.Millisecond,
		gather: 5 * time.Millisecond, probe: 100 * time.Millisecond,
	}
)

func TestChaosLosesNothingAndHealsByItself(t *testing.T) {
	seeds, sizes, lasting, long := 2, []int{3, 5}, 4*time.Second, os.Getenv("E2E_LONG") != ""
	if long {
		seeds, sizes, lasting = 24, []int{3, 4, 5, 3, 5, 3}, 40*time.Second
	}
	first := uint64(time.Now().UnixNano()) % 1_000_000
	if v := os.Getenv(chaosSeed); v != "" {
		var err error
		if first, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
		seeds = 1
	}
	for i := range seeds {
		seed := first + uint64(i)
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			// The size is the seed's too, so that a seed says all.
			newChaos(t, seed, sizes[seed%uint64(len(sizes))], lasting, long && seed%3 == 0).run()
		})
	}
}

// chaos is one run.
type chaos struct {
	*fleet
	check   *chaosCheck
	seed    uint64
	rnd     *rand.Rand // the nemesis's
	lasting time.Duration
	real    bool // the pace of a real cluster
	net     *chaosNet
	disks   []*chaosDisk
	slots   []atomic.Pointer[sidecar]
	dirs    []string
	script  []string
	founded bool
	value   atomic.Int64
}

func newChaos(t *testing.T, seed uint64, size int, lasting time.Duration, real bool) *chaos {
	c := &chaos{
		fleet: &fleet{T: t}, check: newChaosCheck(t), seed: seed, rnd: rand.New(rand.NewPCG(seed, 0)), lasting: lasting, real: real,
		net: newChaosNet(), slots: make([]atomic.Pointer[sidecar], size), dirs: make([]string, size),
	}
	c.observe = c.check.observe
	for range size {
		c.disks = append(c.disks, new(chaosDisk))
	}
	t.Cleanup(func() { // after the sidecars have been stopped
		close(c.net.stop)
		if t.Failed() || testing.Verbose() {
			t.Logf("repeat with %s=%d, and E2E_LONG as it was (%q), several times if need be; the nemesis did:\n%s", chaosSeed, seed, os.Getenv("E2E_LONG"), strings.Join(c.script, "\n"))
		}
	})
	return c
}

func (c *chaos) run() {
	t := c.fleet.T
	for i := range c.slots {
		c.start(i)
	}
	c.await("three voters", c.healthy)
	stop := make(chan struct{})
	var clients sync.WaitGroup
	rest := sync.OnceFunc(func() { close(stop); clients.Wait() })
	defer rest()
	defer c.calm()
	for i := range chaosClients {
		clients.Go(func() { c.client(i, stop) })
	}
	for began := time.Now(); time.Since(began) < c.lasting && !t.Failed(); {
		c.step()
	}
	healing := time.Now()
	c.await("three voters again", c.healthy)
	t.Logf("seed %d: healed in %v", c.seed, time.Since(healing).Round(time.Millisecond))
	rest()
	c.settle()
	c.check.compare(c.living())
	c.check.linearizable()
}

// start starts the sidecar of a slot, with what is in its directory; the first founds the cluster.
func (c *chaos) start(slot int) {
	c.Helper()
	if c.dirs[slot] == "" {
		c.dirs[slot] = c.TempDir()
	}
	began := time.Now()
	c.all = slices.DeleteFunc(c.all, func(s *sidecar) bool { return s.ended() })
	s := c.add(c.dirs[slot], func(_ int, config *Config) {
		config.Fsync = c.real // nobody pulls the plug
		if c.founded {
			// Somebody to join is named even when nobody is there, or one that was never taken in would found a cluster.
			config.Cluster.Join = append(config.Cluster.Join, "127.0.0.1:1")
		}
		config.RaftTimeout = 300 * time.Millisecond
		seams := seams{
			dial: c.net.dialer(slot), faults: chaosFaults{c.net, slot},
			log: func(inner raft.LogStore) raft.LogStore { return chaosLog{inner, c.disks[slot]} },
		}
		if !c.real {
			seams.gossip, seams.roles = &quickGossip, &quickRoles
		} else {
			config.RaftTimeout = DefaultConfig("").RaftTimeout
		}
		config.Cluster.seams = seams
	})
	c.net.name(slot, s.n.ID(), s.n.PeerAddr(), s.n.GossipAddr())
	cut := c.net.gossipCut(slot)
	s.n.membership.gossip.transport.cut.Store(&cut)
	c.slots[slot].Store(s)
	c.founded = true
	c.note("started %d in %v", slot, time.Since(began).Round(time.Millisecond))
}

// living are those that run.
func (c *chaos) living() (all []*sidecar) {
	for i := range c.slots {
		if s := c.slots[i].Load(); s != nil && !s.ended() {
			all = append(all, s)
		}
	}
	return all
}

// by finds one that runs.
func (c *chaos) by(id raft.ServerID) *sidecar {
	for _, s := range c.living() {
		if s.n.ID() == string(id) {
			return s
		}
	}
	return nil
}

// healthy says that the newest configuration holds as many voters and standbys as it should, and all of them run and
// answer. Then one of them may be lost: nobody is about to be demoted.
func (c *chaos) healthy() bool {
	for _, s := range c.living() {
		if r := s.n.running.Load(); s.active() && r != nil && c.healthyBy(s, r) {
			return true
		}
	}
	return false
}

func (c *chaos) healthyBy(s *sidecar, r *replica) bool {
	if _, leading := r.leadership(); !leading {
		return false
	}
	progress, voters := s.n.membership.progress(), 0
	servers := r.transport.configuration().Servers
	for _, server := range servers {
		other := c.by(server.ID)
		if other == nil || other != s && time.Since(progress[string(server.ID)].contact) > maxContact/2 {
			return false
		}
		if server.Suffrage == raft.Voter {
			voters++
		}
	}
	return voters == 3 && len(servers) == len(c.slots)
}

// client writes or reads, one operation after the other, mostly through whoever believes to be active, be that true or
// not.
func (c *chaos) client(number int, stop <-chan struct{}) {
	rnd := rand.New(rand.NewPCG(c.seed, uint64(number)+1))
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rnd.IntN(16)) * time.Millisecond):
		}
		all := c.living()
		actives := slices.DeleteFunc(slices.Clone(all), func(s *sidecar) bool { return !s.active() })
		if len(actives) == 0 || rnd.IntN(10) == 0 {
			actives = all
		}
		if len(actives) == 0 {
			continue
		}
		s, key := actives[rnd.IntN(len(actives))], fmt.Sprint("k", rnd.IntN(chaosKeys))
		if number%2 == 0 {
			c.check.read(number, s, key)
		} else {
			c.check.write(number, s, c.by, key, fmt.Sprint("v", c.value.Add(1)))
		}
	}
}

// settle has a last write and reads by all, and waits until every replica has what the active one has.
func (c *chaos) settle() {
	c.Helper()
	c.await("last write", func() bool {
		value := fmt.Sprint("v", c.value.Add(1))
		c.check.write(0, c.active(), c.by, "last", value)
		c.await("last read", func() bool { return c.check.read(0, c.active(), "last") })
		return c.active().value("last") == value
	})
	for k := range chaosKeys {
		c.await("last reads", func() bool { return c.check.read(0, c.active(), fmt.Sprint("k", k)) })
	}
	last := c.active().value("last")
	for _, s := range c.living() {
		c.await("copy on every replica", func() bool { return s.value("last") == last })
	}
}

// note writes a line of the script.
func (c *chaos) note(format string, args ...any) {
	c.script = append(c.script, fmt.Sprintf("%8.3fs ", time.Since(c.check.began).Seconds())+fmt.Sprintf(format, args...))
}

// step is one thing that the nemesis does: a process or none, a fault of the network or none, one of a disk or none,
// all at once, for a while; then all is well for a shorter one.
func (c *chaos) step() {
	n := len(c.slots)
	process, network, disk := c.rnd.IntN(8), c.rnd.IntN(14), c.rnd.IntN(6)
	a, b, d := c.rnd.IntN(n), c.rnd.IntN(n-1), c.rnd.IntN(n)
	if b >= a {
		b++
	}
	hold, pause := time.Duration(100+c.rnd.IntN(900))*time.Millisecond, time.Duration(c.rnd.IntN(300))*time.Millisecond
	if c.real {
		hold, pause = 8*hold, 4*pause
	}
	stopped := c.process(process)
	c.network(network, a, b)
	if !slices.Contains(stopped, d) && c.disk(disk, d) {
		hold += hungAfter
	}
	time.Sleep(hold)
	c.calmDisks()
	if c.rnd.IntN(2) == 0 { // sometimes they come back into the fault
		c.calm()
	}
	for _, slot := range stopped {
		c.start(slot)
	}
	c.calm()
	time.Sleep(pause)
}

// calm ends the faults of network and disks.
func (c *chaos) calm() {
	c.net.mend()
	c.calmDisks()
}

func (c *chaos) calmDisks() {
	for _, d := range c.disks {
		d.set(0, false)
	}
}

// process stops sidecars, and gives their slots.
func (c *chaos) process(kind int) (stopped []int) {
	n := len(c.slots)
	victim := c.rnd.IntN(n)
	if active := slices.IndexFunc(c.living(), (*sidecar).active); active >= 0 && c.rnd.IntN(2) == 0 {
		victim = active
	}
	switch kind {
	case 0: // one
		stopped = []int{victim}
	case 1: // several, perhaps all
		stopped = c.rnd.Perm(n)[:1+c.rnd.IntN(n)]
	case 2, 3: // one for good: another begins in its place
		if !c.healthy() {
			return nil
		}
		stopped = []int{victim}
		c.dirs[victim] = ""
	case 4: // the active one gives up its term
		if s := c.slots[victim].Load(); s != nil {
			s.mu.Lock()
			term := s.term
			s.mu.Unlock()
			c.note("%d resigns term %d", victim, term)
			s.n.Resign(term)
		}
	case 5: // its log is cut: who lacks what was in it needs a snapshot
		c.snapshot(victim)
	}
	for _, slot := range stopped {
		began := time.Now()
		c.slots[slot].Load().stop()
		c.note("stopped %d in %v, with its directory: %v", slot, time.Since(began).Round(time.Millisecond), c.dirs[slot] != "")
	}
	return stopped
}

func (c *chaos) snapshot(slot int) {
	r := c.slots[slot].Load().n.running.Load()
	if r == nil {
		return
	}
	rc := r.raft.ReloadableConfig()
	rc.TrailingLogs = 4
	err := r.raft.ReloadConfig(rc)
	if err == nil {
		err = r.raft.Snapshot().Error()
	}
	c.note("snapshot on %d: %v", slot, err)
}

// network does something to what lies between two sidecars, or between one and all others.
func (c *chaos) network(kind, a, b int) {
	lossy := wayFaults{drop: 5 + c.rnd.IntN(40), double: c.rnd.IntN(50)}
	slow := wayFaults{delay: time.Duration(1+c.rnd.IntN(80)) * time.Millisecond}
	cut := wayFaults{cut: true}
	switch kind {
	case 0:
		c.note("%d is cut off", a)
		c.around(a, cut, cut)
	case 1:
		c.note("%d is heard by nobody", a)
		c.around(a, cut, wayFaults{})
	case 2:
		c.note("%d hears nobody", a)
		c.around(a, wayFaults{}, cut)
	case 3:
		c.note("%d does not hear %d", b, a)
		c.net.set(way{a, b}, cut)
	case 4:
		c.note("%d and %d are parted", a, b)
		c.net.set(way{a, b}, cut)
		c.net.set(way{b, a}, cut)
	case 5:
		c.note("%d is slow: %+v", a, slow)
		c.around(a, slow, slow)
	case 6, 7:
		c.note("all ways are lossy: %+v", lossy)
		for i := range c.slots {
			c.around(i, lossy, lossy)
		}
	case 8:
		c.note("connections between %d and %d are reset", a, b)
		c.net.reset(a, b)
	case 9, 10: // cut off while it is active, and another is elected before it has noticed
		c.usurp(b)
	case 11: // a majority is cut off from the rest
		side := c.rnd.Perm(len(c.slots))
		half := len(side) / 2
		c.note("%v and %v are parted", side[:half], side[half:])
		for _, x := range side[:half] {
			for _, y := range side[half:] {
				c.net.set(way{x, y}, cut)
				c.net.set(way{y, x}, cut)
			}
		}
	}
}

func (c *chaos) usurp(heir int) {
	s := c.slots[heir].Load()
	for i := range c.slots {
		if old := c.slots[i].Load(); i != heir && old.active() && !s.ended() {
			c.note("%d, which is active, is cut off, and %d stands for election", i, heir)
			c.around(i, wayFaults{cut: true}, wayFaults{cut: true})
			if r := s.n.running.Load(); r != nil {
				go r.transport.campaign(r.id) // until raft hears it, which may be writing to a disk that hangs
			}
		}
	}
}

// around sets the faults of all ways from and to a slot.
func (c *chaos) around(slot int, from, to wayFaults) {
	for other := range c.slots {
		if other != slot {
			c.net.set(way{slot, other}, from)
			c.net.set(way{other, slot}, to)
		}
	}
}

// disk says whether it hangs.
func (c *chaos) disk(kind, slot int) (hangs bool) {
	switch kind {
	case 0:
		slow := time.Duration(5+c.rnd.IntN(100)) * time.Millisecond
		c.note("the disk of %d takes %v", slot, slow)
		c.disks[slot].set(slow, false)
	case 1:
		c.note("the disk of %d hangs", slot)
		c.disks[slot].set(0, true)
		return true
	}
	return false
}
