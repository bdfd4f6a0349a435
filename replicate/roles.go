package replicate

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"
)

// peerProgress is how far a server of the configuration has come, as the leader sees it in its term.
type peerProgress struct {
	match   uint64        // it has stored our log up to here
	contact time.Time     // it last answered; zero: not in this term
	steady  time.Duration // for how long it has answered in time for raft's lease
}

// rolesConfig is what keeping the roles needs.
type rolesConfig struct {
	node      string
	maxVoters int
	raft      autopilot.Raft // raft.Raft is one
	// configuration is the newest that raft has committed, and its index, the only one a change may build on.
	// Index 0: not known, any.
	configuration func() (index uint64, c raft.Configuration)
	members       func() []gossipMember
	changed       func() <-chan struct{} // closed when members has changed; taken before members
	progress      func() map[string]peerProgress
	// answers asks a node over the peer port, where both sides prove what they are, whether it is of this cluster.
	answers func(ctx context.Context, node string) error
	log     *slog.Logger
	timing  roleTiming
}

// How often autopilot looks at the servers' health, and asks the promoter.
const (
	healthInterval  = 250 * time.Millisecond
	promoteInterval = 200 * time.Millisecond
	rolesTick       = time.Second
	enqueueTimeout  = 2 * time.Second // for a change that waits for the one before
	vetTimeout      = 2 * time.Second // for a node to answer before it gets a role
)

// roles keeps the voters and standbys of a cluster while this node leads it.
//
// raft-autopilot judges the servers' health, and promotes, demotes and hands leadership over as its promoter says, which
// names one at a time: what plan names. Adding and removing servers, which autopilot leaves to its user, is done by
// reconcileRoles. Both go through carryOut, which lets through nothing but the plan, and one change at a time.
type roles struct {
	rolesConfig
	health atomic.Pointer[autopilot.State]
	wake   chan struct{}

	mu      sync.Mutex // held from planning a change until raft has committed it
	seen    map[string]sighting
	bars    map[string]bar
	started time.Time
	handed  int       // attempts to hand leadership over that failed
	offer   time.Time // the next one may begin
}

// sighting is what is remembered of a server of the configuration.
type sighting struct {
	contact bool
	since   time.Time // of contact
	absent  time.Time // gossip does not know it since; zero: it does
}

// bar keeps a node out for a while.
type bar struct {
	process string // of the node; one that is started again begins anew
	until   time.Time
	silence time.Duration // of a process that did not answer: how long it was barred for that, doubling
}

var errNotPlanned = errors.New("the roles' plan has changed")

func newRoles(c rolesConfig) *roles {
	if c.maxVoters < 5 { // 3 or 5: an even number is no better than the odd one below
		c.maxVoters = 3
	} else {
		c.maxVoters = 5
	}
	return &roles{rolesConfig: c, wake: make(chan struct{}, 1)}
}

