package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Starved is a control group whose processes get a part of a core.
type Starved struct {
	dir string
	v2  bool
}

const (
	cpuV1 = "/sys/fs/cgroup/cpu"
	cpuV2 = "/sys/fs/cgroup"
)

// NewStarved makes a control group with so many thousandths of a core, given out in steps of 100 ms as Kubernetes does.
// It needs root.
func NewStarved(name string, millicores int) (*Starved, error) {
	const period = 100_000 // microseconds
	g := &Starved{dir: filepath.Join(cpuV1, "offset-sidecar-e2e-"+strconv.Itoa(os.Getpid())+"-"+name)}
	if _, err := os.Stat(cpuV1); err != nil {
		g.v2, g.dir = true, filepath.Join(cpuV2, filepath.Base(g.dir))
	}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return nil, fmt.Errorf("making a control group (as root only): %w", err)
	}
	quota := period * millicores / 1000
	// The largest weight: what they are given they get at once, whatever else the machine does.
	files := [][2]string{{"cpu.cfs_period_us", strconv.Itoa(period)}, {"cpu.cfs_quota_us", strconv.Itoa(quota)}, {"cpu.shares", "262144"}}
	if g.v2 {
		files = [][2]string{{"cpu.max", fmt.Sprintf("%d %d", quota, period)}, {"cpu.weight", "10000"}}
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(g.dir, f[0]), []byte(f[1]), 0o644); err != nil {
			g.Remove()
			return nil, fmt.Errorf("limiting a control group: %w", err)
		}
	}
	return g, nil
}

// Take moves a process into it.
func (g *Starved) Take(p *Process) error {
	return os.WriteFile(filepath.Join(g.dir, "cgroup.procs"), []byte(strconv.Itoa(p.Cmd.Process.Pid)), 0o644)
}

// Throttled is how often its processes had to wait.
func (g *Starved) Throttled() (int, error) {
	text, err := os.ReadFile(filepath.Join(g.dir, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if n, ok := strings.CutPrefix(line, "nr_throttled "); ok {
			return strconv.Atoi(n)
		}
	}
	return 0, fmt.Errorf("%s/cpu.stat does not tell", g.dir)
}

// Remove removes it; its processes must have ended.
func (g *Starved) Remove() { _ = os.Remove(g.dir) }
