package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What may be lost, and since when, is said before anything is done.
func TestRecoverSaysWhatMayBeLostBeforeItDoesIt(t *testing.T) {
	kafka, dir := embedded(t, "", kafkaDataLimit), t.TempDir()
	began := time.Now().Add(-time.Second)
	i, s := run(t, dir, kafka.addrs())
	produce(t, s.Addr(), "numbers", 0, 1)
	commitAndFetch(t, s.Addr(), "readers", "numbers", 1)
	id := s.node.ID()

	if code, _, stderr := call(t, nil, "recover", "--data-dir", dir); code != exitFailed || !strings.Contains(stderr, dir) {
		t.Errorf("of a running sidecar's: %d %s", code, stderr)
	}
	i.stop(t)

	code, out, stderr := call(t, nil, "recover", "--data-dir", dir, "-o", "json")
	var found SurvivorStatus
	if err := json.Unmarshal([]byte(out), &found); code != 0 || err != nil {
		t.Fatalf("%d %v %s%s", code, err, out, stderr)
	}
	if found.NodeID != id || found.LastTerm == 0 || found.LastIndex == 0 || len(found.Voters) != 1 || found.Recovered != 0 ||
		found.MissingSince == nil || found.MissingSince.Before(began) || found.MissingSince.After(time.Now()) {
		t.Errorf("%+v", found)
	}
	since := found.MissingSince.Format(time.RFC3339)
	for _, execute := range []bool{false, true} {
		args := []string{"recover", "--data-dir", dir}
		if execute {
			args = append(args, "--execute")
		}
		code, out, stderr := call(t, nil, args...)
		for _, want := range []string{id + " (this one)", "term ", "index ", "commits acknowledged after " + since, map[bool]string{false: "Nothing was changed", true: "Done."}[execute]} {
			if code != 0 || !strings.Contains(out, want) {
				t.Errorf("%d no %q in %s%s", code, want, out, stderr)
			}
		}
	}
	if code, out, stderr := call(t, nil, "recover", "--data-dir", dir); code != 0 || !strings.Contains(out, "recovered before: 1") {
		t.Errorf("%d %s%s", code, out, stderr)
	}
	_, s = run(t, dir, kafka.addrs())
	if s.node.ID() != id {
		t.Errorf("node %s, not %s", s.node.ID(), id)
	}
}

func TestRecoverTakesNoOtherDirectory(t *testing.T) {
	empty := t.TempDir()
	for _, dir := range []string{empty, filepath.Join(empty, "nowhere")} {
		if code, _, stderr := call(t, nil, "recover", "--data-dir", dir, "--execute"); code != exitFailed || !strings.Contains(stderr, "is not a data directory") {
			t.Errorf("%d %s", code, stderr)
		}
	}
	if left, err := os.ReadDir(empty); err != nil || len(left) != 0 {
		t.Errorf("%v %v", left, err)
	}
	if code, _, stderr := call(t, nil, "recover", "--data-dir", empty, "-o", "xml"); code != exitUsage || !strings.Contains(stderr, "table, json") {
		t.Errorf("%d %s", code, stderr)
	}
}
