package group

import (
	"encoding/binary"
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

// expireOffsets is GroupCoordinatorShard.cleanupGroupMetadata: every group's expired offsets go, and Empty groups that
// have none left (KIP-211).
func (s *State) expireOffsets() {
	if len(s.sweep) == 0 {
		for id := range s.groups {
			s.sweep = append(s.sweep, id)
		}
	}
	piece := s.sweep[:min(len(s.sweep), sweepLooks)]
	slices.Sort(piece) // so that what happens does not hang on the order of a map
	for looks := 0; looks < sweepLooks && len(piece) > 0 && len(s.eff.Records) < sweepRecords; looks++ {
		g := s.groups[piece[0]]
		piece, s.sweep = piece[1:], s.sweep[1:]
		switch {
		case g == nil:
		case g.exists():
			for i := range g.offsets {
				looks += len(g.offsets[i].list)
			}
			s.expireGroup(g)
		default:
			s.deleteGroupItself(g) // a sighting of a group that is gone
		}
	}
	next := s.cfg.OffsetsRetentionCheck
	if len(s.sweep) > 0 {
		next = 0
	} else {
		s.sweep = nil
	}
	s.timers.arm(&s.sweeper, s.now, next)
}

func (s *State) expireGroup(g *group) {
	if s.noteSeen(g); len(g.offsets) > 0 && !s.expireGroupOffsets(g) {
		return
	}
	if c := g.view(); c.state == empty && len(c.pending) == 0 {
		s.deleteGroupItself(g)
	}
}

// expireGroupOffsets yields the tombstones of the group's expired offsets and says whether none is left.
func (s *State) expireGroupOffsets(g *group) (all bool) {
	c := g.view()
	base := int64(-1) // what the retention time counts from, if not the commit
	switch {
	case c.protocolType == nil:
	case c.state == empty:
		base = c.since
	case c.typeName() == consumerType && c.subscribed != nil && c.state == stable:
	default:
		return false
	}
	now, retention := s.now.UnixMilli(), s.cfg.OffsetsRetention.Milliseconds()
	seen := s.lastSeen(g)
	all = true
	for _, t := range slices.Clone(g.offsets) {
		name := t.name()
		if c.subscribesTo(name) {
			all = false
			continue
		}
		for _, p := range slices.Clone(t.list) {
			o, ok := decodeOffset(p.value)
			from := o.committed
			if base != -1 {
				from = base
			}
			// Unlike Kafka: what is read but seldom committed is in use too.
			if expired := o.expires != -1 && now >= o.expires ||
				o.expires == -1 && now-max(from, seen) >= retention; ok && expired {
				s.put(g.partition, appendOffsetKey(nil, g.id, name, p.partition), nil)
			} else {
				all = false
			}
		}
	}
	return all
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
	if len(g.offsets) == 0 || g.seen-g.seenRecord() < grain {
		return
	}
	oldest := g.seen
	for _, t := range g.offsets {
		for _, p := range t.list {
			if o, ok := decodeOffset(p.value); ok {
				oldest = min(oldest, o.committed)
			}
		}
	}
	if g.seen-oldest < grain {
		return
	}
	value := binary.BigEndian.AppendUint16(nil, uint16(seenVersion))
	value = binary.BigEndian.AppendUint64(value, uint64(g.seen))
	s.put(PrivatePartition, groupKey(keySeen, g.id), value)
}
