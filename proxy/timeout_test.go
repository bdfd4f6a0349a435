package proxy_test

import (
	"encoding/binary"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const repeatAfter = 1500 * time.Millisecond // the proxy's own

// --upstream-timeout counts beyond the time that a request itself gives the broker.
func TestRequestsMayTakeTheTimeTheyGive(t *testing.T) {
	b := newBroker(t, 1, func(r request) []byte {
		time.Sleep(700 * time.Millisecond)
		return echoBody(r)
	})
	c := config(b.addr())
	c.UpstreamTimeout = 200 * time.Millisecond
	s := start(t, c, func(s *side) { s.brokers.set(b.broker()) })
	produce := versioned(kmsg.NewPtrProduceRequest(), 8)
	produce.Acks, produce.TimeoutMillis = -1, 5000
	create := versioned(kmsg.NewPtrCreateTopicsRequest(), 4)
	create.TimeoutMillis = 5000
	deleted := versioned(kmsg.NewPtrDeleteRecordsRequest(), 1)
	deleted.TimeoutMillis = 5000
	var waiting []*client
	for _, req := range []kmsg.Request{produce, create, deleted} {
		cl := dial(t, s.Addrs()[1])
		cl.send(1, req)
		waiting = append(waiting, cl)
	}
	for _, cl := range waiting {
		cl.receive()
	}
	produce.Acks = 1 // is answered without a wait
	impatient := dial(t, s.Addrs()[1])
	impatient.send(1, produce)
	impatient.closed()
}

// largeProduce is a Produce request with n bytes of records.
func largeProduce(acks int16, n int) []byte {
	p := versioned(kmsg.NewPtrProduceRequest(), 8)
	p.Acks, p.TimeoutMillis = acks, 100
	topic := kmsg.NewProduceRequestTopic()
	part := kmsg.NewProduceRequestTopicPartition()
	part.Records = make([]byte, n)
	topic.Partitions = append(topic.Partitions, part)
	p.Topics = append(p.Topics, topic)
	return kmsg.NewRequestFormatter(kmsg.FormatterClientID("raw")).AppendRequest(nil, p, 9)
}

// unspliced hides from the proxy that its clients are on TCP, so that it has to copy.
type unspliced struct{ net.Listener }

func (l unspliced) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return struct{ net.Conn }{c}, nil
}

// eachWay runs a test with large frames spliced and with large frames copied.
func eachWay(t *testing.T, c proxy.Config, f func(*testing.T, proxy.Config)) {
	t.Run("spliced", func(t *testing.T) { f(t, c) })
	c.Listener = func(network, addr string) (net.Listener, error) {
		ln, err := net.Listen(network, addr)
		if err != nil {
			return nil, err
		}
		return unspliced{ln}, nil
	}
	t.Run("copied", func(t *testing.T) { f(t, c) })
}

// A client may take as long as it likes to send a large request, in small parts or with a pause longer than any time-out,
// and its broker is not blamed.
func TestSlowUpload(t *testing.T) {
	b := newBroker(t, 1, func(r request) []byte {
		return r.reply(binary.BigEndian.AppendUint32(nil, uint32(len(r.frame))))
	})
	c := config(b.addr())
	c.UpstreamTimeout = 600 * time.Millisecond
	eachWay(t, c, func(t *testing.T, c proxy.Config) {
		s := start(t, c, func(s *side) { s.brokers.set(b.broker()) })
		cl := dial(t, s.Addrs()[1])
		all := largeProduce(1, 400<<10)
		for rest := all; len(rest) > 0; rest = rest[min(20<<10, len(rest)):] {
			cl.sendBytes(rest[:min(20<<10, len(rest))])
			time.Sleep(30 * time.Millisecond)
		}
		if _, body := cl.receive(); binary.BigEndian.Uint32(body) != uint32(len(all)-4) {
			t.Fatal("the request arrived with another length")
		}
		cl.sendBytes(all[:100<<10])
		time.Sleep(3 * c.UpstreamTimeout)
		cl.sendBytes(all[100<<10:])
		cl.receive()
		cl.sendBytes(frame(2, 0, 1, nil))
		time.Sleep(2 * c.UpstreamTimeout) // nor does a deadline stay behind
		cl.receive()
		cl.sendBytes(frame(2, 0, 1, nil))
		cl.receive()
		if strings.Contains(s.logs.String(), "does not answer") {
			t.Fatal(s.logs)
		}
	})
}

// A broker that does not take a large request ends the client's connection, also when there is to be no reply.
func TestUploadToAStoppedBrokerEnds(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() { // says which versions it has, and reads no more
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			if f, err := readFrame(c); err == nil {
				r := request{frame: f}
				r.APIVersion, r.CorrelationID = int16(binary.BigEndian.Uint16(f[2:])), int32(binary.BigEndian.Uint32(f[4:]))
				_, _ = c.Write(versionsOf(r))
			}
		}
	}()
	c := config(ln.Addr().String())
	c.UpstreamTimeout = 300 * time.Millisecond
	eachWay(t, c, func(t *testing.T, c proxy.Config) {
		s := start(t, c, func(s *side) {
			s.brokers.set(upstream.Broker{ID: 1, Host: "127.0.0.1", Port: int32(portOf(ln.Addr().String()))})
		})
		for _, acks := range []int16{1, 0} {
			cl := dial(t, s.Addrs()[1])
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				_, _ = cl.Write(largeProduce(acks, 40<<20)) // more than sockets hold
			}()
			until(t, "the connection is closed", func() bool {
				select {
				case <-sent:
					return s.Clients() == 0
				default:
					return false
				}
			})
		}
	})
}
