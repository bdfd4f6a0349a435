package group

import "time"

// minJoinPhase is how long a join phase that nobody has joined goes on at least.
//
// Unlike Kafka: there a group of static members whose rebalance timeout is 0 completes its join phase again and again,
// as fast as its timer can, until their sessions have ended.
const minJoinPhase = time.Second

// resetSession gives a member its session timeout from now.
func (s *State) resetSession(m *member) { s.timers.arm(&m.session, s.now, m.sessionTimeout) }

// rebalanceOrComplete begins a rebalance, or goes on with the one under way.
func (s *State) rebalanceOrComplete(g *group) {
	if g.live.state == preparingRebalance {
		s.maybeCompleteJoin(g)
		return
	}
	s.prepareRebalance(g)
}

// prepareRebalance begins the join phase.
func (s *State) prepareRebalance(g *group) {
	c := g.live
	if c.state == completingRebalance {
		for _, m := range c.members {
			m.assignment = nil
			if s.releaseSync(m, syncError(m.sync.version, errRebalance)) {
				s.resetSession(m)
			}
		}
	}
	s.timers.cancel(&c.syncPhase)
	for _, m := range c.members {
		m.awaitsSync = false
	}
	initial := c.state == empty
	c.transition(preparingRebalance, s.now)
	if initial {
		// The group is new: time for others to join, so that it does not rebalance once for each (KIP-134).
		c.initial, c.delay = true, s.cfg.InitialRebalanceDelay
		c.rest = max(0, c.rebalanceTimeout()-c.delay)
		s.timers.arm(&c.joinPhase, s.now, c.delay)
		return
	}
	if c.allJoined() {
		s.completeJoin(g)
		return
	}
	c.initial = false
	s.timers.arm(&c.joinPhase, s.now, c.rebalanceTimeout())
}

// maybeCompleteJoin ends the join phase once everybody is there, except of an initial rebalance, which has its time.
func (s *State) maybeCompleteJoin(g *group) {
	if c := g.live; c.state == preparingRebalance && c.previous != empty && c.allJoined() {
		s.completeJoin(g)
	}
}

// expireJoinPhase is the end of the initial delay, which new members may have prolonged, or of the rebalance timeout.
func (s *State) expireJoinPhase(g *group) {
	c := g.live
	if next := min(s.cfg.InitialRebalanceDelay, c.rest); c.initial && c.newMember && next > 0 {
		c.newMember = false
		c.rest = max(0, c.rest-c.delay)
		c.delay = next
		s.timers.arm(&c.joinPhase, s.now, next)
		return
	}
	s.completeJoin(g)
}

// completeJoin ends the join phase: dynamic members that have not joined are out, those who have make the next
// generation (completeClassicGroupJoin).
func (s *State) completeJoin(g *group) {
	c := g.live
	s.timers.cancel(&c.joinPhase)
	for _, m := range append([]*member(nil), c.members...) {
		if m.join.call == 0 && m.instance == nil {
			s.removeMember(c, m)
		}
	}
	if !c.elect() && len(c.members) > 0 {
		// Nobody has joined. Their session timeouts will tell who is gone.
		c.initial = false
		s.timers.arm(&c.joinPhase, s.now, max(c.rebalanceTimeout(), minJoinPhase))
		return
	}
	c.generation++
	c.initial, c.newMember = false, false
	c.departed = nil
	for _, m := range c.members {
		m.awaitsSync = false
	}
	if len(c.members) == 0 {
		c.protocol, c.leader = nil, ""
		c.subscribed = c.subscribedTopics()
		c.transition(empty, s.now)
		s.put(g.partition, groupKey(keyGroup, g.id), encodeGroup(c))
		if g.round != nil {
			s.put(PrivatePartition, groupKey(keyRound, g.id), nil)
		}
		s.forgetDepartures(g)
		return
	}
	chosen := c.choose()
	c.protocol = &chosen
	c.subscribed = c.subscribedTopics()
	c.transition(completingRebalance, s.now)
	// Unlike Kafka: the round is replicated before it is told, so that after a failover it goes on, and no generation is
	// ever given out twice.
	s.putRound(g)
	s.forgetDepartures(g)
	for _, m := range c.members {
		s.releaseJoin(c, m, s.joined(c, m, m.join.version))
		s.resetSession(m)
		m.isNew, m.awaitsSync = false, true
	}
	s.timers.arm(&c.syncPhase, s.now, c.rebalanceTimeout())
}

// noteDepartures keeps in mind who has gone, while the others are still asked to join again. Joins are sent again after a
// failover; who left, or was not heard of, must not come back and be waited for.
//
// Unlike Kafka: there a member that has left is back after a failover, until its session times out.
func (s *State) noteDepartures() {
	for _, g := range s.departed {
		if c := g.live; c != nil {
			c.noting = false
			if c.state == preparingRebalance {
				s.put(PrivatePartition, groupKey(keyDeparted, g.id), encodeDeparted(c))
			}
		}
	}
	s.departed = s.departed[:0]
}

// forgetDepartures follows the record of the next generation, with which they mean nothing any more.
func (s *State) forgetDepartures(g *group) {
	if g.departed != nil {
		s.put(PrivatePartition, groupKey(keyDeparted, g.id), nil)
	}
}

func (s *State) putRound(g *group) {
	g.live.seated()
	s.put(PrivatePartition, groupKey(keyRound, g.id), encodeRound(g.live))
}

// expireSyncPhase removes those who have not synced in this generation (expirePendingSync).
func (s *State) expireSyncPhase(g *group) {
	c := g.live
	if c.state != completingRebalance && c.state != stable {
		return
	}
	late := false
	for _, m := range append([]*member(nil), c.members...) {
		if m.awaitsSync {
			late = true
			s.removeMember(c, m)
		}
	}
	if late {
		s.prepareRebalance(g)
	}
}

// expireMember ends the session of a member that was not heard of. One that waits for an answer is there, except a new
// one, whose join has waited too long.
func (s *State) expireMember(g *group, m *member) {
	c := g.live
	if !m.isNew && (m.join.call != 0 || m.sync.call != 0) {
		return
	}
	s.removeMember(c, m)
	switch {
	case c.state == stable || c.state == completingRebalance:
		s.prepareRebalance(g)
	case c.state == preparingRebalance && c.allJoined():
		s.completeJoin(g)
	}
}

// expirePending forgets a member id that nobody came back with. The rebalance may have waited only for it (KAFKA-7909).
func (s *State) expirePending(g *group, p *pendingMember) {
	c := g.live
	s.dropPending(c, p.id)
	if c.state == preparingRebalance && c.allJoined() {
		s.completeJoin(g)
	}
}

// cancelTimers is for a group that goes.
func (s *State) cancelTimers(c *classic) {
	s.timers.cancel(&c.joinPhase)
	s.timers.cancel(&c.syncPhase)
	for _, m := range c.members {
		s.timers.cancel(&m.session)
	}
	for _, p := range c.pending {
		s.timers.cancel(&p.timer)
	}
}
