package replicate

import (
	"sync"

	"github.com/hashicorp/raft"
)

// pipeline decorates raft's pipeline to one replica.
type pipeline struct {
	raft.AppendPipeline
	t     *transport
	id    raft.ServerID
	ready chan raft.AppendFuture
	stop  chan struct{}

	mu     sync.Mutex
	sent   []sent // not answered yet, in order
	closed bool
}

// AppendEntries sends one request; it waits while too many are on their way.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	if p.t.hung() {
		p.t.abdicate()
		return nil, errHung
	}
	times := 1
	if p.t.faults != nil {
		if times = p.t.faults.request(p.id); times == 0 {
			return nil, errDropped
		}
	}
	f, err := p.send(args, resp, false)
	for range times - 1 {
		if err != nil {
			break
		}
		again := *args // a duplicate is told from the request by its address
		_, err = p.send(&again, new(raft.AppendEntriesResponse), true)
	}
	if err != nil {
		p.broken(args.Term, err)
		return nil, err
	}
	return f, nil
}

func (p *pipeline) send(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse, extra bool) (raft.AppendFuture, error) {
	s := p.t.begin(p.id, args)
	s.extra = extra
	p.mu.Lock()
	p.sent = append(p.sent, s)
	p.mu.Unlock()
	return p.AppendPipeline.AppendEntries(args, resp)
}

// Consumer is where raft takes the answers from.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.ready }

// relay learns from each answer, then passes it on.
func (p *pipeline) relay() {
	for {
		select {
		case f := <-p.AppendPipeline.Consumer():
			if !p.answered(f) {
				continue
			}
			select {
			case p.ready <- f:
			case <-p.stop:
				return
			}
		case <-p.stop:
			return
		}
	}
}

// answered takes an answer, and says whether raft is to see it.
func (p *pipeline) answered(f raft.AppendFuture) bool {
	s, known := p.take(f.Request())
	err := f.Error() // which raft never asks for: it takes a response without success for a failure
	switch {
	case !known:
		return true
	case err != nil:
		p.broken(s.args.Term, err)
	case p.t.faults != nil && !p.t.faults.response(p.id):
		*f.Response() = raft.AppendEntriesResponse{} // an answer lost on the way is the end of a stream
	default:
		p.t.answered(p.id, s, f.Response(), nil)
	}
	return !s.extra
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
		close(p.stop)
	}
	return p.AppendPipeline.Close()
}
