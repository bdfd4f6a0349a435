package proxy_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Replies leave in the order of the requests with their own correlation ids, whoever answers them and whenever: the
// coordinator (at once, late), the proxy, one broker or another; and Produce with acks 0 has none. ORDER_SEED repeats a
// seed that failed.
func TestRepliesLeaveInRequestOrder(t *testing.T) {
	seeds := []uint64{rand.Uint64(), rand.Uint64(), rand.Uint64()}
	if s := os.Getenv("ORDER_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = []uint64{seed}
	}
	for _, seed := range seeds {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) { replyOrder(t, seed) })
	}
}

func replyOrder(t *testing.T, seed uint64) {
	const requests = 600
	rng := rand.New(rand.NewPCG(seed, 1))
	delays := rand.New(rand.NewPCG(seed, 2))
	var a, b *fakeBroker
	handle := func(r request) []byte {
		switch {
		case r.APIKey == 3:
			return metadataOf(a, b)(r)
		case r.APIKey == 0 && bytes.HasSuffix(r.frame, []byte{0xac, 0}):
			return nil
		}
		return echoBody(r)
	}
	a = newBroker(t, 1, handle)
	b = newBroker(t, 2, handle)
	s := start(t, config(a.addr()), func(s *side) {
		s.brokers.set(a.broker(), b.broker())
		s.echo.answer = func(r *coordinator.Request) {
			d := time.Duration(delays.IntN(1500)) * time.Microsecond
			if d < 500*time.Microsecond {
				r.Done(r.Body.ResponseKind(), nil)
				return
			}
			time.AfterFunc(d, func() { r.Done(r.Body.ResponseKind(), nil) })
		}
	})
	c := dial(t, s.Addrs()[1])
	var want []expected
	var sends [][]byte
	for i := range int32(requests) {
		sent, w := randomRequest(rng, i^0x5a5a) // not ascending
		sends = append(sends, sent)
		if w != nil {
			want = append(want, *w)
		}
	}
	go func() {
		for len(sends) > 0 {
			n := min(1+rng.IntN(5), len(sends))
			_, _ = c.Write(bytes.Join(sends[:n], nil))
			sends = sends[n:]
		}
	}()
	for i, w := range want {
		id, body := c.receive()
		if id != w.id {
			t.Fatalf("seed %d: reply %d has correlation id %d, not %d", seed, i, id, w.id)
		}
		if w.body != nil && !bytes.Equal(body, w.body) {
			t.Fatalf("seed %d: reply %d has other bytes than were sent", seed, i)
		}
	}
	ordinal := uint64(0)
	for _, r := range s.echo.requests() {
		if r.Client.Ordinal <= ordinal {
			t.Fatalf("seed %d: ordinal %d after %d", seed, r.Client.Ordinal, ordinal)
		}
		ordinal = r.Client.Ordinal
	}
}

// expected is the reply to a request: its body, if that is known.
type expected struct {
	id   int32
	body []byte
}

// randomRequest makes a request of one of many kinds, and says what must answer it; nil: nothing.
func randomRequest(rng *rand.Rand, id int32) ([]byte, *expected) {
	random := func(n int) []byte {
		body := make([]byte, n)
		for i := range body {
			body[i] = byte(rng.Uint32())
		}
		return body
	}
	known := func(req kmsg.Request) ([]byte, *expected) {
		return kmsg.NewRequestFormatter(kmsg.FormatterClientID("raw")).AppendRequest(nil, req, id), &expected{id, nil}
	}
	switch rng.IntN(8) {
	case 0, 1: // ListOffsets 0, of any size
		body := random([]int{10, 100, 5000, 70000, 300000}[min(rng.IntN(9), 4)])
		return frame(2, 0, id, body), &expected{id, body}
	case 2: // acks 0
		body := append([]byte{0, 0}, random([]int{20, 20, 100000}[rng.IntN(3)])...)
		return frame(0, 0, id, append(body, 0xac, 0)), nil
	case 3: // acks 1
		body := append(append([]byte{0, 1}, random(200)...), 0xac, 1) // not the end by which handle knows acks 0
		return frame(0, 0, id, body), &expected{id, body}
	case 4:
		return known(heartbeat("m"))
	case 5:
		return known(versioned(kmsg.NewPtrOffsetFetchRequest(), 8))
	case 6:
		return known(metadata())
	}
	req := versioned(kmsg.NewPtrFindCoordinatorRequest(), 4)
	req.CoordinatorKeys = []string{"g"}
	return known(req)
}

