package replicate

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// raftPair is raft's own transport over the peer ports of two nodes.
func raftPair(t *testing.T, ended func(string)) (a, b *raft.NetworkTransport, from, to raft.ServerAddress) {
	t.Helper()
	d := &directory{}
	var transports [2]*raft.NetworkTransport
	var nodes [2]raft.ServerAddress
	for i := range transports {
		p := openTestPeer(t, d, nil)
		stream := newRaftStream(p.peerPort, p.id.node, ended)
		p.handle(peerRaft, stream.take)
		transports[i] = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: stream, MaxPool: 2, Timeout: time.Minute, Logger: &raftLogger{log: slog.New(slog.DiscardHandler)}})
		t.Cleanup(func() { _ = transports[i].Close() })
		nodes[i] = transports[i].LocalAddr()
		if string(nodes[i]) != p.id.node {
			t.Errorf("address %q, not the node id", nodes[i])
		}
	}
	return transports[0], transports[1], nodes[0], nodes[1]
}

func TestRaftSpeaksThroughThePeerPort(t *testing.T) {
	ends := make(chan string, 16)
	a, b, from, to := raftPair(t, func(node string) { ends <- node })
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case rpc := <-b.Consumer():
				rpc.Respond(&raft.AppendEntriesResponse{Term: rpc.Command.(*raft.AppendEntriesRequest).Term, Success: true}, nil)
			case <-stop:
				return
			}
		}
	}()
	for term := range uint64(10) {
		var response raft.AppendEntriesResponse
		err := a.AppendEntries(raft.ServerID(to), to, &raft.AppendEntriesRequest{Term: term, RPCHeader: raft.RPCHeader{Addr: []byte(from)}}, &response)
		if err != nil || !response.Success || response.Term != term {
			t.Fatalf("%+v, %v", response, err)
		}
	}
	if len(ends) != 0 {
		t.Fatal("a connection ended")
	}
	// The side that has dialled dies: told once, for its one connection.
	_ = a.Close()
	a.CloseStreams()
	select {
	case node := <-ends:
		if node != string(from) {
			t.Errorf("told that %s has ended", node)
		}
	case <-time.After(time.Minute):
		t.Fatal("the end was not noticed")
	}
	if len(ends) != 0 {
		t.Error("told twice")
	}
}

// However often a dead connection is tried, its end is told once; the port's own end, never.
func TestAnEndIsToldOnce(t *testing.T) {
	d := &directory{}
	a, b := openTestPeer(t, d, nil), openTestPeer(t, d, nil)
	ends := make(chan string, 16)
	stream := newRaftStream(b.peerPort, b.id.node, func(node string) { ends <- node })
	b.handle(peerRaft, stream.take)
	dial := func() net.Conn {
		t.Helper()
		conn, err := newRaftStream(a.peerPort, a.id.node, nil).Dial(raft.ServerAddress(b.id.node), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	for range 2 {
		conn := dial()
		accepted, err := stream.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		_ = conn.Close()
		for range 3 {
			if _, err := accepted.Read(make([]byte, 1)); err == nil {
				t.Error("read something")
			}
		}
		if len(ends) != 1 || <-ends != a.id.node {
			t.Errorf("%d more ends", len(ends))
		}
	}
	third, waiting := dial(), dial()
	defer third.Close()
	defer waiting.Close()
	open, err := stream.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = b.close() // ends the one that raft never took as well, or its taker would stay
	if _, err := open.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) || len(ends) != 0 {
		t.Errorf("%v, %d ends", err, len(ends))
	}
	waitFor(t, "both forgotten", func() bool {
		stream.mu.Lock()
		defer stream.mu.Unlock()
		return len(stream.conns) == 3 // those that raft has, and has not closed
	})
}

// Closing our own side is no sign of anybody's death.
func TestOurOwnCloseIsNobodysEnd(t *testing.T) {
	d := &directory{}
	a, b := openTestPeer(t, d, nil), openTestPeer(t, d, nil)
	stream := newRaftStream(b.peerPort, b.id.node, func(string) { t.Error("told of an end") })
	b.handle(peerRaft, stream.take)
	var conns []net.Conn
	for range 3 {
		conn, _, err := a.dial(context.Background(), b.id.node, peerRaft)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if len(conns) < 2 {
			accepted, err := stream.Accept()
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, accepted)
		}
	}
	_ = conns[0].Close()
	_ = stream.Close()
	for _, conn := range conns {
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
	}
	if _, err := stream.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
	waitFor(t, "all closed, the one that raft never took as well", func() bool { return b.metrics.Value(tracing.PeerConnections) == 0 })
	if conn, _, err := a.dial(context.Background(), b.id.node, peerRaft); err == nil {
		defer conn.Close()
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("a closed stream took a connection")
		}
	}
}
