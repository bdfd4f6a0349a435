package replicate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"
)

// Local keys of a member.
const (
	removedKey = "removed" // present: this node was taken out of raft's configuration
)

const (
	// rpcTimeout bounds a raft request to a peer. A stopped peer is noticed by raft's own time-outs long before; this is
	// how long a request that was swallowed keeps the way to that peer blocked.
	rpcTimeout = 2 * time.Second
	// raftPool is how many idle connections to each peer raft keeps: one replicates, one carries heartbeats.
	raftPool = 3
)

// membership is a node's way to the others: how it finds them, and what it is in raft's configuration.
//
// A node without state is a forwarder until the leader speaks raft to it; one that has been taken out of the
// configuration becomes a forwarder again, and keeps what it has for the case that it is needed once more.
type membership struct {
	node   *Node
	config ClusterConfig
	port   *peerPort
	status *status
	gossip *gossip
	birth  *birth

	ctx    context.Context
	cancel context.CancelFunc
	// searching ends when this node has become a member, or is closed.
	searching    context.Context
	born         context.CancelFunc
	workers      sync.WaitGroup
	retag        chan struct{} // the tags have changed
	reconfigured chan struct{} // the configuration has
	opened       chan struct{} // closed when all above is there: peers may be early

	raftMu sync.Mutex // held while a replica is started or ended
	stream *raftStream

	mu            sync.Mutex
	clusterID     uuid.UUID
	reconciling   context.CancelFunc // ends reconcileRoles
	reconciled    chan struct{}      // closed when it has ended
	leaving       bool
	waiting       string // what keeps us from being a member
	configuration raft.Configuration
	index         uint64 // raft's, of configuration
	counted       uint64 // raft's index of the newest configuration of this replica's that has us, 0: none
}

// openMember opens the peer port and looks for the others.
func (n *Node) openMember(c ClusterConfig) error {
	m := &membership{node: n, config: c, retag: make(chan struct{}, 1), reconfigured: make(chan struct{}, 1), opened: make(chan struct{}), reconciling: func() {}}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.searching, m.born = context.WithCancel(m.ctx)
	n.membership = m
	defer close(m.opened)
	fresh, err := n.store.Fresh()
	if err != nil {
		return err
	}
	removed, err := m.load(fresh)
	if err != nil {
		return err
	}
	m.port, err = openPeerPort(peerConfig{
		bind: c.Peer, dial: c.seams.dial, identity: m.identity, resolve: m.resolve, security: c.Security, logger: n.log, metrics: n.config.Metrics,
		accept: map[peerKind]func(net.Conn, peerIdentity){peerRaft: m.acceptRaft, peerForward: m.acceptForward},
	})
	if err != nil {
		return fmt.Errorf("--peer %s: %w", c.Peer, err)
	}
	m.status = openStatus(m.port, m.facts, n.log)
	hooks := storedHooks(n.store.Local(), n.config.Metrics, n.log)
	hooks.parting = fmt.Sprintf("if that one is to stay, its data having been recovered, say: stop this sidecar, empty its data directory %s, and start it again", n.config.Dir)
	m.gossip, err = openGossip(c, string(n.id), m.peerAddr(), m.tags, n.log, hooks)
	if err != nil {
		return fmt.Errorf("--gossip %s: %w", c.Gossip, err)
	}
	m.birth = &birth{
		node: string(n.id), join: len(c.Join) > 0, expect: c.BootstrapExpect, arbiter: c.Arbiter,
		existed: m.clusterID != (uuid.UUID{}) || n.store.Quarantined(), left: removed,
		members: m.gossip.members, changed: m.gossip.changed, ask: m.status.ask, found: m.found, waiting: m.wait,
		log: n.log, timing: defaultBirthTiming,
	}
	if c.seams.birth != nil {
		m.birth.timing = *c.seams.birth
	}
	m.workers.Go(m.followGossip)
	m.workers.Go(m.keepTags)
	if fresh || removed {
		err = m.beBorn()
	} else {
		err = m.enlist()
	}
	m.workers.Go(m.followConfiguration) // after enlist: it may have been told already that we are out
	return err
}

// beBorn looks for a cluster, or founds one. A node that is alone has done so when it returns.
func (m *membership) beBorn() error {
	c := m.config
	if alone := len(c.Join) == 0 && c.BootstrapExpect <= 1 && c.Arbiter == nil; alone && !m.birth.existed {
		return m.found()
	}
	m.workers.Go(func() {
		if err := m.birth.run(m.searching); err != nil {
			m.node.log.Error("founding a cluster", "err", err)
		}
	})
	return nil
}

