package replicate

import (
	"context"
	"net"
	"time"

	"github.com/hashicorp/raft"
)

// Acks says which copies a reply waits for (--commit-acks).
type Acks uint8

const (
	// AcksAll: a majority of the voters, and besides them every in-sync replica.
	AcksAll Acks = iota
	// AcksQuorum: a majority of the voters.
	AcksQuorum
)

// ClusterConfig is what a node needs to find the others and to be found.
type ClusterConfig struct {
	Name         string // compared before anything else is exchanged
	Gossip, Peer string // host:port to bind; port 0 takes any free one
	Advertise    string // host that peers are told; "" is the bound one
	// Join are gossip addresses, host:port, of other sidecars. A name stands for all its addresses.
	Join []string
	// BootstrapExpect is how many sidecars without state must have found each other for one of them to found the cluster;
	// 0: never by number.
	BootstrapExpect int
	// Arbiter decides who founds the cluster: it gives the first proposal that it was ever asked for, a node id; nil: none.
	Arbiter   func(ctx context.Context, proposal string) (winner string, err error)
	MaxVoters int // 3 or 5
	// Zone and Machine are what voters are spread over; Version is shown.
	Zone, Machine, Version string
	Security               Security
	// Forwarded takes over an incoming connection for forwarded requests, from the node of that id.
	Forwarded func(conn net.Conn, from string)

	seams seams
}

// seams are where tests put faults, and a hurry; in a sidecar that serves anybody there are none.
type seams struct {
	dial   func(ctx context.Context, network, addr string) (net.Conn, error) // to peer ports
	faults faults                                                            // of raft's requests
	log    func(raft.LogStore) raft.LogStore                                 // round raft's log
	gossip *gossipTiming
	birth  *birthTiming
	roles  *roleTiming
	close  time.Duration                                   // in closeTimeout's place
	space  func(dir string) (free, total int64, err error) // on disk
}

// Security of gossip and of the peer port. Without any of it peers are accepted on loopback addresses only, unless
// Insecure is set.
type Security struct {
	// Keyring holds keys for gossip, of 16, 24 or 32 bytes; the first encrypts, all decrypt.
	Keyring [][]byte
	// CertFile, KeyFile and CAFile (PEM) turn mutual TLS on; they are read again when they have changed.
	CertFile, KeyFile, CAFile string
	// Token is a secret that all sidecars of the cluster share; it authenticates, but does not encrypt the peer port.
	Token    string
	Insecure bool
}
