package group

import (
	"encoding/binary"
	"math"
	"slices"
	"time"
)

// A sweep makes way for requests after so many records, or so many groups and offsets that it has looked at.
const (
	sweepRecords = 1024
	sweepLooks   = 8192
)

// seenGrains is how many times in a retention time it is noted durably that a group was seen.
const seenGrains = 8

// sweep is a sweep under way.
type sweep struct {
	groups []string // that it has not come to
	piece  []string // those that come next, sorted, so that what happens does not hang on the order of a map
	// Of the first group of piece: where to go on.
	begun     bool
	topic     string
	partition int32
}

// next gives the group to go on with.
func (w *sweep) next() (id string, ok bool) {
	if len(w.piece) == 0 {
		n := min(len(w.groups), sweepLooks)
		w.piece, w.groups = w.groups[:n:n], w.groups[n:]
		slices.Sort(w.piece)
	}
	if len(w.piece) == 0 {
		return "", false
	}
	return w.piece[0], true
}

// done ends with the group that next gave.
func (w *sweep) done() {
	w.piece = w.piece[1:]
	w.begun, w.topic, w.partition = false, "", 0
}

// expireOffsets is GroupCoordinatorShard.cleanupGroupMetadata: every group's expired offsets go, and Empty groups that
// have none left (KIP-211).
func (s *State) expireOffsets() {
	id, ok := s.sweep.next()
	if !ok {
		for id := range s.groups {
			s.sweep.groups = append(s.sweep.groups, id)
		}
		id, ok = s.sweep.next()
	}
	for looks := 0; ok && looks < sweepLooks && len(s.eff.Records) < sweepRecords; id, ok = s.sweep.next() {
		g := s.groups[id]
		looks++
		if g != nil && g.exists() {
			looked, all := s.expireGroup(g, sweepLooks-looks)
			if looks += looked; !all {
				break
			}
		} else if g != nil {
			s.deleteGroupItself(g) // a sighting of a group that is gone
		}
		s.sweep.done()
	}
	if _, more := s.sweep.next(); more {
		s.timers.arm(&s.sweeper, s.now, 0)
		return
	}
	s.sweep = sweep{}
	s.timers.arm(&s.sweeper, s.now, s.cfg.OffsetsRetentionCheck)
}

// expireGroup looks at up to so many offsets of the group, and says at how many it has, and whether these were all.
func (s *State) expireGroup(g *group, looks int) (looked int, all bool) {
	if !s.sweep.begun {
		s.sweep.begun, s.sweep.partition = true, math.MinInt32
		s.noteSeen(g)
	}
	if looked, all = s.expireGroupOffsets(g, looks); !all || !g.offsets.empty() {
		return looked, all
	}
	if c := g.view(); c.state == empty && len(c.pending) == 0 {
		s.deleteGroupItself(g)
	}
	return looked, true
}

// expireGroupOffsets yields the tombstones of the group's expired offsets, as far as the sweep may go now.
func (s *State) expireGroupOffsets(g *group, looks int) (looked int, all bool) {
	c := g.view()
	base := int64(-1) // what the retention time counts from, if not the commit
	switch {
	case c.protocolType == nil:
	case c.state == empty:
		base = c.since
	case c.typeName() == consumerType && c.subscribed != nil && c.state == stable:
	default:
		return 0, true
	}
	now, retention := s.now.UnixMilli(), s.cfg.OffsetsRetention.Milliseconds()
	seen := s.lastSeen(g)
	room := sweepRecords - len(s.eff.Records)
	var keys [][]byte
	all = true
	for t, p := range g.offsetsFrom(s.sweep.topic, s.sweep.partition) {
		if looked >= looks || len(keys) >= room {
			s.sweep.topic, s.sweep.partition = t.name(), p.partition
			all = false
			break
		}
		looked++
		if c.subscribesTo(t.name()) {
			continue
		}
		o, ok := decodeOffset(p.value)
		from := o.committed
		if base != -1 {
			from = base
		}
		// Unlike Kafka: what is read but seldom committed is in use too.
		if expired := o.expires != -1 && now >= o.expires ||
			o.expires == -1 && now-max(from, seen) >= retention; ok && expired {
			keys = append(keys, appendOffsetKey(nil, g.id, t.name(), p.partition))
		}
	}
	for _, key := range keys {
		s.put(g.partition, key, nil)
	}
	return looked, all
}

// lastSeen is when a client last asked for the group, as far as is known, in milliseconds. A sighting is noted durably
// only now and then, so after a failover up to a grain of time counts in the group's favour.
func (s *State) lastSeen(g *group) int64 {
	return max(g.seen, g.seenRecord()+s.seenGrain().Milliseconds())
}

func (s *State) seenGrain() time.Duration { return s.cfg.OffsetsRetention / seenGrains }

func (g *group) seenRecord() int64 {
	r := reader{b: g.seenValue}
	if r.int16() != seenVersion {
		return 0
	}
	return r.int64()
}

// noteSeen yields the record of a sighting that is a grain newer than the one noted last, if the group has an offset
// that needs it: one that was not committed anew meanwhile.
func (s *State) noteSeen(g *group) {
	grain := s.seenGrain().Milliseconds()
	if g.seen-g.seenRecord() < grain {
		return
	}
	needed := false
	for _, p := range g.allOffsets() {
		if o, ok := decodeOffset(p.value); ok && g.seen-o.committed >= grain {
			needed = true
			break
		}
	}
	if !needed {
		return
	}
	value := binary.BigEndian.AppendUint16(nil, uint16(seenVersion))
	value = binary.BigEndian.AppendUint64(value, uint64(g.seen))
	s.put(PrivatePartition, groupKey(keySeen, g.id), value)
}