// load reads what an earlier process has noted. removed: there is a state, and we do not belong to its configuration.
func (m *membership) load(fresh bool) (removed bool, err error) {
	local := m.node.store.Local()
	id, err := local.Get(clusterIDKey)
	if err != nil {
		return false, err
	}
	if id == nil && !fresh { // written by a version that knew no peers
		id = []byte(uuid.NewString())
		if err := local.Put(clusterIDKey, id); err != nil {
			return false, err
		}
	}
	if id != nil {
		if m.clusterID, err = uuid.ParseBytes(id); err != nil {
			return false, fmt.Errorf("the cluster's id in the store: %w", err)
		}
	}
	epoch, err := clusterEpoch(local)
	if err != nil {
		return false, err
	}
	if epoch > 0 { // a recovered cluster is another one: the log of those who were left behind is not its log
		m.clusterID = uuid.NewSHA1(m.clusterID, []byte(strconv.FormatUint(epoch, 10)))
	}
	mark, err := local.Get(removedKey)
	if err != nil || mark != nil || fresh {
		return mark != nil, err
	}
	// Killed before it could note that it is out, or before it has got what takes it in: a leader knows.
	newest, _, err := m.node.store.Membership()
	return suffrage(newest, m.node.id) == "", err
}

func (m *membership) identity() peerIdentity {
	m.mu.Lock()
	defer m.mu.Unlock()
	return peerIdentity{cluster: m.config.Name, clusterID: m.clusterID, node: string(m.node.id)}
}

func (m *membership) resolve(node string) (string, bool) {
	return m.gossip.resolve(node)
}

// peerAddr is what peers are told of the peer port.
func (m *membership) peerAddr() string {
	host, port, _ := net.SplitHostPort(m.port.addr().String())
	if m.config.Advertise != "" {
		host = m.config.Advertise
	}
	return net.JoinHostPort(host, port)
}

// adopt takes over the id of the cluster that has found us. Our own, once known, never changes: peers of another are
// refused by their hello, or here if we have learnt it since.
func (m *membership) adopt(id uuid.UUID) error {
	m.raftMu.Lock()
	defer m.raftMu.Unlock()
	return m.adoptLocked(id)
}

// adoptLocked is adopt for one that holds raftMu.
func (m *membership) adoptLocked(id uuid.UUID) error {
	if own := uuid.UUID(m.identity().clusterID); id == own || id == (uuid.UUID{}) {
		return nil
	} else if own != (uuid.UUID{}) {
		return errOtherCluster
	}
	if err := m.node.store.Local().Put(clusterIDKey, []byte(id.String())); err != nil {
		return fmt.Errorf("noting the cluster's id: %w", err)
	}
	m.mu.Lock()
	m.clusterID = id
	m.mu.Unlock()
	m.tell()
	return nil
}

// found makes this node's empty store a cluster of one, with an id of its own, unless another cluster has found us
// meanwhile.
func (m *membership) found() error {
	if founded, err := m.makeCluster(); !founded || err != nil {
		return err
	}
	return m.enlist()
}

// makeCluster writes what makes the store a cluster. The id comes last: a store with a state and no id is given one at
// the next start; with an id and no state it would wait for ever for those who have a copy.
func (m *membership) makeCluster() (founded bool, err error) {
	m.raftMu.Lock()
	defer m.raftMu.Unlock()
	if m.identity().clusterID != [16]byte{} {
		return false, nil
	}
	if err := m.node.bootstrap(); err != nil {
		return false, err
	}
	return true, m.adoptLocked(uuid.New())
}

// enlist starts the replica if there is none.
func (m *membership) enlist() error {
	_, err := m.enlisted()
	return err
}

// enlisted gives the way in of the running replica, which it starts if there is none.
func (m *membership) enlisted() (*raftStream, error) {
	m.raftMu.Lock()
	defer m.raftMu.Unlock()
	n := m.node
	if m.ctx.Err() != nil {
		return nil, errEnding
	}
	if n.running.Load() != nil {
		return m.stream, nil
	}
	if err := n.store.Local().Put(removedKey, nil); err != nil {
		return nil, err
	}
	stream := newRaftStream(m.port, string(n.id), func(from string) { m.ended(from) })
	inner := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: stream, MaxPool: raftPool, Timeout: rpcTimeout, Logger: newRaftLogger(n.log), MsgpackUseNewTimeFormat: true,
	})
	r, err := n.startReplica(inner, m)
	if err != nil {
		return nil, errors.Join(err, inner.Close())
	}
	m.stream = stream
	n.running.Store(r)
	m.born()
	m.wait("")
	m.tell()
	return stream, nil
}

