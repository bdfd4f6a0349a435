package replicate

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// raftProtocol is the version in the headers of requests that we make up ourselves.
const raftProtocol = raft.ProtocolVersionMax

// transport decorates raft's transport. It learns from the answers of other replicas what each of them has stored
// (insync) and whether they still took us for the leader when they were asked (fences), which raft tells nobody; it
// sends nothing while our own log write hangs (watchedLog); it puts requests into our own consumer, and has no
// heartbeat fast path. It needs an inner transport whose local address is the node id.
type transport struct {
	raft.Transport
	id     raft.ServerID
	fences *fences
	insync *insync
	raft   atomic.Pointer[raft.Raft] // nil until attach
	log    *watchedLog               // nil: not watched
	ending atomic.Bool               // the replica is: nothing is sent that would keep us leading
	faults faults                    // nil: none; tests set it before raft starts
	peers  sync.Map                  // raft.ServerID → *peerState

	pipelines sync.Map // *pipeline → nil: those that are open

	refused  atomic.Pointer[func(*raft.RequestVoteRequest)] // told of votes that our raft has refused
	consumer chan raft.RPC
	closing  sync.Once
	stop     chan struct{}

	mu      sync.Mutex
	closed  bool
	workers sync.WaitGroup // relay, and what spawn has begun
}

// faults are what tests do to requests on their way. A method may sleep: that is a delay.
type faults interface {
	// request says, before a request leaves, how often it is sent: 0 never, 2 twice. A request that is never sent fails
	// with errDropped.
	request(to raft.ServerID) (times int)
	// response says, when the answer is there, whether it arrives.
	response(from raft.ServerID) bool
}

// peerState is what the transport remembers of another replica.
type peerState struct {
	pinging atomic.Bool // ping's goroutine runs
	failed  atomic.Bool // the last request to it failed
}

var (
	_ raft.Transport   = (*transport)(nil)
	_ raft.WithPreVote = (*transport)(nil)
	_ raft.WithClose   = (*transport)(nil)
)

// errHung: our own log write has been running for longer than hungAfter, or the replica is ending.
var errHung = errors.New("the log write of this sidecar hangs, or it is about to end")

// errDropped is what a request dropped by faults fails with: a time-out, not a closed connection.
var errDropped error = droppedError{}

type droppedError struct{}

func (droppedError) Error() string   { return "dropped by a test" }
func (droppedError) Timeout() bool   { return true }
func (droppedError) Temporary() bool { return true }

func newTransport(inner raft.Transport) *transport {
	t := &transport{
		Transport: inner,
		id:        raft.ServerID(inner.LocalAddr()),
		consumer:  make(chan raft.RPC),
		stop:      make(chan struct{}),
	}
	t.insync = newInsync(t.configuration, t.leadership)
	t.fences = &fences{id: t.id, leadership: t.leadership, configuration: t.configuration, hung: t.hung, kick: t.ping}
	t.spawn(t.relay)
	return t
}

// spawn begins a goroutine that Close waits for.
func (t *transport) spawn(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.workers.Go(f)
	}
}

// watch gives the log that raft is to write through: the transport learns from it when entries were appended, who
// belongs to the configuration, and whether a write hangs. It is called before raft starts.
func (t *transport) watch(log raft.LogStore) raft.LogStore {
	t.log = &watchedLog{LogStore: log, insync: t.insync, ahead: t.ahead, base: time.Now()}
	return t.log
}

// attach makes raft's state known, right after it has started. Until then no fence holds and no replica is in sync.
func (t *transport) attach(r *raft.Raft) { t.raft.Store(r) }

// leadership gives the term, and whether we led in it at one moment between the two reads of it.
func (t *transport) leadership() (term uint64, leading bool) {
	r := t.raft.Load()
	if r == nil {
		return 0, false
	}
	term = r.CurrentTerm()
	return term, r.State() == raft.Leader && r.CurrentTerm() == term
}

// configuration is raft's newest, committed or not. Raft publishes it right after it has appended it; whatever was
// elected meanwhile needed votes from a majority of it or of the one before, and those two overlap.
func (t *transport) configuration() raft.Configuration {
	r := t.raft.Load()
	if r == nil {
		return raft.Configuration{}
	}
	return r.GetConfiguration().Configuration() // answered at once, from an atomic value
}

// lastIndex is the last of our log, noIndex if that is not known.
func (t *transport) lastIndex() uint64 {
	if r := t.raft.Load(); r != nil {
		return r.LastIndex()
	}
	return noIndex
}

// hung says whether our own log write hangs, or we are at our end: then we must not go on leading.
func (t *transport) hung() bool { return t.ending.Load() || t.log != nil && t.log.hung() }

func (t *transport) peer(id raft.ServerID) *peerState {
	if p, ok := t.peers.Load(id); ok {
		return p.(*peerState)
	}
	p, _ := t.peers.LoadOrStore(id, new(peerState))
	return p.(*peerState)
}

