package group

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// FuzzLaws lets the clients of a seed do as they please, with time, failovers, lost appends and lost answers in
// between, and checks the laws in world_test.go after every Step and Tick:
//
//   - live = rebuilt: the state is that of the newest record per key, whatever the order across keys; so are the state
//     machines of the groups, except for what a join phase under way has changed;
//   - Effects.Previous is what the key held before, and undoing any suffix gives the state before it;
//   - a Tick before Deadline does nothing;
//   - a request is answered once, or parked in one place;
//   - a request that is sent again yields nothing if it has yielded something before;
//   - what may not write, by MayWrite, yields nothing;
//   - a generation is told once, and to members that know the same round.
//
// A failure prints the seed's script, which TestScripts can run.
func FuzzLaws(f *testing.F) {
	for seed := range uint64(16) {
		f.Add(seed, uint16(150))
	}
	f.Fuzz(func(t *testing.T, seed uint64, steps uint16) {
		newSimulation(t, seed).run(int(steps % 1000))
	})
}

// TestManySeedsKeepTheLaws is FuzzLaws over fixed seeds.
func TestManySeedsKeepTheLaws(t *testing.T) {
	seeds := uint64(300)
	if testing.Short() {
		seeds = 40
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { newSimulation(t, 1000+seed).run(120) })
	}
}

type simulation struct {
	*world
	*rand.Rand
	scripted scripted
	text     strings.Builder
	ids      []string          // member ids that were told
	rounds   map[string]string // what was told of a group's generation
	deleted  map[string]int    // how often the group began anew
	sent     []simulated
}

type simulated struct {
	conn, text string
	ordinal    uint64
	yielded    bool
}

func newSimulation(t *testing.T, seed uint64) *simulation {
	r := rand.New(rand.NewPCG(seed, 0))
	cfg := scriptConfig()
	cfg.MaxSessions = 1 + r.IntN(6)
	cfg.InitialRebalanceDelay = time.Duration(r.IntN(2)) * 3 * time.Second
	cfg.OffsetsRetention, cfg.OffsetsRetentionCheck = 10*time.Minute, time.Minute
	if r.IntN(4) == 0 {
		cfg.MaxSize = 2
	}
	s := &simulation{world: newWorld(t, cfg), Rand: r, rounds: map[string]string{}, deleted: map[string]int{}}
	s.scripted.world = s.world
	fmt.Fprintf(&s.text, "config initial=%v max-size=%d retention=10m check=1m max-sessions=%d\n----\n\n",
		cfg.InitialRebalanceDelay, cfg.MaxSize, cfg.MaxSessions)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d:\n%s", seed, s.text.String())
		}
	})
	return s
}

func (s *simulation) run(steps int) {
	for range steps {
		switch n := s.IntN(100); {
		case n < 78:
			s.request()
		case n < 90:
			d := []time.Duration{0, 0, time.Second, 4 * time.Second, 11 * time.Second, time.Minute, 7 * time.Minute}[s.IntN(7)]
			fmt.Fprintf(&s.text, "tick %v\n----\n\n", d)
			s.advance(d, s.note)
		case n < 95:
			s.again()
		default:
			undo := s.IntN(1 + min(4, len(s.log)))
			fmt.Fprintf(&s.text, "failover undo=%d\n----\n\n", undo)
			order := slices.Collect(maps.Keys(s.newest))
			slices.Sort(order)
			s.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
			if undo > 0 { // what was undone was told to nobody
				clear(s.rounds)
				s.sent = nil
			}
			s.note(s.failover(undo, order))
		}
		s.checkParked()
	}
}

// request sends something that makes sense half of the time.
func (s *simulation) request() {
	conn := fmt.Sprint("c", 1+s.IntN(4))
	group := "group=" + s.oneOf("g", "g", "h")
	text := s.oneOf(
		"join v3 "+group+s.member()+s.protocols(), "join v3 "+group+s.member()+s.protocols(),
		"join v9 "+group+s.member()+s.protocols(), "join v9 "+group+s.member()+s.instance()+s.protocols(),
		"join v4 "+group+s.protocols(), "join v9 "+group+s.instance()+s.protocols(),
		"sync v3 "+group+s.member()+s.generation()+s.assign(), "sync v3 "+group+s.member()+s.generation()+s.assign(),
		"sync v3 "+group+s.member()+s.generation()+s.assign(),
		"heartbeat v4 "+group+s.member()+s.generation(),
		"leave v5 "+group+" members="+s.id()+","+s.oneOf(s.id(), "@i1"), "leave v0 "+group+s.member(),
		"commit v9 "+group+s.member()+s.generation()+s.offsets(), "commit v9 "+group+s.offsets(),
		"commit v4 "+group+s.offsets()+" retention=60000",
		"fetch v9 "+group+" topics="+s.oneOf("null", "orders/0+1"),
		"offsetdelete v0 "+group+" topics="+s.oneOf("orders/0", "payments/0,orders/1"),
		"delete v2 groups="+s.oneOf("g", "h", "g,h"), "describe v5 groups=g,h", "list v5",
	)
	s.send(conn, text, 0)
}

