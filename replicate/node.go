package replicate

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// closeTimeout bounds Close: raft cannot be stopped while it writes, and a dead disk may keep it for ever.
const closeTimeout = 15 * time.Second

// ErrCloseHangs is what Close gives up with; the error that wraps it names what it waited for. What goes on then must end
// with the process, as after a kill.
var ErrCloseHangs = errors.New("given up; nothing acknowledged is lost, it was on disk before")

// Config of a Node. Zero is not a default: DefaultConfig is.
type Config struct {
	// Dir is the data directory; "" keeps everything in memory.
	Dir string
	// Fsync false acknowledges what the operating system has, not the disk: safe against kill -9, not a power cut.
	Fsync bool
	// RaftTimeout is raft's election time-out.
	RaftTimeout time.Duration
	// MinFree is how many bytes must stay free on the disk for entries to be taken; 0 is no guard.
	MinFree int64
	// Quarantine: a damaged directory is moved aside, within itself, and the node starts empty. Otherwise Open fails.
	Quarantine bool
	// Acks says which copies a reply waits for.
	Acks Acks
	// Cluster is how this node finds others; nil: it is alone, and nobody can join it.
	Cluster *ClusterConfig
	Logger  *slog.Logger
	Metrics *tracing.Metrics
}

// DefaultConfig keeps its data in dir.
func DefaultConfig(dir string) Config {
	return Config{Dir: dir, Fsync: true, RaftTimeout: 500 * time.Millisecond, MinFree: 64 << 20}
}

// Node is this sidecar's part in the cluster: its store, its way to the others, and, while it is a member of raft's
// configuration, a replica.
type Node struct {
	config Config
	log    *slog.Logger
	store  *store.Store
	id     raft.ServerID

	events  chan Event
	entries chan Entry

	running    atomic.Pointer[replica] // nil on a forwarder
	membership *membership             // nil: alone

	started chan struct{} // Open is done
	stop    chan struct{}
	ending  sync.Once
	closing atomic.Pointer[string] // what dismantle waits for
	ended   chan struct{}
	err     error // why it ended by itself; read after ended
}

// Open opens the store and starts raft. An empty store becomes a cluster of one. The first event is Reset.
func Open(c Config) (*Node, error) {
	if c.RaftTimeout < 10*time.Millisecond {
		return nil, fmt.Errorf("raft time-out of %v is too short: at least 10ms", c.RaftTimeout)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	n := &Node{
		config:  c,
		log:     c.Logger,
		events:  make(chan Event, 16),
		entries: make(chan Entry),
		started: make(chan struct{}),
		stop:    make(chan struct{}),
		ended:   make(chan struct{}),
	}
	opt := store.Options{Dir: c.Dir, Fsync: c.Fsync, MinFree: c.MinFree, Quarantine: c.quarantines(), Logger: c.Logger, OnFatal: n.fatal}
	if c.Cluster != nil {
		opt.Space = c.Cluster.seams.space
	}
	s, err := store.Open(opt)
	if err != nil {
		return nil, err
	}
	n.store, n.id = s, raft.ServerID(s.ID())
	if c.Cluster == nil {
		err = n.openAlone()
	} else {
		err = n.openMember(*c.Cluster)
	}
	close(n.started)
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// quarantines says whether a damaged store is moved aside: with others to take the state from it may be, as a new node;
// a node that is alone would lose everything without a word.
func (c *Config) quarantines() bool {
	return c.Quarantine || c.Cluster != nil && len(c.Cluster.Join) > 0
}

// openAlone runs a cluster of one that no other node can reach.
func (n *Node) openAlone() error {
	if err := n.bootstrap(); err != nil {
		return err
	}
	_, inner := raft.NewInmemTransport(raft.ServerAddress(n.id))
	r, err := n.startReplica(inner, nil)
	if err != nil {
		return err
	}
	n.running.Store(r)
	if voters, own := voters(r.transport.configuration(), n.id); !own || voters > 1 {
		n.log.Error("this sidecar's data belong to a cluster, and it was started without a way to the others: no group call is answered; "+
			"start it with --gossip and --peer on free ports, or see recover if the others are lost for good", "voters", voters)
	}
	return nil
}

// bootstrap makes a store without any state a cluster of one. The address is the id: where a peer lives is looked up
// when it is dialled.
func (n *Node) bootstrap() error {
	fresh, err := n.store.Fresh()
	if err != nil || !fresh {
		return err
	}
	return n.store.Bootstrap(raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: n.id, Address: raft.ServerAddress(n.id)}}})
}

