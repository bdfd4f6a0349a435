// Package lab starts what the end-to-end tests and the benchmark need: Kafka brokers, sidecars, clients. It reports by
// errors, so that both can use it, and waits only for conditions, with a deadline.
package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a child whose output is kept, line by line.
type Process struct {
	Name string
	Cmd  *exec.Cmd

	mu    sync.Mutex
	lines []string
	more  chan struct{} // closed and replaced with each line, and closed at the end
	ended bool
	err   error
	stdin io.WriteCloser
	done  chan struct{}
}

// StartProcess runs a program; its stdout and stderr are kept together.
func StartProcess(name string, env []string, program string, args ...string) (*Process, error) {
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	return StartCommand(name, cmd)
}

// StartCommand is StartProcess for a command with settings of its own. The child dies with this process.
func StartCommand(name string, cmd *exec.Cmd) (*Process, error) {
	p := &Process{Name: name, Cmd: cmd, more: make(chan struct{}), done: make(chan struct{})}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.Stdout, cmd.Stderr = &lineWriter{p: p}, &lineWriter{p: p}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	p.stdin = stdin
	started := make(chan error)
	go p.wait(started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

// wait starts the child and waits for it on one goroutine: Pdeathsig follows the parent thread, which Go may end, so
// the thread is kept by locking it.
func (p *Process) wait(started chan error) {
	runtime.LockOSThread()
	err := p.Cmd.Start()
	started <- err
	if err != nil {
		return
	}
	err = p.Cmd.Wait()
	p.mu.Lock()
	p.ended, p.err = true, err
	close(p.more)
	p.mu.Unlock()
	close(p.done)
}

type lineWriter struct {
	p       *Process
	partial []byte
}

func (w *lineWriter) Write(b []byte) (int, error) {
	w.partial = append(w.partial, b...)
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	for {
		i := bytes.IndexByte(w.partial, '\n')
		if i < 0 {
			return len(b), nil
		}
		w.p.lines = append(w.p.lines, string(w.partial[:i]))
		w.partial = w.partial[i+1:]
		close(w.p.more)
		w.p.more = make(chan struct{})
	}
}

// Lines returns all output so far.
func (p *Process) Lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.lines...)
}

// Mark is a position in the output: Line looks only behind it.
func (p *Process) Mark() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.lines)
}

// Line waits for a line behind the mark that the function likes.
func (p *Process) Line(mark int, within time.Duration, like func(string) bool) (string, error) {
	deadline := time.After(within)
	for i := mark; ; {
		p.mu.Lock()
		lines, more, ended := p.lines, p.more, p.ended
		p.mu.Unlock()
		for ; i < len(lines); i++ {
			if like(lines[i]) {
				return lines[i], nil
			}
		}
		if ended {
			return "", fmt.Errorf("%s ended (%v) before the line came:\n%s", p.Name, p.err, p.Tail(30))
		}
		select {
		case <-more:
		case <-deadline:
			return "", fmt.Errorf("%s: no such line within %s:\n%s", p.Name, within, p.Tail(30))
		}
	}
}

// Tail returns the last lines of the output, indented, for a failure's message.
func (p *Process) Tail(n int) string {
	lines := p.Lines()
	lines = lines[max(0, len(lines)-n):]
	return "    " + strings.Join(lines, "\n    ")
}

// Say writes a line to the child's stdin.
func (p *Process) Say(line string) error {
	_, err := io.WriteString(p.stdin, line+"\n")
	return err
}

// Signal sends a signal to the child alone.
func (p *Process) Signal(s syscall.Signal) error { return p.Cmd.Process.Signal(s) }

// Alive says whether the child has not ended yet.
func (p *Process) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the child at once and waits for it.
func (p *Process) Kill() {
	_ = p.Signal(syscall.SIGKILL)
	<-p.done
}

// Wait waits for the child's end and returns its exit status.
func (p *Process) Wait(within time.Duration) (int, error) {
	select {
	case <-p.done:
	case <-time.After(within):
		_ = p.Signal(syscall.SIGQUIT) // Go and Java print their threads
		select {
		case <-p.done:
		case <-time.After(2 * time.Second):
		}
		return -1, fmt.Errorf("%s has not ended within %s:\n%s", p.Name, within, p.Tail(400))
	}
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) {
		return -1, p.err
	}
	return p.Cmd.ProcessState.ExitCode(), nil
}

// Run runs a program to its end and returns its stdout and stderr together.
func Run(within time.Duration, env []string, program string, args ...string) (string, error) {
	p, err := StartProcess(filepath.Base(program), env, program, args...)
	if err != nil {
		return "", err
	}
	_ = p.stdin.Close()
	code, err := p.Wait(within)
	if err != nil {
		p.Kill()
		return "", err
	}
	out := strings.Join(p.Lines(), "\n")
	if code != 0 {
		return out, fmt.Errorf("%s %s: exit status %d:\n%s", program, strings.Join(args, " "), code, p.Tail(40))
	}
	return out, nil
}

// Eventually asks until the answer is nil; at the deadline it returns the last error.
func Eventually(within time.Duration, ask func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s: %w", within, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// given are the ports that Ports gave out not long ago: whoever got them may not listen yet, or not at the moment.
var given struct {
	sync.Mutex
	at map[int]time.Time
}

// Ports finds n neighbouring ports on loopback that nobody listens on, all below the kernel's ephemeral range: there
// a client's own connection may take them while a broker restarts.
func Ports(n int) (int, error) {
	const first, last, keep = 21900, 25000, 10 * time.Minute
	given.Lock()
	defer given.Unlock()
	if given.at == nil {
		given.at = map[int]time.Time{}
	}
	for range 1000 {
		base := first + rand.IntN(last-first-n)
		taken := false
		for p := base; p < base+n; p++ {
			at, was := given.at[p]
			taken = taken || was && time.Since(at) < keep
		}
		if !taken && free(base, n) {
			for p := base; p < base+n; p++ {
				given.at[p] = time.Now()
			}
			return base, nil
		}
	}
	return 0, fmt.Errorf("no %d free ports between %d and %d", n, first, last)
}

func free(base, n int) bool {
	for p := base; p < base+n; p++ {
		for _, host := range []string{"127.0.0.1", "[::1]"} {
			l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", host, p))
			if errors.Is(err, syscall.EADDRINUSE) {
				return false
			}
			if err == nil {
				_ = l.Close()
			}
		}
	}
	return true
}
