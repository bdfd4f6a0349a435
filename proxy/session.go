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

// session is a client connection as the coordinator sees it: its group requests in their order. While no coordinator is
// active it holds them; a request that came back unanswered is sent again, in order and before anything newer.
type session struct {
	proxy  *Proxy
	wake   func() // an answer has come
	client core.Client
	// rebalance is the rebalance time-out of the newest JoinGroup; it belongs to the reader.
	rebalance time.Duration

	// send is held while requests are handed to the coordinator, which keeps their order. Answers only need mu, so that
	// the coordinator's loop, which gives them, never waits for its own queue.
	send sync.Mutex

	mu         sync.Mutex
	ordinal    uint64
	unanswered []*call // in order
	flying     int     // of them: with the coordinator
	term       uint64  // the activation they are with
	returned   bool    // one of that activation has come back: it is over
	closed     bool
}

// call is a group request on its way. Its state is guarded by the session's mutex.
type call struct {
	session  *session
	request  kmsg.Request
	ordinal  uint64
	timeout  time.Duration
	deadline time.Time
	heldOnly bool // the deadline counts only while the request is held: a parked join may take as long as its group
	flying   bool // with the coordinator
	sent     bool // has been, once at least
	answered bool
	response kmsg.Response
}

func (s *session) init(p *Proxy, host string, wake func()) {
	s.proxy, s.wake = p, wake
	s.client.Host = host
	s.client.Session = core.Session(uuid.New())
}

// submit takes a request that has just been read.
func (s *session) submit(req kmsg.Request, clientID *string) *call {
	timeout, heldOnly := s.holdTime(req)
	c := &call{session: s, request: req, timeout: timeout, deadline: time.Now().Add(timeout), heldOnly: heldOnly}
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

// sendHeld hands all held requests to the coordinator, if one is active and nothing of an older activation is still out.
// The caller holds send.
func (s *session) sendHeld() {
	status := s.proxy.coordinator.Status()
	if !status.Active {
		s.hold()
		return
	}
	s.mu.Lock()
	if s.closed || s.flying > 0 && (s.returned || s.term != status.Term) {
		s.mu.Unlock() // the last one to come back brings us here again
		return
	}
	s.term = status.Term
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
	client := s.client
	s.mu.Unlock()
	for _, c := range batch {
		client.Ordinal = c.ordinal
		s.proxy.coordinator.Submit(&coordinator.Request{Body: c.request, Client: client, Term: status.Term, Done: c.take})
	}
}

// take takes the coordinator's answer, on its loop.
func (c *call) take(response kmsg.Response, err error) {
	s := c.session
	s.mu.Lock()
	s.flying--
	c.flying = false
	if err != nil {
		s.returned = true
		if c.heldOnly { // how long it was with the coordinator does not count
			c.deadline = time.Now().Add(c.timeout)
		}
	} else {
		s.answer(c, response)
	}
	again := s.flying == 0 && !s.closed && len(s.unanswered) > 0 // held ones, then
	s.mu.Unlock()
	if again {
		s.hold()
	}
	s.wake() // for the answer, or because there is a deadline again
}

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

// answer is called with mu held. The first answer counts.
func (s *session) answer(c *call, response kmsg.Response) {
	if c.answered {
		return
	}
	c.answered = true
	c.response = response
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

// result gives the response to a call if there is one, else by when there must be; a zero time: whenever it comes. What
// is late is answered as Kafka does and not sent again; it may have been executed. The error says that nobody waits.
func (c *call) result(now time.Time) (kmsg.Response, time.Time, error) {
	s := c.session
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.answered:
		return c.response, time.Time{}, nil
	case s.closed && !c.flying:
		return nil, time.Time{}, net.ErrClosed
	case c.heldOnly && c.flying:
		return nil, time.Time{}, nil
	case now.Before(c.deadline):
		return nil, c.deadline, nil
	}
	s.answer(c, core.ErrorResponse(c.request, coordinator.TimeoutCode(c.request)))
	return c.response, time.Time{}, nil
}

// drop forgets what is held: nobody waits for it any more.
func (s *session) drop() {
	s.mu.Lock()
	s.closed = true
	s.unanswered = nil
	s.mu.Unlock()
	s.proxy.held.remove(s)
	s.wake()
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

// resumeSessions sends what sessions hold whenever the coordinator has become active.
func (p *Proxy) resumeSessions() {
	defer p.running.Done()
	for {
		status := p.coordinator.Status()
		if status.Active {
			for s := range p.held.takeAll() {
				s.send.Lock()
				s.sendHeld()
				s.send.Unlock()
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
