package group

import (
	"bytes"
	"encoding/hex"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// The bytes of each kind of record, as released. A change here is a new version of the format (docs/formats.md).
func TestRecordsKeepTheirBytes(t *testing.T) {
	c := committedOffset{offset: 5, leaderEpoch: 2, metadata: []byte("é"), committed: 3, topicID: [16]byte{1, 15: 2}, confirmed: 4, expires: 6}
	none := committedOffset{offset: -1, leaderEpoch: -1, committed: 3, expires: -1}
	for _, f := range []struct {
		name string
		got  []byte
		want string
	}{
		{"offset key", appendOffsetKey(nil, "g", "orders", 7), "0001 000167 00066f7264657273 00000007"},
		{"group key", groupKey(keyGroup, "g"), "0002 000167"},
		{"session key", appendSessionKey(nil, Session{1, 15: 2}), "03e9 01000000000000000000000000000002"},
		{"round key", groupKey(keyRound, "g"), "03ea 000167"},
		{"departed key", groupKey(keyDeparted, "g"), "03ec 000167"},
		{"sighting key", groupKey(keySeen, "g"), "03eb 000167"},
		{"offset", c.encode(), "0004 0000000000000005 00000002 03c3a9 0000000000000003 03 0010 01000000000000000000000000000002 914e08 0000000000000004 924e08 0000000000000006"},
		{"bare offset", none.encode(), "0004 ffffffffffffffff ffffffff 01 0000000000000003 00"},
		{"new group", encodeEmptyGroup(9), "0003 0000 00000000 ffff ffff 0000000000000009 00000000"},
		{"session", sessionState{highest: 3, done: 5, term: 7, seq: 9}.encode(), "0001 0000000000000003 0000000000000005 0000000000000007 0000000000000009"},
		{"group", encodeGroup(sampleGroup(stable)), "0003 0008636f6e73756d6572 00000004 000572616e6765 00026d31 0000000000000009 00000001 00026d31 00026931 0001 63 0002 2f68 00000bb8 00000fa0 00000001 41 00000001 58"},
		{"round", encodeRound(sampleGroup(completingRebalance)), "0001 00000004 0008636f6e73756d6572 000572616e6765 00026d31 0000000000000009 00000001 00026d31 00026931 000163 00022f68 00000bb8 00000fa0 01000000000000000000000000000000 0000000000000008 00000002 000572616e6765 0000000141 0006737469636b79 00000000"},
		{"round, chosen protocol only", encodeRound(wordyGroup()), "0001 00000004 0008636f6e73756d6572 000572616e6765 00026d31 0000000000000009 00000001 00026d31 00026931 000163 00022f68 00000bb8 00000fa0 01000000000000000000000000000000 0000000000000008 00000001 000572616e6765 0000000141"},
		{"departed", encodeDeparted(&classic{generation: 4, departed: bitmap{}.with(0).with(9)}), "0001 00000004 00000002 0102"},
	} {
		if want := strings.ReplaceAll(f.want, " ", ""); hex.EncodeToString(f.got) != want {
			t.Errorf("%s is\n%x, not\n%s", f.name, f.got, want)
		}
	}
}

func sampleGroup(state classicState) *classic {
	c := newClassic()
	instance, kind, chosen := "i1", consumerType, "range"
	c.add(&member{
		id: "m1", instance: &instance, clientID: "c", clientHost: "/h", rebalanceTimeout: duration(3000), sessionTimeout: duration(4000),
		protocols: []protocol{{"range", []byte("A")}, {"sticky", nil}}, assignment: []byte("X"), origin: origin{Session{1}, 8},
	})
	c.state, c.generation, c.protocolType, c.protocol, c.since = state, 4, &kind, &chosen, 9
	return c
}

// wordyGroup has protocols that take more than a record may hold.
func wordyGroup() *classic {
	c := sampleGroup(completingRebalance)
	m := c.members[0]
	c.update(m, append(m.protocols, protocol{"wordy", make([]byte, maxRound)}), m.rebalanceTimeout, m.sessionTimeout, parked{})
	return c
}

// Kafka's own readers must be able to read what has a schema of Kafka's.
func TestKafkaReadsOurOffsets(t *testing.T) {
	c := committedOffset{offset: 5, leaderEpoch: 2, metadata: []byte("note"), committed: 3, topicID: [16]byte{1}, confirmed: 4, expires: 6}
	var v kmsg.OffsetCommitValue
	if err := v.ReadFrom(c.encode()); err != nil {
		t.Fatal(err)
	}
	if v.Offset != 5 || v.LeaderEpoch != 2 || v.Metadata != "note" || v.CommitTimestamp != 3 || v.TopicID != c.topicID {
		t.Errorf("%+v", v)
	}
	v.UnknownTags.Set(20000, []byte("of a newer version"))
	got, ok := decodeOffset(v.AppendTo(nil))
	if !ok || got.offset != 5 || got.confirmed != 4 || got.expires != 6 || string(got.metadata) != "note" {
		t.Errorf("%+v", got)
	}
	for version := range int16(4) {
		v := kmsg.OffsetCommitValue{Version: version, Offset: 5, LeaderEpoch: 2, Metadata: "note", CommitTimestamp: 3, ExpireTimestamp: 6}
		got, ok := decodeOffset(v.AppendTo(nil))
		if !ok || got.offset != 5 || string(got.metadata) != "note" || got.committed != 3 {
			t.Errorf("v%d: %+v", version, got)
		}
		if (version == 1) != (got.expires == 6) || (version == 3) != (got.leaderEpoch == 2) {
			t.Errorf("v%d: %+v", version, got)
		}
	}
}

// FuzzRecords: whatever the bytes, applying them panics nowhere, is given back byte for byte, and can be activated.
func FuzzRecords(f *testing.F) {
	c := committedOffset{offset: 5, metadata: []byte("m"), committed: 3, confirmed: 4, expires: 6}
	f.Add(appendOffsetKey(nil, "g", "orders", 0), c.encode())
	f.Add(appendOffsetKey(nil, "g", "orders", -1), []byte{})
	f.Add(groupKey(keyGroup, "g"), encodeGroup(sampleGroup(stable)))
	f.Add(groupKey(keyRound, "g"), encodeRound(sampleGroup(completingRebalance)))
	f.Add(groupKey(keyDeparted, "g"), encodeDeparted(&classic{generation: 4, departed: bitmap{1}}))
	f.Add(groupKey(keySeen, "g"), []byte{0, 9})
	f.Add(appendSessionKey(nil, Session{1}), sessionState{highest: 3, done: 5}.encode())
	f.Add([]byte{0, 3, 0, 1, 'g'}, []byte{0, 0, 0, 0, 0, 1}) // KIP-848's group epoch: not known yet
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, key, value []byte) {
		w := newWorld(t, scriptConfig())
		w.state.Apply(Record{Key: key, Value: value})
		if _, known := parseKey(key); known && !bytes.Equal(w.state.Record(key), value) {
			t.Fatalf("%x is %x", value, w.state.Record(key))
		}
		e := w.state.Activate(w.now, 2) // may go on with a rebalance
		w.state.Deactivate()
		for _, p := range slices.Backward(e.Previous) {
			w.state.Apply(p)
		}
		w.state.Apply(Record{Key: key})
		if w.state.Record(key) != nil || len(w.state.groups) > 0 || len(w.state.sessions.byID) > 0 {
			t.Fatal("something is left of a tombstone")
		}
	})
}

