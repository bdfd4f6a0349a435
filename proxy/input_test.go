package proxy_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// What a client does wrong ends its own connection, with one line in the log that names the mistake; a client beside it
// notices nothing.
func TestMistakesEndTheirOwnConnectionWithOneLine(t *testing.T) {
	size := func(n uint32, rest ...byte) []byte { return append(binary.BigEndian.AppendUint32(nil, n), rest...) }
	join := kmsg.NewRequestFormatter().AppendRequest(nil, versioned(kmsg.NewPtrJoinGroupRequest(), 5), 1)
	for name, m := range map[string]struct {
		sent []byte
		says string
	}{
		"TLS":                     {[]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), "speaks TLS, but this port is plain"},
		"HTTP":                    {[]byte("GET / HTTP/1.1\r\nHost: kafka\r\n\r\n"), "speaks HTTP GET"},
		"negative length":         {size(0xffffffff), "claims -1 bytes"},
		"2 GiB":                   {size(0x7fffffff), "claims 2147483647 bytes"},
		"over --max-frame":        {size(100<<20 + 1), "--max-frame"},
		"too short":               {size(3, 1, 2, 3), "too short for a header"},
		"truncated header":        {size(12, 0, 3, 0, 9, 0, 0, 0, 1, 0, 100, 'a', 'b'), "header does not end"},
		"negative api key":        {size(10, 0xff, 0xfe, 0, 0, 0, 0, 0, 1, 0xff, 0xff), "header that nobody can read"},
		"truncated request":       {append(size(uint32(len(join)-4-3)), join[4:len(join)-3]...), "JoinGroup"},
		"unsupported version":     {frame(11, 99, 1, nil), "JoinGroup version 99"},
		"large group request":     {size(8<<20+1, frame(11, 5, 1, nil)[4:]...), "that group requests may have"},
		"Produce without acks":    {frame(0, 3, 1, []byte{0, 9}), "Produce request without acks"},
		"group name too long":     {frame(16, 3, 1, []byte{0, 0xff, 0xff, 0xff, 0xff, 0x7f}), "ListGroups"},
		"ApiVersions truncated":   {frame(18, 3, 1, []byte{0, 99}), "ApiVersions"},
		"tags that are not there": {frame(18, 3, 1, []byte{0, 2, 'a', 2, 'b', 0xff, 0xff, 0xff, 0xff, 0x0f}), "ApiVersions"},
		"unknown api key":         {frame(9999, 0, 1, nil), "api key 9999 (Unknown) version 0"},
		"unknown version":         {frame(19, 99, 1, []byte{0}), "CreateTopics) version 99"},
		"removed version":         {frame(0, 2, 1, []byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0}), "Produce) version 2"},
		"unreadable, for one":     {frame(1, 4, 1, []byte{0}), "upon a Fetch request (api key 1, version 4)"},
		"unreadable, no reply":    {frame(0, 3, 1, []byte{0xff, 0xff, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9}), "upon a Produce request without acks (api key 0, version 3)"},
		"unreadable, for any":     {frame(3, 1, 1, []byte{0, 15, 0x42, 0x40, 0, 1, 'a'}), "Metadata version 1: frame ends too early"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBroker(t, 1, func(r request) []byte {
				if r.APIKey == 9999 || r.APIVersion == 99 || r.APIKey <= 1 || r.APIKey == 3 {
					return []byte{}
				}
				return echoBody(r)
			})
			versions := withoutOldFetch
			b.versions.Store(&versions)
			s := start(t, config(b.addr()))
			beside := dial(t, s.Addr().String())
			beside.call(heartbeat("m"))
			beside.sendBytes(frame(2, 0, 1, nil))
			for range 3 {
				c := dial(t, s.Addr().String())
				c.sendBytes(m.sent)
				c.closed()
			}
			until(t, "all is said", func() bool { return s.Clients() == 1 })
			if n := strings.Count(s.logs.String(), m.says); n != 3 { // one each
				t.Fatalf("%d lines say %q:\n%s", n, m.says, s.logs)
			}
			if strings.Contains(s.logs.String(), "does not answer") {
				t.Fatalf("the upstream is blamed:\n%s", s.logs)
			}
			if id, _ := beside.receive(); id != 1 {
				t.Fatalf("correlation id %d", id)
			}
			beside.call(heartbeat("m"))
		})
	}
}

// withoutOldFetch shows of Fetch what Kafka 4 has, and of Produce the versions 0 to 2, which that has no more.
func withoutOldFetch(r request) []byte {
	decoded, err := wire.DecodeResponse(18, r.APIVersion, versionsOf(r)[4:])
	if err != nil {
		panic(err)
	}
	resp := decoded.(*kmsg.ApiVersionsResponse)
	for i := range resp.ApiKeys {
		if resp.ApiKeys[i].ApiKey == 1 {
			resp.ApiKeys[i].MinVersion = 4
		}
	}
	return wire.AppendResponse(nil, r.CorrelationID, resp)
}

