package replicate

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// The crash test kills a process with SIGKILL again and again. The child appends entries to one directory and writes
// a line to its parent for each that was acknowledged; the parent kills it at a random moment, opens the directory
// itself, and looks for everything any child has ever acknowledged. CRASH_KILLS sets how many times.
const (
	crashDir    = "REPLICATE_CRASH_DIR"
	crashFirst  = "REPLICATE_CRASH_FIRST"
	crashKills  = "CRASH_KILLS"
	crashKeys   = 37
	crashParts  = 5
	crashSecret = -1 // the private partition has a part in it too
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		first, _ := strconv.Atoi(os.Getenv(crashFirst))
		if err := crashChild(dir, first, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Those that run in parallel mostly wait, each for its cluster.
	if err := flag.Set("test.parallel", strconv.Itoa(max(4, runtime.GOMAXPROCS(0)))); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// crashValue is i, every other time a long one: so much is appended that kills come while badger's write-ahead log
// gets blocks ahead of its use, and while badger begins the next.
func crashValue(i int) string {
	return fmt.Sprintf("%0*d", i%2*(6<<10), i)
}

// crashRecords are the records of the i-th entry ever: three, so that an entry that was torn would be seen.
func crashRecords(i int) []Record {
	value := crashValue(i)
	records := []Record{
		record(int32(i%crashParts), fmt.Sprint("k", i%crashKeys), value),
		record(int32((i+1)%crashParts), fmt.Sprint("l", i%crashKeys), value),
		record(crashSecret, fmt.Sprint("s", i%crashKeys), value),
	}
	if i%5 == 0 {
		records[1].Value = nil
	}
	return records
}

func crashChild(dir string, first int, out io.Writer) error {
	c := testConfig(dir)
	n, err := Open(c)
	if err != nil {
		return err
	}
	var term, sequence uint64
	number := map[uint64]int{}
	next := first
	for {
		var offers chan<- Entry
		if term != 0 {
			offers = n.Entries()
		}
		entry := Entry{Term: term, Sequence: sequence + 1, Records: crashRecords(next)}
		select {
		case offers <- entry:
			sequence++
			number[sequence] = next
			next++
			if sequence == 300 { // terms must change, too
				n.Resign(term)
			}
		case e, ok := <-n.Events():
			switch {
			case !ok:
				return n.Err()
			case e.Kind == Active:
				if next > first && term != 0 {
					return errors.New("active twice without inactive")
				}
				term, sequence, number = e.Term, 0, map[uint64]int{}
			case e.Kind == Applied && e.Term == term:
				fmt.Fprintln(out, number[e.Sequence])
			case e.Kind == Failed, e.Kind == Inactive:
				term = 0 // what was in flight is unknown: the parent takes it from the store
			}
		}
	}
}

func TestAKillLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	kills := 8
	if v := os.Getenv(crashKills); v != "" {
		var err error
		if kills, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	acked := map[int]bool{}
	next := 0
	for kill := range kills {
		before := len(acked)
		crashOnce(t, dir, next, acked)
		next = crashCheck(t, dir, acked) + 1
		t.Logf("kill %d: %d entries acknowledged, %d in all", kill, len(acked)-before, len(acked))
	}
}

// crashOnce runs a child until it is killed, and notes which entries were acknowledged.
func crashOnce(t *testing.T, dir string, first int, acked map[int]bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir, crashFirst+"="+strconv.Itoa(first))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	kill := func() { _ = cmd.Process.Kill() }
	var timer *time.Timer
	if rand.IntN(3) == 0 { // while it opens and replays
		timer = time.AfterFunc(time.Duration(rand.IntN(80))*time.Millisecond, kill)
		defer timer.Stop()
	}
	for lines.Scan() {
		if timer == nil { // from the first acknowledgement on; some kills come at once, some after flushes
			timer = time.AfterFunc(time.Duration(rand.IntN(700))*time.Millisecond, kill)
			defer timer.Stop()
		}
		n, err := strconv.Atoi(lines.Text())
		if err != nil {
			break // a line that the kill cut
		}
		acked[n] = true
	}
	_ = cmd.Wait()
	if timer == nil {
		t.Fatalf("the child acknowledged nothing: %s", stderr.String())
	}
}

// crashCheck opens the directory and returns the highest number of an entry in it. Every entry acknowledged must be
// there, none twice, and whole; offsets have no gaps.
func crashCheck(t *testing.T, dir string, acked map[int]bool) int {
	t.Helper()
	h := openHarness(t, testConfig(dir))
	h.active()
	var numbers []int
	newest := map[string]string{}
	next := map[int32]int64{}
	byNumber := map[int]int{}
	for p := range int32(crashParts) {
		err := h.n.Read(p, 0, func(s store.Stored) bool {
			if s.Offset != next[p] {
				t.Errorf("partition %d: offset %d, want %d", p, s.Offset, next[p])
			}
			next[p] = s.Offset + 1
			id := fmt.Sprintf("%d/%s", p, s.Key)
			if delete(newest, id); s.Value != nil {
				newest[id] = string(s.Value)
			}
			if s.Key[0] == 'k' {
				n, _ := strconv.Atoi(string(s.Value))
				numbers = append(numbers, n)
			}
			byNumber[int(s.Index)]++
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for index, records := range byNumber {
		if records != 2 {
			t.Errorf("raft entry %d has %d of its 2 records", index, records)
		}
	}
	slices.Sort(numbers)
	if twice := len(numbers); twice != len(slices.Compact(numbers)) {
		t.Fatal("an entry came twice")
	}
	for n := range acked {
		if _, ok := slices.BinarySearch(numbers, n); !ok {
			t.Fatalf("entry %d was acknowledged and is lost", n)
		}
	}
	for _, n := range numbers { // ascending, as they were appended
		newest[fmt.Sprint("-1/s", n%crashKeys)] = crashValue(n)
	}
	for id, value := range h.latest() {
		if newest[id] != value {
			t.Fatalf("%s is %.30q, want %.30q", id, value, newest[id])
		}
		delete(newest, id)
	}
	if len(newest) != 0 {
		t.Fatalf("latest lacks %d keys", len(newest))
	}
	h.close()
	if len(numbers) == 0 {
		return -1
	}
	return numbers[len(numbers)-1]
}

// The first start is killed as well: what it leaves, whatever it had written by then, is a directory that opens.
func TestAKillDuringTheFirstStartLeavesADirectoryThatOpens(t *testing.T) {
	rounds := 8
	if v := os.Getenv(crashKills); v != "" {
		rounds, _ = strconv.Atoi(v)
	}
	for range rounds {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashDir+"="+dir, crashFirst+"=0")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for wait := time.Now(); time.Since(wait) < 10*time.Second; { // from its first file on
			if names, _ := os.ReadDir(dir); len(names) > 0 {
				break
			}
		}
		time.AfterFunc(time.Duration(rand.IntN(30_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		h := openHarness(t, testConfig(dir))
		h.active()
		h.commit(record(0, "k", "v"))
		h.close()
	}
}
