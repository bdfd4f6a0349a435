package group

import (
	"math"
	"slices"
	"time"
	"unicode/utf8"
)

// newMemberJoinTimeout is how long the parked join of a new member waits, which nobody can have heartbeats for
// (KAFKA-7610; group.new.member.join.timeout.ms, fixed in Kafka too).
const newMemberJoinTimeout = 5 * time.Minute

// groupPartitions is the number of partitions of __consumer_offsets.
const groupPartitions = 50

// DefaultConfig has Kafka's defaults.
func DefaultConfig() Config {
	return Config{
		InitialRebalanceDelay: 3 * time.Second,
		MinSessionTimeout:     6 * time.Second,
		MaxSessionTimeout:     30 * time.Minute,
		MaxSize:               math.MaxInt32,
		OffsetMetadataMaxSize: 4096,
		OffsetsRetention:      7 * 24 * time.Hour,
		OffsetsRetentionCheck: 10 * time.Minute,
		MaxSessions:           1 << 16,
	}
}

// State is all groups and their offsets. It is not safe for concurrent use: one goroutine owns it.
type State struct {
	cfg      Config
	groups   map[string]*group
	sessions sessionTable

	// Soft state: of one activation.
	active  bool
	term    uint64
	seq     uint64 // of the session records of this term
	timers  timers
	sweeper timer
	sweep   sweep

	// Of the Step or Tick that is running.
	now      time.Time
	eff      Effects
	again    bool     // the request has yielded records before: they are not to be yielded once more
	departed []*group // that have lost members of their generation, each once
}

// NewState gives a State without groups, inactive.
func NewState(cfg Config) *State {
	return &State{
		cfg:      cfg,
		groups:   map[string]*group{},
		sessions: sessionTable{byID: map[Session]*sessionEntry{}},
		sweeper:  timer{kind: sweepTimer},
	}
}

// Activate begins an activation: from now on Step and Tick may be called, until Deactivate. Every timer is armed in
// full, as Kafka's coordinator does after loading a partition (GroupMetadataManager.onLoaded), so that a failover
// costs nobody its membership.
func (s *State) Activate(now time.Time, term uint64) Effects {
	if s.active {
		s.Deactivate()
	}
	s.begin(now)
	s.active, s.term = true, term
	for e := s.sessions.first; e != nil; e = e.next {
		if v := decodeSession(e.value); v.term == term {
			s.seq = max(s.seq, v.seq)
		}
	}
	s.timers.arm(&s.sweeper, now, s.cfg.OffsetsRetentionCheck)
	var typed []string // not the simple groups, of which there may be many
	for id, g := range s.groups {
		if g.meta != nil || g.round != nil {
			typed = append(typed, id)
		}
	}
	slices.Sort(typed)
	for _, id := range typed {
		g := s.groups[id]
		s.derive(g)
		if c := g.live; len(c.members) > s.cfg.MaxSize && c.state != preparingRebalance {
			s.prepareRebalance(g) // group.max.size was lowered
		}
	}
	return s.finish()
}

// Rearm gives every timer its full time again: the process was paused, and clients could not be heard.
func (s *State) Rearm(now time.Time) { s.timers.rearm(now) }

// Deactivate ends the activation: parked calls are forgotten unanswered, pending member ids and timers dropped. What
// is left is what replay of the records would give.
func (s *State) Deactivate() {
	s.active, s.term, s.seq = false, 0, 0
	s.timers = timers{}
	s.sweeper = timer{kind: sweepTimer}
	s.sweep = sweep{}
	for _, g := range s.groups {
		g.live, g.seen = nil, 0
		s.dropIfGone(g)
	}
}

// derive builds the state machine of a group from its records and arms its timers.
func (s *State) derive(g *group) {
	c, ok := (*classic)(nil), false
	if g.meta != nil {
		c, ok = decodeGroup(g.meta)
	}
	if g.round != nil {
		if r, readable := decodeRound(g.round); readable {
			switch {
			case !ok || r.generation > c.generation:
				if ok {
					r.showAssignments(c)
				}
				c, ok = r, true
			case r.generation == c.generation && c.state == stable:
				c.enrich(r)
			}
		}
	}
	if !ok {
		c = newClassic()
	}
	c.seated()
	c.dismiss(g.departed)
	c.subscribed = c.subscribedTopics()
	s.adopt(g, c)
	for _, m := range c.members {
		s.resetSession(m)
	}
	if c.state == completingRebalance {
		s.timers.arm(&c.syncPhase, s.now, c.rebalanceTimeout())
	}
	if c.departed != nil {
		s.prepareRebalance(g) // the rebalance that this was for
	}
}

// dismiss takes those out who have left the generation since its records were written.
func (c *classic) dismiss(record []byte) {
	generation, departed, ok := decodeDeparted(record)
	if !ok || generation != c.generation || c.state == empty {
		return
	}
	for _, m := range slices.Clone(c.members) {
		if departed.has(m.seat - 1) {
			c.remove(m)
			c.departed = c.departed.with(m.seat - 1)
		}
	}
}

// adopt makes c the group's state machine.
func (s *State) adopt(g *group, c *classic) {
	g.live = c
	c.joinPhase = timer{kind: joinTimer, g: g}
	c.syncPhase = timer{kind: syncTimer, g: g}
	for _, m := range c.members {
		m.session = timer{kind: sessionTimer, g: g, m: m}
	}
}

// find gives a group that exists.
func (s *State) find(id string) *group {
	g := s.groups[id]
	if g == nil || !g.exists() {
		return nil
	}
	if g.live == nil && (g.meta != nil || g.round != nil) {
		s.derive(g)
	}
	return g
}

// seen is find for the requests of those who use a group. Those who only look at it, as exporters do with all groups,
// must not keep its offsets from expiring.
func (s *State) seen(id string) *group {
	g := s.find(id)
	if g != nil {
		g.seen = s.now.UnixMilli()
	}
	return g
}

// classicOf is the group's state machine, made if it is a simple group that has had no need for one.
func (s *State) classicOf(g *group) *classic {
	if g.live == nil {
		c := newClassic()
		c.since = s.now.UnixMilli()
		s.adopt(g, c)
	}
	return g.live
}

// simple is what a group without members and records of its own looks like. It is never changed.
var simple = newClassic()

func (g *group) view() *classic {
	if g.live == nil {
		return simple
	}
	return g.live
}

// PartitionOf is the partition of __consumer_offsets that a group belongs to: the absolute value of Java's hash of the
// string over its UTF-16 units, where that of MIN_VALUE is 0 (Utils.abs), modulo 50.
func PartitionOf(group string) int32 {
	h := javaHash(group)
	if h == math.MinInt32 {
		return 0
	}
	return max(h, -h) % groupPartitions
}

// javaHash is java.lang.String.hashCode.
func javaHash(s string) int32 {
	var h int32
	for _, r := range s {
		if r >= 1<<16 {
			r -= 1 << 16
			h = 31*h + (0xd800 + r>>10)
			h = 31*h + (0xdc00 + r&0x3ff)
		} else {
			h = 31*h + r
		}
	}
	return h
}

// utf16Longer says whether s has more than limit UTF-16 units, which is what Kafka counts.
func utf16Longer(s string, limit int) bool {
	if len(s) <= limit {
		return false
	}
	n := utf8.RuneCountInString(s)
	for _, r := range s {
		if r >= 1<<16 {
			n++
		}
	}
	return n > limit
}

func millis(d time.Duration) int32    { return int32(d / time.Millisecond) }
func duration(ms int32) time.Duration { return time.Duration(ms) * time.Millisecond }
