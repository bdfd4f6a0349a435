//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// eventuallyCommits commits through a sidecar that may not have found the others yet.
func eventuallyCommits(t *testing.T, s *lab.Sidecar, group, topic string, offset int64) {
	t.Helper()
	check(t, lab.Eventually(30*time.Second, func() error { return dialRaw(t, s.Addr()).simpleCommit(group, topic, offset) }))
}

// finds checks that every sidecar that runs gives this offset.
func finds(t *testing.T, c *lab.Cluster, group, topic string, offset int64) {
	t.Helper()
	for i, s := range others(c, nil) {
		have, err := dialRaw(t, s.Addr()).committed(group, topic)
		if err != nil || have != offset {
			t.Errorf("sidecar %d gives offset %d (%v), not %d", i, have, err, offset)
		}
	}
}

// TestThreeSidecarsOfTheReadme: the commands of the README, but for the ports and Kafka's address, make one cluster.
func TestThreeSidecarsOfTheReadme(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	env, commands := readmeCommands(t, k)
	if len(commands) != 3 {
		t.Fatalf("the README starts %d sidecars", len(commands))
	}
	bin, err := lab.Binary()
	check(t, err)
	cwd := dir(t, "readme")
	var started []*lab.Process
	for _, args := range commands {
		p, err := lab.StartProcess("sidecar", env, "env", append([]string{"--chdir=" + cwd, bin}, args...)...)
		check(t, err)
		started = append(started, p)
		t.Cleanup(func() {
			p.Kill()
			if t.Failed() {
				t.Logf("%v:\n%s", args, p.Tail(40))
			}
		})
	}
	flag := func(i int, name string) string {
		for j, a := range commands[i] {
			if a == name {
				return commands[i][j+1]
			}
		}
		return ""
	}
	for _, p := range started {
		_, err := p.Line(0, 20*time.Second, func(l string) bool { return strings.Contains(l, `"msg":"ready"`) })
		check(t, err)
	}
	check(t, lab.Eventually(60*time.Second, func() error { // as one would look
		for i := range commands {
			out, err := lab.Run(10*time.Second, nil, bin, "status", "--admin", flag(i, "--admin"))
			if err != nil {
				return err
			}
			if !strings.HasPrefix(out, "3 voters") || !strings.Contains(out, "active is") {
				return errors.New(out)
			}
		}
		return nil
	}))
	out, err := lab.Run(10*time.Second, nil, bin, "members", "--admin", flag(0, "--admin"))
	check(t, err)
	if strings.Count(out, "voter ") < 3 {
		t.Errorf("members:\n%s", out)
	}
	name := topic(t, k, "readme", 1)
	check(t, dialRaw(t, flag(0, "--listen")).simpleCommit("readme", name, 7))
	for i := range commands {
		if have, err := dialRaw(t, flag(i, "--listen")).committed("readme", name); err != nil || have != 7 {
			t.Errorf("sidecar %d gives %d (%v)", i, have, err)
		}
	}
}

// readmeCommands reads the section "Three sidecars": its exports, and the arguments of each sidecar, all addresses
// replaced by free ones.
func readmeCommands(t *testing.T, k *lab.Kafka) (env []string, commands [][]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(paths(t).Root, "README.md"))
	check(t, err)
	_, section, found := strings.Cut(string(text), "\n## Three sidecars\n")
	if !found {
		t.Fatal("the README has no section \"Three sidecars\"")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	ports := map[string]string{}
	section = regexp.MustCompile(`127\.0\.0\.1:\d+`).ReplaceAllStringFunc(section, func(addr string) string {
		if ports[addr] == "" {
			base, err := lab.Ports(8) // a client listener has its brokers' behind it
			check(t, err)
			ports[addr] = fmt.Sprintf("127.0.0.1:%d", base)
		}
		return ports[addr]
	})
	section = strings.ReplaceAll(section, "kafka:9092", k.Addrs())
	section = strings.ReplaceAll(section, "\\\n", " ")
	for _, line := range strings.Split(section, "\n") {
		line, shown := strings.CutPrefix(line, "    ")
		if rest, ok := strings.CutPrefix(line, "export "); ok && shown {
			env = append(env, strings.Fields(rest)...)
		}
		if rest, ok := strings.CutPrefix(line, "bin/offset-sidecar run "); ok && shown {
			commands = append(commands, strings.Fields("run "+strings.TrimSuffix(rest, "&")))
		}
	}
	return env, commands
}

// TestAddressesChange: the sidecars are restarted with other addresses, then with each other's; each is still who it was.
func TestAddressesChange(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	name := topic(t, k, "addresses", 1)
	eventuallyCommits(t, c.Sidecars[0], "addresses", name, 1)
	restart := func(offset int64) {
		c.Introduce()
		check(t, c.Up(3))
		finds(t, c, "addresses", name, offset)
		eventuallyCommits(t, c.Sidecars[1], "addresses", name, offset+1)
		finds(t, c, "addresses", name, offset+1)
	}
	c.Kill()
	for _, s := range c.Sidecars {
		check(t, s.Move())
	}
	restart(1)
	c.Kill()
	a, b := c.Sidecars[0], c.Sidecars[1]
	a.Gossip, a.Peer, b.Gossip, b.Peer = b.Gossip, b.Peer, a.Gossip, a.Peer
	restart(2)
	// One alone, while the others run and know its old address.
	last := c.Sidecars[2]
	last.Kill()
	check(t, last.Move())
	check(t, last.Up())
	check(t, c.Settled(60*time.Second, 3))
	finds(t, c, "addresses", name, 3)
}

