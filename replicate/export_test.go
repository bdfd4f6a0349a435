package replicate

import (
	"context"
	"net"

	"github.com/hashicorp/raft"
)

// DialBy makes a node reach the peer ports of others by dial.
func (c *ClusterConfig) DialBy(dial func(ctx context.Context, network, addr string) (net.Conn, error)) {
	c.seams.dial = dial
}

// HandOver hands the leadership of a term to a voter, as the keeper of the roles does.
func (n *Node) HandOver(term uint64, to string) error {
	r := n.running.Load()
	return rolesRaft{r.raft, r, term}.LeadershipTransferToServer(raft.ServerID(to), raft.ServerAddress(to)).Error()
}
