package wire

// kind is how a field is encoded.
type kind uint8

const (
	fixed kind = iota // size bytes
	text
	blob
	list   // of structs
	option // a struct, or null
	texts
	numbers // of size bytes each
)

// field is one field of a request: what has to be known to walk over it and to say where a null is not allowed.
type field struct {
	kind     kind
	size     int
	from, to int16   // versions that have it
	null     int16   // the first version in which it may be null
	of       []field // of a list or struct
}

const (
	always = neverFlexible // as "to": the newest version
	never  = neverFlexible // as "null"
)

func num(size int, from int16) field   { return field{kind: fixed, size: size, from: from, to: always} }
func str(from, to int16) field         { return field{kind: text, from: from, to: to, null: never} }
func nullStr(from int16) field         { return field{kind: text, from: from, to: always, null: from} }
func data() field                      { return field{kind: blob, to: always, null: never} }
func strs(from int16) field            { return field{kind: texts, from: from, to: always, null: never} }
func structs(of ...field) field        { return field{kind: list, to: always, null: never, of: of} }
func maybe(of ...field) field          { return field{kind: option, to: always, of: of} }
func (f field) until(to int16) field   { f.to = to; return f }
func (f field) since(from int16) field { f.from = from; return f }
func (f field) nullFrom(v int16) field { f.null = v; return f }

// groupRequests has the schemas of the requests that end here, as in Kafka's message definitions. A test holds them
// against those of the kafka-clients jar.
var groupRequests = map[int16][]field{
	8: { // OffsetCommit
		str(0, always), num(4, 1), str(1, always), nullStr(7), num(8, 2).until(4),
		structs(str(0, 9), num(16, 10), structs(num(4, 0), num(8, 0), num(8, 1).until(1), num(4, 6), nullStr(0))),
	},
	9: { // OffsetFetch
		str(0, 7), structs(str(0, 7), ints()).until(7).nullFrom(2),
		structs(str(8, always), nullStr(9), num(4, 9), structs(str(8, 9), num(16, 10), ints()).nullFrom(8)).since(8),
		num(1, 7),
	},
	10: {str(0, 3), num(1, 1), strs(4)}, // FindCoordinator
	11: { // JoinGroup
		str(0, always), num(4, 0), num(4, 1), str(0, always), nullStr(5), str(0, always),
		structs(str(0, always), data()), nullStr(8),
	},
	12: {str(0, always), num(4, 0), str(0, always), nullStr(3)},                               // Heartbeat
	13: {str(0, always), str(0, 2), structs(str(3, always), nullStr(3), nullStr(5)).since(3)}, // LeaveGroup
	14: { // SyncGroup
		str(0, always), num(4, 0), str(0, always), nullStr(3), nullStr(5), nullStr(5),
		structs(str(0, always), data()),
	},
	15: {strs(0), num(1, 3)}, // DescribeGroups
	16: {strs(4), strs(5)},   // ListGroups
	28: { // TxnOffsetCommit
		str(0, always), str(0, always), num(8, 0), num(2, 0), num(4, 3), str(3, always), nullStr(3),
		structs(str(0, 5), num(16, 6), structs(num(4, 0), num(8, 0), num(4, 2), nullStr(0))),
	},
	42: {strs(0)},                                                     // DeleteGroups
	47: {str(0, always), structs(str(0, always), structs(num(4, 0)))}, // OffsetDelete
}

