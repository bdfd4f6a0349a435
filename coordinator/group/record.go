package group

import (
	"encoding/binary"
	"math"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Key types of the records. Those below 1000 are Kafka's own, of __consumer_offsets; the others are ours and live in
// PrivatePartition. docs/formats.md has every layout.
const (
	keyOffset   int16 = 1
	keyGroup    int16 = 2
	keySession  int16 = 1001
	keyRound    int16 = 1002
	keySeen     int16 = 1003
	keyDeparted int16 = 1004
)

// Versions of the values that are written.
const (
	offsetVersion   int16 = 4
	groupVersion    int16 = 3
	sessionVersion  int16 = 1
	roundVersion    int16 = 1
	seenVersion     int16 = 1
	departedVersion int16 = 1
)

// Tags of an OffsetCommitValue. 0 is Kafka's; ours are far above what Kafka is likely to hand out, and a reader that
// does not know them skips them (KIP-915).
const (
	tagTopicID   = 0
	tagConfirmed = 10001
	tagExpires   = 10002
)

// maxString is the longest string a non-flexible Kafka field can hold.
const maxString = math.MaxInt16

func appendString(dst []byte, s string) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(s)))
	return append(dst, s...)
}

func appendNullable(dst []byte, s *string) []byte {
	if s == nil {
		return binary.BigEndian.AppendUint16(dst, math.MaxUint16)
	}
	return appendString(dst, *s)
}

func appendBytes(dst, b []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(b)))
	return append(dst, b...)
}

func appendOffsetKey(dst []byte, group, topic string, partition int32) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(keyOffset))
	dst = appendString(dst, group)
	dst = appendString(dst, topic)
	return binary.BigEndian.AppendUint32(dst, uint32(partition))
}

// groupKey is the key of the records that hang on a group as a whole.
func groupKey(kind int16, group string) []byte {
	dst := make([]byte, 0, 4+len(group))
	dst = binary.BigEndian.AppendUint16(dst, uint16(kind))
	return appendString(dst, group)
}

func appendSessionKey(dst []byte, id Session) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(keySession))
	return append(dst, id[:]...)
}

// recordKey is a key taken apart; its slices point into the key.
type recordKey struct {
	kind         int16
	group, topic []byte
	partition    int32
	session      Session
}

// parseKey reports false for key types and lengths that are unknown here: a newer version may have written them, and
// they are kept out rather than refused (KIP-915).
func parseKey(key []byte) (k recordKey, ok bool) {
	r := reader{b: key}
	k.kind = r.int16()
	switch k.kind {
	case keyOffset:
		k.group, k.topic, k.partition = r.short(), r.short(), r.int32()
	case keyGroup, keyRound, keySeen, keyDeparted:
		k.group = r.short()
	case keySession:
		copy(k.session[:], r.take(len(k.session)))
	default:
		return k, false
	}
	return k, !r.bad && len(r.b) == 0
}

// reader reads big-endian fields; after the first one that is missing, bad is set and all others are zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.b, r.bad = nil, true
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) int16() int16 {
	if b := r.take(2); b != nil {
		return int16(binary.BigEndian.Uint16(b))
	}
	return 0
}

func (r *reader) int32() int32 {
	if b := r.take(4); b != nil {
		return int32(binary.BigEndian.Uint32(b))
	}
	return 0
}

func (r *reader) int64() int64 {
	if b := r.take(8); b != nil {
		return int64(binary.BigEndian.Uint64(b))
	}
	return 0
}

func (r *reader) uvarint() int {
	n, size := binary.Uvarint(r.b)
	if size <= 0 || n > math.MaxInt32 {
		r.b, r.bad = nil, true
		return 0
	}
	r.b = r.b[size:]
	return int(n)
}

// short is a string with an int16 length, bytes one with an int32 length; null is empty.
func (r *reader) short() []byte { return r.take(max(0, int(r.int16()))) }
func (r *reader) bytes() []byte { return r.take(max(0, int(r.int32()))) }

func (r *reader) string() string { return string(r.short()) }

func (r *reader) nullable() *string {
	n := r.int16()
	if n < 0 {
		return nil
	}
	s := string(r.take(int(n)))
	return &s
}

// committedOffset is an OffsetCommitValue taken apart. metadata points into the value.
type committedOffset struct {
	offset      int64
	leaderEpoch int32
	metadata    []byte
	committed   int64 // milliseconds
	topicID     [16]byte
	confirmed   int64 // when the upstream last said that the topic has this id; 0: not known
	expires     int64 // -1: by the retention time
}

