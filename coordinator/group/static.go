package group

import "github.com/twmb/franz-go/pkg/kmsg"

// replaceStatic is a static member that comes back without its member id: it gets a new one, and its place (KIP-345;
// GroupMetadataManager.updateStaticMemberThenRebalanceOrCompleteJoin).
func (s *State) replaceStatic(g *group, old *member, j *joining) {
	c := g.live
	id := *j.InstanceID + "-" + j.newID
	m := &member{
		id: id, instance: old.instance, clientID: old.clientID, clientHost: old.clientHost,
		rebalanceTimeout: old.rebalanceTimeout, sessionTimeout: old.sessionTimeout,
		protocols: old.protocols, assignment: old.assignment, origin: j.origin(), awaitsSync: old.awaitsSync, seat: old.seat,
	}
	changed := &member{id: id, instance: m.instance, clientID: m.clientID, clientHost: m.clientHost, protocols: j.protocols}
	grown := changed.size().largest - old.size().largest
	if !c.fits(changed, old) || len(g.meta)+grown+2*len(id) > MaxRecord {
		s.answerJoin(j.call, joinError(j.Version, "", errServer))
		return
	}
	// Whoever still uses the old id is fenced at once.
	fencedJoin := joinError(old.join.version, old.id, errFencedInstance)
	s.releaseJoin(c, old, fencedJoin)
	s.releaseSync(old, syncError(old.sync.version, errFencedInstance))
	s.timers.cancel(&old.session)
	leader := c.leader
	c.replace(old, m)
	m.session = timer{kind: sessionTimer, g: g, m: m}
	s.resetSession(m)
	c.update(m, j.protocols, j.rebalance, j.session, j.call)

	switch c.state {
	case stable:
		if c.choose() != c.protocolName() {
			s.rebalanceOrComplete(g) // its protocols would change the group's
			return
		}
		s.putRound(g)
		s.put(g.partition, groupKey(keyGroup, g.id), encodeGroup(c))
		s.answerReplaced(c, m, leader)
	case completingRebalance:
		// The leader may have assigned partitions to the old id already.
		s.prepareRebalance(g)
	default:
		s.maybeCompleteJoin(g)
	}
}

// replace puts m in the place of old, in the order of members too.
func (c *classic) replace(old, m *member) {
	c.count(old, -1)
	for i := range c.members {
		if c.members[i] == old {
			c.members[i] = m
		}
	}
	delete(c.byID, old.id)
	c.byID[m.id] = m
	c.static[*m.instance] = m
	c.count(m, 1)
	if c.leader == old.id {
		c.leader = m.id
	}
}

// answerReplaced answers the join of a static member that took its place in a Stable group, without a rebalance. The
// leader is told to skip the assignment (KIP-814); before v9 it is told the old leader's id, so that it acts as a
// follower.
func (s *State) answerReplaced(c *classic, m *member, oldLeader string) {
	version := m.join.version
	resp := kmsg.NewPtrJoinGroupResponse()
	if version >= 9 {
		resp = s.joined(c, m, version)
		resp.SkipAssignment = c.leader == m.id
	} else {
		resp.MemberID, resp.Generation = m.id, c.generation
		resp.ProtocolType, resp.Protocol, resp.LeaderID = c.protocolType, c.protocol, oldLeader
	}
	s.releaseJoin(c, m, resp)
}