// wait notes what keeps this node from being a member.
func (m *membership) wait(why string) {
	m.mu.Lock()
	m.waiting = why
	m.mu.Unlock()
}

// leads is told when this node's replica is active in a term, and when it is no longer, as 0: while it is, it keeps the
// roles.
func (m *membership) leads(r *replica, term uint64) {
	m.mu.Lock()
	m.reconciling()
	m.reconciling = func() {}
	before := m.reconciled
	if term == 0 || m.ctx.Err() != nil {
		m.mu.Unlock()
		return
	}
	ctx, stop := context.WithCancel(m.ctx)
	done := make(chan struct{})
	m.reconciling, m.reconciled = stop, done
	m.mu.Unlock()
	m.push(term)
	timing := defaultRoleTiming
	if m.config.seams.roles != nil {
		timing = *m.config.seams.roles
	}
	go func() {
		defer close(done)
		if before != nil {
			<-before
		}
		newRoles(rolesConfig{
			node: string(m.node.id), maxVoters: m.config.MaxVoters, raft: rolesRaft{r.raft, r, term}, configuration: m.committed,
			members: m.gossip.members, changed: m.gossip.changed, progress: m.progress, answers: m.vet, log: m.node.log, timing: timing,
		}).reconcileRoles(ctx)
	}()
}

// progress is how far the servers of the configuration have come, if this node leads.
func (m *membership) progress() map[string]peerProgress {
	r := m.node.running.Load()
	if r == nil {
		return nil
	}
	_, infos := r.transport.insync.infos()
	progress := make(map[string]peerProgress, len(infos))
	for _, i := range infos {
		progress[string(i.ID)] = peerProgress{match: i.Match, contact: i.Contact, steady: i.Steady}
	}
	return progress
}

// vet asks a node whether it is of our cluster. One that knows no cluster yet becomes ours.
func (m *membership) vet(ctx context.Context, node string) error {
	f, err := m.status.ask(ctx, node)
	if own := uuid.UUID(m.identity().clusterID); err == nil && f.ClusterID != own && f.ClusterID != uuid.Nil {
		return errOtherCluster
	}
	return err
}

// roomy asks a node whether there is room on its disk; no answer is no.
func (m *membership) roomy(node string) bool {
	ctx, cancel := context.WithTimeout(m.ctx, vetTimeout)
	defer cancel()
	f, err := m.status.ask(ctx, node)
	return err == nil && f.Room
}

// committed is the newest configuration that raft has committed.
func (m *membership) committed() (index uint64, c raft.Configuration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.index, m.configuration
}

// leave has this node taken out of raft's configuration. One without a replica only tells the others, who then do not make
// it a standby, and says goodbye in close: its end is no failure.
func (m *membership) leave(ctx context.Context) error {
	if m.node.running.Load() == nil {
		m.mu.Lock()
		m.leaving = true
		m.mu.Unlock()
		m.tell()
		return nil
	}
	return leaver{
		node: string(m.node.id), members: m.gossip.members,
		announce: func() error {
			m.mu.Lock()
			m.leaving = true
			m.mu.Unlock()
			return m.gossip.setTags(m.tags())
		},
		enlisted: func() bool {
			_, c := m.committed()
			return m.node.running.Load() != nil && suffrage(c, m.node.id) != ""
		},
	}.leave(ctx)
}

// ended is told of an incoming raft connection that the other side has closed.
func (m *membership) ended(from string) {
	if r := m.node.running.Load(); r != nil {
		r.elections.ended(from)
	}
}

// alive says whether gossip has heard nothing bad of a node.
func (m *membership) alive(node string) bool {
	for _, other := range m.gossip.members() {
		if other.ID == node {
			return other.alive()
		}
	}
	return false
}

// gone says whether it is certain that a node which led us does so no more: nobody is there, or it says so itself, having
// been started again meanwhile.
func (m *membership) gone(node string) bool {
	if m.port.refuses(node) {
		return true
	}
	ctx, cancel := context.WithTimeout(m.ctx, probeTimeout)
	defer cancel()
	f, err := m.status.ask(ctx, node)
	return err == nil && f.Leader != node
}