func (s *simulation) send(conn, text string, ordinal uint64) Effects {
	fmt.Fprintf(&s.text, "step\n%s %s\n----\n\n", conn, text)
	if ordinal == 0 {
		s.ordinals[conn]++
		ordinal = s.ordinals[conn]
	}
	req := parseRequest(s.t, s.topics, text)
	e := s.step(conn, conn+" "+text, req, ordinal)
	s.sent = append(s.sent, simulated{conn, text, ordinal, slices.ContainsFunc(e.Records, func(r Record) bool {
		k, _ := parseKey(r.Key)
		return k.kind == keySession && r.Value != nil
	})})
	s.note(e)
	return e
}

// again sends one of the last requests once more.
func (s *simulation) again() {
	if len(s.sent) == 0 {
		return
	}
	last := s.sent[len(s.sent)-1-s.IntN(min(3, len(s.sent)))]
	known := s.state.sessions.byID[sessionOf(last.conn)] != nil
	e := s.send(last.conn, last.text, last.ordinal)
	if last.yielded && known && len(e.Records) > 0 && !strings.HasPrefix(last.text, "join") {
		s.t.Fatalf("%s was executed twice", last.text)
	}
	for _, r := range e.Replies {
		if last.yielded && known && strings.HasPrefix(showResponse(r.Response), "UNKNOWN") {
			s.t.Fatalf("%s succeeded, and sent again: %s", last.text, showResponse(r.Response))
		}
	}
}

func sessionOf(conn string) (id Session) {
	copy(id[:], conn)
	return id
}

// note remembers what clients were told, and that no generation is told of two rounds.
func (s *simulation) note(e Effects) {
	for _, r := range e.Records {
		k, _ := parseKey(r.Key)
		id := string(k.group)
		switch {
		case k.kind == keyGroup && r.Value == nil:
			s.deleted[id]++
		case k.kind == keyRound && r.Value != nil:
			c, _ := decodeRound(r.Value)
			at := fmt.Sprintf("%s %d generation %d", id, s.deleted[id], c.generation)
			was := s.rounds[at]
			if now := durable(c); was == "" {
				s.rounds[at] = now
			} else if strings.Count(was, "\n") != strings.Count(now, "\n") {
				s.t.Fatalf("%s was told as\n%s\nand as\n%s", at, was, now)
			}
		}
	}
	for _, r := range e.Replies {
		text := showResponse(r.Response)
		if _, id, ok := strings.Cut(text, " member="); ok {
			id, _, _ = strings.Cut(id, " ")
			if id != "" && !slices.Contains(s.ids, id) {
				s.ids = append(s.ids, id)
			}
		}
	}
	s.answered(e)
}

func (s *simulation) oneOf(values ...string) string { return values[s.IntN(len(values))] }

// id is mostly one of the members that are there, else any that was told.
func (s *simulation) id() string {
	if s.IntN(5) > 0 {
		for _, id := range []string{"g", "h"} {
			if g := s.state.groups[id]; g != nil && g.live != nil && len(g.live.members) > 0 && s.IntN(2) == 0 {
				return g.live.members[s.IntN(len(g.live.members))].id
			}
		}
	}
	if len(s.ids) == 0 {
		return "nobody"
	}
	return s.ids[len(s.ids)-1-s.IntN(min(6, len(s.ids)))]
}

func (s *simulation) member() string {
	if s.IntN(3) == 0 {
		return ""
	}
	return " member=" + s.id()
}

func (s *simulation) generation() string {
	if g := s.state.groups["g"]; g != nil && g.live != nil && s.IntN(6) > 0 {
		return fmt.Sprint(" generation=", g.live.generation)
	}
	return fmt.Sprint(" generation=", s.IntN(8)-1)
}

func (s *simulation) instance() string { return " instance=" + s.oneOf("i1", "i2") }

func (s *simulation) protocols() string {
	return " protocols=" + s.oneOf("range:A", "range:A", "range:A,sticky:B", "sticky:B,range:C", "range:sub(orders)", "range:A,range:B") +
		" rebalance=" + s.oneOf("20s", "1m")
}

func (s *simulation) assign() string {
	return " assign=" + s.id() + ":X," + s.id() + ":Y"
}

func (s *simulation) offsets() string {
	return fmt.Sprintf(" offsets=%s:%d", s.oneOf("orders/0", "orders/1", "payments/0", "orders/7"), s.IntN(1000))
}