// encode gives an OffsetCommitValue of version 4 in a slice of exactly its length, for it is kept as it is.
func (c *committedOffset) encode() []byte {
	var tail [64]byte
	t, tags := tail[:0], byte(0)
	if c.topicID != [16]byte{} {
		tags++
		t = append(t, tagTopicID, byte(len(c.topicID)))
		t = append(t, c.topicID[:]...)
	}
	if c.confirmed != 0 {
		tags++
		t = append(binary.AppendUvarint(t, tagConfirmed), 8)
		t = binary.BigEndian.AppendUint64(t, uint64(c.confirmed))
	}
	if c.expires != -1 {
		tags++
		t = append(binary.AppendUvarint(t, tagExpires), 8)
		t = binary.BigEndian.AppendUint64(t, uint64(c.expires))
	}
	var length [binary.MaxVarintLen32]byte
	l := binary.AppendUvarint(length[:0], uint64(len(c.metadata))+1) // a compact string
	dst := make([]byte, 0, 2+8+4+len(l)+len(c.metadata)+8+1+len(t))
	dst = binary.BigEndian.AppendUint16(dst, uint16(offsetVersion))
	dst = binary.BigEndian.AppendUint64(dst, uint64(c.offset))
	dst = binary.BigEndian.AppendUint32(dst, uint32(c.leaderEpoch))
	dst = append(dst, l...)
	dst = append(dst, c.metadata...)
	dst = binary.BigEndian.AppendUint64(dst, uint64(c.committed))
	dst = append(dst, tags)
	return append(dst, t...)
}

// decodeOffset reads every version that Kafka has written; false for what it cannot read.
func decodeOffset(value []byte) (c committedOffset, ok bool) {
	r := reader{b: value}
	version := r.int16()
	c.leaderEpoch, c.expires = -1, -1
	c.offset = r.int64()
	if version >= 3 {
		c.leaderEpoch = r.int32()
	}
	if version >= offsetVersion {
		c.metadata = r.take(max(0, r.uvarint()-1))
	} else {
		c.metadata = r.short()
	}
	c.committed = r.int64()
	if version == 1 {
		c.expires = r.int64()
	}
	if version >= offsetVersion {
		for n := r.uvarint(); n > 0 && !r.bad; n-- {
			tag := r.uvarint()
			v := reader{b: r.take(r.uvarint())}
			switch tag {
			case tagTopicID:
				copy(c.topicID[:], v.b)
			case tagConfirmed:
				c.confirmed = v.int64()
			case tagExpires:
				c.expires = v.int64()
			}
		}
	}
	return c, !r.bad && version >= 0
}

// encodeGroup gives the GroupMetadataValue of the group as it is now (GroupCoordinatorRecordHelpers).
func encodeGroup(c *classic) []byte {
	v := kmsg.GroupMetadataValue{
		Version: groupVersion, Generation: c.generation, Protocol: c.protocol, CurrentStateTimestamp: c.since,
	}
	if c.protocolType != nil {
		v.ProtocolType = *c.protocolType
	}
	if c.leader != "" {
		v.Leader = &c.leader
	}
	for _, m := range c.members {
		v.Members = append(v.Members, kmsg.GroupMetadataValueMember{
			MemberID: m.id, InstanceID: m.instance, ClientID: m.clientID, ClientHost: m.clientHost,
			RebalanceTimeoutMillis: millis(m.rebalanceTimeout), SessionTimeoutMillis: millis(m.sessionTimeout),
			Subscription: m.metadata(c.protocolName()), Assignment: m.assignment,
		})
	}
	return v.AppendTo(nil)
}

// encodeEmptyGroup gives the record of a group that is only just there (newEmptyGroupMetadataRecord).
func encodeEmptyGroup(since int64) []byte {
	v := kmsg.GroupMetadataValue{Version: groupVersion, CurrentStateTimestamp: since}
	return v.AppendTo(nil)
}