// A client that ends its side within a header has made a mistake, one that ends it within a body may have been killed,
// and one that ends it between requests has all its answers coming.
func TestEndsWithinAHeaderAreNamed(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()))
	whole := frame(12, 0, 1, []byte{0, 1, 'g', 0, 0, 0, 1, 0, 1, 'm'})
	for n := range whole {
		c := dial(t, s.Addr().String())
		c.sendBytes(whole[:n])
		if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.closed()
	}
	c := dial(t, s.Addr().String())
	c.sendBytes(whole)
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if id, _ := c.receive(); id != 1 {
		t.Errorf("correlation id %d", id)
	}
	c.closed()
	if n := strings.Count(s.logs.String(), "within the header"); n != len(whole)-11 {
		t.Errorf("%d lines:\n%s", n, s.logs)
	}
}

// Random bytes hurt nobody else, and every connection they come on ends.
func TestRandomBytesHurtNobodyElse(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()))
	beside := dial(t, s.Addr().String())
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		c := dial(t, s.Addr().String())
		junk := make([]byte, 1+rng.IntN(300))
		for i := range junk {
			junk[i] = byte(rng.Uint32())
		}
		if rng.IntN(2) == 0 { // a plausible size and a key that exists
			junk = frame(int16(rng.IntN(94)), int16(rng.IntN(10)), 1, junk)
		}
		_, _ = c.Write(junk)
		_ = c.Conn.(*net.TCPConn).CloseWrite()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := bytes.NewBuffer(nil).ReadFrom(c); isTimeout(err) {
			t.Fatalf("seed %d: a connection with junk stays open", seed)
		}
		_ = c.Close()
		beside.call(heartbeat("m"))
	}
	until(t, "all are gone", func() bool { return s.Clients() == 1 })
	if strings.Contains(s.logs.String(), "panic") {
		t.Fatal(s.logs)
	}
}

// Connections over --max-connections are closed at once; there is room again when one has gone.
func TestMaxConnections(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	c := config(b.addr())
	c.MaxConnections = 3
	s := start(t, c)
	var open []*client
	for range 3 {
		cl := dial(t, s.Addr().String())
		cl.call(heartbeat("m"))
		open = append(open, cl)
	}
	for range 5 {
		dial(t, s.Addr().String()).closed()
	}
	if s.metrics.Value(connectionsRefused) != 5 || strings.Count(s.logs.String(), "--max-connections") != 1 {
		t.Fatalf("%d refused, %s", s.metrics.Value(connectionsRefused), s.logs)
	}
	_ = open[0].Close()
	until(t, "there is room", func() bool { return s.Clients() == 2 })
	dial(t, s.Addr().String()).call(heartbeat("m"))
}

// A client may have --max-inflight requests outstanding; what it sends beyond waits in its socket and is answered later.
func TestMaxInflightStopsReading(t *testing.T) {
	release := make(chan struct{})
	b := newBroker(t, 1, func(r request) []byte {
		<-release
		return echoBody(r)
	})
	c := config(b.addr())
	c.MaxInflight = 4
	s := start(t, c, func(s *side) { s.brokers.set(b.broker()) })
	cl := dial(t, s.Addrs()[1])
	cl.sendBytes(frame(2, 0, 0, nil))
	for i := range int32(20) {
		cl.send(1+i, heartbeat("m"))
	}
	until(t, "three heartbeats were read", func() bool { return len(s.echo.requests()) == 3 })
	time.Sleep(20 * time.Millisecond) // time to do what it must not
	if n := len(s.echo.requests()); n != 3 {
		t.Fatalf("%d heartbeats were read", n)
	}
	close(release)
	for want := range int32(21) {
		if id, _ := cl.receive(); id != want {
			t.Fatalf("correlation id %d, not %d", id, want)
		}
	}
}

// flaky is a listener that has no file descriptors left for a while.
type flaky struct {
	net.Listener
	failures int
}

func (f *flaky) Accept() (net.Conn, error) {
	if f.failures > 0 {
		f.failures--
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return f.Listener.Accept()
}

func TestAcceptingSurvivesARunOutOfFileDescriptors(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	c := config(b.addr())
	c.Listener = func(network, addr string) (net.Listener, error) {
		ln, err := net.Listen(network, addr)
		if err != nil {
			return nil, err
		}
		return &flaky{ln, 4}, nil
	}
	s := start(t, c)
	dial(t, s.Addr().String()).call(heartbeat("m"))
	if !strings.Contains(s.logs.String(), syscall.EMFILE.Error()) {
		t.Fatal(s.logs)
	}
}

// An upstream that speaks no Kafka is named as such, and clients are closed.
func TestUpstreamThatSpeaksNoKafka(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"))
			_ = c.Close()
		}
	}()
	s := start(t, config(ln.Addr().String()))
	c := dial(t, s.Addr().String())
	c.send(1, metadata())
	c.closed()
	if !strings.Contains(s.logs.String(), "no Kafka broker") {
		t.Fatal(s.logs)
	}
}