// otherRequests has the schemas of the other requests that are looked into: what to answer, how long a broker may take,
// whether another may answer, what is refused by name.
var otherRequests = map[int16][]field{
	2: { // ListOffsets
		num(4, 0), num(1, 2), structs(str(0, always), structs(num(4, 0), num(4, 4), num(8, 0), num(4, 0).until(0))), num(4, 10),
	},
	3:  {structs(num(16, 10), str(0, always).nullFrom(10)).nullFrom(1), num(1, 4), num(1, 8).until(10), num(1, 8)}, // Metadata
	18: {str(3, always), str(3, always), nullStr(5), num(4, 5)},                                                    // ApiVersions
	19: { // CreateTopics
		structs(str(0, always), num(4, 0), num(2, 0), structs(num(4, 0), ints()), structs(str(0, always), nullStr(0))),
		num(4, 0), num(1, 1),
	},
	20: {structs(nullStr(6), num(16, 6)).since(6), strs(0).until(5), num(4, 0)},                         // DeleteTopics
	21: {structs(str(0, always), structs(num(4, 0), num(8, 0))), num(4, 0)},                             // DeleteRecords
	22: {nullStr(0), num(4, 0), num(8, 3), num(2, 3), num(1, 6), num(1, 6)},                             // InitProducerId
	25: {str(0, always), num(8, 0), num(2, 0), str(0, always)},                                          // AddOffsetsToTxn
	32: {structs(num(1, 0), str(0, always), strs(0).nullFrom(0)), num(1, 1), num(1, 3)},                 // DescribeConfigs
	33: {structs(num(1, 0), str(0, always), structs(str(0, always), nullStr(0))), num(1, 0)},            // AlterConfigs
	37: {structs(str(0, always), num(4, 0), structs(ints()).nullFrom(0)), num(4, 0), num(1, 0)},         // CreatePartitions
	43: {num(1, 1), structs(str(0, always), ints()).nullFrom(0), num(4, 0)},                             // ElectLeaders
	44: {structs(num(1, 0), str(0, always), structs(str(0, always), num(1, 0), nullStr(0))), num(1, 0)}, // IncrementalAlterConfigs
	45: {num(4, 0), num(1, 1), structs(str(0, always), structs(num(4, 0), ints().nullFrom(0)))},         // AlterPartitionReassignments
	46: {num(4, 0), structs(str(0, always), ints()).nullFrom(0)},                                        // ListPartitionReassignments
	57: {num(4, 0), structs(str(0, always), num(2, 0), num(1, 0).until(0), num(1, 1)), num(1, 1)},       // UpdateFeatures
	60: {num(1, 0), num(1, 1), num(1, 2)},                                                               // DescribeCluster
	68: { // ConsumerGroupHeartbeat
		str(0, always), str(0, always), num(4, 0), nullStr(0), nullStr(0), num(4, 0), strs(0).nullFrom(0), nullStr(1),
		nullStr(0), structs(num(16, 0), ints()).nullFrom(0),
	},
	69: {strs(0), num(1, 0)},                                                                                          // ConsumerGroupDescribe
	75: {structs(str(0, always)), num(4, 0), maybe(str(0, always), num(4, 0))},                                        // DescribeTopicPartitions
	76: {str(0, always), str(0, always), num(4, 0), nullStr(0), strs(0).nullFrom(0)},                                  // ShareGroupHeartbeat
	77: {strs(0), num(1, 0)},                                                                                          // ShareGroupDescribe
	80: {nullStr(0), num(4, 0), num(4, 0), num(16, 0), structs(str(0, always), str(0, always), num(2, 0)), num(1, 1)}, // AddRaftVoter
	89: {strs(0), num(1, 0), num(1, 1)},                                                                               // StreamsGroupDescribe
	90: {structs(str(0, always), structs(str(0, always), ints()).nullFrom(0))},                                        // DescribeShareGroupOffsets
}

func ints() field { return field{kind: numbers, size: 4, to: always, null: never} }

// checkStruct walks over the fields of a struct and its tags, and fails where Kafka's reader would.
func (r *reader) checkStruct(fields []field, version int16) {
	for i := range fields {
		f := &fields[i]
		if version < f.from || version > f.to {
			continue
		}
		null := version >= f.null
		switch f.kind {
		case fixed:
			r.skip(f.size)
		case text:
			r.skipString(null)
		case blob:
			r.skipBytes(null)
		case numbers:
			r.skip(r.arrayLen(null) * f.size)
		case texts:
			for n := r.count(r.arrayLen(null)); n > 0 && r.err == nil; n-- {
				r.skipString(false)
			}
		case list:
			for n := r.count(r.arrayLen(null)); n > 0 && r.err == nil; n-- {
				r.checkStruct(f.of, version)
			}
		case option:
			if r.int8() >= 0 {
				r.checkStruct(f.of, version)
			}
		}
	}
	r.skipTags()
}