// dismiss ends the replica: the others have taken this node out of the configuration. A voter that did not know would
// call elections for ever (hashicorp/raft#524).
func (m *membership) dismiss(r *replica) {
	m.raftMu.Lock()
	defer m.raftMu.Unlock()
	n := m.node
	if m.ctx.Err() != nil || !n.running.CompareAndSwap(r, nil) {
		return
	}
	n.log.Info("this sidecar is no longer a member of the cluster's raft configuration; it forwards")
	if err := n.store.Local().Put(removedKey, []byte{1}); err != nil {
		n.log.Warn("noting the removal", "err", err)
	}
	if err := r.shut(n.waitsFor); err != nil {
		n.log.Warn("ending the replica", "err", err)
	}
	m.mu.Lock()
	m.configuration, m.index, m.counted = raft.Configuration{}, 0, 0
	m.mu.Unlock()
	m.tell()
}

// acceptRaft takes a raft connection. It comes from a leader that counts us in, or from a candidate.
func (m *membership) acceptRaft(conn net.Conn, from peerIdentity) {
	<-m.opened
	err := m.adopt(from.clusterID)
	var stream *raftStream
	if err == nil {
		stream, err = m.enlisted()
	}
	if err != nil {
		if !errors.Is(err, errEnding) {
			m.node.log.Error("becoming a member", "from", from.node, "err", err)
		}
		_ = conn.Close()
		return
	}
	stream.take(conn, from)
}

// acceptForward takes a connection with requests of another sidecar's clients.
func (m *membership) acceptForward(conn net.Conn, from peerIdentity) {
	if m.config.Forwarded == nil {
		_ = conn.Close()
		return
	}
	m.config.Forwarded(conn, from.node)
}

// configured is told of each configuration that raft has committed, on the fsm's goroutine. That one does not have us is
// no reason to go: it may be of the past that a node which was taken in again catches up with.
func (m *membership) configured(index uint64, c raft.Configuration) {
	m.mu.Lock()
	m.configuration, m.index = c, index
	if suffrage(c, m.node.id) != "" {
		m.counted = index
	}
	m.mu.Unlock()
	select {
	case m.reconfigured <- struct{}{}:
	default:
	}
	m.tell()
	if r := m.node.running.Load(); r != nil {
		if term, leading := r.leadership(); leading {
			m.push(term)
		}
	}
}

// push tells everyone who belongs to the configuration. Who is taken out hears of it no more through raft.
func (m *membership) push(term uint64) {
	m.mu.Lock()
	index, ids := m.index, make([]string, 0, len(m.configuration.Servers))
	for _, s := range m.configuration.Servers {
		ids = append(ids, string(s.ID))
	}
	m.mu.Unlock()
	m.status.pushConfiguration(term, index, ids)
}

// followConfiguration ends our replica when a leader says that we are out, by a configuration that is newer than any
// that has us here. Should one be told so late that we are in again, the leader's next connection starts it anew.
func (m *membership) followConfiguration() {
	for {
		_, index, ids, changed := m.status.configuration()
		if r := m.node.running.Load(); r != nil && len(ids) > 0 && !slices.Contains(ids, string(m.node.id)) {
			if in := m.countedIn(r); in > 0 && index > in {
				m.dismiss(r)
			}
		}
		select {
		case <-changed:
		case <-m.ctx.Done():
			return
		}
	}
}

// countedIn is the index of the newest configuration here that has us, committed or not; 0: there is none yet.
func (m *membership) countedIn(r *replica) uint64 {
	newest := r.raft.GetConfiguration() // answered at once
	m.mu.Lock()
	defer m.mu.Unlock()
	if suffrage(newest.Configuration(), m.node.id) != "" {
		return max(m.counted, newest.Index())
	}
	return m.counted
}

// followGossip keeps the status streams on whoever is a voter: by its own word in gossip, by the configuration that we
// have, and by the newest that a leader has told. Gossip alone may take half a minute, until the next exchange of all
// there is, to bring a change: meanwhile we would not hear of a voter that has become active.
func (m *membership) followGossip() {
	for {
		changed := m.gossip.changed()
		_, _, told, retold := m.status.configuration()
		m.mu.Lock()
		configuration := m.configuration
		m.mu.Unlock()
		var voters []string
		r := m.node.running.Load()
		for _, other := range m.gossip.members() {
			if other.State == gossipLeaving && r != nil {
				r.transport.insync.leaving(raft.ServerID(other.ID), time.Now())
			}
			if other.ID != string(m.node.id) && other.alive() && (other.Tags[tagRole] == RoleVoter ||
				suffrage(configuration, raft.ServerID(other.ID)) == RoleVoter || slices.Contains(told, other.ID)) {
				voters = append(voters, other.ID)
			}
		}
		m.status.setVoters(voters)
		select {
		case <-changed:
		case <-retold:
		case <-m.reconfigured:
		case <-m.ctx.Done():
			return
		}
	}
}

