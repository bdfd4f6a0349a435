package replicate

import "time"

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
	LastContact time.Duration // since it last answered the active sidecar
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