// encodeRound gives the record of a completed join round. With all protocols of each member, so that a member that
// joins again after a failover is compared with what it said before; with the chosen one alone if that is too much.
func encodeRound(c *classic) []byte {
	chosenOnly := c.size.all > maxRound
	size := c.size.all
	if chosenOnly {
		size = c.size.largest
	}
	dst := binary.BigEndian.AppendUint16(make([]byte, 0, size+128), uint16(roundVersion))
	dst = binary.BigEndian.AppendUint32(dst, uint32(c.generation))
	dst = appendNullable(dst, c.protocolType)
	dst = appendNullable(dst, c.protocol)
	dst = appendString(dst, c.leader)
	dst = binary.BigEndian.AppendUint64(dst, uint64(c.since))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(c.members)))
	for _, m := range c.members {
		dst = appendString(dst, m.id)
		dst = appendNullable(dst, m.instance)
		dst = appendString(dst, m.clientID)
		dst = appendString(dst, m.clientHost)
		dst = binary.BigEndian.AppendUint32(dst, uint32(millis(m.rebalanceTimeout)))
		dst = binary.BigEndian.AppendUint32(dst, uint32(millis(m.sessionTimeout)))
		dst = append(dst, m.origin.session[:]...)
		dst = binary.BigEndian.AppendUint64(dst, m.origin.ordinal)
		protocols := m.protocols
		if chosenOnly {
			protocols = []protocol{{c.protocolName(), m.metadata(c.protocolName())}}
		}
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(protocols)))
		for _, p := range protocols {
			dst = appendString(dst, p.name)
			dst = appendBytes(dst, p.metadata)
		}
	}
	return dst
}

// decodeRound gives the group as the join round left it: in CompletingRebalance, everybody's sync awaited.
func decodeRound(value []byte) (c *classic, ok bool) {
	r := reader{b: value}
	if r.int16() != roundVersion {
		return nil, false
	}
	c = newClassic()
	c.state = completingRebalance
	c.generation = r.int32()
	c.protocolType, c.protocol = r.nullable(), r.nullable()
	leader := r.string()
	c.since = r.int64()
	for n := r.int32(); n > 0 && !r.bad; n-- {
		m := &member{id: r.string(), instance: r.nullable(), clientID: r.string(), clientHost: r.string()}
		m.rebalanceTimeout, m.sessionTimeout = duration(r.int32()), duration(r.int32())
		copy(m.origin.session[:], r.take(len(m.origin.session)))
		m.origin.ordinal = uint64(r.int64())
		for n := r.int32(); n > 0 && !r.bad; n-- {
			m.protocols = append(m.protocols, protocol{r.string(), append([]byte(nil), r.bytes()...)})
		}
		if !r.bad {
			m.awaitsSync = true
			c.add(m)
		}
	}
	c.leader = leader
	return c, !r.bad
}

// encodeDeparted gives the record of those who have left a generation.
func encodeDeparted(c *classic) []byte {
	dst := binary.BigEndian.AppendUint16(make([]byte, 0, 10+len(c.departed)), uint16(departedVersion))
	dst = binary.BigEndian.AppendUint32(dst, uint32(c.generation))
	return appendBytes(dst, c.departed)
}

func decodeDeparted(value []byte) (generation int32, departed bitmap, ok bool) {
	r := reader{b: value}
	version := r.int16()
	generation, departed = r.int32(), r.bytes()
	return generation, departed, !r.bad && version == departedVersion
}

// bitmap is a set of small numbers; the lowest bit of the first byte is 0.
type bitmap []byte

func (b bitmap) has(n int) bool { return n/8 < len(b) && b[n/8]>>(n%8)&1 == 1 }

func (b bitmap) with(n int) bitmap {
	for len(b) <= n/8 {
		b = append(b, 0)
	}
	b[n/8] |= 1 << (n % 8)
	return b
}

// decodeGroup gives the group as Kafka's coordinator loads it from a GroupMetadataValue.
func decodeGroup(value []byte) (*classic, bool) {
	var v kmsg.GroupMetadataValue
	if err := v.ReadFrom(value); err != nil {
		return nil, false
	}
	c := newClassic()
	c.generation, c.protocol, c.since = v.Generation, v.Protocol, v.CurrentStateTimestamp
	if v.ProtocolType != "" {
		c.protocolType = &v.ProtocolType
	}
	for i := range v.Members {
		g := &v.Members[i]
		timeout := g.RebalanceTimeoutMillis
		if timeout == -1 {
			timeout = g.SessionTimeoutMillis
		}
		c.add(&member{
			id: g.MemberID, instance: g.InstanceID, clientID: g.ClientID, clientHost: g.ClientHost,
			rebalanceTimeout: duration(timeout), sessionTimeout: duration(g.SessionTimeoutMillis),
			protocols:  []protocol{{c.protocolName(), append([]byte(nil), g.Subscription...)}},
			assignment: append([]byte(nil), g.Assignment...),
		})
		c.state = stable
	}
	c.leader = ""
	if v.Leader != nil {
		c.leader = *v.Leader
	}
	return c, true
}
