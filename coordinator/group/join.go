package group

import (
	"bytes"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// joining is a JoinGroup request on its way through the checks.
type joining struct {
	*kmsg.JoinGroupRequest
	call      parked
	client    *Client
	newID     string
	protocols []protocol
	rebalance time.Duration
	session   time.Duration
}

// joinGroup is GroupCoordinatorService.joinGroup and GroupMetadataManager.classicGroupJoinToClassicGroup.
func (s *State) joinGroup(in *Input, req *kmsg.JoinGroupRequest) {
	j := &joining{JoinGroupRequest: req, call: parked{in.Call, req.Version}, client: &in.Client, newID: in.NewID}
	j.session = duration(req.SessionTimeoutMillis)
	j.rebalance = duration(req.RebalanceTimeoutMillis)
	if req.Version == 0 {
		j.rebalance = j.session
	}
	switch {
	case req.Group == "":
		s.refuse(in.Call, joinError(req.Version, req.MemberID, errInvalidGroup))
		return
	case j.session < s.cfg.MinSessionTimeout || j.session > s.cfg.MaxSessionTimeout:
		s.refuse(in.Call, joinError(req.Version, req.MemberID, errInvalidSession))
		return
	case !j.readProtocols():
		s.refuse(in.Call, joinError(req.Version, req.MemberID, errInvalidRequest))
		return
	}
	g := s.seen(req.Group)
	isNew := g == nil
	if isNew {
		if req.MemberID != "" {
			s.answerJoin(j.call, joinError(req.Version, req.MemberID, errUnknownMember))
			return
		}
		g = s.addGroup(req.Group)
		g.seen = s.now.UnixMilli()
	}
	c := s.classicOf(g)
	if m := c.resentBy(j); m != nil {
		s.joinAgain(g, m, j)
		return
	}
	switch {
	case !s.accepts(c, req.MemberID):
		if m := c.byID[req.MemberID]; m != nil {
			s.removeMember(c, m)
		}
		s.dropPending(c, req.MemberID)
		s.answerJoin(j.call, joinError(req.Version, "", errMaxSize))
	case req.MemberID == "":
		s.joinNew(g, j)
	default:
		s.joinExisting(g, j)
	}
	if isNew && len(s.eff.Records) == 0 {
		// A group is there from its first join on, even one that is refused or told to come back with its member id.
		s.put(g.partition, groupKey(keyGroup, g.id), encodeEmptyGroup(s.now.UnixMilli()))
	}
}

// readProtocols copies what is kept of the request, and reports false for strings that no record could hold.
//
// Unlike Kafka: of a protocol that is named twice the first counts. There the member waits for ever, and its group is
// unusable (ClassicGroup.candidateProtocols).
func (j *joining) readProtocols() bool {
	ok := len(j.Group) <= maxString && len(j.ProtocolType) <= maxString && len(j.client.ID) < maxString-idRoom &&
		(j.InstanceID == nil || len(*j.InstanceID) < maxString-idRoom)
	seen := make(map[string]bool, len(j.Protocols))
	for _, p := range j.Protocols {
		ok = ok && len(p.Name) <= maxString
		if !seen[p.Name] {
			seen[p.Name] = true
			j.protocols = append(j.protocols, protocol{p.Name, bytes.Clone(p.Metadata)})
		}
	}
	return ok
}

func (j *joining) origin() origin { return origin{j.client.Session, j.client.Ordinal} }

// resentBy finds the member of a join without a member id that was sent before: the reply with the id was lost.
func (c *classic) resentBy(j *joining) *member {
	if j.MemberID != "" || j.client.Ordinal == 0 {
		return nil
	}
	id, ok := c.origins[j.origin()]
	if !ok {
		return nil
	}
	return c.byID[id]
}

// accepts says whether the group has room for the member (acceptJoiningMember).
func (s *State) accepts(c *classic, id string) bool {
	m := c.byID[id]
	switch c.state {
	case preparingRebalance:
		// By those who wait, so that a group above its limit loses the last to join.
		return m != nil && m.join.call != 0 || c.awaitingJoin < s.cfg.MaxSize
	case completingRebalance, stable:
		return m != nil || len(c.members) < s.cfg.MaxSize
	default:
		return true
	}
}

// joinNew is a join without a member id.
func (s *State) joinNew(g *group, j *joining) {
	c := g.live
	if !c.supports(j.ProtocolType, j.protocols) {
		s.answerJoin(j.call, joinError(j.Version, "", errInconsistentProtocol))
		return
	}
	if j.InstanceID != nil {
		if old := c.static[*j.InstanceID]; old != nil {
			s.replaceStatic(g, old, j)
		} else {
			s.addMember(g, *j.InstanceID+"-"+j.newID, j)
		}
		return
	}
	if j.Version < 4 {
		s.addMember(g, j.client.ID+"-"+j.newID, j)
		return
	}
	// KIP-394: the member is told its id first, so that a client that gives up leaves no member behind.
	if p := c.pending[c.origins[j.origin()]]; p != nil {
		s.answerJoin(j.call, joinError(j.Version, p.id, errMemberIDRequired))
		return
	}
	p := &pendingMember{id: j.client.ID + "-" + j.newID, origin: j.origin()}
	p.timer = timer{kind: pendingTimer, g: g, p: p}
	s.pend(c, p)
	s.timers.arm(&p.timer, s.now, j.session)
	s.answerJoin(j.call, joinError(j.Version, p.id, errMemberIDRequired))
}

// joinExisting is a join with a member id.
func (s *State) joinExisting(g *group, j *joining) {
	c := g.live
	refuse := func(code int16) { s.answerJoin(j.call, joinError(j.Version, j.MemberID, code)) }
	switch {
	case !c.supports(j.ProtocolType, j.protocols):
		refuse(errInconsistentProtocol)
	case c.pending[j.MemberID] != nil:
		if j.InstanceID != nil {
			// GroupMetadataManager.classicGroupJoinExistingMember, IllegalStateException: an id that was handed out
			// to a dynamic member. It stays pending.
			s.answerJoin(j.call, joinError(j.Version, "", errServer))
			return
		}
		s.addMember(g, j.MemberID, j)
	default:
		if code := c.validate(j.MemberID, j.InstanceID); code != 0 {
			refuse(code)
			return
		}
		s.joinAgain(g, c.byID[j.MemberID], j)
	}
}

// joinAgain is a join of a member.
func (s *State) joinAgain(g *group, m *member, j *joining) {
	c := g.live
	switch {
	case c.state == stable && c.leader == m.id && j.MemberID != "":
		// The leader may want a rebalance for what does not show in its metadata, as new partitions of a topic.
		s.updateMember(g, m, j)
	case c.state == stable && j.MemberID == "" && m.instance != nil && m.matches(j.protocols):
		m.join = j.call
		c.awaitingJoin++
		s.answerReplaced(c, m, "")
	case (c.state == completingRebalance || c.state == stable) && m.matches(j.protocols):
		// It did not get the answer to its last join, or knows of no reason for this one.
		s.answerJoin(j.call, s.joined(c, m, j.Version))
	default:
		s.updateMember(g, m, j)
	}
}

// updateMember parks the join of a member that says something new, and rebalances.
func (s *State) updateMember(g *group, m *member, j *joining) {
	c := g.live
	changed := &member{id: m.id, instance: m.instance, clientID: m.clientID, clientHost: m.clientHost, protocols: j.protocols}
	if !c.fits(changed, m) {
		s.answerJoin(j.call, joinError(j.Version, j.MemberID, errServer))
		return
	}
	// Unlike Kafka: if a join of the member is parked already it is answered too; there it never is
	// (ClassicGroup.updateMember replaces the future).
	s.releaseJoin(c, m, joinError(m.join.version, m.id, errRebalance))
	if j.MemberID == "" {
		c.count(m, -1)
		m.origin = j.origin()
		c.count(m, 1)
	}
	c.update(m, j.protocols, j.rebalance, j.session, j.call)
	s.rebalanceOrComplete(g)
}

// addMember parks the first join of a member, and rebalances.
func (s *State) addMember(g *group, id string, j *joining) {
	c := g.live
	m := &member{
		id: id, instance: j.InstanceID, clientID: j.client.ID, clientHost: j.client.Host,
		rebalanceTimeout: j.rebalance, sessionTimeout: j.session, protocols: j.protocols,
		join: j.call, isNew: true,
	}
	if j.MemberID == "" {
		m.origin = j.origin()
	}
	if len(id) > maxString || !c.fits(m, nil) {
		s.answerJoin(j.call, joinError(j.Version, j.MemberID, errServer))
		return
	}
	if c.state == preparingRebalance && c.previous == empty {
		c.newMember = true // the initial rebalance may be delayed further
	}
	if len(c.members) == 0 {
		t := j.ProtocolType
		c.protocolType = &t
	}
	s.dropPending(c, id)
	m.session = timer{kind: sessionTimer, g: g, m: m}
	c.add(m)
	// Its session has not begun: it does not know its id. So that retries of its client do not pile up members, the
	// join gives up in time.
	s.timers.arm(&m.session, s.now, newMemberJoinTimeout)
	s.rebalanceOrComplete(g)
}

const (
	// maxRound bounds what a group's members take in the record of a join round with the protocol chosen, leaving room
	// for its other fields.
	maxRound = MaxRecord - 4*maxString
	// maxProtocols bounds what they take with all their protocols.
	maxProtocols = 8 * MaxRecord
	// maxPending bounds the member ids of a group that are handed out and not used yet.
	maxPending = 10_000
	// idRoom is what is left of a member id for what the coordinator makes up.
	idRoom = 64
)

// joined is the answer to a join in the current generation.
func (s *State) joined(c *classic, m *member, version int16) *kmsg.JoinGroupResponse {
	resp := kmsg.NewPtrJoinGroupResponse()
	resp.Version, resp.MemberID, resp.Generation = version, m.id, c.generation
	resp.ProtocolType, resp.Protocol, resp.LeaderID = c.protocolType, c.protocol, c.leader
	if version >= 7 && resp.Protocol != nil && *resp.Protocol == "" {
		resp.Protocol = nil // JoinGroupResponse's constructor
	}
	if c.leader == m.id {
		resp.Members = c.joinMembers()
	}
	return resp
}

func (c *classic) joinMembers() []kmsg.JoinGroupResponseMember {
	members := make([]kmsg.JoinGroupResponseMember, 0, len(c.members))
	for _, m := range c.members {
		members = append(members, kmsg.JoinGroupResponseMember{
			MemberID: m.id, InstanceID: m.instance, ProtocolMetadata: m.metadata(c.protocolName()),
		})
	}
	return members
}

func (s *State) answerJoin(call parked, resp *kmsg.JoinGroupResponse) { s.reply(call.call, resp) }

// releaseJoin answers the member's parked join, if there is one.
func (s *State) releaseJoin(c *classic, m *member, resp *kmsg.JoinGroupResponse) {
	if m.join.call == 0 {
		return
	}
	resp.Version = m.join.version
	s.answerJoin(m.join, resp)
	m.join = parked{}
	c.awaitingJoin--
}

// dropPending forgets a member id that was handed out.
func (s *State) dropPending(c *classic, id string) bool {
	p := c.unpend(id)
	if p == nil {
		return false
	}
	s.timers.cancel(&p.timer)
	return true
}

// removeMember takes a member out of the group and answers what it has parked.
//
// Unlike Kafka: its parked sync too, which there is never answered.
func (s *State) removeMember(c *classic, m *member) {
	s.releaseJoin(c, m, joinError(m.join.version, "", errUnknownMember))
	s.releaseSync(m, syncError(m.sync.version, errUnknownMember))
	s.timers.cancel(&m.session)
	c.remove(m)
	if m.seat == 0 {
		return
	}
	c.departed = c.departed.with(m.seat - 1)
	if !c.noting {
		c.noting = true
		s.departed = append(s.departed, m.session.g)
	}
}
