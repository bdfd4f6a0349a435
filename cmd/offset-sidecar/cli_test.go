package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
)

// invocation is one call of the program within this process.
type invocation struct {
	stdout, stderr safeBuffer
	signals        chan os.Signal
	ready          chan *Sidecar
	code           chan int
	once           sync.Once
	ended          bool
}

// safeBuffer is written by the program while the test reads it.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// start calls the program with an environment that holds only env ("NAME=value").
func start(t *testing.T, env []string, args ...string) *invocation {
	t.Helper()
	i := &invocation{signals: make(chan os.Signal, 2), ready: make(chan *Sidecar, 1), code: make(chan int, 1)}
	vars := map[string]string{"HOME": t.TempDir()}
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		vars[name] = value
	}
	p := &program{
		stdout: &i.stdout, stderr: &i.stderr, signals: i.signals,
		lookup:  func(name string) (string, bool) { v, ok := vars[name]; return v, ok },
		exit:    func(code int) { i.code <- code },
		started: func(s *Sidecar) { i.ready <- s },
	}
	go func() { i.code <- p.main(append([]string{"offset-sidecar"}, args...)) }()
	return i
}

// call runs the program to its end.
func call(t *testing.T, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	i := start(t, env, args...)
	code = i.wait(t)
	return code, i.stdout.String(), i.stderr.String()
}

func (i *invocation) wait(t *testing.T) int {
	t.Helper()
	select {
	case code := <-i.code:
		return code
	case <-time.After(30 * time.Second):
		t.Fatalf("still running\n%s", i.stderr.String())
		return -1
	}
}

// sidecar waits until it is ready, and has it stopped when the test ends.
func (i *invocation) sidecar(t *testing.T) *Sidecar {
	t.Helper()
	select {
	case s := <-i.ready:
		t.Cleanup(func() { i.stop(t) })
		return s
	case code := <-i.code:
		t.Fatalf("ended with %d before it was ready\n%s", code, i.stderr.String())
	case <-time.After(30 * time.Second):
		t.Fatalf("not ready\n%s", i.stderr.String())
	}
	return nil
}

// terminate sends SIGTERM, once.
func (i *invocation) terminate() {
	i.once.Do(func() { i.signals <- syscall.SIGTERM })
}

// stop terminates and waits for a clean end.
func (i *invocation) stop(t *testing.T) {
	t.Helper()
	if i.terminate(); i.ended {
		return
	}
	i.ended = true
	if code := i.wait(t); code != 0 {
		t.Errorf("exit code %d\n%s", code, i.stderr.String())
	}
}

