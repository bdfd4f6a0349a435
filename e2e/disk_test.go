//go:build e2e && linux

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// mounted gives a filesystem of 192 MiB: tmpfs, or ext4 on a loop device. Only root may mount.
func mounted(t *testing.T, kind string) string {
	t.Helper()
	at := dir(t, "disk")
	args := []string{"-t", "tmpfs", "-o", "size=192m", "tmpfs", at}
	if kind == "ext4" {
		image := filepath.Join(dir(t, "image"), "image")
		check(t, os.WriteFile(image, nil, 0o600))
		check(t, os.Truncate(image, 192<<20))
		if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", image).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		args = []string{"-o", "loop", image, at}
	}
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Fatalf("mounting: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	return at
}

// fillUp takes all the space of a filesystem, as a careless neighbour would, and returns how to give it back.
func fillUp(t *testing.T, at string) (free func()) {
	t.Helper()
	name := filepath.Join(at, "neighbour")
	f, err := os.Create(name)
	check(t, err)
	defer func() { _ = f.Close() }()
	for b := make([]byte, 256<<10); len(b) > 0; {
		if _, err := f.Write(b); err != nil {
			b = b[:len(b)/2]
		}
		time.Sleep(time.Millisecond)
	}
	return func() { check(t, os.Remove(name)) }
}

// TestFullDisk: while the disk is full commits are refused with an error that clients retry, committed offsets are told,
// and the process stays; when there is space again commits go on. A restart on the full disk says what is wrong or serves; nothing acknowledged is
// lost in all of it.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("only root can mount a small filesystem")
		return
	}
	k := kafka(t, lab.Newest, 1)
	name := topic(t, k, "full", 1)
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			at := mounted(t, kind)
			s := newSidecar(t, k.Addrs(), "--commit-timeout", "1s")
			s.Dir = filepath.Join(at, "data")
			killed(t, s) // before the filesystem goes
			check(t, s.Up())
			offset := int64(0)
			commit := func() error {
				err := dialRaw(t, s.Addr()).simpleCommit("full", name, offset+1)
				if err == nil {
					offset++
				}
				return err
			}
			read := func() {
				t.Helper()
				check(t, lab.Eventually(20*time.Second, func() error {
					got, err := dialRaw(t, s.Addr()).committed("full", name)
					if err == nil && got != offset && got != offset+1 { // the one that failed last may have been stored
						t.Fatalf("committed %d, acknowledged %d", got, offset)
					}
					return err
				}))
			}
			check(t, lab.Eventually(20*time.Second, commit))
			for range 3 {
				free := fillUp(t, at)
				check(t, lab.Eventually(20*time.Second, func() error {
					if err := commit(); err == nil {
						return fmt.Errorf("still taken")
					} else if !strings.Contains(err.Error(), "COORDINATOR_NOT_AVAILABLE") && !strings.Contains(err.Error(), "NOT_COORDINATOR") {
						t.Fatal(err)
					}
					return nil
				}))
				if !s.Alive() {
					t.Fatal("the sidecar ended on the full disk")
				}
				for range 3 { // what is there is still told
					if got, err := dialRaw(t, s.Addr()).committed("full", name); err != nil || got != offset && got != offset+1 {
						t.Fatalf("committed %d on the full disk, acknowledged %d: %v", got, offset, err)
					}
				}
				free()
				check(t, lab.Eventually(20*time.Second, commit))
				read()
			}
			free := fillUp(t, at)
			s.Kill()
			check(t, s.Start())
			if code, err := s.Wait(3 * time.Second); err == nil && (code == 0 || !strings.Contains(s.Tail(20), "free some space")) {
				t.Fatalf("exit status %d:\n%s", code, s.Tail(20))
			} else if err != nil { // it serves, and ends in order
				check(t, s.Process.Signal(syscall.SIGTERM))
				if code, err := s.Wait(30 * time.Second); err != nil || code != 0 {
					t.Fatalf("exit status %d, %v:\n%s", code, err, s.Tail(20))
				}
			}
			free()
			check(t, s.Up())
			check(t, lab.Eventually(20*time.Second, commit))
			read()
		})
	}
}

// TestReadOnlyDisk: a filesystem that has become read-only is said so at start, by its name.
func TestReadOnlyDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("only root can mount a small filesystem")
		return
	}
	at := mounted(t, "ext4")
	s := newSidecar(t, "127.0.0.1:1")
	s.Dir = filepath.Join(at, "data")
	killed(t, s)
	check(t, s.Up())
	s.Kill()
	if out, err := exec.Command("mount", "-o", "remount,ro", at).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	refused(t, s, s.Dir, "read-only", "make it writable")
	if out, err := exec.Command("mount", "-o", "remount,rw", at).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check(t, s.Up())
}

// killed ends a sidecar with the test, before what was set up earlier is taken down.
func killed(t *testing.T, s *lab.Sidecar) {
	t.Cleanup(func() {
		if s.Process != nil {
			s.Kill()
		}
	})
}
