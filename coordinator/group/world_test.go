package group

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// world is a State with a clock, its clients and the log of what it has yielded. Whatever runs in it is checked against
// the laws after each Step and Tick.
type world struct {
	t      testing.TB
	cfg    Config
	state  *State
	now    time.Time
	start  time.Time
	topics topicTable
	blind  bool // the upstream cannot be asked
	term   uint64

	calls    uint64
	ids      int
	names    map[uint64]string // of the calls that wait for an answer
	ordinals map[string]uint64 // by connection
	log      []Effects         // of this activation
	newest   map[string]Record // by key: what a store would hold
}

type topicTable map[string]struct {
	id         [16]byte
	partitions int32
}

func (t topicTable) Topic(name string) ([16]byte, int32, bool) {
	e, ok := t[name]
	return e.id, e.partitions, ok
}

func (t topicTable) TopicName(id [16]byte) (string, bool) {
	for name, e := range t {
		if e.id == id {
			return name, true
		}
	}
	return "", false
}

func (t topicTable) add(name string, partitions int32, generation byte) {
	id := [16]byte{15: generation}
	copy(id[:15], name)
	t[name] = struct {
		id         [16]byte
		partitions int32
	}{id, partitions}
}

func newWorld(t testing.TB, cfg Config) *world {
	w := &world{
		t: t, cfg: cfg, now: time.UnixMilli(1_000_000_000_000), topics: topicTable{},
		names: map[uint64]string{}, ordinals: map[string]uint64{}, newest: map[string]Record{},
	}
	w.start = w.now
	w.topics.add("orders", 3, 1)
	w.topics.add("payments", 2, 1)
	w.topics.add("audit", 1, 1)
	w.state = NewState(cfg)
	w.activate()
	return w
}

func (w *world) activate() Effects {
	w.term++
	return w.took(w.state.Activate(w.now, w.term))
}

// step sends a request over a connection; its reply is named name. An ordinal of 0 is the connection's next.
func (w *world) step(conn, name string, req kmsg.Request, ordinal uint64) Effects {
	w.calls++
	w.ids++
	w.names[w.calls] = name
	if ordinal == 0 {
		w.ordinals[conn]++
		ordinal = w.ordinals[conn]
	}
	c := Client{ID: conn, Host: "/127.0.0.1", Ordinal: ordinal}
	copy(c.Session[:], conn)
	in := Input{
		Call: w.calls, Request: req, Client: c, NewID: fmt.Sprint(w.ids), Topics: w.topics, AcceptUnknownTopics: w.blind,
	}
	may := w.state.MayWrite(&in)
	e := w.state.Step(w.now, in)
	if !may && len(e.Records) > 0 {
		w.t.Fatalf("%T yielded records, which MayWrite had ruled out", req)
	}
	return w.took(e)
}

// took notes what was yielded and checks the laws.
func (w *world) took(e Effects) Effects {
	w.t.Helper()
	w.log = append(w.log, e)
	if len(e.Records) != len(e.Previous) {
		w.t.Fatalf("%d records, %d previous", len(e.Records), len(e.Previous))
	}
	for i, r := range e.Records {
		before := w.newest[string(r.Key)]
		if p := e.Previous[i]; !bytes.Equal(p.Key, r.Key) || !bytes.Equal(p.Value, before.Value) || (p.Value == nil) != (before.Value == nil) {
			w.t.Fatalf("previous of %x is %x, not %x", r.Key, p.Value, before.Value)
		}
		if len(r.Key)+len(r.Value) > MaxRecord {
			w.t.Fatalf("a record of %d bytes", len(r.Key)+len(r.Value))
		}
		w.newest[string(r.Key)] = r
	}
	for _, r := range e.Replies {
		if _, waiting := w.names[r.Call]; !waiting {
			w.t.Fatalf("call %d is answered, which does not wait", r.Call)
		}
		if r.Fence && len(e.Records) > 0 {
			w.t.Fatalf("the reply to call %d waits for a fence and for records", r.Call)
		}
	}
	w.check()
	return e
}

