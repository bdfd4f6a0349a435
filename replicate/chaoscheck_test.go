package replicate

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/hashicorp/raft"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// chaosCheck watches all sidecars of a fleet, and keeps the history of what clients saw.
type chaosCheck struct {
	*testing.T
	began time.Time

	mu      sync.Mutex
	active  map[uint64]string // term → who was active in it
	entries map[uint64]string // raft's index → what was applied or ignored there
	at      map[*sidecar]uint64
	ops     []chaosOp
	refused map[string]bool // values that were certainly not appended
}

// chaosOp is one operation on the register of a key. A read has an outcome or is left out.
type chaosOp struct {
	client         int
	key, value     string
	write, known   bool
	call, returned time.Duration
	term, index    uint64 // of a write that was acknowledged
	node           string
}

func newChaosCheck(t *testing.T) *chaosCheck {
	return &chaosCheck{
		T: t, began: time.Now(), active: map[uint64]string{}, entries: map[uint64]string{}, at: map[*sidecar]uint64{}, refused: map[string]bool{},
	}
}

// observe is told of every event of every sidecar: no two are active in one term, and at one place of the log there is
// one entry, which counts on all replicas or on none.
func (c *chaosCheck) observe(s *sidecar, e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := s.n.ID()
	switch e.Kind {
	case Reset:
		c.at[s] = 0
	case Active:
		if other, there := c.active[e.Term]; there && other != id {
			c.Errorf("%s and %s were both active in term %d", other, id, e.Term)
		}
		c.active[e.Term] = id
	case Applied, Ignored:
		if e.Index <= c.at[s] {
			c.Errorf("%s: entry %d came after entry %d", id, e.Index, c.at[s])
		}
		c.at[s] = e.Index
		what := describeEntry(e)
		if other, there := c.entries[e.Index]; there && other != what {
			c.Errorf("entry %d is %s on %s, and %s elsewhere", e.Index, what, id, other)
		}
		c.entries[e.Index] = what
	}
}

func describeEntry(e Event) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d of term %d", e.Sequence, e.Term)
	if e.Kind == Ignored {
		b.WriteString(", ignored")
	}
	for _, r := range e.Records {
		fmt.Fprintf(&b, " %d/%s=%s", r.Partition, r.Key, r.Value)
	}
	return b.String()
}

// inSync gives the term in which a sidecar leads, and who is in sync there.
func inSync(s *sidecar) (term uint64, ids []raft.ServerID) {
	r := s.n.running.Load()
	if r == nil {
		return 0, nil
	}
	term, leading := r.leadership()
	if !leading {
		return 0, nil
	}
	_, infos := r.transport.insync.infos()
	for _, i := range infos {
		if i.InSync {
			ids = append(ids, i.ID)
		}
	}
	if now, still := r.leadership(); !still || now != term {
		return 0, nil
	}
	return term, ids
}

