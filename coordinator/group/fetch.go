package group

import (
	"math"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// maxResponse bounds what an OffsetFetch or DescribeGroups may make of a request that names the same again and again,
// roughly, in bytes. Beyond it groups get UNKNOWN_SERVER_ERROR.
//
// Unlike Kafka: there the broker may run out of memory.
const maxResponse = 64 << 20

// fetching is an OffsetFetch on its way.
type fetching struct {
	*Input
	version  int16
	room     int                   // of maxResponse
	metadata map[*byte]*string     // what was shown already, by where it is kept
	whole    map[string]wholeGroup // groups of which all was asked for
}

type wholeGroup struct {
	topics []kmsg.OffsetFetchResponseGroupTopic
	size   int
}

// fetchOffsets is KafkaApis.handleOffsetFetchRequest and OffsetMetadataManager.fetchOffsets. What is not there has the
// offset -1 and no error.
func (s *State) fetchOffsets(in *Input, req *kmsg.OffsetFetchRequest) {
	resp := req.ResponseKind().(*kmsg.OffsetFetchResponse)
	f := &fetching{Input: in, version: req.Version, room: maxResponse}
	if req.Version >= 8 {
		resp.Groups = make([]kmsg.OffsetFetchResponseGroup, len(req.Groups))
		for i := range req.Groups {
			g := &req.Groups[i]
			resp.Groups[i].Group = g.Group
			if topics, ok := s.fetchGroup(f, g); ok {
				resp.Groups[i].Topics = topics
			} else {
				resp.Groups[i].ErrorCode = errServer
			}
		}
		s.reply(in.Call, resp)
		return
	}
	one := kmsg.OffsetFetchRequestGroup{Group: req.Group}
	if req.Topics != nil {
		one.Topics = make([]kmsg.OffsetFetchRequestGroupTopic, len(req.Topics))
		for i, t := range req.Topics {
			one.Topics[i] = kmsg.OffsetFetchRequestGroupTopic{Topic: t.Topic, Partitions: t.Partitions}
		}
	}
	topics, ok := s.fetchGroup(f, &one)
	if !ok {
		s.reply(in.Call, fetchError(req, errServer))
		return
	}
	resp.Topics = make([]kmsg.OffsetFetchResponseTopic, len(topics))
	for i, t := range topics {
		resp.Topics[i].Topic = t.Topic
		resp.Topics[i].Partitions = make([]kmsg.OffsetFetchResponseTopicPartition, len(t.Partitions))
		for j, p := range t.Partitions {
			resp.Topics[i].Partitions[j] = kmsg.OffsetFetchResponseTopicPartition{
				Partition: p.Partition, Offset: p.Offset, LeaderEpoch: p.LeaderEpoch, Metadata: p.Metadata, ErrorCode: p.ErrorCode,
			}
		}
	}
	s.reply(in.Call, resp)
}

// fetchGroup gives what is asked of one group, and reports false if that is more than there is room for.
func (s *State) fetchGroup(f *fetching, req *kmsg.OffsetFetchRequestGroup) ([]kmsg.OffsetFetchResponseGroupTopic, bool) {
	if req.Topics == nil && f.version >= 2 {
		return s.fetchAll(f, req.Group)
	}
	g, room := s.seen(req.Group), f.room
	topics := make([]kmsg.OffsetFetchResponseGroupTopic, len(req.Topics))
	for i := range req.Topics {
		t := &req.Topics[i]
		found := topicOf{name: t.Topic}
		if f.version >= 10 {
			found = f.topicByID(g, t.TopicID)
		}
		var offsets *topicOffsets
		if g != nil && found.code == 0 {
			offsets = g.topic(found.name)
		}
		current := [16]byte{}
		if offsets != nil {
			current, _, _ = f.Topics.Topic(found.name)
		}
		topics[i] = kmsg.OffsetFetchResponseGroupTopic{Topic: t.Topic, TopicID: t.TopicID}
		topics[i].Partitions = make([]kmsg.OffsetFetchResponseGroupTopicPartition, len(t.Partitions))
		for j, n := range t.Partitions {
			p := &topics[i].Partitions[j]
			p.Partition, p.ErrorCode = n, found.code
			var value []byte
			if offsets != nil {
				value = offsets.value(n)
			}
			f.fill(p, value, found.id, current)
		}
		if room -= topicSize(&topics[i]); room < 0 {
			return nil, false
		}
	}
	f.room = room
	return topics, true
}

// fetchAll gives all offsets of a group; in v10, of topics whose id is known.
func (s *State) fetchAll(f *fetching, id string) ([]kmsg.OffsetFetchResponseGroupTopic, bool) {
	all, again := f.whole[id]
	if !again {
		all.topics = []kmsg.OffsetFetchResponseGroupTopic{}
		if g := s.find(id); g != nil {
			for offsets := range g.offsets.all() {
				if t, ok := f.wholeTopic(offsets); ok {
					all.topics = append(all.topics, t)
					all.size += topicSize(&t)
				}
			}
		}
		if f.whole == nil {
			f.whole = map[string]wholeGroup{}
		}
		f.whole[id] = all
	}
	if all.size > f.room {
		return nil, false
	}
	f.room -= all.size
	return all.topics, true
}

// wholeTopic gives all offsets of a topic that are to be shown, and reports false if there are none.
func (f *fetching) wholeTopic(offsets *topicOffsets) (t kmsg.OffsetFetchResponseGroupTopic, ok bool) {
	t.Topic = offsets.name()
	current, _, _ := f.Topics.Topic(t.Topic)
	t.TopicID = current
	if current == [16]byte{} && f.AcceptUnknownTopics {
		t.TopicID = offsets.storedID()
	}
	if f.version >= 10 {
		if t.Topic = ""; t.TopicID == [16]byte{} {
			return t, false
		}
	}
	for o := range offsets.list.all() {
		p := kmsg.OffsetFetchResponseGroupTopicPartition{Partition: o.partition}
		if f.fill(&p, o.value, [16]byte{}, current) {
			t.Partitions = append(t.Partitions, p)
		}
	}
	return t, len(t.Partitions) > 0
}

// topicSize is roughly what the topic takes in a response.
func topicSize(t *kmsg.OffsetFetchResponseGroupTopic) int {
	n := 24 + len(t.Topic)
	for i := range t.Partitions {
		n += 24 + len(*t.Partitions[i].Metadata)
	}
	return n
}

// storedID is the topic id of the commit made last, zero if none was known then.
func (t *topicOffsets) storedID() (id [16]byte) {
	newest := int64(math.MinInt64)
	for o := range t.list.all() {
		if c, ok := decodeOffset(o.value); ok && c.topicID != [16]byte{} && c.committed > newest {
			id, newest = c.topicID, c.committed
		}
	}
	return id
}

// noMetadata is what a commit without metadata, and a partition without a commit, shows.
var noMetadata string

// fill fills in a stored offset, unless it is another topic's: asked by id, one that was committed to another id
// (isMismatchedTopicId); and whatever it was asked by, one committed while the upstream was known to give the topic
// another id than now, so that a topic made anew does not begin in its middle. (Kafka tombstones the offsets of a
// deleted topic; nobody tells us.) It reports whether there is an offset to show.
func (f *fetching) fill(p *kmsg.OffsetFetchResponseGroupTopicPartition, value []byte, asked, current [16]byte) bool {
	p.Offset, p.LeaderEpoch, p.Metadata = -1, -1, &noMetadata
	if value == nil {
		return false
	}
	c, ok := decodeOffset(value)
	if !ok || c.hidden(asked, current) {
		return false
	}
	p.Offset, p.LeaderEpoch = c.offset, c.leaderEpoch
	if len(c.metadata) > 0 {
		p.Metadata = f.text(c.metadata)
	}
	return true
}

// text gives stored metadata, in one copy for each offset that is asked for, however often.
func (f *fetching) text(metadata []byte) *string {
	if m := f.metadata[&metadata[0]]; m != nil {
		return m
	}
	if f.metadata == nil {
		f.metadata = map[*byte]*string{}
	}
	m := string(metadata)
	f.metadata[&metadata[0]] = &m
	return &m
}

func (c *committedOffset) hidden(asked, current [16]byte) bool {
	none := [16]byte{}
	switch {
	case c.topicID == none:
		return false
	case asked != none && asked != c.topicID:
		return true
	default:
		return current != none && current != c.topicID && c.confirmed >= c.committed
	}
}