// answered takes the replies' calls off the waiting list and gives their names.
func (w *world) answered(e Effects) []string {
	var names []string
	for _, r := range e.Replies {
		names = append(names, w.names[r.Call])
		delete(w.names, r.Call)
	}
	return names
}

// check: the state is that of the newest records; Record gives them back; what is parked is what waits.
func (w *world) check() {
	w.t.Helper()
	rebuilt := w.rebuild(slices.Sorted(maps.Keys(w.newest)))
	if got, want := hardState(w.state), hardState(rebuilt); got != want {
		w.t.Fatalf("live:\n%s\nrebuilt:\n%s", got, want)
	}
	for k, r := range w.newest {
		if got := w.state.Record([]byte(k)); !bytes.Equal(got, r.Value) || (got == nil) != (r.Value == nil) {
			w.t.Fatalf("record of %x is %x, not %x", k, got, r.Value)
		}
	}
	rebuilt.Activate(w.now, 0)
	for id, g := range w.state.groups {
		c := simple
		if r := rebuilt.groups[id]; r != nil {
			c = r.view()
		}
		if g.live != nil && g.live.state == preparingRebalance {
			for _, m := range c.members { // what a join phase has changed is kept when it ends; who has gone, at once
				if m.instance == nil && g.live.byID[m.id] == nil || m.instance != nil && g.live.static[*m.instance] == nil {
					w.t.Fatalf("%s has left group %s, and is back", m.id, id)
				}
			}
		}
		if g.live == nil || g.live.state == preparingRebalance {
			continue
		}
		if got, want := durable(g.live), durable(c); got != want {
			w.t.Fatalf("group %s live:\n%s\nrebuilt:\n%s", id, got, want)
		}
	}
}

// checkParked: a request is answered or parked, never forgotten, and parked in one place.
func (w *world) checkParked() {
	w.t.Helper()
	parked := map[uint64]bool{}
	for id, g := range w.state.groups {
		if g.live == nil {
			continue
		}
		joins := 0
		for _, m := range g.live.members {
			if m.join.call != 0 {
				joins++
			}
			for _, call := range []uint64{m.join.call, m.sync.call} {
				if call != 0 && parked[call] {
					w.t.Fatalf("call %d is parked twice", call)
				}
				parked[call] = true
			}
		}
		if joins != g.live.awaitingJoin {
			w.t.Fatalf("group %s has %d joins parked and counts %d", id, joins, g.live.awaitingJoin)
		}
	}
	for call, name := range w.names {
		if !parked[call] {
			w.t.Fatalf("call %d (%s) is neither answered nor parked", call, name)
		}
	}
}

// rebuild applies the newest record of each key, in this order of keys.
func (w *world) rebuild(order []string) *State {
	s := NewState(w.cfg)
	for _, k := range order {
		s.Apply(w.newest[k])
	}
	return s
}

// advance lets time pass, with a Tick at each deadline and one just before, which must do nothing.
func (w *world) advance(d time.Duration, took func(Effects)) {
	w.t.Helper()
	until := w.now.Add(d)
	for rounds := 0; ; rounds++ {
		at := w.state.Deadline()
		if at.IsZero() || at.After(until) || rounds > 10_000 {
			break
		}
		if early := at.Add(-time.Nanosecond); early.After(w.now) {
			if e := w.state.Tick(early); len(e.Records)+len(e.Replies) > 0 || !w.state.Deadline().Equal(at) {
				w.t.Fatalf("a Tick before %v did something", at)
			}
		}
		if at.After(w.now) {
			w.now = at
		}
		e := w.took(w.state.Tick(w.now))
		took(e)
	}
	w.now = until
}