// sent is what is noted when the sending of a request begins.
type sent struct {
	args     *raft.AppendEntriesRequest
	stamp    uint64 // of the fences' clock
	previous uint64 // our last index when the request before went out to the same replica, or noIndex
	of       *call  // raft's, in a pipeline; nil: raft must not see the answer
}

// begin notes that the sending of a request begins.
func (t *transport) begin(id raft.ServerID, args *raft.AppendEntriesRequest) sent {
	s := sent{args: args, stamp: t.fences.clock.Load(), previous: noIndex}
	if !heartbeat(args) {
		s.previous = t.insync.sending(id, args.Term, t.lastIndex())
	}
	return s
}

// heartbeat says whether a request carries nothing (as raft's NetworkTransport tells it): its answer says nothing of
// the log.
func heartbeat(args *raft.AppendEntriesRequest) bool {
	return args.PrevLogEntry == 0 && len(args.Entries) == 0 && args.LeaderCommitIndex == 0
}

// stores is the index up to which a replica that accepts the request has the leader's log on disk: followers answer
// after StoreLogs. 0: it does not say.
func stores(args *raft.AppendEntriesRequest) uint64 {
	if n := len(args.Entries); n > 0 {
		return args.Entries[n-1].Index
	}
	return args.PrevLogEntry
}

// answered takes what has become of a request.
func (t *transport) answered(id raft.ServerID, s sent, resp *raft.AppendEntriesResponse, err error) {
	if err != nil {
		t.failed(id, s.args.Term, err)
		return
	}
	t.accepted(id, s.args.Term, resp.Term, resp.Success, stores(s.args), s)
}

// accepted takes an answer to AppendEntries or InstallSnapshot of a term.
func (t *transport) accepted(id raft.ServerID, term, theirs uint64, success bool, index uint64, s sent) {
	if p := t.peer(id); p.failed.Load() {
		p.failed.Store(false)
	}
	if theirs > term {
		t.fences.over(term)
		return
	}
	if !success {
		return // a log that does not fit yet
	}
	t.insync.acked(id, term, index, s.previous, time.Now())
	t.fences.acked(id, term, s.stamp)
}

// failed takes a request that got no answer. A time-out says nothing yet; anything else is a closed connection.
func (t *transport) failed(id raft.ServerID, term uint64, err error) {
	t.peer(id).failed.Store(true)
	if late, ok := errors.AsType[net.Error](err); !ok || !late.Timeout() {
		t.insync.closed(id, term, time.Now())
	}
}

// AppendEntries is raft's heartbeat, and its replication when it does not pipeline.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if t.hung() {
		t.abdicate()
		return errHung
	}
	s := t.begin(id, args)
	err := t.faulty(id, func() error { return t.Transport.AppendEntries(id, target, args, resp) })
	t.answered(id, s, resp, err)
	return err
}

// faulty makes a call as the faults have it.
func (t *transport) faulty(id raft.ServerID, call func() error) error {
	if t.faults == nil {
		return call()
	}
	err := errDropped
	for range t.faults.request(id) {
		err = call()
	}
	if err == nil && !t.faults.response(id) {
		return errDropped
	}
	return err
}

// AppendEntriesPipeline is raft's replication to a replica that has caught up.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	if t.hung() {
		return nil, errHung
	}
	inner, err := t.Transport.AppendEntriesPipeline(id, target)
	if err != nil {
		if !errors.Is(err, raft.ErrPipelineReplicationNotSupported) {
			t.peer(id).failed.Store(true)
		}
		return nil, err
	}
	p := newPipeline(inner, t, id)
	t.pipelines.Store(p, nil)
	go p.relay()
	go p.goAhead()
	return p, nil
}

// ahead sends entries that our own log is about to write to whoever has everything before them, if we lead: their disks
// and ours then write at the same time. Configurations are left to raft, which looks at its own copy first. It runs on
// raft's main goroutine, where alone our state changes.
func (t *transport) ahead(previous raft.Log, entries []*raft.Log) {
	term, leading := t.leadership()
	if !leading || previous.Index+1 != entries[0].Index {
		return
	}
	for _, e := range entries {
		if e.Type != raft.LogCommand || e.Term != term {
			return
		}
	}
	var args *raft.AppendEntriesRequest
	t.pipelines.Range(func(p, _ any) bool {
		if args == nil {
			args = &raft.AppendEntriesRequest{
				RPCHeader: t.header(), Term: term,
				PrevLogEntry: previous.Index, PrevLogTerm: previous.Term, Entries: entries, LeaderCommitIndex: t.raft.Load().CommitIndex(),
			}
		}
		p.(*pipeline).offer(args)
		return true
	})
}

// InstallSnapshot sends a snapshot: whoever has accepted it has everything up to its last index.
func (t *transport) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if t.hung() {
		return errHung
	}
	s := sent{stamp: t.fences.clock.Load(), previous: noIndex}
	if t.faults != nil && t.faults.request(id) == 0 { // its data cannot be sent twice
		return errDropped
	}
	err := t.Transport.InstallSnapshot(id, target, args, resp, data)
	if err == nil && t.faults != nil && !t.faults.response(id) {
		err = errDropped
	}
	if err != nil {
		t.failed(id, args.Term, err)
		return err
	}
	t.accepted(id, args.Term, resp.Term, resp.Success, args.LastLogIndex, s)
	return nil
}

