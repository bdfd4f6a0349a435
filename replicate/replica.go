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

// offerEvery is how often a leader whose disk is full asks the other voters whether theirs has room.
const offerEvery = 2 * time.Second

// replica is one run of raft over the store: from the time this node is a member of the cluster's configuration, or
// about to become one, until it is removed or the node ends. A node has one at a time at most; a forwarder has none.
type replica struct {
	log       *slog.Logger
	store     *store.Store
	raft      *raft.Raft
	transport *transport
	elections *elections
	fsm       *fsm
	id        raft.ServerID
	retry     time.Duration
	send      func(Event) bool // to the node's events; false: the node is ending
	entries   <-chan Entry
	leads     func(r *replica, term uint64) // told of a term in which we are active, and of its end, as 0; nil: nobody wants to know
	roomy     func(node string) bool        // asks a voter whether there is room on its disk

	inFlight chan pending
	slots    chan struct{} // one for each entry in flight
	turn     chan struct{} // has a value while an entry is given to raft, or leadership is handed over
	// unanswered are the entries in flight.
	unanswered atomic.Int32

	failedTerm atomic.Uint64 // an entry of it failed
	resigned   atomic.Uint64 // the newest term to resign
	wake       chan struct{} // resigned has changed
	offering   atomic.Bool   // makeWay is at it

	stop    chan struct{}
	workers sync.WaitGroup
}

// startReplica brings raft up over what the store holds, through the transport given. m, which may be nil, is
// told of its configuration and leadership.
func (n *Node) startReplica(inner raft.Transport, m *membership) (*replica, error) {
	r := &replica{
		log: n.log, store: n.store, id: n.id, retry: n.config.RaftTimeout, send: n.send, entries: n.entries,
		inFlight: make(chan pending, EntriesInFlight),
		slots:    make(chan struct{}, EntriesInFlight),
		turn:     make(chan struct{}, 1),
		wake:     make(chan struct{}, 1),
		stop:     make(chan struct{}),
	}
	r.fsm = &fsm{store: n.store, send: n.send, fatal: func(err error) { go n.fatal(err) }}
	if m != nil {
		r.fsm.configured, r.leads, r.roomy = m.configured, m.leads, m.roomy
	}
	r.fsm.resume()
	r.fsm.tellConfiguration()
	if !n.send(Event{Kind: Reset}) {
		return nil, errEnding
	}
	r.transport = newTransport(inner)
	r.transport.insync.logger, r.transport.insync.lease = n.log, raftConfig(n.config, n.id).LeaderLeaseTimeout
	if n.config.Acks == AcksAll {
		r.fsm.stored = r.transport.insync.has
	}
	var inLog raft.LogStore = n.store.RaftLog()
	if m != nil {
		r.transport.faults = m.config.seams.faults
		if m.config.seams.log != nil {
			inLog = m.config.seams.log(inLog)
		}
	}
	log := r.transport.watch(inLog)
	var err error
	r.raft, err = raft.NewRaft(raftConfig(n.config, n.id), r.fsm, log, n.store.Stable(), n.store.Snapshots(), r.transport)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting raft: %w", err), r.transport.Close())
	}
	r.transport.attach(r.raft)
	if m != nil {
		r.elections = r.transport.elections(m.alive, m.gone, n.log)
	} else {
		r.elections = r.transport.elections(nil, nil, n.log)
	}
	go r.elections.lone() // returns when raft has heard it
	r.workers.Go(r.lead)
	r.workers.Go(r.acknowledge)
	r.workers.Go(r.append)
	r.workers.Go(r.settle)
	r.workers.Go(r.trim)
	return r, nil
}

// shut ends the run. Raft goes on until the workers have their answers: what is on its way to the fsm when raft is shut
// down is never answered. Nor is, as long as we lead, what the others have no room for: so we do not for long. waitsFor is
// told of each step.
func (r *replica) shut(waitsFor func(rung string)) error {
	waitsFor("raft to answer the entries on their way, which it does once its log is written")
	close(r.stop)
	resign := time.AfterFunc(2*r.retry, func() { r.transport.ending.Store(true) })
	r.workers.Wait()
	resign.Stop()
	waitsFor("raft to stop, which it does once what it reads or writes on disk is done")
	err := r.raft.Shutdown().Error()
	waitsFor("raft's requests on their way")
	return errors.Join(err, r.transport.Close())
}

