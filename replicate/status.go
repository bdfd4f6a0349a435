package replicate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
)

// How status streams are kept.
const (
	aliveEvery  = time.Second     // the voter's side says at least that much
	silentAfter = 5 * time.Second // the other side then dials again
	backoffMin  = 50 * time.Millisecond
	backoffMax  = 250 * time.Millisecond // a voter that comes back may be active as soon
)

// facts are what a sidecar says of itself when it is asked.
type facts struct {
	ClusterID uuid.UUID `json:"cluster_id"` // zero: not known
	HasState  bool      `json:"has_state"`  // its store holds a cluster's state
	Term      uint64    `json:"term"`       // raft's
	LastTerm  uint64    `json:"last_term"`  // of the newest entry of raft's log
	LastIndex uint64    `json:"last_index"`
	Role      string    `json:"role"`
	Leader    string    `json:"leader"` // node id, as far as known
	Expect    int       `json:"expect"` // --bootstrap-expect
	Version   string    `json:"version"`
	Room      bool      `json:"room"` // on its disk, to lead; false as well where the version does not say
}

// status is how each sidecar knows who is active. It keeps one stream to every voter, on which that voter says at once
// when it becomes active, or no longer is; the highest term holds. What the active sidecar was last known to be stays
// known when its stream ends: a new one has a higher term.
type status struct {
	port    *peerPort
	self    string // our node id
	own     func() facts
	log     *slog.Logger
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup // a goroutine for each voter, two for each incoming stream

	mu       sync.Mutex
	closed   bool
	voters   map[string]*voterStream
	incoming map[*statusStream]struct{}
	mine     message // what we say of ourselves: kind, term
	said     uint64  // how often that changed
	term     uint64  // the highest in which anybody was active
	node     string  // who is active in it; "" is nobody any more
	changed  chan struct{}
	members  configuration
}

// configuration is who is in raft, as its leader says.
type configuration struct {
	term, index uint64
	members     []string
	changed     chan struct{}
}

// openStatus begins to answer status streams; setVoters begins to dial them.
func openStatus(p *peerPort, own func() facts, logger *slog.Logger) *status {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	s := &status{port: p, self: p.config.identity().node, own: own, log: logger, voters: map[string]*voterStream{},
		incoming: map[*statusStream]struct{}{}, mine: message{kind: sayNotActive}, said: 1, changed: make(chan struct{})}
	s.members.changed = make(chan struct{})
	s.ctx, s.cancel = context.WithCancel(context.Background())
	p.handle(peerStatus, s.serve)
	return s
}

// close ends every stream.
func (s *status) close() {
	s.mu.Lock()
	s.closed = true
	streams := make([]*statusStream, 0, len(s.incoming))
	for stream := range s.incoming {
		streams = append(streams, stream)
	}
	s.mu.Unlock()
	s.cancel()
	for _, stream := range streams {
		_ = stream.conn.Close()
	}
	s.running.Wait()
}

// publish says to everybody, at once, whether this sidecar is active.
func (s *status) publish(active bool, term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mine = message{kind: sayNotActive, term: term}
	if active {
		s.mine.kind = sayActive
	}
	s.said++
	s.learn(s.self, s.mine)
	s.push()
}

// active gives who is active, as far as known, perhaps ourselves; node "" is nobody known. changed is closed at the next
// change.
func (s *status) active() (term uint64, node string, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term, s.node, s.changed
}

