//go:build e2e

package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// client is a Kafka client library behind the drivers' line protocol.
type client struct {
	name    string
	flavour string
	command func(t *testing.T, verb string, args ...string) *exec.Cmd
	line    func(string) string      // brings a line of output into the protocol's form; nil: it has it
	leave   func(*lab.Process) error // nil: a line on stdin
}

// clients are all that are tried, by name.
func clients() map[string]client {
	all := map[string]client{}
	for _, c := range []client{
		{name: "franz-go", flavour: "eager", command: franzDriver},
		{name: "franz-go-cooperative", flavour: "cooperative", command: franzDriver},
		{name: "sarama", flavour: "eager", command: saramaDriver},
		{name: "java", flavour: "eager", command: javaDriver},
		{name: "java-cooperative", flavour: "cooperative", command: javaDriver},
		{name: "kafka-python", flavour: "eager", command: pythonDriver},
		{name: "kafkajs", flavour: "eager", command: jsDriver},
		{name: "kcat", flavour: "eager", command: kcatDriver, line: kcatLine,
			leave: func(p *lab.Process) error { return p.Signal(syscall.SIGTERM) }},
	} {
		all[c.name] = c
	}
	return all
}

func paths(t *testing.T) lab.Paths {
	t.Helper()
	p, err := lab.Setup()
	check(t, err)
	return p
}

// builtDrivers compiles the two drivers in Go, once.
var builtDrivers = sync.OnceValues(func() (string, error) {
	bin, err := lab.TempDir("drivers")
	if err != nil {
		return "", err
	}
	p, err := lab.Setup()
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", bin+"/", "./e2e/clients/franz", "./e2e/clients/sarama")
	cmd.Dir = p.Root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the drivers: %w\n%s", err, out)
	}
	return bin, nil
})

func goDriver(t *testing.T, name, verb string, args []string) *exec.Cmd {
	t.Helper()
	bin, err := builtDrivers()
	check(t, err)
	return exec.Command(filepath.Join(bin, name), append([]string{verb}, args...)...)
}

func franzDriver(t *testing.T, verb string, args ...string) *exec.Cmd {
	return goDriver(t, "franz", verb, args)
}

func saramaDriver(t *testing.T, verb string, args ...string) *exec.Cmd {
	return goDriver(t, "sarama", verb, args)
}

func javaDriver(t *testing.T, verb string, args ...string) *exec.Cmd {
	return exec.Command("java", append(paths(t).Java(lab.Newest, "96m", "Driver", verb), args...)...)
}

func pythonDriver(t *testing.T, verb string, args ...string) *exec.Cmd {
	p := paths(t)
	return exec.Command(filepath.Join(p.Cache, "python/bin/python"), append([]string{filepath.Join(p.Root, "e2e/clients/python/driver.py"), verb}, args...)...)
}

func jsDriver(t *testing.T, verb string, args ...string) *exec.Cmd {
	p := paths(t)
	cmd := exec.Command("node", append([]string{filepath.Join(p.Root, "e2e/clients/js/driver.js"), verb}, args...)...)
	cmd.Env = append(cmd.Environ(), "E2E_JS="+filepath.Join(p.Cache, "js"))
	return cmd
}

// kcatDriver: kcat has no synchronous commit; its own, each 5 s, is waited for by asking the group's offsets.
func kcatDriver(_ *testing.T, verb string, args ...string) *exec.Cmd {
	if verb == "produce" {
		script := `seq "$3" $(($4 - 1)) | sed 's/.*/k&:v&/' | kcat -P -b "$1" -t "$2" -K: && echo "produced $(($4 - $3))"`
		return exec.Command("sh", append([]string{"-c", script, "kcat"}, args...)...)
	}
	return exec.Command("kcat", "-b", args[0], "-G", args[2], "-u", "-E", "-f", `got %p %o %k\n`,
		"-X", "auto.offset.reset=earliest", "-X", "session.timeout.ms=6000", "-X", "heartbeat.interval.ms=500",
		"-X", "topic.metadata.refresh.interval.ms=5000", "-X", "reconnect.backoff.max.ms=1000", args[1])
}

var kcatPartition = regexp.MustCompile(`\[(\d+)\]`)

// kcatLine: "% Group g rebalanced (memberid m): assigned: t [0], t [1]", and the same with revoked.
func kcatLine(line string) string {
	_, list, assigned := strings.Cut(line, "): assigned:")
	if !assigned {
		if strings.Contains(line, "): revoked:") {
			return "assigned"
		}
		return line
	}
	var ps []string
	for _, m := range kcatPartition.FindAllStringSubmatch(list, -1) {
		ps = append(ps, m[1])
	}
	slices.Sort(ps)
	return strings.TrimSpace("assigned " + strings.Join(ps, ","))
}

// member is a running consumer.
type member struct {
	*lab.Process
	client client
}

// consume starts a consumer of the topic in the group.
func (c client) consume(t *testing.T, addr, topic, group string) *member {
	t.Helper()
	p, err := lab.StartCommand(c.name, c.command(t, "consume", addr, topic, group, c.flavour))
	check(t, err)
	return &member{Process: p, client: c}
}

// produce writes keys with the client itself.
func (c client) produce(t *testing.T, addr, topic string, from, to int) {
	t.Helper()
	p, err := lab.StartCommand(c.name+" producer", c.command(t, "produce", addr, topic, strconv.Itoa(from), strconv.Itoa(to)))
	check(t, err)
	code, err := p.Wait(60 * time.Second)
	check(t, err)
	if want := fmt.Sprintf("produced %d", to-from); code != 0 || !slices.Contains(p.Lines(), want) {
		t.Fatalf("exit status %d, without the line %q:\n%s", code, want, p.Tail(30))
	}
}

// protocol is the output so far, in the protocol's form.
func (m *member) protocol() []string {
	lines := m.Lines()
	if m.client.line != nil {
		for i := range lines {
			lines[i] = m.client.line(lines[i])
		}
	}
	return lines
}

// owns is the member's newest assignment; nil before the first.
func (m *member) owns() []string {
	for _, line := range slices.Backward(m.protocol()) {
		if line == "assigned" {
			return []string{}
		}
		if ps, ok := strings.CutPrefix(line, "assigned "); ok {
			return strings.Split(ps, ",")
		}
	}
	return nil
}

// position is one record's place.
type position struct {
	partition int
	offset    int64
}

// got is every record that the member has shown, in its order.
func (m *member) got() []position {
	var all []position
	for _, line := range m.protocol() {
		var p position
		var key string
		if n, _ := fmt.Sscanf(line, "got %d %d %s", &p.partition, &p.offset, &key); n == 3 {
			all = append(all, p)
		}
	}
	return all
}

// leaves makes the member leave in order.
func (m *member) leaves(t *testing.T) {
	t.Helper()
	if m.client.leave != nil {
		check(t, m.client.leave(m.Process))
	} else {
		check(t, m.Say("leave"))
	}
	code, err := m.Wait(20 * time.Second)
	check(t, err)
	if code != 0 {
		t.Fatalf("exit status %d of a member that was asked to leave:\n%s", code, m.Tail(30))
	}
}