// reconcileRoles keeps the roles until ctx ends. It is to run while this node leads; where raft knows better, its changes
// fail and nothing happens.
func (r *roles) reconcileRoles(ctx context.Context) {
	r.mu.Lock()
	r.seen, r.bars, r.started, r.handed = map[string]sighting{}, map[string]bar{}, time.Now(), 0
	r.mu.Unlock()
	r.health.Store(nil)
	pilot := autopilot.New(pilotRaft{r}, pilotHost{r}, autopilot.WithPromoter(promoter{r}), autopilot.WithLogger(hclog.NewNullLogger()),
		autopilot.WithUpdateInterval(healthInterval), autopilot.WithReconcileInterval(promoteInterval))
	pilot.Start(ctx)
	defer func() { <-pilot.Stop() }()
	tick := time.NewTicker(rolesTick)
	defer tick.Stop()
	for {
		changed := r.changed()
		for ctx.Err() == nil {
			c := r.planned()
			if c.kind != addStandby && c.kind != removeServer {
				break
			}
			if c.newcomer.id != "" && !r.vetted(ctx, c.newcomer) {
				continue // without it
			}
			if err := r.carryOut(c.kind, c.id); err != nil {
				break // the next tick tries again
			}
		}
		select {
		case <-changed:
		case <-r.wake:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// vetted says whether a node that gossip names answers. Whoever can speak in gossip can name anybody; and a standby that
// cannot be reached has no copy, but another's place. Others wait while one is asked, so who stays silent is asked ever
// less often.
func (r *roles) vetted(ctx context.Context, n roleNode) bool {
	asking, cancel := context.WithTimeout(ctx, vetTimeout)
	defer cancel()
	err := r.answers(asking, n.id)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		delete(r.bars, n.id)
	} else if ctx.Err() == nil {
		r.log.Debug("a sidecar that gossip names does not answer, and gets no role", "node", n.id, "err", err)
		silence := min(max(2*n.silence, r.timing.unanswered), r.timing.barred)
		r.bars[n.id] = bar{process: n.process, until: time.Now().Add(silence), silence: silence}
	}
	return err == nil
}

// planned is the plan as things are.
func (r *roles) planned() roleChange {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, v := r.observe(time.Now())
	return v.plan()
}

// carryOut makes a change, if it is the plan, and waits until it is committed.
func (r *roles) carryOut(kind changeKind, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	index, v := r.observe(now)
	c := v.plan()
	if c.kind != kind || c.id != id {
		return errNotPlanned
	}
	var future raft.Future
	server, address := raft.ServerID(id), raft.ServerAddress(id)
	switch kind {
	case addStandby:
		future = r.raft.AddNonvoter(server, address, index, enqueueTimeout)
	case promote:
		future = r.raft.AddVoter(server, address, index, enqueueTimeout)
	case demote:
		future = r.raft.DemoteVoter(server, index, enqueueTimeout)
	case removeServer:
		future = r.raft.RemoveServer(server, index, enqueueTimeout)
	case handLeadership:
		future = r.raft.LeadershipTransferToServer(server, address)
	}
	if err := future.Error(); err != nil {
		if kind == handLeadership {
			r.offer = time.Now().Add(r.timing.handover << r.handed)
			r.handed++
		}
		r.log.Debug("changing roles", "change", kind, "node", id, "why", c.why, "err", err)
		return err
	}
	r.log.Info("roles changed", "change", kind.String(), "node", id, "why", c.why)
	switch kind {
	case addStandby:
		r.seen[id] = sighting{since: now}
	case removeServer:
		if n, _ := v.find(id); v.unreached(n) {
			r.bars[id] = bar{process: n.process, until: now.Add(r.timing.barred)}
		}
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
	return nil
}

// observe puts raft's configuration, gossip and health together. The caller holds mu.
func (r *roles) observe(now time.Time) (index uint64, v roleView) {
	index, configuration := r.configuration()
	progress, health := r.progress(), r.health.Load()
	v = roleView{self: r.node, maxVoters: r.maxVoters, now: now, timing: r.timing, handed: r.handed, offer: r.offer}
	servers := map[string]raft.ServerSuffrage{}
	for _, s := range configuration.Servers {
		servers[string(s.ID)] = s.Suffrage
	}
	for id := range r.seen {
		if _, there := servers[id]; !there {
			delete(r.seen, id)
		}
	}
	for _, m := range r.members() {
		n := roleNode{
			id: m.ID, process: m.Name, state: m.State, since: m.Since,
			zone: m.Tags[tagZone], machine: m.Tags[tagMachine], version: m.Tags[tagVersion],
		}
		if b := r.bars[m.ID]; b.process == m.Name {
			n.barred, n.silence = now.Before(b.until), b.silence
		}
		if suffrage, there := servers[m.ID]; there {
			r.observeServer(&n, suffrage, progress[m.ID], health, now)
			delete(servers, m.ID)
		}
		v.nodes = append(v.nodes, n)
	}
	for id, suffrage := range servers {
		n := roleNode{id: id}
		r.observeServer(&n, suffrage, progress[id], health, now)
		v.nodes = append(v.nodes, n)
	}
	v.sort()
	return index, v
}

// observeServer adds what is known of a server of the configuration.
func (r *roles) observeServer(n *roleNode, suffrage raft.ServerSuffrage, p peerProgress, health *autopilot.State, now time.Time) {
	n.role = standby
	if suffrage == raft.Voter {
		n.role = voter
	}
	s, there := r.seen[n.id]
	if contact := !p.contact.IsZero() && now.Sub(p.contact) <= maxContact; !there || contact != s.contact {
		s.contact, s.since = contact, now
	}
	if n.state != 0 {
		s.absent = time.Time{}
	} else if s.absent.IsZero() {
		s.absent = now
	}
	r.seen[n.id] = s
	n.contact, n.contactSince, n.match, n.steady = s.contact, s.since, p.match, p.steady
	if n.state == 0 {
		n.since = s.absent
	}
	if n.since.Before(r.started) {
		n.since = r.started // a new leader gives everybody the same time again
	}
	if health == nil {
		return
	}
	if state := health.Servers[raft.ServerID(n.id)]; state != nil {
		n.ready, n.readySince = state.Health.Healthy && n.contact, state.Health.StableSince
	}
}

// pilotRaft is raft as autopilot may use it: for what is planned, and nothing else.
type pilotRaft struct{ r *roles }

var _ autopilot.Raft = pilotRaft{}

func (p pilotRaft) AddVoter(id raft.ServerID, _ raft.ServerAddress, _ uint64, _ time.Duration) raft.IndexFuture {
	return done{p.r.carryOut(promote, string(id))}
}

// DemoteVoter may be asked for a second time in one round, with what autopilot knew before the first.
func (p pilotRaft) DemoteVoter(id raft.ServerID, _ uint64, _ time.Duration) raft.IndexFuture {
	return done{p.r.carryOut(demote, string(id))}
}

func (p pilotRaft) LeadershipTransferToServer(id raft.ServerID, _ raft.ServerAddress) raft.Future {
	return done{p.r.carryOut(handLeadership, string(id))}
}

// AddNonvoter and RemoveServer are not autopilot's here.
func (p pilotRaft) AddNonvoter(raft.ServerID, raft.ServerAddress, uint64, time.Duration) raft.IndexFuture {
	return done{errNotPlanned}
}

func (p pilotRaft) RemoveServer(raft.ServerID, uint64, time.Duration) raft.IndexFuture {
	return done{errNotPlanned}
}

func (p pilotRaft) LastIndex() uint64                          { return p.r.raft.LastIndex() }
func (p pilotRaft) Leader() raft.ServerAddress                 { return p.r.raft.Leader() }
func (p pilotRaft) GetConfiguration() raft.ConfigurationFuture { return p.r.raft.GetConfiguration() }
func (p pilotRaft) Stats() map[string]string                   { return p.r.raft.Stats() }
func (p pilotRaft) State() raft.RaftState                      { return p.r.raft.State() }

// done is a future that is over.
type done struct{ err error }

func (d done) Error() error  { return d.err }
func (d done) Index() uint64 { return 0 }

// pilotHost is what autopilot asks of us.
type pilotHost struct{ r *roles }

var _ autopilot.ApplicationIntegration = pilotHost{}

func (h pilotHost) AutopilotConfig() *autopilot.Config {
	return &autopilot.Config{
		LastContactThreshold: maxContact, MaxTrailingLogs: maxTrailingLogs,
		ServerStabilizationTime: h.r.timing.stable, MinQuorum: uint(min(3, h.r.maxVoters)),
		CleanupDeadServers: false, // plan says who goes
	}
}

func (h pilotHost) NotifyState(s *autopilot.State) { h.r.health.Store(s) }

// FetchServerStats needs to ask nobody: what a server has stored of our log is known from its answers.
func (h pilotHost) FetchServerStats(_ context.Context, servers map[raft.ServerID]*autopilot.Server) map[raft.ServerID]*autopilot.ServerStats {
	last := h.r.raft.LastIndex()
	term, _ := strconv.ParseUint(h.r.raft.Stats()["last_log_term"], 10, 64)
	progress, now := h.r.progress(), time.Now()
	stats := map[raft.ServerID]*autopilot.ServerStats{}
	for id := range servers {
		if string(id) == h.r.node {
			stats[id] = &autopilot.ServerStats{LastTerm: term, LastIndex: last}
			continue
		}
		p := progress[string(id)]
		s := &autopilot.ServerStats{LastContact: now.Sub(p.contact), LastIndex: p.match}
		// Its log is ours up to match. The last entries decide its last term; so near the end it can be no other.
		if p.match > 0 && p.match+maxTrailingLogs >= last {
			s.LastTerm = term
		}
		stats[id] = s
	}
	return stats
}

func (h pilotHost) KnownServers() map[raft.ServerID]*autopilot.Server {
	known := map[raft.ServerID]*autopilot.Server{}
	for _, m := range h.r.members() {
		status := autopilot.NodeAlive
		switch m.State {
		case gossipLeft:
			status = autopilot.NodeLeft
		case gossipFailed:
			status = autopilot.NodeFailed
		}
		known[raft.ServerID(m.ID)] = &autopilot.Server{
			ID: raft.ServerID(m.ID), Name: m.Name, Address: raft.ServerAddress(m.ID), NodeStatus: status, Version: m.Tags[tagVersion],
			Meta: m.Tags, RaftVersion: int(raft.ProtocolVersionMax), IsLeader: m.ID == h.r.node,
		}
	}
	return known
}

func (h pilotHost) RemoveFailedServer(*autopilot.Server) {}

// promoter names what plan names.
type promoter struct{ r *roles }

var _ autopilot.Promoter = promoter{}

func (p promoter) CalculatePromotionsAndDemotions(*autopilot.Config, *autopilot.State) (changes autopilot.RaftChanges) {
	switch c := p.r.planned(); c.kind {
	case promote:
		changes.Promotions = []raft.ServerID{raft.ServerID(c.id)}
	case demote:
		changes.Demotions = []raft.ServerID{raft.ServerID(c.id)}
	case handLeadership:
		changes.Leader = raft.ServerID(c.id)
	}
	return changes
}

func (p promoter) GetServerExt(*autopilot.Config, *autopilot.ServerState) any { return nil }
func (p promoter) GetStateExt(*autopilot.Config, *autopilot.State) any        { return nil }

func (p promoter) GetNodeTypes(_ *autopilot.Config, s *autopilot.State) map[raft.ServerID]autopilot.NodeType {
	types := map[raft.ServerID]autopilot.NodeType{}
	for id, server := range s.Servers {
		types[id] = RoleStandby
		if server.HasVotingRights() {
			types[id] = autopilot.NodeVoter
		}
	}
	return types
}

func (p promoter) FilterFailedServerRemovals(*autopilot.Config, *autopilot.State, *autopilot.FailedServers) *autopilot.FailedServers {
	return &autopilot.FailedServers{}
}

func (p promoter) IsPotentialVoter(autopilot.NodeType) bool { return true }