// learn takes what a node says of itself. What it says comes in its order: one that was active and says that it is not,
// is not, whatever term it knows of.
func (s *status) learn(from string, m message) {
	switch {
	case m.kind == sayActive && m.term > s.term:
		s.term, s.node = m.term, from
	case m.kind == sayActive && m.term == s.term && s.node == "":
		s.node = from
	case m.kind == sayNotActive && s.node == from:
		s.node = ""
	default:
		return
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// pushConfiguration is the leader's: who is in raft by the configuration at index. Those who are not hear of it too.
func (s *status) pushConfiguration(term, index uint64, members []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(members) > maxMembers || slices.ContainsFunc(members, func(id string) bool { _, err := uuid.Parse(id); return err != nil }) {
		s.log.Error("a configuration that cannot be told to the others", "members", members)
		return
	}
	s.adopt(term, index, members)
	s.push()
}

// configuration gives the newest one heard of; index 0 is none. changed is closed at the next.
func (s *status) configuration() (term, index uint64, members []string, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.members.term, s.members.index, s.members.members, s.members.changed
}

// adopt keeps the newer configuration: an index may be given again in a later term.
func (s *status) adopt(term, index uint64, members []string) {
	if old := &s.members; term > old.term || term == old.term && index > old.index {
		close(old.changed)
		s.members = configuration{term: term, index: index, members: slices.Clone(members), changed: make(chan struct{})}
	}
}

// push wakes the writers of the incoming streams.
func (s *status) push() {
	for stream := range s.incoming {
		stream.nudge()
	}
}

// statusStream is an incoming stream. Its reader is the goroutine that it came on.
type statusStream struct {
	conn  net.Conn
	wake  chan struct{}
	done  chan struct{} // closed when the reader ends
	asked bool          // facts are due; status.mu
}

func (t *statusStream) nudge() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// serve answers a stream: what we are now, then each change of it.
func (s *status) serve(conn net.Conn, _ peerIdentity) {
	defer conn.Close()
	t := &statusStream{conn: conn, wake: make(chan struct{}, 1), done: make(chan struct{})}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.incoming[t] = struct{}{}
	s.running.Add(2)
	s.mu.Unlock()
	defer s.running.Done()
	go s.tell(t)
	for r := newMessageReader(conn); ; {
		m, err := r.next()
		if err != nil {
			break
		}
		if m.kind == sayAsk {
			s.mu.Lock()
			t.asked = true
			s.mu.Unlock()
			t.nudge()
		}
	}
	close(t.done)
	s.mu.Lock()
	delete(s.incoming, t)
	s.mu.Unlock()
}

// tell writes what a stream has not been told yet.
func (s *status) tell(t *statusStream) {
	defer s.running.Done()
	defer t.conn.Close()
	alive := time.NewTicker(aliveEvery)
	defer alive.Stop()
	var said, term, index uint64
	for {
		own := s.port.config.identity()
		var out []byte
		s.mu.Lock()
		if s.said != said {
			said = s.said
			out = s.mine.append(out, own)
		}
		if c := s.members; c.term != term || c.index != index {
			term, index = c.term, c.index
			out = message{kind: sayConfiguration, term: term, index: index, members: c.members}.append(out, own)
		}
		asked, now := t.asked, s.term
		t.asked = false
		s.mu.Unlock()
		if asked {
			about := s.own()
			out = message{kind: sayFacts, facts: &about}.append(out, own)
		}
		if out == nil {
			select {
			case <-t.wake:
				continue
			case <-t.done:
				return
			case <-alive.C:
				out = message{kind: sayAlive, term: now}.append(nil, own)
			}
		}
		_ = t.conn.SetWriteDeadline(time.Now().Add(silentAfter))
		if _, err := t.conn.Write(out); err != nil {
			return
		}
	}
}

// voterStream is the stream that we keep to a voter.
type voterStream struct {
	node   string
	cancel context.CancelFunc
	again  chan struct{} // do not wait any longer
	addr   string        // the last one dialled; status.mu
	abort  func()        // ends that dial or stream; status.mu
	up     bool          // there is a stream; status.mu
}

// setVoters says to whom a stream is kept. It is to be called again when an address may have changed: a voter that has
// moved is dialled at once.
func (s *status) setVoters(nodes []string) {
	addrs := map[string]string{}
	for _, node := range nodes {
		if node != s.self {
			addrs[node], _ = s.port.config.resolve(node)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for node, v := range s.voters {
		addr, wanted := addrs[node]
		if !wanted {
			v.cancel()
			delete(s.voters, node)
			continue
		}
		moved := addr != v.addr && addr != ""
		if moved {
			v.abort()
		}
		if moved || !v.up { // what has changed may be that it is there again
			select {
			case v.again <- struct{}{}:
			default:
			}
		}
	}
	for node := range addrs {
		if s.voters[node] == nil {
			ctx, cancel := context.WithCancel(s.ctx)
			v := &voterStream{node: node, cancel: cancel, abort: func() {}, again: make(chan struct{}, 1)}
			s.voters[node] = v
			s.running.Go(func() { s.follow(ctx, v) })
		}
	}
}

// follow keeps the stream to one voter.
func (s *status) follow(ctx context.Context, v *voterStream) {
	var wait time.Duration
	var lost time.Time // since when there is no stream
	told := false
	for {
		began := time.Now()
		err := s.listen(ctx, v, func() {
			if told {
				s.log.Info("the status stream is there again", "voter", v.node)
			}
			lost, told = time.Time{}, false
		})
		if ctx.Err() != nil {
			return
		}
		if lost.IsZero() {
			lost = time.Now()
		}
		if !told && time.Since(lost) > silentAfter {
			told = true
			s.log.Warn("no status stream to a voter: if it becomes active, this is noticed late; trying on", "voter", v.node, "err", err)
		}
		if time.Since(began) > backoffMax {
			wait = 0
		}
		wait = min(max(2*wait, backoffMin), backoffMax)
		timer := time.NewTimer(wait/2 + rand.N(wait/2))
		select {
		case <-timer.C:
		case <-v.again:
			timer.Stop()
			wait = 0
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

func (s *status) isUp(v *voterStream, up bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.up = up
}

// listen dials a voter and takes what it says until the stream ends.
func (s *status) listen(ctx context.Context, v *voterStream, connected func()) error {
	addr, _ := s.port.config.resolve(v.node)
	attempt, cancel := context.WithCancel(ctx)
	defer cancel()
	s.mu.Lock()
	v.addr, v.abort = addr, cancel
	s.mu.Unlock()
	conn, who, err := s.port.dial(attempt, v.node, peerStatus)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(attempt, func() { _ = conn.Close() })()
	s.isUp(v, true)
	defer s.isUp(v, false)
	connected()
	for r := newMessageReader(conn); ; {
		_ = conn.SetReadDeadline(time.Now().Add(silentAfter))
		m, err := r.next()
		if err != nil {
			return err
		}
		if err := s.heard(ctx, who, m); err != nil {
			return err
		}
	}
}

var errOtherCluster = errors.New("it is of another cluster by now")

// heard takes a message of a voter.
func (s *status) heard(ctx context.Context, who peerIdentity, m message) error {
	if m.kind != sayActive && m.kind != sayNotActive && m.kind != sayConfiguration {
		return nil
	}
	// Either side may have learnt its cluster id since the hello: the next one will tell them apart.
	if own := s.port.config.identity(); m.clusterID != own.clusterID && m.clusterID != uuid.Nil && own.clusterID != uuid.Nil {
		return errOtherCluster
	}
	if m.kind == sayActive && m.node != who.node {
		return fmt.Errorf("node %s says that %s is active", who.node, m.node)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case ctx.Err() != nil: // no voter any more
	case m.kind == sayConfiguration:
		s.adopt(m.term, m.index, m.members)
	default:
		s.learn(who.node, m)
	}
	return nil
}

// ask gives what a sidecar says of itself now.
func (s *status) ask(ctx context.Context, node string) (facts, error) {
	ctx, cancel := context.WithTimeout(ctx, silentAfter)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	conn, _, err := s.port.dial(ctx, node, peerStatus)
	if err != nil {
		return facts{}, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if _, err := conn.Write(message{kind: sayAsk}.append(nil, peerIdentity{})); err != nil {
		return facts{}, fmt.Errorf("asking node %s: %w", node, err)
	}
	for r := newMessageReader(conn); ; {
		m, err := r.next()
		if err != nil {
			return facts{}, fmt.Errorf("asking node %s: %w", node, errors.Join(err, ctx.Err()))
		}
		if m.kind == sayFacts {
			return *m.facts, nil
		}
	}
}
