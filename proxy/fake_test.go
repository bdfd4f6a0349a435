package proxy_test

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// fakeBroker is a server that speaks just enough Kafka: it answers ApiVersions and hands every other request to its
// handler, one after the other on each connection.
type fakeBroker struct {
	id       int32
	ln       net.Listener
	handle   atomic.Pointer[func(request) []byte]
	versions atomic.Pointer[func(request) []byte] // answers ApiVersions, if set
	deaf     atomic.Bool                          // accepts and never answers, as a stopped process
	dials    atomic.Int32                         // connections that have asked for ApiVersions

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	seen  []request
}

// request is a frame without its size, with its header.
type request struct {
	wire.RequestHeader
	frame []byte
}

// reply is the frame, size in front, that answers r with some bytes.
func (r request) reply(body []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(4+len(body)))
	b = binary.BigEndian.AppendUint32(b, uint32(r.CorrelationID))
	return append(b, body...)
}

func newBroker(t testing.TB, id int32, handle func(request) []byte) *fakeBroker {
	t.Helper()
	b := &fakeBroker{id: id, conns: map[net.Conn]struct{}{}}
	b.listen(t, "127.0.0.1:0")
	b.handle.Store(&handle)
	t.Cleanup(b.kill)
	return b
}

func (b *fakeBroker) listen(t testing.TB, addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	b.accept(ln)
}

func (b *fakeBroker) accept(ln net.Listener) {
	b.ln = ln
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			b.conns[c] = struct{}{}
			b.mu.Unlock()
			go b.serve(c)
		}
	}()
}

func (b *fakeBroker) addr() string { return b.ln.Addr().String() }

func (b *fakeBroker) broker() upstream.Broker {
	a := b.ln.Addr().(*net.TCPAddr)
	return upstream.Broker{ID: b.id, Host: "127.0.0.1", Port: int32(a.Port)}
}

// kill closes the listener and every connection.
func (b *fakeBroker) kill() {
	_ = b.ln.Close()
	b.closeConns()
}

func (b *fakeBroker) closeConns() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.conns {
		_ = c.Close()
		delete(b.conns, c)
	}
}

func (b *fakeBroker) requests() []request {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]request(nil), b.seen...)
}

func (b *fakeBroker) serve(c net.Conn) {
	defer c.Close()
	for {
		frame, err := readFrame(c)
		if err != nil {
			return
		}
		for b.deaf.Load() {
			time.Sleep(time.Millisecond)
			if b.gone(c) {
				return
			}
		}
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			return
		}
		r := request{h, frame}
		if h.APIKey == 18 {
			b.dials.Add(1)
			answer := versionsOf
			if other := b.versions.Load(); other != nil {
				answer = *other
			}
			_, _ = c.Write(answer(r))
			continue
		}
		b.mu.Lock()
		b.seen = append(b.seen, r)
		b.mu.Unlock()
		reply := (*b.handle.Load())(r)
		if reply == nil {
			continue
		}
		if len(reply) == 0 { // it closes the connection, as Kafka does on what it does not know
			return
		}
		if _, err := c.Write(reply); err != nil {
			return
		}
	}
}

func (b *fakeBroker) gone(c net.Conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, open := b.conns[c]
	return !open
}

func versionsOf(r request) []byte {
	resp := kmsg.NewPtrApiVersionsResponse()
	resp.Version = r.APIVersion
	for key := int16(0); key <= 75; key++ {
		if req := kmsg.RequestForKey(key); req != nil {
			k := kmsg.NewApiVersionsResponseApiKey()
			k.ApiKey, k.MaxVersion = key, req.MaxVersion()
			resp.ApiKeys = append(resp.ApiKeys, k)
		}
	}
	return wire.AppendResponse(nil, r.CorrelationID, resp)
}

func readFrame(c io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return nil, err
	}
	frame := make([]byte, binary.BigEndian.Uint32(head[:]))
	_, err := io.ReadFull(c, frame)
	return frame, err
}

// echoBody answers with the bytes of the request behind its header.
func echoBody(r request) []byte { return r.reply(r.frame[r.Length:]) }

