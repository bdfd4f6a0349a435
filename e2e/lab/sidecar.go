package lab

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Sidecar is one sidecar process; Start may be called again after its end and uses the same ports and directory.
type Sidecar struct {
	Verb     string // "" is run
	Upstream string
	Host     string // "" is 127.0.0.1
	Net      *Net   // the network namespace that it runs in; nil: the machine's
	Port     int    // of the bootstrap listener; 0: chosen, with room behind it for the brokers' listeners
	Dir      string // the data directory
	Gossip   string // host:port; "": any free port, as for Peer
	Peer     string
	Join     string // "" is alone
	Args     []string
	Command  func(*exec.Cmd) // a last change to the command, such as another user
	*Process

	ready map[string]any
}

// Binary builds the sidecar once and returns its path; E2E_BINARY names one to take instead.
var Binary = sync.OnceValues(func() (string, error) {
	if given := os.Getenv("E2E_BINARY"); given != "" {
		return given, nil
	}
	paths, err := Setup()
	if err != nil {
		return "", err
	}
	dir, err := TempDir("bin")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "offset-sidecar")
	cmd := exec.Command("go", "build", "-o", bin, "./cmd/offset-sidecar")
	cmd.Dir = paths.Root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the sidecar: %w\n%s", err, out)
	}
	return bin, nil
})

var temp = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "offset-sidecar-e2e-")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
})

// TempDir makes a folder under one that Cleanup removes. Anyone may enter: a sidecar may run as another user.
func TempDir(name string) (string, error) {
	dir, err := temp()
	if err != nil {
		return "", err
	}
	made, err := os.MkdirTemp(dir, name+"-")
	if err != nil {
		return "", err
	}
	return made, os.Chmod(made, 0o755)
}

// Cleanup removes all that TempDir gave.
func Cleanup() {
	if dir, err := temp(); err == nil {
		_ = os.RemoveAll(dir)
	}
}

// Start launches the process without waiting for anything.
func (s *Sidecar) Start() error {
	bin, err := Binary()
	if err != nil {
		return err
	}
	if s.Port == 0 {
		if s.Port, err = Ports(8); err != nil {
			return err
		}
	}
	args := []string{"run", "--upstream", s.Upstream,
		"--gossip", cmp.Or(s.Gossip, "127.0.0.1:0"), "--peer", cmp.Or(s.Peer, "127.0.0.1:0")}
	if s.Verb != "" {
		args = []string{s.Verb}
	}
	args = append(args, "--listen", s.Addr(), "--http", cmp.Or(s.Host, "127.0.0.1")+":0", "--admin", "127.0.0.1:0")
	if s.Host != "" {
		args = append(args, "--advertise-clients", s.Host)
	}
	if s.Dir != "" {
		args = append(args, "--data-dir", s.Dir)
	}
	if s.Join != "" {
		args = append(args, "--join", s.Join)
	}
	cmd := exec.Command(bin, append(args, s.Args...)...)
	if s.Net != nil {
		cmd = exec.Command("ip", slices.Concat([]string{"netns", "exec", s.Net.name}, cmd.Args)...) // which becomes the sidecar
	}
	if s.Command != nil {
		s.Command(cmd)
	}
	s.ready = nil
	s.Process, err = StartCommand("sidecar", cmd)
	return err
}

// Up starts the process and waits for its line "ready".
func (s *Sidecar) Up() error {
	if err := s.Start(); err != nil {
		return err
	}
	return s.Ready(15 * time.Second)
}

// Ready waits for the line "ready" and keeps its addresses.
func (s *Sidecar) Ready(within time.Duration) error {
	_, err := s.Line(0, within, func(line string) bool {
		var entry map[string]any
		if json.Unmarshal([]byte(line), &entry) != nil || entry["msg"] != "ready" {
			return false
		}
		s.ready = entry
		return true
	})
	return err
}

// Addr is the bootstrap listener's address.
func (s *Sidecar) Addr() string { return fmt.Sprintf("%s:%d", cmp.Or(s.Host, "127.0.0.1"), s.Port) }

// BrokerAddr is the address of the listener for an upstream broker (design: listen + 1 + node id mod 256).
func (s *Sidecar) BrokerAddr(id int) string { return fmt.Sprintf("127.0.0.1:%d", s.Port+1+id%256) }

// Terminate sends SIGTERM and waits for the end.
func (s *Sidecar) Terminate(within time.Duration) (int, error) {
	if err := s.Signal(syscall.SIGTERM); err != nil {
		return -1, err
	}
	return s.Wait(within)
}

// page reads a JSON page of the admin listener.
func (s *Sidecar) page(path string, into any) error {
	addr, _ := s.ready["admin"].(string)
	if addr == "" {
		return errors.New("the line ready named no admin address")
	}
	if s.Net != nil { // whose loopback it is on
		bin, err := Binary()
		if err != nil {
			return err
		}
		out, err := Run(10*time.Second, nil, "ip", "netns", "exec", s.Net.name, bin, strings.TrimPrefix(path, "/"), "--admin", addr, "-o", "json")
		if err != nil {
			return err
		}
		return json.Unmarshal([]byte(out), into)
	}
	client := http.Client{Timeout: 2 * time.Second} // the process may be stopped
	resp, err := client.Get("http://" + addr + path)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// Stacks gives what all goroutines are at.
func (s *Sidecar) Stacks() (string, error) {
	addr, _ := s.ready["admin"].(string)
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + addr + "/debug/pprof/goroutine?debug=2")
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return "", errors.New(resp.Status)
	}
	all, err := io.ReadAll(resp.Body)
	return string(all), err
}

// Metric reads one metric, summed over its labels, from the health listener.
func (s *Sidecar) Metric(name string) (float64, error) {
	addr, _ := s.ready["http"].(string)
	if addr == "" {
		return 0, errors.New("the line ready named no http address")
	}
	client := http.Client{Timeout: 2 * time.Second}
	resp, err := client.Get("http://" + addr + "/metrics")
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	sum, found := 0.0, false
	for line := range strings.SplitSeq(string(body), "\n") {
		series, value, ok := strings.Cut(line, " ")
		if i := strings.LastIndexByte(line, '}'); i >= 0 && len(line) > i+2 { // labels may hold blanks
			series, value, ok = line[:i], line[i+2:], true
		}
		if metric, _, _ := strings.Cut(series, "{"); !ok || metric != name {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum, found = sum+v, true
	}
	if !found {
		return 0, fmt.Errorf("no metric %s", name)
	}
	return sum, nil
}
