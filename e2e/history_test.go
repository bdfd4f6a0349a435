//go:build e2e

package e2e

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// call is one OffsetCommit or OffsetFetch of a key: a group's offset of one partition. Every commit has a value of its own.
type call struct {
	commit  bool
	offset  int64 // of a commit; a fetch's is its output
	conn    int   // of the client's connections, counted over the history
	ordinal int32 // of the commit in that connection, from 1
}

// history is what clients have asked and were told, by key.
type history struct {
	began time.Time
	value atomic.Int64 // the newest commit's
	conns atomic.Int64

	mu     sync.Mutex
	calls  map[string][]porcupine.Operation
	open   map[string][]porcupine.Operation // commits whose outcome is not known
	errors map[string]int                   // what clients were told instead of an answer
}

func newHistory() *history {
	return &history{began: time.Now(), calls: map[string][]porcupine.Operation{}, open: map[string][]porcupine.Operation{}, errors: map[string]int{}}
}

func (h *history) now() int64 { return int64(time.Since(h.began)) }

// commit notes a commit that was sent then; err is what became of it.
func (h *history) commit(key string, c call, sent int64, err error) {
	op := porcupine.Operation{Input: c, Call: sent, Return: h.now()}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		op.Return = math.MaxInt64 // it may take effect at any time, or never
		h.open[key] = append(h.open[key], op)
		return
	}
	h.calls[key] = append(h.calls[key], op)
}

// fetch notes what a client was told of a key; a fetch without an answer tells nothing.
func (h *history) fetch(key string, c call, sent, offset int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls[key] = append(h.calls[key], porcupine.Operation{Input: c, Output: offset, Call: sent, Return: h.now()})
}

// fails notes an error that a client was told of.
func (h *history) fails(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.errors[err.Error()]++
}

// maxConns is how many connections may have committed to one key.
const maxConns = 64

// register is the model of a key: its offset, and of each connection the commit that was last executed: the commits of
// one connection are executed in their order, none twice.
type register struct {
	offset   int64
	executed [maxConns]int32
}

var registerModel = porcupine.Model{
	Init: func() any { return register{offset: -1} },
	Step: func(state, input, output any) (bool, any) {
		r, c := state.(register), input.(call)
		if !c.commit {
			return output.(int64) == r.offset, r
		}
		if c.ordinal <= r.executed[c.conn] {
			return false, r
		}
		r.offset, r.executed[c.conn] = c.offset, c.ordinal
		return true, r
	},
	DescribeOperation: func(input, output any) string {
		if c := input.(call); c.commit {
			return fmt.Sprintf("commit %d (connection %d, %d)", c.offset, c.conn, c.ordinal)
		}
		return fmt.Sprint("fetch ", output)
	},
}

// key gives what is to be checked of one key. A commit of unknown outcome that no fetch has seen says nothing: whatever
// holds without it holds. One that was seen was executed, some time after it was sent.
func (h *history) key(key string) []porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	ops := slices.Clone(h.calls[key])
	seen := map[int64]bool{}
	for _, op := range ops {
		if !op.Input.(call).commit {
			seen[op.Output.(int64)] = true
		}
	}
	for _, op := range h.open[key] {
		if seen[op.Input.(call).offset] {
			ops = append(ops, op)
		}
	}
	conns := map[int]int{} // connections are counted anew in each key
	for i := range ops {
		c := ops[i].Input.(call)
		if _, known := conns[c.conn]; !known && c.commit {
			conns[c.conn] = len(conns)
		}
		c.conn = conns[c.conn]
		ops[i].Input = c
	}
	return ops
}

