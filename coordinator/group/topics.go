package group

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// UnknownTopics gives the topics of a request that the table does not know, or not with so many partitions: the
// upstream is asked for them once before they are refused, or left out for want of an id.
func (s *State) UnknownTopics(req kmsg.Request, t Topics) (names []string, ids [][16]byte) {
	name := func(n string, highest int32) {
		if n == "" || len(n) > maxTopic {
			return
		}
		if _, partitions, known := t.Topic(n); (!known || highest >= partitions) && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	id := func(id [16]byte, highest int32) {
		if id == [16]byte{} {
			return
		}
		if n, known := t.TopicName(id); known {
			name(n, highest)
		} else if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	switch req := req.(type) {
	case *kmsg.OffsetCommitRequest:
		for i := range req.Topics {
			highest := int32(-1)
			for j := range req.Topics[i].Partitions {
				highest = max(highest, req.Topics[i].Partitions[j].Partition)
			}
			if req.Version >= 10 {
				id(req.Topics[i].TopicID, highest)
			} else {
				name(req.Topics[i].Topic, highest)
			}
		}
	case *kmsg.OffsetFetchRequest:
		if req.Version >= 10 {
			for _, rg := range req.Groups {
				for _, t := range rg.Topics {
					id(t.TopicID, -1)
				}
				if g := s.groups[rg.Group]; g != nil && rg.Topics == nil {
					for i := range g.offsets {
						name(g.offsets[i].name(), -1)
					}
				}
			}
		}
	case *kmsg.OffsetDeleteRequest:
		for _, t := range req.Topics {
			highest := int32(-1)
			for _, p := range t.Partitions {
				highest = max(highest, p.Partition)
			}
			name(t.Topic, highest)
		}
	}
	return names, ids
}