// tell has the tags sent.
func (m *membership) tell() {
	select {
	case m.retag <- struct{}{}:
	default:
	}
}

// keepTags sends the tags when they have changed: serf waits until somebody has them.
func (m *membership) keepTags() {
	for {
		select {
		case <-m.retag:
		case <-m.ctx.Done():
			return
		}
		if err := m.gossip.setTags(m.tags()); err != nil && m.ctx.Err() == nil {
			m.node.log.Debug("telling the others what we are", "err", err)
		}
	}
}

// tags are what others see of us through gossip.
func (m *membership) tags() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	tags := map[string]string{tagRole: m.roleLocked()}
	if m.clusterID != (uuid.UUID{}) {
		tags[tagClusterID] = m.clusterID.String()
	}
	if m.leaving {
		tags[tagLeaving] = "1"
	}
	return tags
}

// roleLocked is our role by the newest configuration that was committed; the caller holds mu.
func (m *membership) roleLocked() string {
	if m.node.running.Load() == nil {
		return RoleForwarder
	}
	if role := suffrage(m.configuration, m.node.id); role != "" {
		return role
	}
	return RoleForwarder
}

// suffrage gives the role that a configuration gives to a node, "" for none.
func suffrage(c raft.Configuration, id raft.ServerID) string {
	for _, s := range c.Servers {
		switch {
		case s.ID != id:
		case s.Suffrage == raft.Voter:
			return RoleVoter
		default:
			return RoleStandby
		}
	}
	return ""
}

// retire lets no replica be started any more.
func (m *membership) retire() {
	m.cancel()
	m.raftMu.Lock() // whoever is starting one has done so
	defer m.raftMu.Unlock()
}

// close ends everything but the replica, which must be at its end already. waitsFor is told of each step.
func (m *membership) close(waitsFor func(rung string)) error {
	var err error
	if m.gossip != nil {
		waitsFor("gossip")
		m.mu.Lock()
		leaving := m.leaving
		m.mu.Unlock()
		if leaving {
			err = m.gossip.leave()
		}
		err = errors.Join(err, m.gossip.close())
	}
	if m.status != nil {
		waitsFor("status streams")
		m.status.close()
	}
	if m.port != nil {
		waitsFor("connections at the peer port")
		err = errors.Join(err, m.port.close())
	}
	waitsFor("whoever follows gossip and raft's configuration")
	m.workers.Wait()
	m.mu.Lock()
	reconciled := m.reconciled
	m.mu.Unlock()
	if reconciled != nil {
		waitsFor("whoever keeps the roles")
		<-reconciled
	}
	return err
}

// facts are what this node says of itself to one that asks.
func (m *membership) facts() facts {
	<-m.opened
	m.mu.Lock()
	f := facts{ClusterID: m.clusterID, Role: m.roleLocked(), Expect: m.config.BootstrapExpect, Version: m.config.Version}
	m.mu.Unlock()
	fresh, err := m.node.store.Fresh()
	f.HasState = err != nil || !fresh
	f.Room = m.node.store.Roomy()
	if r := m.node.running.Load(); r != nil {
		f.Term = r.raft.CurrentTerm()
		f.LastIndex, f.LastTerm = lastEntry(r.raft)
		_, id := r.raft.LeaderWithID()
		f.Leader = string(id)
	} else if !f.HasState && m.birth != nil {
		f.Leader = m.birth.endorsement()
	}
	return f
}

// track fills in what only the leader knows of its replicas.
func (m *membership) track(infos map[string]*MemberInfo) {
	r := m.node.running.Load()
	if r == nil {
		return
	}
	if _, leading := r.leadership(); !leading {
		return
	}
	last, replicas := r.transport.insync.infos()
	for _, p := range replicas {
		if info := infos[string(p.ID)]; info != nil {
			info.Tracked, info.InSync = true, p.InSync
			info.Lag = p.lag(last)
			info.LastContact = -1
			if !p.Contact.IsZero() {
				info.LastContact = time.Since(p.Contact)
			}
		}
	}
	if own := infos[string(m.node.id)]; own != nil {
		own.Tracked, own.InSync = true, true
	}
}
