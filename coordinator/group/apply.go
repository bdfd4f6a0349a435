package group

import (
	"bytes"
	"cmp"
	"iter"
	"math"
	"unique"
)

// group is everything that hangs on one group id. Its hard state is the newest value of each of its records, kept as
// it was written; live is the state machine that Step runs on top, derived from them and dropped with the activation.
type group struct {
	id             string
	partition      int32
	*memberRecords                      // noMembers for most groups, which have but offsets
	seenValue      []byte               // when a client was last seen, coarsely
	offsets        sorted[topicOffsets] // by topic

	live *classic
	seen int64 // milliseconds; when a client was last seen in this activation, 0 for not yet
}

// memberRecords are the records of a group that has, or had, members.
type memberRecords struct {
	meta     []byte // GroupMetadataValue
	round    []byte // the join round completed last
	departed []byte // who has left since
}

// noMembers is shared, and never changed.
var noMembers = &memberRecords{}

// topicOffsets are a group's offsets of a topic, by partition. Lists rather than maps, for most groups have few of each.
// Names are interned: a million keys share some hundred topic names.
type topicOffsets struct {
	topic unique.Handle[string]
	list  sorted[partitionOffset]
}

func (t *topicOffsets) name() string { return t.topic.Value() }

// topicAt is where the offsets of a topic are, or would be.
func (g *group) topicAt(name string) (place, bool) {
	return g.offsets.search(func(t *topicOffsets) int { return cmp.Compare(t.name(), name) })
}

// topic gives the offsets of a topic, nil if there are none. It holds until the next record is applied.
func (g *group) topic(name string) *topicOffsets {
	if p, ok := g.topicAt(name); ok {
		return g.offsets.at(p)
	}
	return nil
}

// allOffsets gives the group's offsets in order.
func (g *group) allOffsets() iter.Seq2[*topicOffsets, *partitionOffset] {
	return g.offsetsFrom("", math.MinInt32)
}

// offsetsFrom gives the group's offsets in order, beginning at those of a topic and partition.
func (g *group) offsetsFrom(name string, partition int32) iter.Seq2[*topicOffsets, *partitionOffset] {
	return func(yield func(*topicOffsets, *partitionOffset) bool) {
		at, _ := g.topicAt(name)
		for t := range g.offsets.from(at) {
			first := place{}
			if t.name() == name {
				first, _ = t.find(partition)
			}
			for p := range t.list.from(first) {
				if !yield(t, p) {
					return
				}
			}
		}
	}
}

type partitionOffset struct {
	partition int32
	value     []byte // OffsetCommitValue
}

func (t *topicOffsets) find(partition int32) (place, bool) {
	if i := int(partition); i >= 0 && i < len(t.list.head) && t.list.head[i].partition == partition {
		return place{0, i}, true // all partitions from 0 on have an offset, as is usual
	}
	return t.list.search(func(p *partitionOffset) int { return cmp.Compare(p.partition, partition) })
}

// value gives the OffsetCommitValue of a partition, nil if there is none.
func (t *topicOffsets) value(partition int32) []byte {
	if p, ok := t.find(partition); ok {
		return t.list.at(p).value
	}
	return nil
}

// exists tells a group from a mere sighting of one.
func (g *group) exists() bool {
	return g.live != nil || g.meta != nil || g.round != nil || !g.offsets.empty()
}

// Apply makes r the newest record of its key. Live, in replay and in undo, the same line runs: State is a function of
// the newest value per key, whatever the order across keys. Key types that are not known are kept out. r may be reused
// afterwards.
func (s *State) Apply(r Record) {
	s.swap(r.Key, bytes.Clone(r.Value))
}

// Record gives the newest value of a key, byte for byte as it was applied; nil for a tombstone or none. It is not to be
// changed.
func (s *State) Record(key []byte) []byte {
	k, ok := parseKey(key)
	if !ok {
		return nil
	}
	if k.kind == keySession {
		if e := s.sessions.byID[k.session]; e != nil {
			return e.value
		}
		return nil
	}
	g := s.groups[string(k.group)]
	if g == nil {
		return nil
	}
	switch k.kind {
	case keyOffset:
		if t := g.topic(string(k.topic)); t != nil {
			return t.value(k.partition)
		}
		return nil
	default:
		return *g.value(k.kind)
	}
}

// value is where the group keeps its record of that kind.
func (g *group) value(kind int16) *[]byte {
	switch kind {
	case keyGroup:
		return &g.meta
	case keyRound:
		return &g.round
	case keyDeparted:
		return &g.departed
	default:
		return &g.seenValue
	}
}

// swap is Apply; it takes value over and gives back the one before.
func (s *State) swap(key, value []byte) (previous []byte) {
	k, ok := parseKey(key)
	if !ok {
		return nil
	}
	if k.kind == keySession {
		return s.sessions.swap(k.session, value)
	}
	g := s.groups[string(k.group)]
	if g == nil {
		if value == nil {
			return nil
		}
		g = s.addGroup(string(k.group))
	}
	if k.kind == keyOffset {
		previous = g.swapOffset(k, value)
	} else {
		previous = g.swapValue(k.kind, value)
	}
	if value == nil {
		s.dropIfGone(g)
	}
	return previous
}

func (g *group) swapValue(kind int16, value []byte) (previous []byte) {
	if kind != keySeen && g.memberRecords == noMembers {
		if value == nil {
			return nil
		}
		g.memberRecords = &memberRecords{}
	}
	at := g.value(kind)
	previous, *at = *at, value
	return previous
}

func (g *group) swapOffset(k recordKey, value []byte) (previous []byte) {
	at, found := g.topicAt(string(k.topic))
	if !found {
		if value != nil {
			t := topicOffsets{topic: unique.Make(string(k.topic))}
			t.list.head = []partitionOffset{{k.partition, value}}
			g.offsets.insert(at, t)
		}
		return nil
	}
	t := g.offsets.at(at)
	p, found := t.find(k.partition)
	switch {
	case found && value != nil:
		o := t.list.at(p)
		previous, o.value = o.value, value
	case found:
		previous = t.list.at(p).value
		if t.list.remove(p); t.list.empty() {
			g.offsets.remove(at)
		}
	case value != nil:
		t.list.insert(p, partitionOffset{k.partition, value})
	}
	return previous
}

// addGroup gives the place of a group, which may be there for no more than a sighting.
func (s *State) addGroup(id string) *group {
	if g := s.groups[id]; g != nil {
		return g
	}
	g := &group{id: id, partition: PartitionOf(id), memberRecords: noMembers}
	s.groups[id] = g
	return g
}

func (s *State) dropIfGone(g *group) {
	if !g.exists() && g.seenValue == nil && g.departed == nil {
		delete(s.groups, g.id)
	}
}
