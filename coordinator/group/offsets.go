package group

import "github.com/twmb/franz-go/pkg/kmsg"

// maxTopic is the longest name a topic can have.
const maxTopic = 249

// topicOf is what a request's topic turns out to be.
type topicOf struct {
	name       string
	id         [16]byte
	partitions int32 // -1: not known, any is accepted
	confirmed  bool  // the upstream has said so, not an old answer
	code       int16 // why the topic is refused
}

// topicByName looks a name up.
func (in *Input) topicByName(name string) (t topicOf) {
	t.name = name
	id, partitions, known := in.Topics.Topic(name)
	switch {
	case known:
		t.id, t.partitions, t.confirmed = id, partitions, !in.AcceptUnknownTopics
		if in.AcceptUnknownTopics {
			t.partitions = -1 // it may have grown since
		}
	case in.AcceptUnknownTopics && name != "" && len(name) <= maxTopic:
		t.partitions = -1
	default:
		t.code = errUnknownPartition
	}
	return t
}

// topicByID looks an id up; while the upstream cannot be asked, among the group's own offsets too.
func (in *Input) topicByID(g *group, id [16]byte) (t topicOf) {
	t.id = id
	if id == [16]byte{} {
		t.code = errUnknownTopicID
		return t
	}
	if name, known := in.Topics.TopicName(id); known {
		t = in.topicByName(name)
		t.id = id
		return t
	}
	if in.AcceptUnknownTopics && g != nil {
		if name, known := in.remember(g)[id]; known {
			return topicOf{name: name, id: id, partitions: -1}
		}
	}
	t.code = errUnknownTopicID
	return t
}

// remember gives the names of the topic ids of a group's offsets, put together once for each request.
func (in *Input) remember(g *group) map[[16]byte]string {
	names, ok := in.remembered[g]
	if ok {
		return names
	}
	names = map[[16]byte]string{}
	for t, p := range g.allOffsets() {
		if c, ok := decodeOffset(p.value); ok && names[c.topicID] == "" {
			names[c.topicID] = t.name()
		}
	}
	if in.remembered == nil {
		in.remembered = map[*group]map[[16]byte]string{}
	}
	in.remembered[g] = names
	return names
}

func (t *topicOf) has(partition int32) bool {
	return partition >= 0 && (t.partitions < 0 || partition < t.partitions)
}

// commitOffsets is KafkaApis.handleOffsetCommitRequest and OffsetMetadataManager.commitOffset: topics and partitions
// are checked first, each by itself, then the group for all that are left.
func (s *State) commitOffsets(in *Input, req *kmsg.OffsetCommitRequest) {
	resp := req.ResponseKind().(*kmsg.OffsetCommitResponse)
	resp.Topics = make([]kmsg.OffsetCommitResponseTopic, 0, len(req.Topics))
	var few [4]topicOf
	topics := few[:0]
	left, refused, empty := 0, false, false
	byID := (*group)(nil)
	if req.Version >= 10 {
		byID = s.groups[req.Group]
	}
	for i := range req.Topics {
		t := &req.Topics[i]
		var found topicOf
		if req.Version >= 10 {
			found = in.topicByID(byID, t.TopicID)
		} else {
			found = in.topicByName(t.Topic)
		}
		topics = append(topics, found)
		refused = refused || found.code != 0 // also without partitions
		empty = empty || len(t.Partitions) == 0
		rt := kmsg.OffsetCommitResponseTopic{Topic: t.Topic, TopicID: t.TopicID}
		rt.Partitions = make([]kmsg.OffsetCommitResponseTopicPartition, len(t.Partitions))
		for j := range t.Partitions {
			p := &t.Partitions[j]
			rt.Partitions[j] = kmsg.OffsetCommitResponseTopicPartition{Partition: p.Partition, ErrorCode: found.code}
			switch {
			case found.code != 0:
			case !found.has(p.Partition):
				rt.Partitions[j].ErrorCode, refused = errUnknownPartition, true
			default:
				left++
			}
		}
		resp.Topics = append(resp.Topics, rt)
	}
	if left > 0 {
		s.commitLeft(in, req, resp, topics, left)
	}
	if refused || empty {
		resp.Topics = mergeCommitted(resp.Topics, topics, refused)
	}
	s.reply(in.Call, resp)
}

// commitLeft commits what has been refused so far by nobody, or refuses all of it.
func (s *State) commitLeft(in *Input, req *kmsg.OffsetCommitRequest, resp *kmsg.OffsetCommitResponse, topics []topicOf, left int) {
	code := int16(0)
	if !s.again {
		code = s.validateCommit(req)
	}
	if !s.again && code == 0 {
		s.expect(left + 2) // with the session's, and that of one which makes room
	}
	now := s.now.UnixMilli()
	expires := int64(-1)
	if req.Version <= 4 && req.RetentionTimeMillis != -1 {
		expires = now + req.RetentionTimeMillis
	}
	partition := PrivatePartition // until known
	for i := range req.Topics {
		for j := range req.Topics[i].Partitions {
			p, rp := &req.Topics[i].Partitions[j], &resp.Topics[i].Partitions[j]
			switch {
			case rp.ErrorCode != 0:
				continue
			case code != 0:
				rp.ErrorCode = code
				continue
			case p.Metadata != nil && utf16Longer(*p.Metadata, s.cfg.OffsetMetadataMaxSize):
				rp.ErrorCode = errMetadataTooLarge
				continue
			case s.again:
				continue
			}
			c := committedOffset{
				offset: p.Offset, leaderEpoch: -1, committed: now, topicID: topics[i].id, expires: expires,
			}
			if req.Version >= 6 {
				c.leaderEpoch = p.LeaderEpoch
			}
			if p.Metadata != nil {
				c.metadata = []byte(*p.Metadata)
			}
			if topics[i].confirmed {
				c.confirmed = now
			}
			if partition == PrivatePartition {
				partition = s.partitionOf(req.Group)
			}
			name := topics[i].name
			key := appendOffsetKey(make([]byte, 0, 10+len(req.Group)+len(name)), req.Group, name, p.Partition)
			s.put(partition, key, c.encode())
		}
	}
	if g := s.groups[req.Group]; g != nil {
		s.dropIfGone(g) // nothing was stored of a new one
	}
	s.noteSession(&in.Client)
}

