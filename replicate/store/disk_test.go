//go:build e2e && linux

package store

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A child process writes to a store on a filesystem that its parent fills up: a full disk is a SIGBUS in a process
// that writes through mmap, as badger does. It mounts a tmpfs and an ext4 image, so it needs root.
const diskDir = "STORE_DISK_DIR"

func init() {
	if dir := os.Getenv(diskDir); dir != "" {
		if err := diskChild(dir); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// diskChild appends, flushes and compacts until its standard input ends; it says when appends begin to fail, and when
// they succeed again. Reads must not fail.
func diskChild(dir string) error {
	s, err := Open(Options{Dir: dir, Fsync: true, MinFree: 64 << 20})
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		close(stop)
	}()
	said := ""
	say := func(what string) {
		if said != what {
			fmt.Println(what)
			said = what
		}
	}
	_, index := s.RaftLog().ends()
	index = max(index, s.State().Index)
	fmt.Println("open", index)
	for step := 0; ; step++ {
		select {
		case <-stop:
			if err := s.Close(); err != nil {
				return err
			}
			fmt.Println("closed", index)
			return nil
		default:
		}
		err := s.RaftLog().StoreLogs(entries(1, index+1, index+10, 8<<10))
		switch {
		case errors.Is(err, ErrNoSpace):
			say("full")
			time.Sleep(5 * time.Millisecond)
		case err != nil:
			return err
		default:
			say("writing")
			for range 10 {
				index++
				for s.State().Index < index { // what was replayed is in there already
					if err := crashApply(s, s.State().Index+1); err != nil {
						return err
					}
				}
			}
		}
		if step%20 == 0 {
			if err := s.Latest(func(Record) error { return nil }); err != nil {
				return fmt.Errorf("reading: %w", err)
			}
			_ = s.Flush(allOfTail) // fails while there is no room
			if first, _ := s.RaftLog().ends(); index > first+500 {
				s.mu.Lock()
				to := min(index-500, s.flushed.Index)
				s.mu.Unlock()
				if err := s.RaftLog().DeleteRange(first, to); err != nil {
					return err
				}
			}
		}
	}
}

type diskProcess struct {
	*testing.T
	cmd   *exec.Cmd
	lines chan string
	stdin interface{ Close() error }
}

func startDisk(t *testing.T, dir string) *diskProcess {
	t.Helper()
	p := &diskProcess{T: t, cmd: exec.Command(os.Args[0]), lines: make(chan string, 1000)}
	p.cmd.Env = append(os.Environ(), diskDir+"="+dir)
	var stderr strings.Builder
	p.cmd.Stderr = &stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdin = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			p.lines <- lines.Text()
		}
		_ = p.cmd.Wait()
		if text := stderr.String(); text != "" {
			p.lines <- "stderr: " + text
		}
		close(p.lines)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		for range p.lines {
		}
	})
	return p
}

// first gives the first line.
func (p *diskProcess) first() string {
	p.Helper()
	select {
	case line := <-p.lines:
		return line
	case <-time.After(60 * time.Second):
		p.Fatal("nothing for 60 s")
	}
	panic("unreachable")
}

// await gives the first line that begins so.
func (p *diskProcess) await(prefix string) string {
	p.Helper()
	late := time.After(60 * time.Second)
	for {
		select {
		case line, ok := <-p.lines:
			if strings.HasPrefix(line, prefix) {
				return line
			}
			if !ok || strings.HasPrefix(line, "stderr") || strings.HasPrefix(line, "failed") {
				p.Fatalf("waiting for %q: %.2000s", prefix, line)
			}
		case <-late:
			p.Fatalf("not within 60 s: %q", prefix)
		}
	}
}

// end closes the store and waits for the end of the process: a database that could not be closed is locked until then.
func (p *diskProcess) end() (last string) {
	p.Helper()
	_ = p.stdin.Close()
	last = strings.TrimPrefix(p.await("closed"), "closed ")
	for range p.lines {
	}
	return last
}

// fill takes all the space there is, at once or bit by bit.
func fill(t *testing.T, dir string, atOnce bool) (free func()) {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := int64(0)
	for chunk := int64(1 << 30); chunk >= 4096; {
		if !atOnce {
			chunk = min(chunk, 256<<10)
		}
		if err := syscall.Fallocate(int(f.Fd()), 0, size, chunk); err != nil {
			chunk /= 2
			continue
		}
		size += chunk
		if !atOnce {
			time.Sleep(time.Millisecond)
		}
	}
	return func() {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}

func mounted(t *testing.T, kind string) string {
	t.Helper()
	dir := t.TempDir()
	args := []string{"-t", "tmpfs", "-o", "size=192m", "tmpfs", dir}
	if kind == "ext4" {
		image := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, 192<<20); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", image).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		args = []string{"-o", "loop", image, dir}
	}
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Fatalf("mounting needs root: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	return dir
}

func TestAFullDiskStopsAppendsAndNothingElse(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			mount := mounted(t, kind)
			dir := filepath.Join(mount, "data")
			p := startDisk(t, dir)
			p.await("writing")
			rounds := 4
			if v := os.Getenv("STORE_FILLS"); v != "" {
				rounds, _ = strconv.Atoi(v)
			}
			for range rounds {
				free := fill(t, mount, os.Getenv("STORE_FILL_AT_ONCE") != "")
				p.await("full")
				time.Sleep(200 * time.Millisecond) // compaction and flushes go on meanwhile, or not
				free()
				p.await("writing")
				time.Sleep(300 * time.Millisecond)
			}
			free := fill(t, mount, false)
			p.await("full")
			last := p.end()

			p = startDisk(t, dir) // it says why not, or it serves on what the ballast gave
			line := p.first()
			if line != "open "+last && (!strings.Contains(line, ErrNoSpace.Error()) || !strings.Contains(line, "free some space")) {
				t.Fatalf("%q, want %s", line, last)
			}
			if line == "open "+last {
				last = p.end()
			}
			free()
			p = startDisk(t, dir)
			if got := p.await("open"); got != "open "+last {
				t.Fatalf("%q, want %s", got, last)
			}
			p.await("writing")
		})
	}
}
