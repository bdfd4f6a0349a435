//go:build e2e

package e2e

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// tool runs one of Kafka's own command line tools.
func tool(t *testing.T, stdin, class string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(within(t, time.Minute), "java", paths(t).Java(lab.Newest, "96m", append([]string{class}, args...)...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", class, args, err, out)
	}
	return string(out)
}

const groupsTool = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"

// TestKafkasOwnTools: what an operator knows works through the sidecar: topics, console producer and consumer, and
// kafka-consumer-groups with its verbs.
func TestKafkasOwnTools(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	kafkasOwnTools(t, sidecar(t, k).Addr())
}

// TestKafkasOwnToolsInDev: the same with the embedded Kafka.
func TestKafkasOwnToolsInDev(t *testing.T) {
	s := newSidecar(t, "")
	s.Verb, s.Args = "dev", nil
	check(t, s.Up())
	kafkasOwnTools(t, s.Addr())
}

func kafkasOwnTools(t *testing.T, addr string) {
	t.Helper()
	has := func(out string, words ...string) {
		t.Helper()
		for _, line := range strings.Split(out, "\n") {
			found := true
			for _, w := range words {
				found = found && strings.Contains(line, w)
			}
			if found {
				return
			}
		}
		t.Errorf("no line with %q in\n%s", words, out)
	}
	topics := "org.apache.kafka.tools.TopicCommand"
	tool(t, "", topics, "--bootstrap-server", addr, "--create", "--topic", "tools", "--partitions", "1")
	has(tool(t, "", topics, "--bootstrap-server", addr, "--list"), "tools")
	has(tool(t, "", topics, "--bootstrap-server", addr, "--describe", "--topic", "tools"), "Partition: 0")
	tool(t, "one\ntwo\nthree\n", "org.apache.kafka.tools.ConsoleProducer", "--bootstrap-server", addr, "--topic", "tools")
	consume := func(n string) string {
		return tool(t, "", "org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", addr, "--topic", "tools", "--group", "console",
			"--from-beginning", "--max-messages", n, "--timeout-ms", "20000")
	}
	if out := consume("2"); !strings.Contains(out, "one\ntwo\n") {
		t.Errorf("the console consumer printed\n%s", out)
	}
	if out := consume("1"); !strings.Contains(out, "three\n") || strings.Contains(out, "two") {
		t.Errorf("the console consumer did not resume; it printed\n%s", out)
	}
	has(tool(t, "", groupsTool, "--bootstrap-server", addr, "--list", "--state"), "console", "Empty")
	has(tool(t, "", groupsTool, "--bootstrap-server", addr, "--describe", "--group", "console"), "console", "tools", "3")
	has(tool(t, "", groupsTool, "--bootstrap-server", addr, "--describe", "--all-groups", "--state"), "console", "Empty")
	has(tool(t, "", groupsTool, "--bootstrap-server", addr, "--reset-offsets", "--group", "console", "--topic", "tools", "--to-earliest", "--execute"), "console", "tools", "0")
	if out := consume("3"); !strings.Contains(out, "one\ntwo\nthree\n") {
		t.Errorf("after the reset the console consumer printed\n%s", out)
	}
	has(tool(t, "", groupsTool, "--bootstrap-server", addr, "--delete-offsets", "--group", "console", "--topic", "tools"), "tools", "Successful")
	if out := tool(t, "", groupsTool, "--bootstrap-server", addr, "--list"); strings.Contains(out, "console") {
		has(tool(t, "", groupsTool, "--bootstrap-server", addr, "--delete", "--group", "console"), "successful")
	}
	if out := tool(t, "", groupsTool, "--bootstrap-server", addr, "--list"); strings.Contains(out, "console") {
		t.Errorf("a deleted group is still listed:\n%s", out)
	}
}
