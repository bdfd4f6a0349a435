package proxy

import (
	"net"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/coordinator"
	core "github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// otherTimeout bounds how long a group request is held that is neither a write nor part of a rebalance.
const otherTimeout = 20 * time.Second

// maxRebalance bounds the rebalance time-out that a client may claim for what is held.
const maxRebalance = 10 * time.Minute

// target is where the requests of sessions go: to the coordinator that is active in term, ours or the one that a link
// leads to. The zero target is nobody.
type target struct {
	term uint64
	link *link // nil: our own
}

// session is a client connection as the coordinator sees it: its group requests in their order. While no coordinator is
// active it holds them; a request that came back unanswered is sent again, in order and before anything newer.
type session struct {
	proxy    *Proxy
	wake     func()      // an answer has come
	gone     func() bool // the client has closed its connection, perhaps unread
	listener int32       // the node id whose listener the client came in by
	client   core.Client
	// rebalance is the rebalance time-out of the newest JoinGroup; it belongs to the reader.
	rebalance time.Duration

	// send is held while requests are handed to their target, which keeps their order. Answers only need mu, so that
	// the coordinator's loop, which gives them, never waits for its own queue.
	send sync.Mutex

	mu         sync.Mutex
	ordinal    uint64
	unanswered []*call // in order
	flying     int     // with the target; of the unanswered, but also those answered at their deadline
	to         target  // what they are with
	returned   bool    // one of that target has come back: its activation is over
	closed     bool
	stream     *stream // the newest; nil if that has ended
	streams    uint64  // opened so far
}

// call is a group request on its way. Its state is guarded by the session's mutex.
type call struct {
	session  *session
	request  kmsg.Request
	frame    []byte // the client's, without its size; only with peers
	ordinal  uint64
	timeout  time.Duration
	deadline time.Time
	heldOnly bool // the deadline counts only while the request is held: a parked join may take as long as its group
	flying   bool // with the target
	sent     bool // has been with one, once at least
	answered bool
	answer   answer
}

// answer is a response, or the frame of one that came from a peer, without its size. The zero answer is none.
type answer struct {
	response kmsg.Response
	frame    []byte
}

func (a answer) none() bool { return a.response == nil && a.frame == nil }

func (s *session) init(p *Proxy, listener int32, host string, wake func(), gone func() bool) {
	s.proxy, s.wake, s.gone = p, wake, gone
	s.listener = listener
	s.client.Host = host
	s.client.Session = core.Session(uuid.New())
}

// submit takes a request that has just been read, and its frame without the size.
func (s *session) submit(req kmsg.Request, frame []byte, clientID *string) *call {
	timeout, heldOnly := s.holdTime(req)
	c := &call{session: s, request: req, timeout: timeout, deadline: time.Now().Add(timeout), heldOnly: heldOnly}
	if s.proxy.peers != nil {
		c.frame = frame
	}
	s.send.Lock()
	defer s.send.Unlock()
	s.mu.Lock()
	if clientID == nil {
		s.client.ID = ""
	} else if s.client.ID != *clientID {
		s.client.ID = *clientID
	}
	s.ordinal++
	c.ordinal = s.ordinal
	s.unanswered = append(s.unanswered, c)
	s.mu.Unlock()
	s.sendHeld()
	return c
}

// holdTime gives how long a request may wait for an answer, and whether that ends when a coordinator takes it.
func (s *session) holdTime(req kmsg.Request) (timeout time.Duration, heldOnly bool) {
	switch r := req.(type) {
	case *kmsg.JoinGroupRequest:
		millis := r.RebalanceTimeoutMillis
		if r.Version == 0 { // had none: Kafka takes the session time-out
			millis = r.SessionTimeoutMillis
		}
		s.rebalance = min(max(time.Duration(millis)*time.Millisecond, time.Second), maxRebalance)
		return s.rebalance, true
	case *kmsg.SyncGroupRequest:
		return max(s.rebalance, otherTimeout), true
	case *kmsg.OffsetCommitRequest, *kmsg.LeaveGroupRequest, *kmsg.DeleteGroupsRequest, *kmsg.OffsetDeleteRequest:
		return s.proxy.config.CommitTimeout, false
	}
	return otherTimeout, false
}

// sendHeld hands all held requests to the present target, if there is one and nothing is still out with another. The
// caller holds send.
func (s *session) sendHeld() {
	to := s.proxy.target()
	if to == (target{}) {
		s.hold()
		return
	}
	s.mu.Lock()
	if s.closed || s.flying > 0 && (s.returned || s.to != to) {
		s.mu.Unlock() // the last one to come back brings us here again
		return
	}
	var over *stream
	if s.returned || s.to != to { // what it belonged to is over
		over, s.stream = s.stream, nil
	}
	s.to = to
	s.returned = false
	var room [4]*call
	batch := room[:0]
	for _, c := range s.unanswered {
		if !c.flying {
			if c.sent {
				s.proxy.metrics.Add(tracing.ResentRequests, 1)
			}
			c.flying, c.sent = true, true
			s.flying++
			batch = append(batch, c)
		}
	}
	if to.link != nil {
		if s.stream == nil {
			s.streams++
			s.stream = &stream{link: to.link, session: s, number: s.streams}
		}
		st := s.stream
		st.calls = append(st.calls, batch...)
		s.mu.Unlock()
		over.close()
		to.link.send(st, batch)
		return
	}
	client := s.client
	s.mu.Unlock()
	over.close()
	for _, c := range batch {
		client.Ordinal = c.ordinal
		s.proxy.coordinator.Submit(&coordinator.Request{Body: c.request, Client: client, Term: to.term, Done: c.take})
	}
}

// take takes our own coordinator's answer, on its loop.
func (c *call) take(response kmsg.Response, err error) {
	s := c.session
	s.mu.Lock()
	s.land(c, answer{response: response}, err != nil)
	again := s.again()
	s.mu.Unlock()
	if again {
		s.hold()
	}
	s.wake() // for the answer, or because there is a deadline again
}

// land notes what became of a call that was with a target: it is answered, or it has come back. The caller holds mu.
func (s *session) land(c *call, a answer, cameBack bool) {
	s.flying--
	c.flying = false
	if !cameBack {
		s.settle(c, a)
		return
	}
	s.returned = true
	if c.heldOnly { // how long it was with the coordinator does not count
		c.deadline = time.Now().Add(c.timeout)
	}
}

// again says whether there are requests to be sent now that none is out any more. The caller holds mu.
func (s *session) again() bool { return s.flying == 0 && !s.closed && len(s.unanswered) > 0 }

// hold has the session looked at when a coordinator is active, unless its client has gone.
func (s *session) hold() {
	s.proxy.held.add(s)
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed { // perhaps since before it was added
		s.proxy.held.remove(s)
	}
}

// settle is called with mu held. The first answer counts.
func (s *session) settle(c *call, a answer) {
	if c.answered {
		return
	}
	c.answered = true
	c.answer = a
	if i := slices.Index(s.unanswered, c); i >= 0 {
		s.unanswered = slices.Delete(s.unanswered, i, i+1)
	}
}

// done says whether who waits for the call has to look at it: there is an answer, or will never be one; or it is held,
// and whoever waits does so without an alarm.
func (c *call) done(alarmed bool) bool {
	c.session.mu.Lock()
	defer c.session.mu.Unlock()
	return c.answered || !c.flying && (c.session.closed || !alarmed)
}

// result gives the answer to a call if there is one, else by when there must be; a zero time: whenever it comes. What
// is late is answered as Kafka does and not sent again; it may have been executed. The error says that nobody waits.
func (c *call) result(now time.Time) (answer, time.Time, error) {
	s := c.session
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.answered:
		return c.answer, time.Time{}, nil
	case s.closed && !c.flying:
		return answer{}, time.Time{}, net.ErrClosed
	case c.heldOnly && c.flying:
		return answer{}, time.Time{}, nil
	case now.Before(c.deadline):
		return answer{}, c.deadline, nil
	}
	s.settle(c, answer{response: core.ErrorResponse(c.request, coordinator.TimeoutCode(c.request))})
	return c.answer, time.Time{}, nil
}