// Kafka's partitioner is Utils.abs of String.hashCode, not the hash without its sign bit.
func TestPartitionOf(t *testing.T) {
	for group, want := range map[string]int32{
		"my-group": 12, "grüppe": 12, "grp-😀": 13, "gB": 9, "": 0, "polygenelubricants": 0,
	} {
		if got := PartitionOf(group); got != want {
			t.Errorf("%q is in %d, not %d", group, got, want)
		}
	}
	if javaHash("polygenelubricants") != math.MinInt32 {
		t.Error("that hash is MIN_VALUE")
	}
}

func TestTiesFallAsInAJavaHashMap(t *testing.T) {
	for _, f := range [][2]string{
		{"range sticky", "sticky range"},
		{"range roundrobin cooperative-sticky", "range roundrobin cooperative-sticky"},
		{"a b c d e f g h i j k l m", "a b c d e f g h i j k l m"},
	} {
		names := strings.Fields(f[0])
		sortLikeHashMap(names)
		if got := strings.Join(names, " "); got != f[1] {
			t.Errorf("%s comes as %s", f[0], got)
		}
	}
}

func TestMetadataIsMeasuredInUTF16(t *testing.T) {
	for _, f := range []struct {
		s      string
		limit  int
		longer bool
	}{{"xx", 2, false}, {"xxx", 2, true}, {"üü", 2, false}, {"üüü", 2, true}, {"😀", 2, false}, {"😀x", 2, true}} {
		if utf16Longer(f.s, f.limit) != f.longer {
			t.Errorf("%q against %d", f.s, f.limit)
		}
	}
}