// Events are what happens to the log, in its order. Closed when the node has ended.
func (n *Node) Events() <-chan Event { return n.events }

// Entries takes the next entry while fewer than EntriesInFlight are in flight.
func (n *Node) Entries() chan<- Entry { return n.entries }

// Latest gives the newest record of each key, tombstones left out, in no particular order. A record whose Applied
// event is still to come may be among them.
func (n *Node) Latest(yield func(Record) error) error { return n.store.Latest(yield) }

// Read gives the records of a partition from an offset on; see store.Store.Read.
func (n *Node) Read(partition int32, offset int64, yield func(store.Stored) bool) error {
	return n.store.Read(partition, offset, yield)
}

// Local keeps this node's own small keys.
func (n *Node) Local() *store.Local { return n.store.Local() }

// ID is this node's: a UUID kept in the store.
func (n *Node) ID() string { return string(n.id) }

// Fence calls done with nil once it is certain that this replica led in term after Fence was called, and else with an
// error. With one voter it does so before it returns.
func (n *Node) Fence(term uint64, done func(error)) {
	r := n.running.Load()
	if r == nil {
		done(ErrNotLeader)
		return
	}
	r.transport.fences.fence(term, done)
}

// Resign ends this replica's leadership of term and forces a new term: the activation of the old one has failed.
// It does nothing if that term is over, and does not wait.
func (n *Node) Resign(term uint64) {
	if r := n.running.Load(); r != nil {
		r.resign(term)
	}
}

// Full says that the disk has no room for entries now, or soon will not: one that is offered may fail, and its term with
// it. A leader hands its lead over meanwhile if a majority of the voters has room.
func (n *Node) Full() bool { return n.store.Full() }

// send delivers an event; false if the node is ending.
func (n *Node) send(e Event) bool {
	select {
	case <-n.stop:
		return false // even where there is room
	default:
	}
	select {
	case n.events <- e:
		return true
	case <-n.stop:
		return false
	}
}

// fatal ends the node by itself.
func (n *Node) fatal(err error) {
	<-n.started
	_ = n.end(err)
}

// Err is why the node ended, once Events is closed: nil after Close.
func (n *Node) Err() error {
	select {
	case <-n.ended:
		return n.err
	default:
		return nil
	}
}

// Close flushes and stops, or gives up with ErrCloseHangs. Events that nobody has taken are lost; what they told is
// replayed at the next Open.
func (n *Node) Close() error {
	err := n.end(nil)
	<-n.ended
	return err
}

// end stops everything, or what can be stopped in time.
func (n *Node) end(cause error) (err error) {
	n.ending.Do(func() {
		close(n.stop)
		timeout := closeTimeout
		if c := n.config.Cluster; c != nil && c.seams.close > 0 {
			timeout = c.seams.close
		}
		n.waitsFor("the store")
		closed := make(chan error, 1)
		go func() { closed <- n.dismantle() }()
		select {
		case err = <-closed:
		case <-time.After(timeout):
			rung := *n.closing.Load()
			n.log.Error("closing hangs and is given up", "waits_for", rung, "after", timeout)
			err = fmt.Errorf("closing waits for %s: %w", rung, ErrCloseHangs)
		}
		n.err = cause
		if cause != nil {
			n.log.Error("replication has ended", "err", cause)
		}
		close(n.ended)
		close(n.events) // after ended: whoever sees this close may ask Err; nobody sends after stop
	})
	return err
}

// waitsFor notes which rung of the ladder down is next: if closing hangs, there it does.
func (n *Node) waitsFor(rung string) { n.closing.Store(&rung) }

// dismantle stops everything, bottom last.
func (n *Node) dismantle() (err error) {
	n.store.Release()
	if n.membership != nil {
		n.waitsFor("a replica that is being started or dismissed")
		n.membership.retire()
	}
	if r := n.running.Load(); r != nil {
		err = r.shut(n.waitsFor)
	}
	if n.membership != nil {
		err = errors.Join(err, n.membership.close(n.waitsFor))
	}
	n.waitsFor("the store, which flushes")
	return errors.Join(err, n.store.Close())
}