// TestAWipedSidecarIsANewOne: it comes back with an empty directory, is taken in, and becomes a voter in its former place.
func TestAWipedSidecarIsANewOne(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	name := topic(t, k, "wiped", 1)
	eventuallyCommits(t, c.Sidecars[0], "wiped", name, 1)
	victim := active(t, c)
	victim.Kill()
	eventuallyCommits(t, others(c, nil)[0], "wiped", name, 2)
	check(t, victim.Wipe())
	check(t, victim.Up())
	check(t, lab.Eventually(120*time.Second, func() error { // the former one has to be given up first
		m, err := victim.Members()
		if err == nil && !slices.ContainsFunc(m.Members, func(o lab.Member) bool { return o.Self && o.Role == "voter" }) {
			err = errors.New(m.Summary)
		}
		return err
	}))
	check(t, c.Settled(60*time.Second, 3))
	finds(t, c, "wiped", name, 2)
	// It holds a copy of its own: with it and one other there is a majority.
	left := others(c, victim)
	left[0].Kill()
	eventuallyCommits(t, victim, "wiped", name, 3)
	finds(t, c, "wiped", name, 3)
}

// TestTwoSidecarsSayThatTheyHaveNoFailover, and a third that comes gives it to them.
func TestTwoSidecarsSayThatTheyHaveNoFailover(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c, err := lab.NewCluster("grows", k.Addrs(), 3, 2, "--group-initial-rebalance-delay", "0s", "--max-drain", "2s")
	check(t, err)
	t.Cleanup(c.Kill)
	third := c.Sidecars[2]
	c.Sidecars = c.Sidecars[:2]
	check(t, c.Up(1))
	check(t, lab.Eventually(60*time.Second, func() error {
		m, err := active(t, c).Members()
		for _, want := range []string{"1 voter", "1 standby", "two sidecars have no failover"} {
			if err == nil && !strings.Contains(m.Summary, want) {
				err = errors.New(m.Summary)
			}
		}
		return err
	}))
	name := topic(t, k, "grows", 1)
	eventuallyCommits(t, c.Sidecars[0], "grows", name, 1)
	c.Sidecars = append(c.Sidecars, third)
	check(t, third.Up())
	check(t, c.Settled(60*time.Second, 3))
	finds(t, c, "grows", name, 1)
	// Asked to stop, two of them leave in order; the last goes on alone.
	for len(c.Sidecars) > 1 {
		leaver := c.Sidecars[0]
		code, err := leaver.Terminate(30 * time.Second)
		check(t, err)
		if code != 0 {
			t.Errorf("exit status %d", code)
		}
		c.Sidecars = c.Sidecars[1:]
		eventuallyCommits(t, c.Sidecars[0], "grows", name, int64(10-len(c.Sidecars)))
	}
	check(t, c.Settled(60*time.Second, 1))
	finds(t, c, "grows", name, 9)
}

// TestRecover: two of three are lost for good; what is left says what may be missing, and goes on alone; new ones join it.
func TestRecover(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	name := topic(t, k, "recover", 1)
	eventuallyCommits(t, c.Sidecars[0], "recover", name, 1)
	finds(t, c, "recover", name, 1)
	c.Kill()
	last := c.Sidecars[2]
	bin, err := lab.Binary()
	check(t, err)
	out, err := lab.Run(20*time.Second, nil, bin, "recover", "--data-dir", last.Dir)
	check(t, err)
	if !strings.Contains(out, "commits acknowledged after") || !strings.Contains(out, "Nothing was changed") {
		t.Errorf("%s", out)
	}
	_, err = lab.Run(20*time.Second, nil, bin, "recover", "--data-dir", last.Dir, "--execute")
	check(t, err)
	for _, s := range c.Sidecars[:2] {
		check(t, s.Wipe())
	}
	check(t, last.Up())
	eventuallyCommits(t, last, "recover", name, 2)
	check(t, c.Sidecars[0].Up())
	check(t, c.Sidecars[1].Up())
	check(t, c.Settled(120*time.Second, 3))
	finds(t, c, "recover", name, 2)
}

// TestTheUpstreamArbitrates: of three sidecars that say so, one founds the cluster, whichever; who comes later joins it.
func TestTheUpstreamArbitrates(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c, err := lab.NewCluster("arbiter", k.Addrs(), 3, 0, "--bootstrap-arbiter", "upstream", "--max-drain", "2s")
	check(t, err)
	t.Cleanup(c.Kill)
	check(t, c.Up(3))
	name := topic(t, k, "arbiter", 1)
	eventuallyCommits(t, c.Sidecars[0], "arbiter", name, 1)
	finds(t, c, "arbiter", name, 1)
}
