package group

import (
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Step takes one request. Its records are already applied; its reply may come with it or with a later Step or Tick.
func (s *State) Step(now time.Time, in Input) Effects {
	s.begin(now)
	if noted(in.Request) {
		overtaken := false
		if s.again, overtaken = s.recall(&in.Client); overtaken {
			// What it was refused for is not known any more: its client is to find out by a new request.
			s.reply(in.Call, ErrorResponse(in.Request, errNotAvailable))
			return s.finish()
		}
	}
	switch req := in.Request.(type) {
	case *kmsg.JoinGroupRequest:
		s.joinGroup(&in, req)
	case *kmsg.SyncGroupRequest:
		s.syncGroup(&in, req)
	case *kmsg.HeartbeatRequest:
		s.heartbeat(&in, req)
	case *kmsg.LeaveGroupRequest:
		s.leaveGroup(&in, req)
	case *kmsg.OffsetCommitRequest:
		s.commitOffsets(&in, req)
	case *kmsg.OffsetFetchRequest:
		s.fetchOffsets(&in, req)
	case *kmsg.OffsetDeleteRequest:
		s.deleteOffsets(&in, req)
	case *kmsg.ListGroupsRequest:
		s.listGroups(&in, req)
	case *kmsg.DescribeGroupsRequest:
		s.describeGroups(&in, req)
	case *kmsg.DeleteGroupsRequest:
		s.deleteGroups(&in, req)
	default:
		s.refuse(in.Call, ErrorResponse(in.Request, errUnsupportedVersion))
	}
	return s.finish()
}

// noted says whether the request is of those that are executed once by their session's record.
func noted(req kmsg.Request) bool {
	switch req.(type) {
	case *kmsg.OffsetCommitRequest, *kmsg.LeaveGroupRequest, *kmsg.OffsetDeleteRequest, *kmsg.DeleteGroupsRequest:
		return true
	}
	return false
}

// MayWrite says whether a Step of this request, now, could yield records. While nothing can be replicated the others are
// executed all the same: those that only read, those that are answered as what they yielded before, and a SyncGroup that
// is told its assignment or waits for it. Not so a JoinGroup that would yield none: it may begin a rebalance, which could
// not end.
func (s *State) MayWrite(in *Input) bool {
	switch req := in.Request.(type) {
	case *kmsg.JoinGroupRequest:
		return true
	case *kmsg.SyncGroupRequest:
		g := s.find(req.Group)
		return g != nil && g.view().state == completingRebalance && g.live.leader == req.MemberID
	}
	again, overtaken := s.recall(&in.Client)
	return noted(in.Request) && !again && !overtaken
}

// Tick does what time has come for. A Tick before Deadline does nothing. What it arms for now is for the next one:
// requests come first, and no timer can keep a Tick from ending.
func (s *State) Tick(now time.Time) Effects {
	s.begin(now)
	last := s.timers.order
	for t := s.timers.due(now, last); t != nil; t = s.timers.due(now, last) {
		switch t.kind {
		case sessionTimer:
			s.expireMember(t.g, t.m)
		case pendingTimer:
			s.expirePending(t.g, t.p)
		case joinTimer:
			s.expireJoinPhase(t.g)
		case syncTimer:
			s.expireSyncPhase(t.g)
		case sweepTimer:
			s.expireOffsets()
		}
	}
	return s.finish()
}

// Deadline is when the next Tick is due, the zero time if nothing is armed.
func (s *State) Deadline() time.Time {
	if t := s.timers.next(); t != nil {
		return t.at
	}
	return time.Time{}
}

func (s *State) begin(now time.Time) {
	s.now = now
	s.eff = Effects{}
	s.again = false
	s.departed = s.departed[:0]
}

func (s *State) finish() Effects {
	s.noteDepartures()
	eff := s.eff
	s.eff = Effects{}
	if len(eff.Records) > 0 {
		for i := range eff.Replies {
			eff.Replies[i].Fence = false // they wait for these records
		}
	}
	return eff
}

// expect makes room for n more records.
func (s *State) expect(n int) {
	both := make([]Record, 2*n) // one allocation for both
	s.eff.Records = append(both[:0:n], s.eff.Records...)
	s.eff.Previous = append(both[n:n:2*n], s.eff.Previous...)
}

// put yields a record and applies it; it takes key and value over.
func (s *State) put(partition int32, key, value []byte) {
	previous := s.swap(key, value)
	s.eff.Records = append(s.eff.Records, Record{partition, key, value})
	s.eff.Previous = append(s.eff.Previous, Record{partition, key, previous})
}

// reply answers with something that holds only while this coordinator has not been replaced.
func (s *State) reply(call uint64, resp kmsg.Response) {
	s.eff.Replies = append(s.eff.Replies, Reply{Call: call, Response: resp, Fence: true, Again: s.again})
}

// refuse answers a request that is wrong whatever the state.
func (s *State) refuse(call uint64, resp kmsg.Response) {
	s.eff.Replies = append(s.eff.Replies, Reply{Call: call, Response: resp})
}

func (s *State) sortedGroups() []string {
	ids := make([]string, 0, len(s.groups))
	for id := range s.groups {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}