// ephemeral are the flags that keep a sidecar out of everybody's way.
func ephemeral(args ...string) []string {
	if args[0] == "run" {
		args = append(args, "--gossip", "127.0.0.1:0", "--peer", "127.0.0.1:0")
	}
	return append(args, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0")
}

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The order of sources is what the README says: flag, environment, file, default.
func TestConfigPrintShowsEachValueAndWhereItComesFrom(t *testing.T) {
	file := write(t, "sidecar.yaml", "upstream:\n  - a:9092\n  - b:9092\ncommit-timeout: 7s\nmax-inflight: 3\nlog-level: warn\n")
	code, out, stderr := call(t, []string{"OFFSET_SIDECAR_MAX_INFLIGHT=4", "OFFSET_SIDECAR_LOG_LEVEL=error"},
		"config", "print", "--config", file, "--log-level", "debug")
	if code != 0 {
		t.Fatalf("%d %s", code, stderr)
	}
	for _, want := range []string{
		`(?m)^upstream: a:9092,b:9092 +# ` + regexp.QuoteMeta(file) + `$`,
		`(?m)^commit-timeout: 7s +# ` + regexp.QuoteMeta(file) + `$`,
		`(?m)^max-inflight: 4 +# OFFSET_SIDECAR_MAX_INFLIGHT$`,
		`(?m)^log-level: debug +# --log-level$`,
		`(?m)^listen: 127.0.0.1:19092 +# default$`,
		`(?m)^# data-dir: +# default: /.*offset-sidecar/default$`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	// What it prints is a file it reads.
	again := write(t, "again.yaml", out)
	if code, _, stderr := call(t, nil, "config", "print", "--config", again); code != 0 {
		t.Errorf("%d %s\n%s", code, stderr, out)
	}
}

func TestConfigFileMayComeFromTheEnvironment(t *testing.T) {
	file := write(t, "s.yaml", "upstream: a:9092\n")
	if code, out, stderr := call(t, []string{"OFFSET_SIDECAR_CONFIG=" + file}, "config", "print"); code != 0 || !strings.Contains(out, "upstream: a:9092") {
		t.Errorf("%d %s%s", code, out, stderr)
	}
}

// peers are the arguments of a sidecar with others, but for what is wrong with them.
func peers(more ...string) []string {
	return append([]string{"run", "--upstream", "a:1", "--cluster", "c"}, more...)
}

// Each mistake is one line that names the place to mend and the way out, with exit code 2 and nothing touched.
func TestMistakesInTheConfigurationAreNamed(t *testing.T) {
	for name, c := range map[string]struct {
		args, env []string
		file      string
		want      []string
	}{
		"no upstream":            {args: []string{"run"}, want: []string{"--upstream", "kafka:9092", "OFFSET_SIDECAR_UPSTREAM", "dev"}},
		"no port":                {args: []string{"run", "--upstream", "kafka"}, want: []string{`--upstream "kafka"`, "HOST:PORT"}},
		"port too high":          {args: []string{"run", "--upstream", "kafka:99999"}, want: []string{"--upstream", "1 to 65535"}},
		"no host":                {args: []string{"run", "--upstream", ":9092"}, want: []string{"--upstream", "neither a host name nor an address"}},
		"a URL":                  {args: []string{"run", "--upstream", "kafka://k:9092"}, want: []string{"--upstream", "without kafka://"}},
		"empty item":             {args: []string{"run", "--upstream", "a:1,,b:2"}, want: []string{"--upstream", "HOST:PORT"}},
		"environment":            {args: []string{"run"}, env: []string{"OFFSET_SIDECAR_COMMIT_TIMEOUT=5x"}, want: []string{"--commit-timeout", "OFFSET_SIDECAR_COMMIT_TIMEOUT", "500ms"}},
		"file key":               {args: []string{"run"}, file: "upstrem: a:1\n", want: []string{"line 1", `unknown key "upstrem"`, "config print"}},
		"file value":             {args: []string{"run"}, file: "upstream: a:1\nmax-inflight: 65\n", want: []string{"--max-inflight", "between 1 and 64", "s.yaml"}},
		"file nesting":           {args: []string{"run"}, file: "upstream: {host: a}\n", want: []string{`"upstream"`, "single value"}},
		"file without value":     {args: []string{"run"}, file: "upstream:\n", want: []string{`"upstream"`, "no value"}},
		"file twice":             {args: []string{"run"}, file: "listen: 127.0.0.1:1\nlisten: 127.0.0.1:2\n", want: []string{"--config", "listen", "already defined"}},
		"no file":                {args: []string{"run", "--config", "/nowhere/s.yaml"}, want: []string{"--config", "/nowhere/s.yaml", "no such file"}},
		"later flag":             {args: []string{"run", "--role", "client"}, want: []string{"unknown flag --role", "anchors and clients", "this version does not have"}},
		"later key":              {args: []string{"run"}, file: "upstream-offsets: mirror\n", want: []string{`unknown key "upstream-offsets"`, "this version does not have"}},
		"unknown flag":           {args: []string{"run", "--listn", "a"}, want: []string{"unknown flag --listn", "--help"}},
		"dev has no upstream":    {args: []string{"dev", "--upstream", "a:1"}, want: []string{"unknown flag --upstream"}},
		"argument":               {args: []string{"run", "kafka:9092"}, want: []string{`unexpected argument "kafka:9092"`}},
		"verb":                   {args: []string{"rum"}, want: []string{`unknown command "rum"`}},
		"config verb":            {args: []string{"config", "show"}, want: []string{`unknown command "show"`}},
		"listen without port":    {args: []string{"run", "--upstream", "a:1", "--listen", "127.0.0.1"}, want: []string{"--listen", "ADDR:PORT"}},
		"listen on a name":       {args: []string{"run", "--upstream", "a:1", "--listen", "myhost:1"}, want: []string{"--listen", "not an IP address"}},
		"listen for everybody":   {args: []string{"run", "--upstream", "a:1", "--listen", "0.0.0.0:1"}, want: []string{"--listen 0.0.0.0:1", "--advertise-clients"}},
		"admin for everybody":    {args: []string{"run", "--upstream", "a:1", "--admin", "0.0.0.0:1"}, want: []string{"--admin 0.0.0.0:1", "loopback"}},
		"advertised port":        {args: []string{"run", "--upstream", "a:1", "--advertise-clients", "h:1"}, want: []string{"--advertise-clients", "no port"}},
		"same port twice":        {args: []string{"run", "--upstream", "a:1", "--http", "127.0.0.1:19092"}, want: []string{"--listen", "--http", "same port"}},
		"self loop":              {args: []string{"run", "--upstream", "localhost:19092"}, want: []string{"--upstream localhost:19092", "leads back to this sidecar", "--listen"}},
		"cluster name":           {args: []string{"run", "--upstream", "a:1", "--cluster", "a/../b"}, want: []string{"--cluster", "characters"}},
		"fsync":                  {args: []string{"run", "--upstream", "a:1", "--fsync", "sometimes"}, want: []string{"--fsync", "always, never"}},
		"size":                   {args: []string{"run", "--upstream", "a:1", "--max-frame", "2GiB"}, want: []string{"--max-frame", "between"}},
		"negative":               {args: []string{"run", "--upstream", "a:1", "--commit-timeout", "-5s"}, want: []string{"--commit-timeout", "between"}},
		"session bounds crossed": {args: []string{"run", "--upstream", "a:1", "--group-min-session-timeout", "1h"}, want: []string{"--group-min-session-timeout", "--group-max-session-timeout"}},
		"join without a cluster": {args: []string{"run", "--upstream", "a:1", "--join", "127.0.0.1:1"}, want: []string{"--join", "--cluster NAME", `"default"`}},
		"join elsewhere":         {args: peers("--join", "192.0.2.1:7946"), want: []string{"--join 192.0.2.1:7946", "--gossip 127.0.0.1:7946", "--gossip 10.0.0.5:7946", "--peer", "POD_IP"}},
		"join a name elsewhere":  {args: peers("--join", "nowhere.invalid"), want: []string{"--join nowhere.invalid:7946", "loopback"}},
		"peer stays at home":     {args: peers("--join", "192.0.2.1", "--gossip", "192.0.2.2:1", "--insecure-peers"), want: []string{"--join 192.0.2.1:7946", "--peer 127.0.0.1:7947"}},
		"advertised loopback":    {args: peers("--join", "192.0.2.1", "--gossip", "0.0.0.0:1", "--peer", "0.0.0.0:2", "--advertise", "localhost", "--insecure-peers"), want: []string{"--advertise localhost is on loopback"}},
		"open gossip":            {args: peers("--gossip", "192.0.2.1:1"), want: []string{"--gossip 192.0.2.1:1", "--peer-cert", "--join-token", "--insecure-peers"}},
		"open peer port":         {args: peers("--peer", "0.0.0.0:1"), want: []string{"--peer 0.0.0.0:1", "--peer-ca", "--join-token-file", "--insecure-peers"}},
		"gossip keys alone":      {args: peers("--peer", "0.0.0.0:1", "--gossip-key-file", write(t, "k", "AAAAAAAAAAAAAAAAAAAAAA==\n")), want: []string{"--peer 0.0.0.0:1", "--insecure-peers"}},
		"mTLS, open gossip":      {args: peers("--gossip", "192.0.2.1:1", "--peer", "192.0.2.1:2", "--peer-cert", "c.pem", "--peer-key", "k.pem", "--peer-ca", "ca.pem"), want: []string{"--gossip 192.0.2.1:1", "--gossip-key-file", "--insecure-peers"}},
		"half of mTLS":           {args: peers("--peer-cert", "c.pem", "--peer-ca", "ca.pem"), want: []string{"--peer-key is missing"}},
		"pod without security":   {args: peers("--join", "192.0.2.1"), env: []string{"POD_IP=192.0.2.7"}, want: []string{"--gossip 192.0.2.7:7946", "--join-token"}},
		"two births":             {args: peers("--join", "127.0.0.1", "--bootstrap-expect", "3", "--bootstrap-arbiter", "upstream"), want: []string{"--bootstrap-expect", "--bootstrap-arbiter", "leave one out"}},
		"expecting nobody":       {args: peers("--bootstrap-expect", "3"), want: []string{"--bootstrap-expect 3 needs --join"}},
		"arbiter":                {args: peers("--bootstrap-arbiter", "me"), want: []string{"--bootstrap-arbiter", "upstream"}},
		"voters":                 {args: peers("--max-voters", "4"), want: []string{"--max-voters", "3, 5"}},
		"acks":                   {args: peers("--commit-acks", "1"), want: []string{"--commit-acks", "all, quorum"}},
		"join a port":            {args: peers("--join", "a:b"), want: []string{`--join "a:b"`, "1 to 65535"}},
		"two tokens":             {args: peers("--join-token", "x", "--join-token-file", "y"), want: []string{"--join-token", "leave one out"}},
		"no token file":          {args: peers("--join-token-file", "/nowhere/t"), want: []string{"--join-token-file", "/nowhere/t"}},
		"empty token file":       {args: peers("--join-token-file", write(t, "t", " \n")), want: []string{"--join-token-file", "is empty"}},
		"bad gossip key":         {args: peers("--gossip-key-file", write(t, "k", "AAAA\n")), want: []string{"--gossip-key-file", "line 1", "base64"}},
		"no gossip key":          {args: peers("--gossip-key-file", write(t, "k", "\n")), want: []string{"--gossip-key-file", "no key"}},
		"long zone":              {args: peers("--zone", strings.Repeat("z", 64)), want: []string{"--zone", "63 bytes"}},
		"gossip on the peer's":   {args: peers("--gossip", "127.0.0.1:7947"), want: []string{"--gossip", "--peer", "same port"}},
		"dev has no peers":       {args: []string{"dev", "--join", "a:1"}, want: []string{"unknown flag --join"}},
		"no home":                {args: []string{"config", "print", "--upstream", "a:1", "--data-dir", "", "--cluster", "\x00"}, want: []string{"--cluster"}},
	} {
		t.Run(name, func(t *testing.T) {
			args := c.args
			if c.file != "" {
				args = append(args, "--config", write(t, "s.yaml", c.file))
			}
			code, _, stderr := call(t, c.env, args...)
			if code != exitUsage || strings.Count(strings.TrimSpace(stderr), "\n") != 0 {
				t.Errorf("exit code %d\n%s", code, stderr)
			}
			for _, want := range c.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("no %q in: %s", want, stderr)
				}
			}
		})
	}
}

