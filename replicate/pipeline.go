package replicate

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// pipeline decorates raft's pipeline to one replica. Besides raft's own requests it sends entries ahead: those that our
// own log has just begun to write, so that the leader's disk and the others' write at the same time (Ongaro's thesis,
// §10.2.1; raft itself sends an entry when its own write is done). When raft then asks for the same entries, they are
// not sent again: the answer to what went ahead is the answer. The leader still counts its own copy only when it is on
// disk, as raft does, and so does the in-sync set.
type pipeline struct {
	raft.AppendPipeline
	t      *transport
	id     raft.ServerID
	ready  chan raft.AppendFuture
	early  chan *raft.AppendEntriesRequest // to be sent ahead; one at most waits
	nudged chan struct{}                   // a call may be complete that no answer will complete
	stop   chan struct{}

	// Who sends has put a value in: what is on the wire has the order of sent. (Not a sync.Mutex: a test's faults and pipes
	// hold it for as long as they delay, and synctest's clock stands still while somebody waits for a mutex.)
	sending chan struct{}
	term    uint64 // of what was sent: a pipeline lives within one
	last    uint64 // whatever raft has not asked for before and is not newer went ahead

	mu      sync.Mutex
	sent    []sent                      // not answered yet, in order
	calls   []*call                     // raft's, not passed on yet, in order
	stored  uint64                      // the replica has accepted everything up to here
	refused *raft.AppendEntriesResponse // the first answer to a request sent ahead that was not accepted, nil: none
	closed  bool
}

// call is a request that raft has made. It is complete when its own answer is there, or, if its entries went ahead,
// when the replica has them.
type call struct {
	start    time.Time
	args     *raft.AppendEntriesRequest
	resp     *raft.AppendEntriesResponse
	ahead    bool // its entries went ahead
	err      error
	complete chan struct{} // closed when it is
}

var _ raft.AppendFuture = (*call)(nil)

func (c *call) Start() time.Time                      { return c.start }
func (c *call) Request() *raft.AppendEntriesRequest   { return c.args }
func (c *call) Response() *raft.AppendEntriesResponse { return c.resp }

// Error waits until the call is complete.
func (c *call) Error() error {
	<-c.complete
	return c.err
}

func newPipeline(inner raft.AppendPipeline, t *transport, id raft.ServerID) *pipeline {
	return &pipeline{
		AppendPipeline: inner, t: t, id: id, ready: make(chan raft.AppendFuture),
		sending: make(chan struct{}, 1),
		early:   make(chan *raft.AppendEntriesRequest, 1), nudged: make(chan struct{}, 1), stop: make(chan struct{}),
	}
}

// AppendEntries sends one request, unless its entries went ahead; it waits while too many are on their way.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	if p.t.hung() {
		p.t.abdicate()
		return nil, errHung
	}
	c := &call{start: time.Now(), args: args, resp: resp, complete: make(chan struct{})}
	p.sending <- struct{}{}
	defer func() { <-p.sending }()
	rest := p.rest(args)
	c.ahead = rest == nil
	times := 1
	if p.t.faults != nil && !c.ahead {
		if times = p.t.faults.request(p.id); times == 0 {
			return nil, errDropped
		}
	}
	p.mu.Lock()
	p.calls = append(p.calls, c)
	p.mu.Unlock()
	if c.ahead {
		p.nudge()
		return c, nil
	}
	err := p.send(rest, resp, c)
	for range times - 1 {
		if err != nil {
			break
		}
		again := *rest // a duplicate is told from the request by its address
		err = p.send(&again, new(raft.AppendEntriesResponse), nil)
	}
	if err != nil {
		p.broken(args.Term, err)
		return nil, err
	}
	return c, nil
}

// rest gives what of a request has not gone ahead, nil if all its entries have.
func (p *pipeline) rest(args *raft.AppendEntriesRequest) *raft.AppendEntriesRequest {
	n := len(args.Entries)
	switch {
	case n == 0 || args.Term != p.term || args.Entries[0].Index > p.last:
		return args
	case args.Entries[n-1].Index <= p.last:
		return nil
	}
	ahead := p.last - args.PrevLogEntry
	rest := *args
	rest.PrevLogEntry, rest.PrevLogTerm = p.last, args.Entries[ahead-1].Term
	rest.Entries = args.Entries[ahead:]
	return &rest
}