// failover ends the activation: the last undo Effects are undone, and another replica, which has applied the records in
// an order of its own, becomes active. Calls that waited are forgotten; their clients send them again.
func (w *world) failover(undo int, order []string) Effects {
	w.t.Helper()
	w.end(undo)
	if order == nil {
		order = slices.Sorted(maps.Keys(w.newest))
	}
	rebuilt := w.rebuild(order)
	if got, want := hardState(rebuilt), hardState(w.state); got != want {
		w.t.Fatalf("rebuilt:\n%s\nwas:\n%s", got, want)
	}
	w.state = rebuilt
	return w.activate()
}

// end undoes the last Effects of the activation and deactivates.
func (w *world) end(undo int) {
	w.t.Helper()
	for ; undo > 0 && len(w.log) > 0; undo-- {
		e := w.log[len(w.log)-1]
		w.log = w.log[:len(w.log)-1]
		for _, p := range slices.Backward(e.Previous) {
			w.state.Apply(p)
			w.newest[string(p.Key)] = p
		}
	}
	w.log = nil
	w.state.Deactivate()
	if !w.state.Deadline().IsZero() {
		w.t.Fatal("a timer is left after Deactivate")
	}
	clear(w.names)
	if got, want := hardState(w.state), hardState(w.rebuild(slices.Collect(maps.Keys(w.newest)))); got != want {
		w.t.Fatalf("after undo:\n%s\nbefore:\n%s", got, want)
	}
}

// hardState writes down all that a State keeps of its records.
func hardState(s *State) string {
	var b strings.Builder
	for _, id := range s.sortedGroups() {
		g := s.groups[id]
		if g.meta == nil && g.round == nil && g.seenValue == nil && g.departed == nil && g.offsets.empty() {
			continue // only a live state machine
		}
		fmt.Fprintf(&b, "group %q of %d meta %x round %x seen %x departed %x\n", id, g.partition, g.meta, g.round, g.seenValue, g.departed)
		if !g.offsets.empty() {
			b.WriteString(broken(&g.offsets, func(t *topicOffsets) string { return t.name() }))
		}
		for t := range g.offsets.all() {
			b.WriteString(broken(&t.list, func(p *partitionOffset) int32 { return p.partition }))
			for p := range t.list.all() {
				fmt.Fprintf(&b, "  %s/%d %x\n", t.name(), p.partition, p.value)
			}
		}
	}
	var sessions []string
	for e := s.sessions.first; e != nil; e = e.next {
		sessions = append(sessions, hex.EncodeToString(e.id[:])+" "+hex.EncodeToString(e.value))
	}
	slices.Sort(sessions)
	if len(sessions) != len(s.sessions.byID) {
		sessions = append(sessions, "BROKEN sessions")
	}
	return b.String() + strings.Join(sessions, "\n")
}

// broken says so if a list is not in order, or has chunks that it should not have.
func broken[T any, K cmp.Ordered](l *sorted[T], key func(*T) K) string {
	var keys []K
	for e := range l.all() {
		keys = append(keys, key(e))
	}
	if len(keys) == 0 || !slices.IsSorted(keys) || l.rest != nil && len(*l.rest) == 0 {
		return "  BROKEN\n"
	}
	for i := range 1 + len(keys)/maxChunk {
		if l.rest != nil && i < len(*l.rest) && len((*l.rest)[i]) == 0 {
			return "  BROKEN chunk\n"
		}
	}
	return ""
}

// durable writes down what of a state machine must outlive it.
func durable(c *classic) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s generation %d type %s protocol %s leader %s", c.state, c.generation, show(c.protocolType), show(c.protocol), c.leader)
	for _, m := range c.members {
		fmt.Fprintf(&b, "\n  %s %s %s %s %v %v %q", m.id, show(m.instance), m.clientID, m.clientHost, m.rebalanceTimeout, m.sessionTimeout, m.protocols)
		if c.state == stable {
			fmt.Fprintf(&b, " %q", m.assignment)
		}
	}
	return b.String()
}

func show(s *string) string {
	if s == nil {
		return "null"
	}
	if *s == "" {
		return `""`
	}
	return *s
}
