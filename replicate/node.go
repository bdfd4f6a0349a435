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
)

// Limits of raft's log: a snapshot, which flushes the tail, is taken after so many entries or bytes; of what it makes
// superfluous as much stays for followers that were away.
const (
	snapshotEntries = 8192
	trailingEntries = 10240
	logBytes        = 16 << 20
	trailingBytes   = 4 << 20
	trimEvery       = 2 * time.Second
)

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
	Logger     *slog.Logger
}

// DefaultConfig keeps its data in dir.
func DefaultConfig(dir string) Config {
	return Config{Dir: dir, Fsync: true, RaftTimeout: 500 * time.Millisecond, MinFree: 64 << 20}
}

// Node is this sidecar's replica.
type Node struct {
	log       *slog.Logger
	store     *store.Store
	raft      *raft.Raft
	transport *transport
	fsm       *fsm
	id        raft.ServerID
	retry     time.Duration

	events   chan Event
	entries  chan Entry
	inFlight chan pending
	slots    chan struct{} // one for each entry in flight

	failedTerm atomic.Uint64 // an entry of it failed
	resigned   atomic.Uint64 // the newest term to resign
	wake       chan struct{} // resigned has changed

	started chan struct{} // Open is done
	stop    chan struct{}
	workers sync.WaitGroup
	ending  sync.Once
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
		log:      c.Logger,
		retry:    c.RaftTimeout,
		events:   make(chan Event, 16),
		entries:  make(chan Entry),
		inFlight: make(chan pending, EntriesInFlight),
		slots:    make(chan struct{}, EntriesInFlight),
		wake:     make(chan struct{}, 1),
		started:  make(chan struct{}),
		stop:     make(chan struct{}),
		ended:    make(chan struct{}),
	}
	s, err := store.Open(store.Options{Dir: c.Dir, Fsync: c.Fsync, MinFree: c.MinFree, Quarantine: c.Quarantine, Logger: c.Logger, OnFatal: n.fatal})
	if err != nil {
		return nil, err
	}
	n.store, n.id = s, raft.ServerID(s.ID())
	if err := n.start(c); err != nil {
		return nil, errors.Join(fmt.Errorf("starting raft: %w", err), s.Close())
	}
	close(n.started)
	return n, nil
}

// start brings raft up.
func (n *Node) start(c Config) error {
	fresh, err := n.store.Fresh()
	if err != nil {
		return err
	}
	// The address is the id: where a peer lives is looked up when it is dialled.
	address := raft.ServerAddress(n.id)
	if fresh {
		err := n.store.Bootstrap(raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: n.id, Address: address}}})
		if err != nil {
			return err
		}
	}
	n.fsm = &fsm{store: n.store, send: n.send, fatal: func(err error) { go n.fatal(err) }}
	n.fsm.resume()
	n.events <- Event{Kind: Reset}
	_, inner := raft.NewInmemTransport(address)
	n.transport = newTransport(inner)
	n.raft, err = raft.NewRaft(raftConfig(c, n.id), n.fsm, n.store.RaftLog(), n.store.Stable(), n.store.Snapshots(), n.transport)
	if err != nil {
		return errors.Join(err, n.transport.Close())
	}
	n.workers.Go(n.lead)
	n.workers.Go(n.append)
	n.workers.Go(n.settle)
	n.workers.Go(n.trim)
	n.workers.Go(func() { n.transport.campaign(n.id) })
	return nil
}

func raftConfig(c Config, id raft.ServerID) *raft.Config {
	rc := raft.DefaultConfig()
	rc.LocalID = id
	rc.HeartbeatTimeout = c.RaftTimeout
	rc.ElectionTimeout = c.RaftTimeout
	rc.LeaderLeaseTimeout = c.RaftTimeout / 2
	rc.CommitTimeout = min(rc.CommitTimeout, c.RaftTimeout/4)
	rc.MaxAppendEntries = 64
	rc.SnapshotThreshold = snapshotEntries
	rc.TrailingLogs = trailingEntries
	rc.NoLegacyTelemetry = true
	rc.ShutdownOnRemove = false        // the node ends raft, in its own order
	rc.NoSnapshotRestoreOnStart = true // the store holds what the snapshot does
	// BatchApplyCh gives raft a buffer whose entries nobody answers when raft is shut down. Our one appender has at most
	// EntriesInFlight on their way and waits in Apply while raft writes, so raft gathers as much without it.
	rc.BatchApplyCh = false
	rc.Logger = &raftLogger{log: c.Logger}
	return rc
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
	if now, leading := n.leadership(); !leading || now != term {
		done(ErrNotLeader)
		return
	}
	done(nil)
}