// drop forgets what is held: nobody waits for it any more. What is with a target may still be answered.
func (s *session) drop() {
	s.mu.Lock()
	s.closed = true
	s.unanswered = nil
	var over *stream
	if s.flying == 0 {
		over, s.stream = s.stream, nil
	}
	s.mu.Unlock()
	s.proxy.held.remove(s)
	over.close()
	s.wake()
}

// end is the last thing that happens to a session: its client has gone for good.
func (s *session) end() {
	s.drop()
	s.mu.Lock()
	over := s.stream
	s.stream = nil
	s.mu.Unlock()
	over.close()
}

// heldSessions are the sessions that wait for an active coordinator.
type heldSessions struct {
	mu       sync.Mutex
	sessions map[*session]struct{}
	added    chan struct{} // capacity 1
}

func (h *heldSessions) add(s *session) {
	h.mu.Lock()
	if h.sessions == nil {
		h.sessions = map[*session]struct{}{}
	}
	h.sessions[s] = struct{}{}
	h.mu.Unlock()
	h.look()
}

// look has resumeSessions look again at who is active.
func (h *heldSessions) look() {
	select {
	case h.added <- struct{}{}:
	default:
	}
}

func (h *heldSessions) remove(s *session) {
	h.mu.Lock()
	delete(h.sessions, s)
	h.mu.Unlock()
}

func (h *heldSessions) takeAll() map[*session]struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := h.sessions
	h.sessions = nil
	return all
}

// resumeSessions sends what sessions hold whenever there is an active coordinator again.
func (p *Proxy) resumeSessions() {
	defer p.running.Done()
	for {
		status := p.coordinator.Status()
		if p.target() != (target{}) {
			for s := range p.held.takeAll() {
				s.resume()
			}
		}
		select {
		case <-status.Changed:
		case <-p.held.added:
		case <-p.ctx.Done():
			return
		}
	}
}

// resume sends what a session holds, unless its client has gone meanwhile: it may have committed something newer through
// another connection.
func (s *session) resume() {
	if s.gone() {
		s.drop()
		return
	}
	s.send.Lock()
	s.sendHeld()
	s.send.Unlock()
}

// target says where requests go now. Of our own coordinator and the peers' word for who is active the higher term counts.
func (p *Proxy) target() target {
	status := p.coordinator.Status()
	if p.peers == nil {
		if status.Active {
			return target{term: status.Term}
		}
		return target{}
	}
	return p.forward.target(status)
}
