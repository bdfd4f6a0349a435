package proxy_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"
)

// Large frames are spliced, both ways, and none of their bytes is lost or changed; at most the first few kilobytes of
// each pass through our memory.
func TestLargeFramesAreSpliced(t *testing.T) {
	const size, frames = 1 << 20, 16
	body := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range body {
		body[i] = byte(rng.Uint32())
	}
	b := newBroker(t, 1, func(r request) []byte {
		if len(r.frame) > size {
			return r.reply(binary.BigEndian.AppendUint32(nil, crc(r.frame[r.Length:])))
		}
		return r.reply(body)
	})
	s := start(t, config(b.addr()))
	c := dial(t, s.Addr().String())
	for id := range int32(frames) {
		c.sendBytes(frame(1, 4, id, make([]byte, 30)))
		if got, read := c.receive(); got != id || !bytes.Equal(read, body) {
			t.Fatalf("reply %d has other bytes", got)
		}
	}
	spliced, copied := s.metrics.Value(splicedBytes), s.metrics.Value(copiedBytes)
	if share := float64(spliced) / float64(spliced+copied); share < 0.95 {
		t.Fatalf("%.3f of the bytes were spliced", share)
	}
	for id := range int32(frames) {
		c.sendBytes(frame(2, 0, id, body))
		if got, read := c.receive(); got != id || binary.BigEndian.Uint32(read) != crc(body) {
			t.Fatalf("request %d arrived with other bytes", got)
		}
	}
	until(t, "requests are spliced", func() bool { return s.metrics.Value(splicedBytes) >= spliced+frames*size*95/100 })
}

// More large replies at once than there may be splices are all delivered.
func TestMoreLargeRepliesThanSplices(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	b := newBroker(t, 1, func(r request) []byte { return r.reply(body) })
	s := start(t, config(b.addr()))
	var all sync.WaitGroup
	for range 48 {
		c := dial(t, s.Addr().String())
		all.Go(func() {
			for id := range int32(5) {
				if _, err := c.Write(frame(1, 4, id, make([]byte, 30))); err != nil {
					t.Error(err)
					return
				}
				if read, err := readFrame(c); err != nil || !bytes.Equal(read[4:], body) {
					t.Errorf("reply %d: %v", id, err)
					return
				}
			}
		})
	}
	all.Wait()
}