// Resign ends this replica's leadership of term and forces a new term: the activation of the old one has failed.
// It does nothing if that term is over, and does not wait.
func (n *Node) Resign(term uint64) {
	for old := n.resigned.Load(); old < term && !n.resigned.CompareAndSwap(old, term); old = n.resigned.Load() {
	}
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// leadership gives the term, and whether we led in it at one moment between the two reads of it.
func (n *Node) leadership() (term uint64, leading bool) {
	term = n.raft.CurrentTerm()
	return term, n.raft.State() == raft.Leader && n.raft.CurrentTerm() == term
}

// lead tells of activations. LeaderCh is only a hint: raft drops values nobody has read.
func (n *Node) lead() {
	again := time.NewTicker(n.retry)
	defer again.Stop()
	var active, gaveUp uint64
	for {
		select {
		case <-n.raft.LeaderCh():
		case <-n.wake:
			if term, leading := n.leadership(); leading && term == n.resigned.Load() && term != gaveUp {
				gaveUp = term
				n.log.Debug("forcing a new term", "term", term)
				n.transport.campaign(n.id)
			}
		case <-again.C: // a barrier that failed while we went on leading
		case <-n.stop:
			return
		}
		if active = n.follow(active); active == ended {
			return
		}
	}
}

// ended is no term.
const ended = ^uint64(0)

// follow brings the activation told up to raft's leadership, and returns its term, 0 for none.
func (n *Node) follow(active uint64) uint64 {
	for {
		term, leading := n.leadership()
		if active != 0 && (!leading || term != active) {
			if !n.send(Event{Kind: Inactive, Term: active}) {
				return ended
			}
			active = 0
		}
		if !leading || term == active {
			return active
		}
		// The barrier passes through the fsm: when it returns, every entry before has been handed on.
		if err := n.raft.Barrier(0).Error(); err != nil {
			n.log.Debug("barrier failed", "term", term, "err", err)
			if now, still := n.leadership(); !still || now == term {
				return active
			}
			continue
		}
		if n.fsm.ended.Load() {
			return ended // the barrier passed through an fsm that applies nothing any more
		}
		if now, still := n.leadership(); !still || now != term {
			continue
		}
		if !n.send(Event{Kind: Active, Term: term}) {
			return ended
		}
		active = term
	}
}

// trim keeps raft's log within logBytes: raft's own threshold counts entries alone.
func (n *Node) trim() {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-n.stop:
			return
		}
		entries, bytes := n.store.RaftLog().Size()
		trailing := uint64(trailingEntries)
		if bytes > logBytes {
			trailing = max(64, entries*trailingBytes/uint64(bytes))
		}
		rc := n.raft.ReloadableConfig()
		if rc.TrailingLogs != trailing {
			rc.TrailingLogs = trailing
			if err := n.raft.ReloadConfig(rc); err != nil {
				n.log.Warn("setting how much of raft's log is kept", "err", err)
			}
		}
		if bytes <= logBytes {
			continue
		}
		if err := n.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
			n.log.Debug("taking a snapshot", "err", err)
		}
	}
}

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

// Close flushes and stops. Events that nobody has taken are lost; what they told is replayed at the next Open.
func (n *Node) Close() error {
	err := n.end(nil)
	<-n.ended
	return err
}

// end stops everything, bottom last.
func (n *Node) end(cause error) (err error) {
	n.ending.Do(func() {
		close(n.stop)
		n.store.Release()
		// Raft goes on until the workers have their answers: what is on its way to the fsm when raft is shut down is never
		// answered.
		n.workers.Wait()
		err = n.raft.Shutdown().Error()
		err = errors.Join(err, n.transport.Close(), n.store.Close())
		n.err = cause
		if cause != nil {
			n.log.Error("replication has ended", "err", cause)
		}
		close(n.ended)
		close(n.events) // after ended: whoever sees this close may ask Err
	})
	return err
}
