package group

import "github.com/twmb/franz-go/pkg/kmsg"

// maxAsked bounds the topics that the upstream is asked for on behalf of one request. Those beyond it are taken as the
// table has them.
const maxAsked = 1000

// UnknownTopics gives the topics of a request that the table does not know, or not with so many partitions: the
// upstream is asked for them once before they are refused, or left out for want of an id.
func (s *State) UnknownTopics(req kmsg.Request, t Topics) (names []string, ids [][16]byte) {
	var askedNames map[string]bool
	var askedIDs map[[16]byte]bool
	name := func(n string, highest int32) {
		if n == "" || len(n) > maxTopic || len(names)+len(ids) >= maxAsked {
			return
		}
		if _, partitions, known := t.Topic(n); (!known || highest >= partitions) && !askedNames[n] {
			if askedNames == nil {
				askedNames = map[string]bool{}
			}
			askedNames[n] = true
			names = append(names, n)
		}
	}
	id := func(id [16]byte, highest int32) {
		if id == [16]byte{} || len(names)+len(ids) >= maxAsked {
			return
		}
		if n, known := t.TopicName(id); known {
			name(n, highest)
		} else if !askedIDs[id] {
			if askedIDs == nil {
				askedIDs = map[[16]byte]bool{}
			}
			askedIDs[id] = true
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
			whole := map[string]bool{}
			for _, rg := range req.Groups {
				for _, t := range rg.Topics {
					id(t.TopicID, -1)
				}
				if g := s.groups[rg.Group]; g != nil && rg.Topics == nil && !whole[rg.Group] {
					whole[rg.Group] = true
					for t := range g.offsets.all() {
						name(t.name(), -1)
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