// A heartbeat on a connection whose fetch is stuck reaches the coordinator when it is read (sarama and kafkajs share one
// connection); only its reply waits.
func TestGroupWorkStartsWhenRead(t *testing.T) {
	release := make(chan struct{})
	b := newBroker(t, 1, func(r request) []byte {
		<-release
		return echoBody(r)
	})
	s := start(t, config(b.addr()), func(s *side) { s.brokers.set(b.broker()) })
	c := dial(t, s.Addrs()[1])
	c.sendBytes(frame(1, 4, 1, make([]byte, 30)))
	c.send(2, heartbeat("m"))
	until(t, "the heartbeat reaches the coordinator", func() bool { return len(s.echo.requests()) == 1 })
	close(release)
	for want := int32(1); want <= 2; want++ {
		if id, _ := c.receive(); id != want {
			t.Fatalf("correlation id %d, not %d", id, want)
		}
	}
}

// An unknown api key passes untouched, there and back.
func TestUnknownAPIKeyPasses(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()))
	c := dial(t, s.Addr().String())
	sent := frame(9999, 3, 42, []byte("whatever it means"))
	c.sendBytes(sent)
	id, body := c.receive()
	if id != 42 || string(body) != "whatever it means" {
		t.Fatalf("%d %q", id, body)
	}
	if got := b.requests(); len(got) != 1 || !bytes.Equal(got[0].frame, sent[4:]) {
		t.Fatalf("the broker saw %v", got)
	}
}

// A version that a group request does not have closes the connection, as Kafka does; replies that come before it are
// still given.
func TestUnsupportedGroupVersionClosesAfterEarlierReplies(t *testing.T) {
	b := newBroker(t, 1, echoBody)
	s := start(t, config(b.addr()))
	c := dial(t, s.Addr().String())
	c.send(1, heartbeat("m"))
	c.sendBytes(frame(12, 99, 2, nil))
	if id, _ := c.receive(); id != 1 {
		t.Fatalf("correlation id %d", id)
	}
	c.closed()
	if len(s.echo.requests()) != 1 {
		t.Fatal("version 99 reached the coordinator")
	}
}

// A client that ends its side gets what it asked for, in order, and then the end.
func TestHalfCloseAnswersWhatIsOutstanding(t *testing.T) {
	b := newBroker(t, 1, func(r request) []byte {
		time.Sleep(50 * time.Millisecond)
		return echoBody(r)
	})
	s := start(t, config(b.addr()))
	c := dial(t, s.Addr().String())
	c.sendBytes(frame(2, 0, 1, []byte("remote")))
	c.send(2, heartbeat("m"))
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for want := int32(1); want <= 2; want++ {
		if id, _ := c.receive(); id != want {
			t.Fatalf("correlation id %d, not %d", id, want)
		}
	}
	c.closed()
	until(t, "the leg is closed too", func() bool { return s.metrics.Value(upstreamConnections) == 0 })
}

// A reply that comes after its request was answered by another broker, because the dial took so long, is not taken for
// the next one's.
func TestReplyOfASlowDialIsNotTakenForAnothers(t *testing.T) {
	var all []*fakeBroker
	handle := func(r request) []byte {
		if r.APIKey == 3 {
			return metadataOf(all...)(r)
		}
		return echoBody(r)
	}
	slow, b := newBroker(t, 1, handle), newBroker(t, 2, handle)
	all = []*fakeBroker{slow, b}
	dialled := make(chan struct{})
	c := config(b.addr())
	c.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if addr == slow.addr() {
			<-dialled
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	s := start(t, c, func(s *side) { s.brokers.set(slow.broker(), b.broker()) })
	cl := dial(t, s.Addrs()[1])
	cl.call(metadata())
	close(dialled)
	cl.sendBytes(frame(2, 0, 5, []byte("hello")))
	if id, body := cl.receive(); id != 5 || string(body) != "hello" {
		t.Fatalf("correlation id %d, %q", id, body)
	}
}
