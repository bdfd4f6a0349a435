package proxy_test

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// maker makes what the dialling side of a link sends.
type maker struct{ connections uint64 }

func (m *maker) begin() []byte {
	m.connections++
	return wire.AppendPeer(nil, &wire.PeerMessage{Kind: wire.PeerBegin, Process: [16]byte{1}, Number: m.connections})
}

func openStream(stream uint32, session byte, term uint64) []byte {
	return wire.AppendPeer(nil, &wire.PeerMessage{Kind: wire.PeerOpen, Stream: stream, Number: 1, Session: [16]byte{session}, Term: term, Host: "/192.0.2.1"})
}

func peerRequest(stream uint32, ordinal uint64, frame []byte) []byte {
	return wire.AppendPeer(nil, &wire.PeerMessage{Kind: wire.PeerRequest, Stream: stream, Ordinal: ordinal, Frame: frame})
}

// What a stranger, or a peer of another make, sends harms its own connection alone.
func TestGarbageFromAPeerHarmsNobodyElse(t *testing.T) {
	c := startCluster(t, 2)
	a, b := c.all[0], c.all[1]
	c.lead(b)
	cl := a.client()
	cl.send(1, commitOf(0, 1))
	cl.committedAs(1, 0)
	resent := a.metrics.Value(tracing.ResentRequests)
	var m maker
	for i, x := range []struct {
		what string
		sent []byte
	}{
		{"http", []byte("GET / HTTP/1.1\r\n\r\n")},
		{"no length", []byte{0, 0, 0, 0}},
		{"nothing first", openStream(1, 1, 1)},
		{"a closed stream", slices.Concat(m.begin(), peerRequest(9, 1, nil))},
		{"opened twice", slices.Concat(m.begin(), openStream(1, 1, 1), openStream(1, 2, 1))},
		{"an older stream", slices.Concat(m.begin(), openStream(1, 1, 1), openStream(2, 1, 1))},
		{"too large", slices.Concat(m.begin(), []byte{0x7f, 0xff, 0xff, 0xff})},
		{"half a message", slices.Concat(m.begin(), []byte{0, 0, 0, 6, byte(wire.PeerOpen), 0, 0, 0, 0, 1})},
		{"a second beginning", slices.Concat(m.begin(), m.begin())},
	} {
		t.Run(x.what, func(t *testing.T) {
			conn := b.dialPeer(t, "x")
			_, _ = conn.Write(x.sent)
			if n, err := conn.Read(make([]byte, 1)); n > 0 || isTimeout(err) {
				t.Fatalf("%d bytes, %v", n, err)
			}
			until(t, "it is counted", func() bool { return b.metrics.Value(tracing.ForwardMistakes) == int64(i+1) })
		})
	}
	cl.send(2, commitOf(0, 2))
	cl.committedAs(2, 0)
	if n := a.metrics.Value(tracing.ResentRequests) - resent; n != 0 {
		t.Errorf("%d requests were sent again", n)
	}
}

// A frame that cannot be read ends its own stream alone, and the answer says why.
func TestBrokenFrameFromAPeerEndsItsStreamAlone(t *testing.T) {
	c := startCluster(t, 2)
	b := c.all[1]
	c.lead(b)
	b.untilActive()
	var m maker
	conn := b.dialPeer(t, "x")
	good := kmsg.NewRequestFormatter(kmsg.FormatterClientID("raw")).AppendRequest(nil, heartbeat("m"), 9)[4:]
	_, _ = conn.Write(slices.Concat(m.begin(), openStream(1, 1, 1), openStream(2, 2, 1), openStream(3, 3, 99),
		peerRequest(1, 1, []byte("\x00\x0c\x00\x04\x00\x00\x00\x01\xff\xff\x00\x7fnot whole")), peerRequest(1, 2, good),
		peerRequest(2, 1, good), peerRequest(2, 2, frame(3, 9, 1, []byte{0})[4:]), peerRequest(3, 1, good),
		wire.AppendPeer(nil, &wire.PeerMessage{Kind: 99}), wire.AppendPeer(nil, &wire.PeerMessage{Kind: wire.PeerPing})))
	answers := map[string]wire.PeerMessage{}
	for range 6 {
		message, err := readFrame(conn)
		if err != nil {
			t.Fatal(err)
		}
		m, err := wire.ParsePeer(message)
		if err != nil {
			t.Fatal(err)
		}
		answers[fmt.Sprintf("%d/%d/%d", m.Kind, m.Stream, m.Ordinal)] = m
	}
	for what, code := range map[string]wire.PeerCode{
		"5/1/1": wire.PeerRefused, "5/1/2": wire.PeerStreamEnd, "5/2/1": wire.PeerAnswered, "5/2/2": wire.PeerRefused,
		"5/3/1": wire.PeerInactive, "7/0/0": 0,
	} {
		if m, ok := answers[what]; !ok || m.Code != code {
			t.Errorf("%s: %+v", what, m)
		}
	}
	if m := answers["5/1/1"]; m.Error != kerr.UnknownServerError.Code || !strings.Contains(string(m.Frame), "Heartbeat version 4") {
		t.Errorf("%d %s", m.Error, m.Frame)
	}
	if m := answers["5/2/2"]; !strings.Contains(string(m.Frame), "Metadata version 9 is not for the coordinator") {
		t.Errorf("%s", m.Frame)
	}
	if m := answers["5/3/1"]; m.Term != 1 {
		t.Errorf("the current term is said to be %d", m.Term)
	}
}

func (s *sidecar) dialPeer(t *testing.T, from string) net.Conn {
	conn, err := net.Dial("tcp", s.ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = conn.Write([]byte(from))
	return conn
}