// partitionOf is PartitionOf, remembered.
func (s *State) partitionOf(id string) int32 {
	if g := s.groups[id]; g != nil {
		return g.partition
	}
	return PartitionOf(id)
}

// validateCommit is OffsetMetadataManager.validateOffsetCommit and ClassicGroup's.
func (s *State) validateCommit(req *kmsg.OffsetCommitRequest) int16 {
	if len(req.Group) > maxString {
		return errInvalidGroup
	}
	g := s.seen(req.Group)
	if g == nil {
		switch {
		case req.Generation < 0:
			g = s.addGroup(req.Group) // a simple group: offsets without members
			g.seen = s.now.UnixMilli()
			return 0
		case req.Version >= 9:
			return errGroupNotFound
		default:
			return errIllegalGeneration
		}
	}
	c := g.view()
	if req.Generation < 0 && c.state == empty {
		return 0
	}
	if req.Generation < 0 && req.MemberID == "" && req.InstanceID == nil {
		return errUnknownMember
	}
	if code := c.validate(req.MemberID, req.InstanceID); code != 0 {
		return code
	}
	switch {
	case req.Generation != c.generation:
		return errIllegalGeneration
	case c.state == completingRebalance:
		return errRebalance
	}
	s.resetSession(c.byID[req.MemberID])
	return 0
}

// mergeCommitted gives the topics as Kafka does (OffsetCommitResponse.Builder): once anything was refused before the
// group was asked, one entry for each topic; never one for a known topic without partitions.
func mergeCommitted(topics []kmsg.OffsetCommitResponseTopic, of []topicOf, refused bool) []kmsg.OffsetCommitResponseTopic {
	type key struct {
		name string
		id   [16]byte
	}
	at := map[key]int{}
	merged := topics[:0]
	for i, t := range topics {
		if len(t.Partitions) == 0 && of[i].code == 0 {
			continue
		}
		k := key{t.Topic, t.TopicID}
		if j, ok := at[k]; ok && refused {
			merged[j].Partitions = append(merged[j].Partitions, t.Partitions...)
			continue
		}
		at[k] = len(merged)
		merged = append(merged, t)
	}
	return merged
}

// deleteOffsets is KafkaApis.handleOffsetDeleteRequest and OffsetMetadataManager.deleteOffsets: here the group comes
// first, then topics and partitions.
func (s *State) deleteOffsets(in *Input, req *kmsg.OffsetDeleteRequest) {
	resp := req.ResponseKind().(*kmsg.OffsetDeleteResponse)
	if req.Group == "" {
		resp.ErrorCode = errInvalidGroup
		s.refuse(in.Call, resp)
		return
	}
	g := s.find(req.Group)
	if g == nil && !s.again {
		resp.ErrorCode = errGroupNotFound
		s.reply(in.Call, resp)
		return
	}
	c := simple
	if g != nil {
		c = s.classicOf(g) // a simple group outlives its last offset, until the next sweep
	}
	if c.state != empty && c.typeName() != consumerType && !s.again {
		resp.ErrorCode = errNonEmpty
		s.reply(in.Call, resp)
		return
	}
	refused := false
	var known []bool
	for i := range req.Topics {
		t := &req.Topics[i]
		found := in.topicByName(t.Topic)
		rt := kmsg.OffsetDeleteResponseTopic{Topic: t.Topic}
		for _, p := range t.Partitions {
			code := found.code
			switch {
			case code != 0:
			case !found.has(p.Partition):
				code = errUnknownPartition
			case c.subscribesTo(t.Topic):
				code = errSubscribed
			case s.again:
			default:
				key := appendOffsetKey(nil, g.id, t.Topic, p.Partition)
				if s.Record(key) != nil {
					s.put(g.partition, key, nil)
				}
			}
			refused = refused || code == errUnknownPartition
			rt.Partitions = append(rt.Partitions, kmsg.OffsetDeleteResponseTopicPartition{Partition: p.Partition, ErrorCode: code})
		}
		resp.Topics = append(resp.Topics, rt)
		known = append(known, found.code == 0)
	}
	resp.Topics = mergeDeleted(resp.Topics, known, refused)
	s.noteSession(&in.Client)
	s.reply(in.Call, resp)
}

// mergeDeleted is mergeCommitted for OffsetDelete (OffsetDeleteResponse.Builder).
func mergeDeleted(topics []kmsg.OffsetDeleteResponseTopic, known []bool, refused bool) []kmsg.OffsetDeleteResponseTopic {
	at := map[string]int{}
	merged := topics[:0]
	for i, t := range topics {
		if len(t.Partitions) == 0 && known[i] {
			continue
		}
		if j, ok := at[t.Topic]; ok && refused {
			merged[j].Partitions = append(merged[j].Partitions, t.Partitions...)
			continue
		}
		at[t.Topic] = len(merged)
		merged = append(merged, t)
	}
	return merged
}