// answer gives a handler that answers requests of known keys with a response made from them.
func answer(f func(kmsg.Request) kmsg.Response) func(request) []byte {
	return func(r request) []byte {
		req := kmsg.RequestForKey(r.APIKey)
		req.SetVersion(r.APIVersion)
		if req.ReadFrom(r.frame[r.Length:]) != nil {
			return nil
		}
		return wire.AppendResponse(nil, r.CorrelationID, f(req))
	}
}

// metadataOf names these brokers in Metadata, and their addresses in nothing else.
func metadataOf(all ...*fakeBroker) func(request) []byte {
	return answer(func(req kmsg.Request) kmsg.Response {
		resp := req.ResponseKind()
		if m, ok := resp.(*kmsg.MetadataResponse); ok {
			for _, b := range all {
				x := kmsg.NewMetadataResponseBroker()
				x.NodeID, x.Host, x.Port = b.id, "127.0.0.1", b.broker().Port
				m.Brokers = append(m.Brokers, x)
			}
		}
		return resp
	})
}

// client is a raw one: it sends frames and reads frames.
type client struct {
	net.Conn
	t testing.TB
}

func dial(t testing.TB, addr string) *client {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return &client{c, t}
}

// send sends a request.
func (c *client) send(correlation int32, req kmsg.Request) {
	c.t.Helper()
	c.sendBytes(kmsg.NewRequestFormatter(kmsg.FormatterClientID("raw")).AppendRequest(nil, req, correlation))
}

func (c *client) sendBytes(b []byte) {
	c.t.Helper()
	if _, err := c.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// receive reads a reply: its correlation id and the rest.
func (c *client) receive() (int32, []byte) {
	c.t.Helper()
	frame, err := readFrame(c)
	if err != nil {
		c.t.Fatalf("reading a reply: %v", err)
	}
	return int32(binary.BigEndian.Uint32(frame)), frame[4:]
}

// call sends a request and reads its response.
func (c *client) call(req kmsg.Request) kmsg.Response {
	c.t.Helper()
	c.send(77, req)
	id, body := c.receive()
	if id != 77 {
		c.t.Fatalf("correlation id %d", id)
	}
	resp := req.ResponseKind()
	if resp.IsFlexible() && resp.Key() != 18 {
		body = body[1:]
	}
	if err := resp.ReadFrom(body); err != nil {
		c.t.Fatal(err)
	}
	return resp
}

// closed waits for the end of the connection.
func (c *client) closed() {
	c.t.Helper()
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || isTimeout(err) {
		c.t.Fatalf("the connection was to be closed, read %d bytes, %v", n, err)
	}
}

func isTimeout(err error) bool {
	e, ok := err.(net.Error)
	return ok && e.Timeout()
}

// frame builds a request of any key: header version 1 with client id "raw".
func frame(key, version int16, correlation int32, body []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(13+len(body)))
	b = binary.BigEndian.AppendUint16(b, uint16(key))
	b = binary.BigEndian.AppendUint16(b, uint16(version))
	b = binary.BigEndian.AppendUint32(b, uint32(correlation))
	b = append(b, 0, 3, 'r', 'a', 'w')
	return append(b, body...)
}

// until waits for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func crc(b []byte) uint32 { return crc32.ChecksumIEEE(b) }

func versioned[R kmsg.Request](req R, version int16) R {
	req.SetVersion(version)
	return req
}

func heartbeat(member string) *kmsg.HeartbeatRequest {
	req := versioned(kmsg.NewPtrHeartbeatRequest(), 4)
	req.Group, req.MemberID = "g", member
	return req
}

// metadata asks for brokers only.
func metadata() *kmsg.MetadataRequest {
	req := versioned(kmsg.NewPtrMetadataRequest(), 9)
	req.Topics = []kmsg.MetadataRequestTopic{}
	return req
}

type netConn = net.Conn

func itoa(n int) string { return strconv.Itoa(n) }

func portOf(addr string) (port int) {
	_, text, _ := net.SplitHostPort(addr)
	_, _ = fmt.Sscan(text, &port)
	return port
}

const (
	splicedBytes        = tracing.SplicedBytes
	copiedBytes         = tracing.CopiedBytes
	connectionsRefused  = tracing.ConnectionsRefused
	upstreamConnections = tracing.UpstreamConnections
)
