package replicate

import (
	"context"
	"maps"
	"net"
	"slices"
	"time"

	"github.com/google/uuid"
)

// Roles of a sidecar in its cluster.
const (
	RoleVoter     = "voter"     // its vote counts, and its copy is one of the majority that is waited for
	RoleStandby   = "standby"   // has a copy, and takes a voter's place
	RoleForwarder = "forwarder" // has no copy
)

// MemberInfo is one sidecar of the cluster, as another sees it.
type MemberInfo struct {
	ID     string // node id
	State  string // what gossip thinks: alive, leaving, left, failed; "" when gossip does not know it
	Role   string // RoleVoter, RoleStandby, RoleForwarder; "" where it is not known
	Active bool   // its coordinator answers, as far as is known
	// Tracked says that the next three hold: the active sidecar alone knows them, of voters and standbys.
	Tracked     bool
	Lag         uint64        // entries that it lacks
	InSync      bool          // commits wait for it
	LastContact time.Duration // since it last answered the active sidecar; negative: never in its term
	// What it says of itself; "" where gossip has not told it yet.
	Zone, Machine, Version, GossipAddr, PeerAddr string
}

// NodeStatus is what a node says of itself and of its cluster.
type NodeStatus struct {
	ClusterID            string // UUID; "" until it is known
	Role                 string // RoleVoter, RoleStandby, RoleForwarder
	Term                 uint64 // of the activation that is known
	Active               string // node id of the active sidecar; "" when none is known
	GossipAddr, PeerAddr string // bound; "" without peers
	// Waiting says what keeps a node that belongs to no cluster yet from being born or taken in; "" for a member.
	Waiting string
}

// Active gives who is active as far as is known, perhaps this node itself, and in which term; node is "" when nobody is
// known. changed is closed at the next change. Alone, nobody ever is.
func (n *Node) Active() (term uint64, node string, changed <-chan struct{}) {
	if n.membership == nil {
		return 0, "", nil
	}
	return n.membership.status.active()
}

// Announce tells the other sidecars that this one's coordinator answers in term, or no longer does.
func (n *Node) Announce(active bool, term uint64) {
	if n.membership != nil {
		n.membership.status.publish(active, term)
	}
}

// Dial connects to another sidecar for forwarded requests.
func (n *Node) Dial(ctx context.Context, node string) (net.Conn, error) {
	if n.membership == nil {
		return nil, errUnknownNode
	}
	conn, _, err := n.membership.port.dial(ctx, node, peerForward)
	return conn, err
}

// Leave has this node taken out of raft's configuration before it exits: it hands its leadership over, and its vote to
// another where there is one. It goes on forwarding. Alone, or when everybody leaves at once, there is nothing to do.
func (n *Node) Leave(ctx context.Context) error {
	if n.membership == nil {
		return nil
	}
	return n.membership.leave(ctx)
}

// GossipAddr is where others find this node, "" without peers.
func (n *Node) GossipAddr() string {
	if n.membership == nil {
		return ""
	}
	return n.membership.gossip.addr()
}

// PeerAddr is what others are told of the peer port, "" without peers.
func (n *Node) PeerAddr() string {
	if n.membership == nil {
		return ""
	}
	return n.membership.peerAddr()
}

// Status says what this node is.
func (n *Node) Status() NodeStatus {
	m := n.membership
	if m == nil {
		s := NodeStatus{Role: RoleVoter}
		if r := n.running.Load(); r != nil {
			if term, leading := r.leadership(); leading {
				s.Term, s.Active = term, string(n.id)
			}
		}
		return s
	}
	s := NodeStatus{GossipAddr: n.GossipAddr(), PeerAddr: n.PeerAddr()}
	s.Term, s.Active, _ = n.Active()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.clusterID != (uuid.UUID{}) {
		s.ClusterID = m.clusterID.String()
	}
	s.Role = m.roleLocked()
	if s.Role == RoleForwarder {
		s.Waiting = m.waiting
	}
	return s
}

// Members gives the sidecars of the cluster, by id: those that gossip knows and those of raft's configuration.
func (n *Node) Members() []MemberInfo {
	m := n.membership
	if m == nil {
		s := n.Status()
		return []MemberInfo{{ID: n.ID(), State: gossipAlive.String(), Role: s.Role, Active: s.Active != "", Tracked: true, InSync: true}}
	}
	_, active, _ := n.Active()
	m.mu.Lock()
	configuration := m.configuration
	m.mu.Unlock()
	// A forwarder has heard from the leader who belongs to it; tags of the dead are those of their lives.
	_, _, told, _ := m.status.configuration()
	infos := map[string]*MemberInfo{}
	for _, g := range m.gossip.members() {
		infos[g.ID] = &MemberInfo{
			ID: g.ID, State: g.State.String(), Role: g.Tags[tagRole], Zone: g.Tags[tagZone], Machine: g.Tags[tagMachine],
			Version: g.Tags[tagVersion], GossipAddr: g.GossipAddr, PeerAddr: g.PeerAddr,
		}
		if len(configuration.Servers) > 0 || len(told) > 0 && !slices.Contains(told, g.ID) { // newer than tags
			infos[g.ID].Role = RoleForwarder
		}
	}
	for _, s := range configuration.Servers {
		if infos[string(s.ID)] == nil {
			infos[string(s.ID)] = &MemberInfo{ID: string(s.ID)}
		}
		infos[string(s.ID)].Role = suffrage(configuration, s.ID)
	}
	m.track(infos)
	all := make([]MemberInfo, 0, len(infos))
	for _, id := range slices.Sorted(maps.Keys(infos)) {
		infos[id].Active = id == active
		all = append(all, *infos[id])
	}
	return all
}
