package replicate

import (
	"sync"

	"github.com/hashicorp/raft"
)

// raftProtocol is the version in the headers of requests that we make up ourselves.
const raftProtocol = raft.ProtocolVersionMax

// transport decorates raft's transport. What it adds: requests put into our own consumer, and no heartbeat fast path.
type transport struct {
	raft.Transport
	consumer chan raft.RPC
	closing  sync.Once
	stop     chan struct{}
	done     chan struct{} // relay has ended
}

var (
	_ raft.Transport   = (*transport)(nil)
	_ raft.WithPreVote = (*transport)(nil)
)

func newTransport(inner raft.Transport) *transport {
	t := &transport{Transport: inner, consumer: make(chan raft.RPC), stop: make(chan struct{}), done: make(chan struct{})}
	go t.relay()
	return t
}

// relay passes incoming requests on.
func (t *transport) relay() {
	defer close(t.done)
	for {
		select {
		case rpc := <-t.Transport.Consumer():
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

// Consumer is where raft takes its requests from.
func (t *transport) Consumer() <-chan raft.RPC { return t.consumer }

// SetHeartbeatHandler does nothing: heartbeats take the ordinary way. Raft's fast path runs beside its main goroutine
// and can set the term back after a newer vote (raft.go, processHeartbeat).
func (t *transport) SetHeartbeatHandler(func(raft.RPC)) {}

// RequestPreVote keeps the inner transport's pre-vote.
func (t *transport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if p, ok := t.Transport.(raft.WithPreVote); ok {
		return p.RequestPreVote(id, target, args, resp)
	}
	return raft.ErrUnsupportedProtocol
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

// Close ends the relay and the inner transport. Raft's Shutdown calls it.
func (t *transport) Close() (err error) {
	t.closing.Do(func() {
		close(t.stop)
		<-t.done
		if c, ok := t.Transport.(raft.WithClose); ok {
			err = c.Close()
		}
	})
	return err
}