// send puts a request on the wire. of is the call whose answer is this one's.
func (p *pipeline) send(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse, of *call) error {
	s := p.t.begin(p.id, args)
	s.of = of
	p.mu.Lock()
	p.sent = append(p.sent, s)
	p.mu.Unlock()
	p.term, p.last = args.Term, max(stores(args), p.last)
	_, err := p.AppendPipeline.AppendEntries(args, resp)
	return err
}

// offer has a request sent ahead, if none waits for that already. It does not block: it is called by raft's main
// goroutine.
func (p *pipeline) offer(args *raft.AppendEntriesRequest) {
	select {
	case p.early <- args:
	default:
	}
}

// goAhead sends what is offered, if the request before it has been sent here: anything else is left to raft.
func (p *pipeline) goAhead() {
	for {
		select {
		case args := <-p.early:
			p.sending <- struct{}{}
			if args.Term == p.term && args.PrevLogEntry == p.last && (p.t.faults == nil || p.t.faults.request(p.id) > 0) {
				if err := p.send(args, new(raft.AppendEntriesResponse), nil); err != nil {
					p.refuse(new(raft.AppendEntriesResponse)) // nobody will answer
					p.broken(args.Term, err)
				}
			}
			<-p.sending
		case <-p.stop:
			return
		}
	}
}

// Consumer is where raft takes the answers from.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.ready }

// relay learns from each answer, and passes on the calls that are complete, in their order. It goes on taking answers
// while raft takes none: raft may be waiting, in AppendEntries, for room on the wire.
func (p *pipeline) relay() {
	for {
		c := p.next()
		ready := p.ready
		if c == nil {
			ready = nil
		}
		select {
		case ready <- c:
			p.mu.Lock()
			p.calls = append(p.calls[:0], p.calls[1:]...)
			p.mu.Unlock()
		case f := <-p.AppendPipeline.Consumer():
			p.answered(f)
		case <-p.nudged:
		case <-p.stop:
			return
		}
	}
}

func (p *pipeline) nudge() {
	select {
	case p.nudged <- struct{}{}:
	default:
	}
}

// answered takes an answer from the wire.
func (p *pipeline) answered(f raft.AppendFuture) {
	s, known := p.take(f.Request())
	if !known {
		return
	}
	err, resp := f.Error(), f.Response() // raft never asks for the error: it takes a response without success for a failure
	switch {
	case err != nil:
		p.broken(s.args.Term, err)
	case p.t.faults != nil && !p.t.faults.response(p.id):
		*resp = raft.AppendEntriesResponse{} // an answer lost on the way is the end of a stream
	default:
		p.t.answered(p.id, s, resp, nil)
	}
	accepted := err == nil && resp.Success
	if s.of == nil && !accepted {
		p.refuse(resp)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.of != nil {
		s.of.err = err
		close(s.of.complete)
	}
	if accepted {
		p.stored = max(p.stored, stores(s.args))
	}
}

// refuse fails the calls whose entries went ahead, and have not been accepted; the first reason stands.
func (p *pipeline) refuse(resp *raft.AppendEntriesResponse) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refused == nil {
		p.refused = resp
	}
	p.nudge()
}

// next is the first call of raft's, if it is complete.
func (p *pipeline) next() *call {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.calls) == 0 {
		return nil
	}
	c := p.calls[0]
	select {
	case <-c.complete:
		return c
	default:
	}
	switch {
	case !c.ahead:
		return nil
	case c.args.Entries[len(c.args.Entries)-1].Index <= p.stored:
		*c.resp = raft.AppendEntriesResponse{Term: c.args.Term, Success: true}
	case p.refused != nil:
		*c.resp = *p.refused
	default:
		return nil
	}
	close(c.complete)
	return c
}

// take finds what was noted when the request was sent.
func (p *pipeline) take(args *raft.AppendEntriesRequest) (sent, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, s := range p.sent {
		if s.args == args {
			p.sent = append(p.sent[:0], p.sent[i+1:]...) // answers come in order: nothing before will be answered
			return s, true
		}
	}
	return sent{}, false
}

// broken: the connection has failed, unless it was us who closed it.
func (p *pipeline) broken(term uint64, err error) {
	p.mu.Lock()
	closed := p.closed
	p.mu.Unlock()
	if !closed {
		p.t.failed(p.id, term, err)
	}
}

// Close ends the pipeline; what was sent stays unanswered.
func (p *pipeline) Close() error {
	p.mu.Lock()
	first := !p.closed
	p.closed = true
	p.mu.Unlock()
	if first {
		p.t.pipelines.Delete(p)
		close(p.stop)
	}
	return p.AppendPipeline.Close()
}
