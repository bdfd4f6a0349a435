package replicate

import (
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// chaosNet is what lies between the sidecars of a fleet. Each has a slot, which outlives it: whoever comes back there,
// with whatever id and address, has the same faults.
//
// A way that is cut is one packets are lost on: what was written arrives when it is mended, late but in order; the end
// of a connection is not heard of; and no connection begins, which needs both ways. Gossip's packets are lost for good.
type chaosNet struct {
	stop chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed when any of the following has changed
	slots   map[string]int
	ways    map[way]wayFaults
	open    map[*chaosConn]struct{}
}

type way struct{ from, to int }

// wayFaults are what happens on one way. Drop and double are chances, of a request of raft's, of 100.
type wayFaults struct {
	cut          bool
	delay        time.Duration
	drop, double int
}

// chaosConn is one connection, with its two ends in our hands.
type chaosConn struct {
	way       // of who has dialled
	near, far net.Conn
}

func newChaosNet() *chaosNet {
	return &chaosNet{
		stop: make(chan struct{}), changed: make(chan struct{}),
		slots: map[string]int{}, ways: map[way]wayFaults{}, open: map[*chaosConn]struct{}{},
	}
}

// name says in which slot an address or a node id is.
func (c *chaosNet) name(slot int, names ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range names {
		c.slots[n] = slot
	}
}

func (c *chaosNet) slot(name string) (int, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	slot, known := c.slots[name]
	return slot, known
}

// set changes what happens on a way; the zero faults mend it.
func (c *chaosNet) set(w way, f wayFaults) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ways[w] = f
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *chaosNet) mend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.ways)
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *chaosNet) faults(w way) (f wayFaults, changed <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ways[w], c.changed
}

// pass waits until a way is open; false: the test is over, or done is closed.
func (c *chaosNet) pass(w way, done <-chan struct{}) bool {
	for {
		f, changed := c.faults(w)
		if !f.cut {
			return true
		}
		select {
		case <-changed:
		case <-done:
			return false
		case <-c.stop:
			return false
		}
	}
}

// reset breaks every connection between two slots, as a device in the middle that has forgotten them would.
func (c *chaosNet) reset(a, b int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.open {
		if conn.way == (way{a, b}) || conn.way == (way{b, a}) {
			_ = conn.near.Close()
			_ = conn.far.Close()
		}
	}
}

// dialer is how the sidecar in a slot dials.
func (c *chaosNet) dialer(from int) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		to, known := c.slot(addr)
		there, back := way{from, to}, way{to, from}
		if known && !(c.pass(there, ctx.Done()) && c.pass(back, ctx.Done())) {
			return nil, &net.OpError{Op: "dial", Net: network, Err: context.DeadlineExceeded}
		}
		var d net.Dialer
		far, err := d.DialContext(ctx, network, addr)
		if err != nil || !known {
			return far, err
		}
		ours, theirs, err := loopbackPair(ctx)
		if err != nil {
			_ = far.Close()
			return nil, err
		}
		conn := &chaosConn{way: there, near: ours, far: far}
		c.mu.Lock()
		c.open[conn] = struct{}{}
		c.mu.Unlock()
		var pumps sync.WaitGroup
		pumps.Go(func() { c.pump(there, ours, far) })
		pumps.Go(func() { c.pump(back, far, ours) })
		go func() {
			pumps.Wait()
			c.mu.Lock()
			delete(c.open, conn)
			c.mu.Unlock()
		}()
		return theirs, nil
	}
}

// loopbackPair is a connection with both its ends.
func loopbackPair(ctx context.Context) (ours, theirs net.Conn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	var d net.Dialer
	if theirs, err = d.DialContext(ctx, "tcp", l.Addr().String()); err != nil {
		return nil, nil, err
	}
	if ours, err = l.Accept(); err != nil {
		_ = theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// pump carries one direction. When its source ends, its sink is closed once the way is open, for both directions: half
// a connection is of no use to a peer. A sink that is gone says nothing: the other pump hears of it.
func (c *chaosNet) pump(w way, from, to net.Conn) {
	defer to.Close()
	defer c.pass(w, nil)
	buf := make([]byte, 64<<10)
	for dead := false; ; {
		n, err := from.Read(buf)
		if n > 0 && !dead {
			if !c.pass(w, nil) {
				return
			}
			if f, _ := c.faults(w); f.delay > 0 {
				select {
				case <-time.After(f.delay):
				case <-c.stop:
				}
			}
			_, werr := to.Write(buf[:n])
			dead = werr != nil
		}
		if err != nil {
			return
		}
	}
}

// gossipCut is the fault of gossip in a slot.
func (c *chaosNet) gossipCut(from int) func(addr string) bool {
	return func(addr string) bool {
		to, known := c.slot(addr)
		f, _ := c.faults(way{from, to})
		return known && f.cut
	}
}

// chaosFaults are those of raft's requests in a slot: dropped, sent twice, or without an answer. What is cut or late is
// so on the connections.
type chaosFaults struct {
	*chaosNet
	from int
}

func (f chaosFaults) request(to raft.ServerID) int {
	slot, known := f.slot(string(to))
	if !known {
		return 1
	}
	faults, _ := f.chaosNet.faults(way{f.from, slot})
	switch {
	case rand.IntN(100) < faults.drop:
		return 0
	case rand.IntN(100) < faults.double:
		return 2
	}
	return 1
}

func (f chaosFaults) response(from raft.ServerID) bool {
	slot, known := f.slot(string(from))
	if !known {
		return true
	}
	faults, _ := f.chaosNet.faults(way{slot, f.from})
	return rand.IntN(100) >= faults.drop
}

// chaosDisk is the disk of a slot, as raft's log sees it.
type chaosDisk struct {
	mu   sync.Mutex
	slow time.Duration // each write
	hung chan struct{} // writes wait until it is closed; nil: they do not
}

func (d *chaosDisk) set(slow time.Duration, hang bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.slow = slow
	switch {
	case hang && d.hung == nil:
		d.hung = make(chan struct{})
	case !hang && d.hung != nil:
		close(d.hung)
		d.hung = nil
	}
}

func (d *chaosDisk) write() {
	d.mu.Lock()
	slow, hung := d.slow, d.hung
	d.mu.Unlock()
	time.Sleep(slow)
	if hung != nil {
		<-hung
	}
}

// chaosLog writes through a chaosDisk.
type chaosLog struct {
	raft.LogStore
	disk *chaosDisk
}

func (l chaosLog) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }

func (l chaosLog) StoreLogs(entries []*raft.Log) error {
	l.disk.write()
	return l.LogStore.StoreLogs(entries)
}

func (l chaosLog) DeleteRange(low, high uint64) error {
	l.disk.write()
	return l.LogStore.DeleteRange(low, high)
}

func (l chaosLog) IsMonotonic() bool {
	m, ok := l.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}