// A reply with another correlation id than the request's ends the connection.
func TestForeignCorrelationIDClosesTheConnection(t *testing.T) {
	b := newBroker(t, 1, func(r request) []byte {
		r.CorrelationID++
		return echoBody(r)
	})
	s := start(t, config(b.addr()))
	c := dial(t, s.Addr().String())
	c.sendBytes(frame(2, 0, 7, nil))
	c.closed()
	if !strings.Contains(s.logs.String(), "correlation id 8 instead of 7") {
		t.Fatal(s.logs)
	}
}

// Each mistake has a line of its own, but a client that makes one after the other does not fill the log.
func TestAFloodOfMistakesIsCutShort(t *testing.T) {
	const mistakeLines = 50
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()))
	for n := range uint32(mistakeLines + 10) {
		c := dial(t, s.Addr().String())
		c.sendBytes(binary.BigEndian.AppendUint32(nil, 1<<30+n))
		c.closed()
	}
	if n := strings.Count(s.logs.String(), "--max-frame"); n != mistakeLines {
		t.Fatalf("%d lines:\n%s", n, s.logs)
	}
	if n := strings.Count(s.logs.String(), "more of the kind"); n != 1 {
		t.Fatalf("%d lines say that there are more:\n%s", n, s.logs)
	}
}

// A connection keeps 16 MiB of requests in memory; what a client sends beyond waits in its socket and is answered later.
func TestMemoryOfAConnectionIsBounded(t *testing.T) {
	p := &park{}
	s := alone(t, func(s *side) { s.echo.answer = p.keep })
	c := dial(t, s.Addrs()[1])
	commit := versioned(kmsg.NewPtrSyncGroupRequest(), 3)
	commit.GroupAssignment = []kmsg.SyncGroupRequestGroupAssignment{{MemberAssignment: make([]byte, 3<<20)}}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for id := range int32(20) {
			if _, err := c.Write(kmsg.NewRequestFormatter().AppendRequest(nil, commit, id)); err != nil {
				return
			}
		}
	}()
	until(t, "five were read", func() bool { return p.len() == 5 })
	time.Sleep(50 * time.Millisecond) // time to do what it must not
	if n := p.len(); n != 5 {
		t.Fatalf("%d requests of 3 MiB were read", n)
	}
	for want := int32(0); want < 20; {
		for _, r := range p.take() {
			r.Done(r.Body.ResponseKind(), nil)
			if id, _ := c.receive(); id != want {
				t.Fatalf("correlation id %d, not %d", id, want)
			}
			want++
		}
	}
	<-sent
}

// A client that goes while it has as many requests outstanding as it may is noticed.
func TestClientThatGoesWithAllItsRequestsOutstanding(t *testing.T) {
	s := alone(t, func(s *side) { s.echo = newEcho(false) })
	c := dial(t, s.Addrs()[1])
	for id := range int32(80) {
		c.send(id, heartbeat("m"))
	}
	until(t, "64 are held", func() bool { return s.metrics.Value(tracing.RequestsInFlight) == 64 })
	_ = c.Close()
	until(t, "it has gone", func() bool { return s.Clients() == 0 })
	s.echo.set(true, 2)
	dial(t, s.Addrs()[1]).call(heartbeat("another"))
	if got := s.echo.requests(); len(got) != 1 {
		t.Fatalf("%d requests were executed", len(got))
	}
}

// Offsets in transactions are refused with the error that ends the producer however many they are.
func TestManyOffsetsInATransactionAreRefused(t *testing.T) {
	s := start(t, config("127.0.0.1:1"))
	req := versioned(kmsg.NewPtrTxnOffsetCommitRequest(), 3)
	topic := kmsg.NewTxnOffsetCommitRequestTopic()
	for i := range int32(20_000) {
		p := kmsg.NewTxnOffsetCommitRequestTopicPartition()
		p.Partition, p.Metadata = i, kmsg.StringPtr("metadata of some length")
		topic.Partitions = append(topic.Partitions, p)
	}
	req.Topics = append(req.Topics, topic)
	resp := dial(t, s.Addr().String()).call(req).(*kmsg.TxnOffsetCommitResponse)
	if n, code := len(resp.Topics[0].Partitions), resp.Topics[0].Partitions[0].ErrorCode; n != 20_000 || code != kerr.UnsupportedForMessageFormat.Code {
		t.Fatalf("%d partitions, error %d", n, code)
	}
}

// SaslHandshake 0 is not shown, and refused: what follows it comes in no frames.
func TestSASLWithoutFramesIsRefused(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker()) })
	c := dial(t, s.Addrs()[1])
	v := c.call(versioned(kmsg.NewPtrApiVersionsRequest(), 2)).(*kmsg.ApiVersionsResponse)
	for _, k := range v.ApiKeys {
		if k.ApiKey == 17 && (k.MinVersion != 1 || k.MaxVersion != 1) {
			t.Fatalf("%+v", k)
		}
	}
	handshake := versioned(kmsg.NewPtrSASLHandshakeRequest(), 0)
	handshake.Mechanism = "PLAIN"
	if code := c.call(handshake).(*kmsg.SASLHandshakeResponse).ErrorCode; code != kerr.UnsupportedVersion.Code || len(b.requests()) != 0 {
		t.Fatalf("error %d, %d requests went upstream", code, len(b.requests()))
	}
}