func TestDefaultDataDirectory(t *testing.T) {
	env := func(vars map[string]string) func(string) (string, bool) {
		return func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
	}
	for _, c := range []struct {
		vars map[string]string
		root bool
		want string
	}{
		{map[string]string{"XDG_STATE_HOME": "/x", "HOME": "/h"}, false, "/x/offset-sidecar/c"},
		{map[string]string{"XDG_STATE_HOME": "relative", "HOME": "/h"}, false, "/h/.local/state/offset-sidecar/c"},
		{map[string]string{"HOME": "/h"}, false, "/h/.local/state/offset-sidecar/c"},
		{map[string]string{"HOME": "/h"}, true, "/var/lib/offset-sidecar/c"},
	} {
		if got, err := defaultDataDir("c", env(c.vars), c.root); err != nil || got != c.want {
			t.Errorf("%v: %s %v", c.vars, got, err)
		}
	}
	if _, err := defaultDataDir("c", env(nil), false); err == nil || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("without a home: %v", err)
	}
}

// The flags' defaults are Kafka's, which the core states itself.
func TestGroupDefaultsAreKafkas(t *testing.T) {
	c, err := loadConfig("run", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.Coordinator.Group, group.DefaultConfig(); got != want {
		t.Errorf("%+v, not %+v", got, want)
	}
	dev, err := loadConfig("dev", nil)
	if err != nil {
		t.Fatal(err)
	}
	if dev.Coordinator.Group.InitialRebalanceDelay != 0 {
		t.Errorf("dev waits %v for more members", dev.Coordinator.Group.InitialRebalanceDelay)
	}
}

func TestHelpAndVersionGoToStdout(t *testing.T) {
	if code, out, _ := call(t, nil, "version"); code != 0 || !strings.HasPrefix(out, "offset-sidecar ") {
		t.Errorf("version: %d %q", code, out)
	}
	for _, args := range [][]string{{"--help"}, {}, {"config"}} {
		if code, out, stderr := call(t, nil, args...); code != 0 || !strings.Contains(out, "USAGE") || stderr != "" {
			t.Errorf("%v: %d %q %q", args, code, out, stderr)
		}
	}
	_, out, _ := call(t, nil, "run", "--help")
	for i := range settings {
		if !strings.Contains(out, "--"+settings[i].name+" ") {
			t.Errorf("run --help does not show --%s", settings[i].name)
		}
	}
}

func TestPortInUseNamesTheFlagAndTheWayOut(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, flag := range []string{"--listen", "--http", "--admin", "--gossip", "--peer"} {
		args := ephemeral("run", "--upstream", "127.0.0.1:1", "--data-dir", t.TempDir())
		for i, a := range args {
			if a == flag {
				args[i+1] = taken.Addr().String()
			}
		}
		code, _, stderr := call(t, nil, args...)
		last := stderr[strings.LastIndex(strings.TrimSpace(stderr), "\n")+1:]
		if code != exitFailed || !strings.Contains(last, flag+" "+taken.Addr().String()) || !strings.Contains(last, "in use by another process") {
			t.Errorf("%s: %d %s", flag, code, stderr)
		}
	}
}

// The README's table is the one thing people copy flags from.
func TestReadmeShowsEveryFlagWithItsDefault(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := strings.ReplaceAll(string(readme), `\|`, "|")
	for i := range settings {
		s := &settings[i]
		row := fmt.Sprintf("| `%s` | ", strings.TrimSpace("--"+s.name+" "+s.arg))
		if s.value != "" {
			row += fmt.Sprintf("`%s` | %s |", s.value, s.usage)
		}
		if !strings.Contains(rows, row) {
			t.Errorf("no row %s", row)
		}
	}
	if got := strings.Count(rows, "\n| `--"); got != len(settings) {
		t.Errorf("%d rows for %d flags", got, len(settings))
	}
	if first, _, _ := strings.Cut(firstThings, "Kafka's own tools"); !strings.Contains(rows, strings.Split(strings.TrimSpace(first), "\n")[0]) {
		t.Error("the first screen does not show what dev prints")
	}
}
