package group

import (
	"bytes"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// syncGroup is GroupMetadataManager.classicGroupSync.
func (s *State) syncGroup(in *Input, req *kmsg.SyncGroupRequest) {
	refuse := func(code int16) { s.refuse(in.Call, syncError(req.Version, code)) }
	switch {
	case req.Version >= 5 && (req.ProtocolType == nil || req.Protocol == nil):
		refuse(errInconsistentProtocol)
		return
	case req.Group == "":
		refuse(errInvalidGroup)
		return
	}
	g := s.seen(req.Group)
	if g == nil || g.view().state == empty {
		s.reply(in.Call, syncError(req.Version, errUnknownMember))
		return
	}
	c := g.live
	code := c.validate(req.MemberID, req.InstanceID)
	switch {
	case code != 0:
	case req.Generation != c.generation:
		code = errIllegalGeneration
	case differs(req.ProtocolType, c.protocolType) || differs(req.Protocol, c.protocol):
		code = errInconsistentProtocol
	case c.state == preparingRebalance:
		code = errRebalance
	}
	if code != 0 {
		s.reply(in.Call, syncError(req.Version, code))
		return
	}
	m := c.byID[req.MemberID]
	m.awaitsSync = false
	if !c.awaitsSync() {
		s.timers.cancel(&c.syncPhase)
	}
	if c.state == stable {
		s.reply(in.Call, synced(c, m, req.Version))
		return
	}
	// Unlike Kafka: if a sync of the member is parked already it is answered too; there it never is.
	s.releaseSync(m, syncError(m.sync.version, errRebalance))
	m.sync = parked{in.Call, req.Version}
	if c.leader == m.id {
		s.assign(g, req.GroupAssignment)
	}
}

// assign takes the leader's assignment, stores the generation and answers everybody who waits for it.
func (s *State) assign(g *group, assignments []kmsg.SyncGroupRequestGroupAssignment) {
	c := g.live
	for _, m := range c.members {
		m.assignment = []byte{}
	}
	for i := range assignments { // of a member named twice the last counts; strangers are ignored
		if m := c.byID[assignments[i].MemberID]; m != nil {
			m.assignment = bytes.Clone(assignments[i].MemberAssignment)
		}
	}
	c.since = s.now.UnixMilli()
	key, value := groupKey(keyGroup, g.id), encodeGroup(c)
	if len(key)+len(value) > MaxRecord {
		for _, m := range c.members {
			m.assignment = nil
			if s.releaseSync(m, syncError(m.sync.version, errServer)) {
				s.resetSession(m)
			}
		}
		s.prepareRebalance(g)
		return
	}
	c.transition(stable, s.now)
	s.put(g.partition, key, value)
	for _, m := range c.members {
		if s.releaseSync(m, synced(c, m, m.sync.version)) {
			s.resetSession(m)
		}
	}
}

func synced(c *classic, m *member, version int16) *kmsg.SyncGroupResponse {
	resp := kmsg.NewPtrSyncGroupResponse()
	resp.Version, resp.ProtocolType, resp.Protocol = version, c.protocolType, c.protocol
	resp.MemberAssignment = m.assignment
	if resp.MemberAssignment == nil {
		resp.MemberAssignment = []byte{}
	}
	return resp
}

// releaseSync answers the member's parked sync, and reports whether there was one.
func (s *State) releaseSync(m *member, resp *kmsg.SyncGroupResponse) bool {
	if m.sync.call == 0 {
		return false
	}
	s.reply(m.sync.call, resp)
	m.sync = parked{}
	return true
}

func (c *classic) awaitsSync() bool {
	for _, m := range c.members {
		if m.awaitsSync {
			return true
		}
	}
	return false
}

func differs(requested, actual *string) bool {
	return requested != nil && actual != nil && *requested != *actual
}

// heartbeat is GroupMetadataManager.classicGroupHeartbeat.
func (s *State) heartbeat(in *Input, req *kmsg.HeartbeatRequest) {
	resp := req.ResponseKind().(*kmsg.HeartbeatResponse)
	if req.Group == "" {
		resp.ErrorCode = errInvalidGroup
		s.refuse(in.Call, resp)
		return
	}
	g := s.seen(req.Group)
	if g == nil {
		resp.ErrorCode = errUnknownMember
		s.reply(in.Call, resp)
		return
	}
	c := g.view()
	resp.ErrorCode = c.validate(req.MemberID, req.InstanceID)
	if resp.ErrorCode == 0 && req.Generation != c.generation {
		resp.ErrorCode = errIllegalGeneration
	}
	if resp.ErrorCode == 0 {
		s.resetSession(c.byID[req.MemberID])
		if c.state == preparingRebalance {
			resp.ErrorCode = errRebalance
		}
	}
	s.reply(in.Call, resp)
	// An error sends the client into a rebalance, or back to the start: a coordinator that has been replaced must not.
	s.eff.Replies[len(s.eff.Replies)-1].Recent = resp.ErrorCode == 0
}

// leaveGroup is GroupMetadataManager.classicGroupLeave: each member of the batch has an error of its own, and all of
// them cause at most one rebalance.
func (s *State) leaveGroup(in *Input, req *kmsg.LeaveGroupRequest) {
	resp := req.ResponseKind().(*kmsg.LeaveGroupResponse)
	if req.Group == "" {
		resp.ErrorCode = errInvalidGroup
		s.refuse(in.Call, resp)
		return
	}
	leaving := req.Members
	if req.Version < 3 {
		leaving = []kmsg.LeaveGroupRequestMember{{MemberID: req.MemberID}}
	}
	g := s.seen(req.Group)
	left := false
	for _, l := range leaving {
		code := errUnknownMember
		switch {
		case s.again:
			code = 0
		case g != nil:
			code = s.leave(g.view(), l)
		}
		left = left || code == 0
		resp.Members = append(resp.Members, kmsg.LeaveGroupResponseMember{
			MemberID: l.MemberID, InstanceID: l.InstanceID, ErrorCode: code,
		})
		if req.Version < 3 {
			resp.ErrorCode, resp.Members = code, nil
		}
	}
	if left && !s.again {
		switch g.live.state {
		case stable, completingRebalance:
			s.prepareRebalance(g)
		case preparingRebalance:
			s.maybeCompleteJoin(g)
		}
	}
	s.noteDepartures()
	s.noteSession(&in.Client)
	s.reply(in.Call, resp)
}

// leave takes one member out, by its id or, for admins, by its instance id alone.
func (s *State) leave(c *classic, l kmsg.LeaveGroupRequestMember) int16 {
	if l.MemberID == "" {
		if l.InstanceID == nil || c.static[*l.InstanceID] == nil {
			return errUnknownMember
		}
		s.removeMember(c, c.static[*l.InstanceID])
		return 0
	}
	if s.dropPending(c, l.MemberID) {
		return 0
	}
	if code := c.validate(l.MemberID, l.InstanceID); code != 0 {
		return code
	}
	s.removeMember(c, c.byID[l.MemberID])
	return 0
}
