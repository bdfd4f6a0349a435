//go:build linux

package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// A child process works on a store. The parent stops it at any moment, copies what is on disk, which is what a kill
// would leave there, and lets it go on; the copy must open with everything that the child had been promised. A power
// cut is the same with what was not synced torn: some of its pages are zeroes. STORE_CRASHES says how many.
const (
	crashDir      = "STORE_CRASH_DIR"
	crashProgress = "STORE_CRASH_PROGRESS"
	crashRounds   = "STORE_CRASHES"
	crashParts    = 5
	crashKeys     = 97
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		fmt.Fprintln(os.Stderr, crashChild(dir, os.Getenv(crashProgress)))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// promises is what the child has been told is on disk.
type promises struct{ last, vote uint64 }

func (p promises) write(f *os.File) error {
	b := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, p.last), p.vote)
	_, err := f.WriteAt(b, 0)
	return err
}

func crashEntry(index uint64) *raft.Log {
	size := int(index * 7919 % 6000)
	if index%50 == 0 {
		size = 400 << 10
	}
	return &raft.Log{Index: index, Term: 1, Data: slices.Repeat([]byte{byte(index)}, size)}
}

func crashApply(s *Store, index uint64) error {
	value := strings.Repeat(fmt.Sprintf("%08d", index), 20)
	return s.Append(index, 1, 1, index+1, []Record{
		rec(int32(index%crashParts), fmt.Sprint("k", index%crashKeys), value),
		rec(-1, fmt.Sprint("s", index%crashKeys), value),
	})
}

// crashChild does what raft does, without end.
func crashChild(dir, progress string) error {
	out, err := os.Create(progress)
	if err != nil {
		return err
	}
	s, err := Open(Options{Dir: dir, Fsync: true, OnFatal: func(err error) { panic(err) }})
	if err != nil {
		return err
	}
	var p promises
	for step := uint64(1); err == nil; step++ {
		var logs []*raft.Log
		for range 1 + rand.IntN(40) {
			logs = append(logs, crashEntry(p.last+1+uint64(len(logs))))
		}
		if err = s.RaftLog().StoreLogs(logs); err != nil {
			break
		}
		applied := p.last
		p.last += uint64(len(logs))
		err = p.write(out)
		if rand.IntN(10) == 0 && err == nil { // some of them are taken back
			to := p.last
			p.last = applied + rand.Uint64N(to-applied) + 1
			err = errors.Join(p.write(out), s.RaftLog().DeleteRange(p.last+1, to))
		}
		for index := applied + 1; index <= p.last && err == nil; index++ {
			err = crashApply(s, index)
		}
		switch rand.IntN(30) {
		case 0:
			go s.Compact()
		case 1, 2:
			err = errors.Join(err, s.Flush(allOfTail))
			s.mu.Lock()
			flushed := s.flushed.Index
			s.mu.Unlock()
			if first, _ := s.RaftLog().ends(); flushed > first+100 {
				err = errors.Join(err, s.RaftLog().DeleteRange(first, flushed-50))
			}
		case 3, 4:
			err = errors.Join(err, s.Stable().SetUint64([]byte("LastVoteTerm"), step))
			p.vote = step
			err = errors.Join(err, p.write(out))
		}
	}
	return err
}

func TestWhatAKillLeavesOpensWithEverythingPromised(t *testing.T) {
	rounds := 10
	if v := os.Getenv(crashRounds); v != "" {
		rounds, _ = strconv.Atoi(v)
	}
	dir, progress := t.TempDir(), filepath.Join(t.TempDir(), "progress")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir, crashProgress+"="+progress)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	torn := 0
	for round := range rounds {
		if err := syscall.Kill(cmd.Process.Pid, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		// Any moment will do: this is no waiting for anything.
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		image := t.TempDir()
		p := freeze(t, cmd.Process.Pid, dir, progress, image)
		cut := t.TempDir()
		copySparse(t, image, cut)
		if err := crashCheck(image, p); err != nil {
			t.Fatalf("round %d, killed: %v", round, err)
		}
		if tear(t, cut, p) {
			torn++
		}
		if err := crashCheck(cut, p); err != nil {
			t.Fatalf("round %d, power cut: %v", round, err)
		}
		if err := errors.Join(os.RemoveAll(image), os.RemoveAll(cut)); err != nil {
			t.Fatal(err)
		}
		if round == rounds-1 {
			t.Logf("%d entries promised; %d images were torn", p.last, torn)
		}
	}
}