// check fails the test unless the history of each key is linearizable; of one that is not a picture is left behind.
func (h *history) check(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	keys, open, total := make([]string, 0, len(h.calls)), 0, 0
	for key := range h.calls {
		keys = append(keys, key)
		open += len(h.open[key])
		total += len(h.calls[key])
	}
	h.mu.Unlock()
	slices.Sort(keys)
	for _, key := range keys {
		result, info := porcupine.CheckOperationsVerbose(registerModel, h.key(key), time.Minute)
		if result == porcupine.Ok {
			continue
		}
		picture := "none"
		if d, err := lab.TempDir("history"); err == nil {
			picture = d + "/" + key + ".html"
			if err := porcupine.VisualizePath(registerModel, info, picture); err != nil {
				picture = err.Error()
			}
		}
		t.Errorf("the history of %s is not linearizable (%s); picture: %s\n%s", key, result, picture, h.story(key, 40))
	}
	t.Logf("%d calls on %d keys, %d commits of unknown outcome, errors %v", total, len(keys), open, h.errors)
}

// story is the end of a key's history as text.
func (h *history) story(key string, n int) (text string) {
	ops := h.key(key)
	slices.SortFunc(ops, func(a, b porcupine.Operation) int { return int(a.Call/1000 - b.Call/1000) })
	for _, op := range ops[max(0, len(ops)-n):] {
		end := fmt.Sprintf("%.6f", float64(op.Return)/1e9)
		if op.Return == math.MaxInt64 {
			end = "?"
		}
		text += fmt.Sprintf("    %.6f to %s: %s\n", float64(op.Call)/1e9, end, registerModel.DescribeOperation(op.Input, op.Output))
	}
	return text
}

// historian is a client that commits and fetches at random until it is stopped. It has one connection at a time, to the
// address that at gives; a lost connection is no error of the sidecars'.
type historian struct {
	history *history
	topic   string
	at      func() string
	keys    func() []string
	stop    <-chan struct{}
}

func (g *historian) run() {
	for {
		select {
		case <-g.stop:
			return
		default:
		}
		c, err := net.DialTimeout("tcp", g.at(), time.Second)
		if err != nil {
			time.Sleep(20 * time.Millisecond) // its sidecar is gone for a while
			continue
		}
		g.converse(&raw{Conn: c}, int(g.history.conns.Add(1)))
		_ = c.Close()
	}
}

// converse goes on until the connection breaks or an answer stays out.
func (g *historian) converse(r *raw, conn int) {
	ordinal := int32(0)
	for {
		select {
		case <-g.stop:
			return
		default:
		}
		keys := g.keys()
		key := keys[rand.IntN(len(keys))]
		if rand.IntN(2) == 0 {
			sent := g.history.now()
			offset, err := r.committed(key, g.topic)
			if isNetwork(err) {
				return
			}
			if err != nil {
				g.history.fails(fmt.Errorf("OffsetFetch: %w", err))
				continue
			}
			g.history.fetch(key, call{conn: conn}, sent, offset)
			continue
		}
		// Two commits on their way at once, now and then.
		if !g.commits(r, key, conn, &ordinal, 1+rand.IntN(2)) {
			return
		}
	}
}

// commits sends n commits before it reads the first reply; false if the connection is no longer of use.
func (g *historian) commits(r *raw, key string, conn int, ordinal *int32, n int) bool {
	var calls []call
	var sent []int64
	first, broken := r.next+1, error(nil)
	for range n {
		*ordinal++
		c := call{commit: true, offset: g.history.value.Add(1), conn: conn, ordinal: *ordinal}
		calls, sent = append(calls, c), append(sent, g.history.now())
		if broken == nil {
			broken = r.send(commitRequest(key, g.topic, c.offset), commitWait)
		}
	}
	for i, c := range calls {
		var err error
		if broken == nil {
			resp, got := r.receive(commitRequest(key, g.topic, 0), first+int32(i))
			if broken = got; got == nil {
				err = commitError(resp)
			}
		}
		if broken != nil {
			g.history.commit(key, c, sent[i], broken)
			continue
		}
		if err != nil {
			g.history.fails(fmt.Errorf("OffsetCommit: %w", err))
		}
		g.history.commit(key, c, sent[i], err)
	}
	return broken == nil
}