// write appends through a sidecar. What is acknowledged is on every replica that was in sync all the while: whoever
// leaves the set stays out for seconds.
func (c *chaosCheck) write(client int, s *sidecar, living func(id raft.ServerID) *sidecar, key, value string) {
	records := []Record{{Partition: 0, Key: []byte(key), Value: []byte(value)}, {Partition: 1, Key: []byte(key), Value: []byte(value)}}
	call := &appendCall{records: records, done: make(chan error, 1)}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	term, before := inSync(s)
	op := chaosOp{client: client, key: key, value: value, write: true, call: time.Since(c.began), node: s.n.ID()}
	err := s.call(ctx, call)
	op.returned, op.known = time.Since(c.began), err == nil
	if err == nil {
		op.term, op.index = term, call.index
		if now, after := inSync(s); term != 0 && now == term {
			for _, id := range before {
				if slices.Contains(after, id) {
					c.has(living(id), call.index, value)
				}
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == errNotActive {
		c.refused[value] = true
		return
	}
	c.ops = append(c.ops, op)
}

// has holds a replica to an acknowledgement.
func (c *chaosCheck) has(s *sidecar, index uint64, value string) {
	if s == nil {
		return
	}
	r := s.n.running.Load()
	if r == nil {
		return
	}
	if last := r.raft.LastIndex(); last < index {
		c.Errorf("%s was acknowledged at %d, and %s, in sync, has only %d", value, index, s.n.ID(), last)
	}
}

// read reads through a sidecar, behind a fence.
func (c *chaosCheck) read(client int, s *sidecar, key string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	op := chaosOp{client: client, key: key, call: time.Since(c.began), known: true, node: s.n.ID()}
	value, err := s.read(ctx, key)
	if err != nil {
		return false
	}
	op.value, op.returned = value, time.Since(c.began)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ops = append(c.ops, op)
	return true
}

// read gives what was applied, behind a fence.
func (s *sidecar) read(ctx context.Context, key string) (string, error) {
	s.mu.Lock()
	term := s.term
	s.mu.Unlock()
	if term == 0 {
		return "", errNotActive
	}
	done := make(chan error, 1)
	s.n.Fence(term, func(err error) { done <- err })
	select {
	case err := <-done:
		if err != nil {
			return "", err
		}
	case <-ctx.Done():
		return "", ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.term != term {
		return "", errNotActive
	}
	return s.state[key], nil
}

// registers is the model: one register for each key.
var registers = porcupine.Model{
	Partition: func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
		byKey := map[string][]porcupine.Operation{}
		for _, o := range history {
			key := o.Input.(chaosOp).key
			byKey[key] = append(byKey[key], o)
		}
		for _, part := range byKey {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		if op := input.(chaosOp); op.write {
			return true, op.value
		}
		return state == input.(chaosOp).value, state
	},
	DescribeOperation: func(input, _ any) string {
		op := input.(chaosOp)
		kind := "read"
		if op.write {
			kind = "write"
		}
		return fmt.Sprintf("%s %s %s (known %v) at %s, entry %d", kind, op.key, op.value, op.known, op.node, op.index)
	},
}

// chaosCopy is what one sidecar holds at the end.
type chaosCopy struct {
	latest map[string]string
	log    map[int32][]store.Stored
}

func (c *chaosCheck) copyOf(s *sidecar) chaosCopy {
	c.Helper()
	held := chaosCopy{latest: map[string]string{}, log: map[int32][]store.Stored{}}
	err := s.n.Latest(func(r Record) error {
		held.latest[fmt.Sprintf("%d/%s", r.Partition, r.Key)] = string(r.Value)
		return nil
	})
	if err != nil {
		c.Error(err)
	}
	for _, p := range []int32{0, 1} {
		err := s.n.Read(p, 0, func(r store.Stored) bool {
			r.Time = time.Time{} // when this replica placed it
			held.log[p] = append(held.log[p], r)
			return true
		})
		if err != nil {
			c.Error(err)
		}
	}
	return held
}

// compare looks at what all replicas hold once they have caught up: the same records at the same positions, without a
// gap, nothing twice, all that was acknowledged, nothing that was refused.
func (c *chaosCheck) compare(all []*sidecar) {
	c.Helper()
	var first chaosCopy
	for i, s := range all {
		held := c.copyOf(s)
		for p, log := range held.log {
			for n, r := range log {
				if r.Offset != int64(n) {
					c.Errorf("%s, partition %d: offset %d follows %d records", s.n.ID(), p, r.Offset, n)
					break
				}
			}
		}
		if i == 0 {
			first = held
			continue
		}
		if got, want := fmt.Sprint(held.latest), fmt.Sprint(first.latest); got != want {
			c.Errorf("the newest records of %s are %s, of %s %s", s.n.ID(), got, all[0].n.ID(), want)
		}
		for p := range first.log {
			if !slices.EqualFunc(held.log[p], first.log[p], func(a, b store.Stored) bool { return fmt.Sprint(a) == fmt.Sprint(b) }) {
				c.Errorf("partition %d: %s has %d records, %s %d, and they are not the same", p, s.n.ID(), len(held.log[p]), all[0].n.ID(), len(first.log[p]))
			}
		}
	}
	c.held(first)
}

// held holds one copy to what clients were told.
func (c *chaosCheck) held(copied chaosCopy) {
	c.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	count := map[string]int{}
	for p, log := range copied.log {
		for _, r := range log {
			count[fmt.Sprint(p, " ", string(r.Value))]++
		}
	}
	for what, n := range count {
		_, value, _ := strings.Cut(what, " ")
		if n > 1 || c.refused[value] {
			c.Errorf("partition and value %s: there %d times, refused %v", what, n, c.refused[value])
		}
	}
	kept := c.ops[:0]
	for _, op := range c.ops {
		there := count["0 "+op.value]
		if op.write && there != count["1 "+op.value] {
			c.Errorf("%s was torn", op.value)
		}
		if op.write && op.known && there == 0 {
			c.Errorf("%s=%s was acknowledged by %s at entry %d of term %d, and is lost", op.key, op.value, op.node, op.index, op.term)
		}
		if op.write && !op.known && there == 0 && !c.seen(op.value) {
			continue // it was never appended: the checker need not try to place it
		}
		kept = append(kept, op)
	}
	c.ops = kept
}

// seen says whether a read gave a value; the caller holds mu.
func (c *chaosCheck) seen(value string) bool {
	return slices.ContainsFunc(c.ops, func(op chaosOp) bool { return !op.write && op.value == value })
}

// linearizable gives the history to porcupine.
func (c *chaosCheck) linearizable() {
	c.Helper()
	var history []porcupine.Operation
	open := 0
	for _, op := range c.ops {
		o := porcupine.Operation{ClientId: op.client, Input: op, Call: int64(op.call), Return: int64(op.returned)}
		if !op.known {
			o.Return = math.MaxInt64
			open++
		}
		history = append(history, o)
	}
	result := porcupine.CheckOperationsTimeout(registers, history, time.Minute)
	c.Logf("%d operations, %d of them open: %s", len(history), open, result)
	if result == porcupine.Ok {
		return
	}
	slices.SortFunc(c.ops, func(a, b chaosOp) int { return cmp.Or(cmp.Compare(a.key, b.key), cmp.Compare(a.call, b.call)) })
	for _, op := range c.ops {
		c.Logf("%v to %v: %s", op.call, op.returned, registers.DescribeOperation(op, nil))
	}
	c.Errorf("the history is not linearizable: %s", result)
}