// RequestVote asks for a vote.
func (t *transport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.faulty(id, func() error { return t.Transport.RequestVote(id, target, args, resp) })
}

// RequestPreVote keeps the inner transport's pre-vote.
func (t *transport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	p, ok := t.Transport.(raft.WithPreVote)
	if !ok {
		return raft.ErrUnsupportedProtocol
	}
	return t.faulty(id, func() error { return p.RequestPreVote(id, target, args, resp) })
}

// TimeoutNow asks another voter to campaign.
func (t *transport) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.faulty(id, func() error { return t.Transport.TimeoutNow(id, target, args, resp) })
}

// SetHeartbeatHandler does nothing: heartbeats take the ordinary way. Raft's fast path runs beside its main goroutine
// and can set the term back after a newer vote (raft.go, processHeartbeat).
func (t *transport) SetHeartbeatHandler(func(raft.RPC)) {}

// ping asks the other voters at once whether we still lead in term, by heartbeats like raft's own, which come only
// every tenth of its time-out. (raft.VerifyLeader makes raft send its own at once, but by way of raft's main
// goroutine, which may be writing to the disk.) One at a time goes to each; what comes meanwhile shares the next.
func (t *transport) ping(term uint64) {
	for _, s := range t.configuration().Servers {
		if s.Suffrage != raft.Voter || s.ID == t.id {
			continue
		}
		// One that does not answer is left to raft's heartbeats, which wait longer and longer.
		if p := t.peer(s.ID); !p.failed.Load() && p.pinging.CompareAndSwap(false, true) {
			t.spawn(func() { t.pingOne(p, s, term) })
		}
	}
}

// pingOne sends heartbeats of term to one voter as long as fences wait that began after the last was sent.
func (t *transport) pingOne(p *peerState, s raft.Server, term uint64) {
	for {
		args := &raft.AppendEntriesRequest{RPCHeader: t.header(), Term: term}
		stamp := t.fences.clock.Load()
		err := t.AppendEntries(s.ID, s.Address, args, new(raft.AppendEntriesResponse))
		if err == nil && t.fences.want(stamp) {
			continue
		}
		p.pinging.Store(false)
		if err != nil || !t.fences.want(stamp) || !p.pinging.CompareAndSwap(false, true) {
			return
		}
	}
}

// header is that of requests which we make up ourselves.
func (t *transport) header() raft.RPCHeader {
	return raft.RPCHeader{ProtocolVersion: raftProtocol, ID: []byte(t.id), Addr: t.EncodePeer(t.id, t.LocalAddr())}
}

// Consumer is where raft takes its requests from.
func (t *transport) Consumer() <-chan raft.RPC { return t.consumer }

// relay passes incoming requests on.
func (t *transport) relay() {
	for {
		select {
		case rpc := <-t.Transport.Consumer():
			if vote, ok := rpc.Command.(*raft.RequestVoteRequest); ok {
				rpc.RespChan = t.overhear(vote, rpc.RespChan)
			}
			select {
			case t.consumer <- rpc:
			case <-t.stop:
				return
			}
		case <-t.stop:
			return
		}
	}
}

// overhear passes raft's answer to a vote request on, and tells of a refusal.
func (t *transport) overhear(vote *raft.RequestVoteRequest, to chan<- raft.RPCResponse) chan<- raft.RPCResponse {
	refused := t.refused.Load()
	if refused == nil {
		return to
	}
	answer := make(chan raft.RPCResponse, 1)
	t.spawn(func() {
		select {
		case a := <-answer:
			to <- a // both transports have room for the one answer
			if resp, ok := a.Response.(*raft.RequestVoteResponse); ok && a.Error == nil && !resp.Granted {
				(*refused)(vote)
			}
		case <-t.stop:
		}
	})
	return answer
}

// campaign makes ourselves a candidate at once, without a pre-vote, as a leader's TimeoutNow would. It returns when
// raft has taken it.
func (t *transport) campaign(id raft.ServerID) {
	rpc := raft.RPC{
		Command:  &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raftProtocol, ID: []byte(id), Addr: []byte(id)}},
		RespChan: make(chan raft.RPCResponse, 1),
	}
	select {
	case t.consumer <- rpc:
	case <-t.stop:
	}
}

// Close ends the relay and the inner transport, and waits for our own requests on their way. Raft's Shutdown calls it.
func (t *transport) Close() (err error) {
	t.closing.Do(func() {
		close(t.stop)
		t.mu.Lock()
		t.closed = true
		t.mu.Unlock()
		t.fences.over(ended)
		t.insync.stop()
		if c, ok := t.Transport.(raft.WithClose); ok {
			err = c.Close()
		}
		if c, ok := t.Transport.(interface{ CloseStreams() }); ok {
			c.CloseStreams() // those in raft's pool: its own Close leaves them open
		}
		t.workers.Wait()
	})
	return err
}