func raftConfig(c Config, id raft.ServerID) *raft.Config {
	rc := raft.DefaultConfig()
	rc.LocalID = id
	rc.HeartbeatTimeout = c.RaftTimeout
	rc.ElectionTimeout = c.RaftTimeout
	// As long as the others wait for it: less gives up a leader whose answers take that long (each process on their way is
	// held up for 90 ms by a quota of a tenth of a core). No read may rest on it, but on a fence. The voters do not wait for
	// it: they vote for whoever was told to campaign (a transfer, an election of ours) although they know a leader. Raft
	// counts it from when answers come in, not from when it asked. And what went ahead (pipeline) it asks for when its own
	// write is done: it takes that for the time of an answer that may be as much older as the write took.
	rc.LeaderLeaseTimeout = c.RaftTimeout
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
	rc.Logger = newRaftLogger(c.Logger)
	return rc
}

// leadership gives the term, and whether we led in it at one moment between the two reads of it.
func (r *replica) leadership() (term uint64, leading bool) { return r.transport.leadership() }

// resign is Node.Resign.
func (r *replica) resign(term uint64) {
	for old := r.resigned.Load(); old < term && !r.resigned.CompareAndSwap(old, term); old = r.resigned.Load() {
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// acknowledge tells how far the in-sync replicas have come.
func (r *replica) acknowledge() {
	for {
		select {
		case <-r.transport.insync.advanced:
			term, index := r.transport.insync.stored()
			if !r.send(Event{Kind: Stored, Term: term, Index: index}) {
				return
			}
		case <-r.stop:
			return
		}
	}
}

// lead tells of activations. LeaderCh is only a hint: raft drops values nobody has read.
func (r *replica) lead() {
	again := time.NewTicker(r.retry)
	defer again.Stop()
	var active, gaveUp uint64
	for {
		select {
		case <-r.raft.LeaderCh():
		case <-r.wake:
			if term, leading := r.leadership(); leading && term == r.resigned.Load() && term != gaveUp {
				gaveUp = term
				go r.giveUp(term) // a transfer takes as long as it takes, and with a disk that hangs for ever
			}
		case <-again.C: // a barrier that failed while we went on leading
			if active != 0 && r.roomy != nil && r.store.Full() && r.offering.CompareAndSwap(false, true) {
				go r.makeWay(active) // as giveUp
			}
		case <-r.stop:
			if active != 0 {
				r.over(active)
				r.send(Event{Kind: Inactive, Term: active})
			}
			return
		}
		if active = r.follow(active); active == ended {
			return
		}
	}
}

func (r *replica) leadsIn(term uint64) bool {
	now, leading := r.leadership()
	return leading && now == term
}

// await waits; false: the run is at its end.
func (r *replica) await(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-r.stop:
		return false
	}
}

// ended is no term.
const ended = ^uint64(0)

// follow brings the activation told up to raft's leadership, and returns its term, 0 for none.
func (r *replica) follow(active uint64) uint64 {
	for {
		term, leading := r.leadership()
		if active != 0 && (!leading || term != active) {
			r.over(active)
			if !r.send(Event{Kind: Inactive, Term: active}) {
				return ended
			}
			active = 0
		}
		if !leading || term == active {
			return active
		}
		r.transport.insync.begin(term)
		// The barrier passes through the fsm: when it returns, every entry before has been handed on.
		if err := r.raft.Barrier(0).Error(); err != nil {
			r.log.Debug("barrier failed", "term", term, "err", err)
			if now, still := r.leadership(); !still || now == term {
				return active
			}
			continue
		}
		if r.fsm.ended.Load() {
			return ended // the barrier passed through an fsm that applies nothing any more
		}
		if now, still := r.leadership(); !still || now != term {
			continue
		}
		if !r.send(Event{Kind: Active, Term: term}) {
			return ended
		}
		active = term
		if r.leads != nil {
			r.leads(r, term)
		}
	}
}

// over ends what hangs on our leadership in a term.
func (r *replica) over(term uint64) {
	r.transport.fences.over(term)
	r.transport.insync.end(term)
	if r.leads != nil {
		r.leads(r, 0)
	}
}

// trim keeps raft's log within logBytes: raft's own threshold counts entries alone.
func (r *replica) trim() {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-r.stop:
			return
		}
		entries, bytes := r.store.RaftLog().Size()
		trailing := uint64(trailingEntries)
		if bytes > logBytes {
			trailing = max(64, entries*trailingBytes/uint64(bytes))
		}
		rc := r.raft.ReloadableConfig()
		if rc.TrailingLogs != trailing {
			rc.TrailingLogs = trailing
			if err := r.raft.ReloadConfig(rc); err != nil {
				r.log.Warn("setting how much of raft's log is kept", "err", err)
			}
		}
		if bytes <= logBytes {
			continue
		}
		if err := r.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
			r.log.Debug("taking a snapshot", "err", err)
		}
	}
}
