package main

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
)

// Several sidecars on one machine, each alone with the default ports, must go on working.
func TestTheSecondSidecarOnDefaultPortsStaysAlone(t *testing.T) {
	if l, err := net.Listen("tcp", defaultGossip); err == nil { // else somebody else has it, which is as good
		defer l.Close()
	}
	i := start(t, nil, "run", "--upstream", "127.0.0.1:1", "--data-dir", t.TempDir(), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	i.sidecar(t)
	if log := i.stderr.String(); !strings.Contains(log, "this one runs alone") || !strings.Contains(log, `"gossip":"off"`) {
		t.Errorf("%s", log)
	}
}

func TestSidecarsThatJoinAreOne(t *testing.T) {
	kafka := embedded(t, "", kafkaDataLimit)
	_, first := run(t, t.TempDir(), kafka.addrs(), "--cluster", "one")
	produce(t, first.Addr(), "numbers", 0, 1)
	all := []*Sidecar{first}
	for range 2 {
		_, s := run(t, t.TempDir(), kafka.addrs(), "--cluster", "one", "--join", first.node.GossipAddr(), "--max-drain", "100ms")
		all = append(all, s)
	}
	for i, s := range all {
		commitAndFetch(t, s.Addr(), "readers", "numbers", int64(i+1))
	}
	deadline := time.Now().Add(30 * time.Second)
	for i := 0; i < len(all); {
		m := all[i].Members()
		if strings.HasPrefix(m.Summary, "3 voters") && strings.Contains(m.Summary, "active is") {
			i++
			continue
		}
		if time.Now().After(deadline) {
			t.Fatalf("sidecar %d: %+v", i, m)
		}
		time.Sleep(10 * time.Millisecond)
	}
	status := all[1].Status()
	if status.ClusterID == "" || status.ClusterID != all[2].Members().ClusterID || status.ActiveNode == "" || status.Gossip != all[1].node.GossipAddr() {
		t.Errorf("%+v", status)
	}
}

// The example's command line is one that the program takes: in a container with one address.
func TestTheComposeExampleIsValid(t *testing.T) {
	content, err := os.ReadFile("../../examples/docker-compose/compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var compose struct {
		Services map[string]struct {
			Command     []string
			Environment map[string]string
		}
	}
	if err := yaml.Unmarshal(content, &compose); err != nil {
		t.Fatal(err)
	}
	found := 0
	for name, service := range compose.Services {
		if len(service.Command) == 0 {
			continue
		}
		found++
		var env []string
		for key, value := range service.Environment {
			env = append(env, key+"="+value)
		}
		if code, _, stderr := call(t, env, append([]string{"config", "print"}, service.Command[1:]...)...); code != 0 || service.Command[0] != "run" {
			t.Errorf("%s: %v: %d %s", name, service.Command, code, stderr)
		}
	}
	if found != 3 {
		t.Errorf("%d sidecars", found)
	}
}