// freeze stops the process and copies its directory.
func freeze(t *testing.T, pid int, dir, progress, image string) (p promises) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "a stopped child", func() bool { return allStopped(pid) })
	copySparse(t, dir, image)
	b, err := os.ReadFile(progress)
	if err == nil && len(b) == 16 {
		p = promises{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
	}
	return p
}

// allStopped looks at each thread: one in a system call stops when that ends.
func allStopped(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, name := range threads {
		b, rerr := os.ReadFile(name)
		_, state, _ := strings.Cut(string(b), ") ")
		if rerr != nil || !strings.HasPrefix(state, "T") {
			return false
		}
	}
	return err == nil && len(threads) > 0
}

// crashCheck opens an image and compares it with what was promised.
func crashCheck(dir string, p promises) error {
	s, err := Open(Options{Dir: dir, Fsync: false})
	if err != nil {
		return err
	}
	defer s.Close()
	first, last := s.RaftLog().ends()
	if last < p.last {
		return fmt.Errorf("raft's log ends at %d, promised %d", last, p.last)
	}
	if vote, err := s.Stable().GetUint64([]byte("LastVoteTerm")); err != nil || vote < p.vote {
		return fmt.Errorf("vote %d, promised %d: %w", vote, p.vote, err)
	}
	for index := max(first, 1); index <= last; index++ {
		var e raft.Log
		if err := s.RaftLog().GetLog(index, &e); err != nil || string(e.Data) != string(crashEntry(index).Data) {
			return fmt.Errorf("entry %d: %w", index, err)
		}
		if index > s.State().Index {
			if err := crashApply(s, index); err != nil {
				return err
			}
		}
	}
	newest := map[string]uint64{}
	for index := last; index > 0 && len(newest) < 2*crashKeys*crashParts; index-- {
		for _, key := range []string{fmt.Sprintf("%d/k%d", index%crashParts, index%crashKeys), fmt.Sprintf("-1/s%d", index%crashKeys)} {
			newest[key] = max(newest[key], index)
		}
	}
	err = s.Latest(func(r Record) error {
		key := fmt.Sprintf("%d/%s", r.Partition, r.Key)
		if got := string(r.Value[:8]); newest[key] != 0 && got != fmt.Sprintf("%08d", newest[key]) {
			return fmt.Errorf("%s is %s, want %d", key, got, newest[key])
		}
		delete(newest, key)
		return nil
	})
	for key, index := range newest {
		if index > 0 && err == nil && index+uint64(2*crashKeys*crashParts) > last {
			err = fmt.Errorf("%s is missing, want %d", key, index)
		}
	}
	for partition := range int32(crashParts) {
		rerr := s.Read(partition, 0, func(r Stored) bool {
			// Entry i has one record in partition i modulo their number.
			if want := (int64(r.Index) - 1) / crashParts; partition == 0 && r.Offset != int64(r.Index)/crashParts-1 || partition != 0 && r.Offset != want {
				err = fmt.Errorf("partition %d: entry %d has offset %d", partition, r.Index, r.Offset)
			}
			return err == nil
		})
		err = errors.Join(err, rerr)
	}
	return err
}

// tear makes zeroes of some of what was not synced yet: it lies behind all that was promised. False: there is none.
func tear(t *testing.T, dir string, p promises) bool {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(dir, databaseName, "*"+walSuffix))
	if err != nil || len(logs) == 0 {
		return false
	}
	slices.Sort(logs)
	name := logs[len(logs)-1]
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	w, err := openWatermark(filepath.Join(dir, watermarkName))
	if err != nil {
		t.Fatal(err)
	}
	version := w.version
	w.close()
	from := promisedEnd(b, version, p.last)
	end := len(b)
	for end > from && b[end-1] == 0 {
		end--
	}
	if end <= from {
		return false
	}
	for at := from; at < end; at = at&^4095 + 4096 {
		if rand.IntN(2) == 0 {
			clear(b[at:min(at&^4095+4096, end)])
		}
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return true
}

// promisedEnd is where the last transaction ends that a sync has covered: of a version that the watermark names, or
// with the last entry promised.
func promisedEnd(b []byte, version, last uint64) int {
	end, at, holds := min(logHeaderBytes, len(b)), logHeaderBytes, false
	for at < len(b) {
		e, n := walEntry(b[at:])
		if n == 0 {
			break
		}
		at += n
		if key := e.key[:max(len(e.key)-8, 0)]; len(key) == 10 && key[0] == rangeRaftLog && raftLogIndex(key) == last {
			holds = true
		}
		if e.meta&metaFinTxn != 0 {
			if holds || e.version() <= version {
				end = at
			}
			holds = false
		}
	}
	return end
}
