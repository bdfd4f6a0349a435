package replicate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// statusPeer is a peer port with its status streams, on a network within a bubble.
type statusPeer struct {
	*testPeer
	*status
	about facts
}

// statusNet makes them.
type statusNet struct {
	pipes
	directory
	t     *testing.T
	peers int
}

func (n *statusNet) open(changes ...func(*peerConfig, *peerIdentity)) *statusPeer {
	n.t.Helper()
	n.peers++
	p := &statusPeer{}
	p.testPeer = openTestPeer(n.t, &n.directory, func(c *peerConfig, id *peerIdentity) {
		n.on(fmt.Sprintf("127.0.0.1:%d", 7000+n.peers))(c, id)
		for _, change := range changes {
			change(c, id)
		}
	})
	p.status = openStatus(p.peerPort, func() facts { return p.about }, p.config.logger)
	return p
}

// stop ends it as a process would.
func (p *statusPeer) stop() {
	p.status.close()
	_ = p.peerPort.close()
}

// says checks who a peer thinks is active, once everything that is on its way has come.
func (p *statusPeer) says(term uint64, node string) {
	p.t.Helper()
	synctest.Wait()
	if gotTerm, got, _ := p.active(); gotTerm != term || got != node {
		p.t.Errorf("active is %q in term %d, not %q in %d", got, gotTerm, node, term)
	}
}

func inStatusNet(t *testing.T, test func(*testing.T, *statusNet)) {
	synctest.Test(t, func(t *testing.T) {
		n := &statusNet{t: t}
		test(t, n)
	})
}

// No time passes between a sidecar's becoming active and everybody's knowing it.
func TestWhoIsActiveIsKnownAtOnce(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		a, b := n.open(), n.open()
		peers := []*statusPeer{a, b, n.open(), n.open(), n.open()}
		for _, p := range peers {
			defer p.stop()
			p.setVoters([]string{a.id.node, b.id.node})
			p.says(0, "")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		began := time.Now()
		_, _, changed := peers[4].active()
		for term := uint64(1); term < 9; term += 2 {
			a.publish(true, term)
			for _, p := range peers {
				p.says(term, a.id.node)
			}
			a.publish(false, term)
			for _, p := range peers {
				p.says(term, "")
			}
			b.publish(true, term+1)
			for _, p := range peers {
				p.says(term+1, b.id.node)
			}
		}
		select {
		case <-changed:
		default:
			t.Error("the change was not told")
		}
		if passed := time.Since(began); passed != 0 {
			t.Errorf("it took %v", passed)
		}
	})
}

// The old active sidecar may believe in itself for a while, and say so.
func TestTheHighestTermHolds(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		a, b, f := n.open(), n.open(), n.open()
		for _, p := range []*statusPeer{a, b, f} {
			defer p.stop()
		}
		f.setVoters([]string{a.id.node, b.id.node, f.id.node})
		b.publish(true, 8)
		f.says(8, b.id.node)
		a.publish(true, 7)
		f.says(8, b.id.node)
		a.publish(false, 9) // it has heard of a term, in which nobody was active yet
		f.says(8, b.id.node)
		b.publish(false, 8)
		f.says(8, "")
		a.publish(true, 7)
		f.says(8, "")
		a.publish(true, 10)
		f.says(10, a.id.node)
		f.publish(true, 11)
		f.says(11, f.id.node)
		if n := f.metrics.Value(tracing.PeerDials); n != 2 {
			t.Errorf("%d dials, for two other voters", n)
		}
		a.says(10, a.id.node) // it keeps no stream to f
		f.publish(false, 11)
		f.says(11, "")
	})
}

// Whoever comes later knows as much as who was there.
func TestANewStreamIsToldWhatHolds(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		a := n.open()
		defer a.stop()
		a.publish(true, 3)
		a.pushConfiguration(3, 40, []string{a.id.node})
		f := n.open()
		defer f.stop()
		f.setVoters([]string{a.id.node})
		f.says(3, a.id.node)
		if term, index, members, _ := f.configuration(); term != 3 || index != 40 || !slices.Equal(members, []string{a.id.node}) {
			t.Errorf("configuration %d/%d: %v", term, index, members)
		}
	})
}

// A sidecar that was active, died and came back is not thought to be active still.
func TestOneThatCameBackIsNotActive(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		a, f := n.open(), n.open()
		defer f.stop()
		f.setVoters([]string{a.id.node})
		a.publish(true, 3)
		f.says(3, a.id.node)
		a.stop()
		time.Sleep(time.Minute)
		f.says(3, a.id.node) // nobody else is known
		if !strings.Contains(f.testPeer.log.String(), "no status stream to a voter") || strings.Count(f.testPeer.log.String(), "\n") != 1 {
			t.Errorf("log:\n%s", f.testPeer.log)
		}
		if dials := f.metrics.Value(tracing.PeerDials); dials < 230 || dials > 500 {
			t.Errorf("%d dials in a minute", dials)
		}
		again := n.open(func(c *peerConfig, id *peerIdentity) { c.bind, *id = a.config.bind, a.id })
		defer again.stop()
		time.Sleep(backoffMax)
		f.says(3, "")
		again.publish(true, 4)
		f.says(4, a.id.node)
	})
}

func TestAVoterThatHasMovedIsDialledAtOnce(t *testing.T) {
	for _, gone := range []bool{true, false} { // or silent: nothing listens to us there, and nothing says so
		inStatusNet(t, func(t *testing.T, n *statusNet) {
			f := n.open()
			defer f.stop()
			node := uuid.NewString()
			if gone {
				n.set(node, "127.0.0.1:1")
			} else {
				silent, _ := n.listen("tcp", "127.0.0.1:1")
				n.set(node, "127.0.0.1:1")
				defer silent.Close()
				go func() {
					if conn, err := silent.Accept(); err == nil {
						_, _ = io.Copy(io.Discard, conn)
						_ = conn.Close()
					}
				}()
			}
			f.setVoters([]string{node})
			time.Sleep(2*time.Second + 345*time.Millisecond)
			synctest.Wait()
			began := time.Now()
			a := n.open(func(_ *peerConfig, id *peerIdentity) { id.node = node })
			defer a.stop()
			a.publish(true, 1)
			f.setVoters([]string{node})
			f.says(1, node)
			if time.Since(began) != 0 {
				t.Errorf("after %v", time.Since(began))
			}
		})
	}
}

// One that is no voter any more is not listened to.
func TestVotersComeAndGo(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		a, b, f := n.open(), n.open(), n.open()
		for _, p := range []*statusPeer{a, b, f} {
			defer p.stop()
		}
		f.setVoters([]string{a.id.node})
		a.publish(true, 1)
		f.says(1, a.id.node)
		f.setVoters([]string{b.id.node})
		synctest.Wait()
		if n := a.metrics.Value(tracing.PeerConnections); n != 0 {
			t.Errorf("%d streams to the one that was dropped", n)
		}
		a.publish(true, 2)
		b.publish(true, 3)
		f.says(3, b.id.node)
		f.setVoters(nil)
		synctest.Wait()
		if n := b.metrics.Value(tracing.PeerConnections); n != 0 {
			t.Errorf("%d streams left", n)
		}
	})
}

// A voter that is stopped says nothing, and its sockets stay open.
func TestASilentVoterIsDialledAgain(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		f, v := n.open(), n.open()
		defer f.stop()
		defer v.stop()
		silent := make(chan net.Conn, 8)
		v.handle(peerStatus, func(conn net.Conn, _ peerIdentity) { silent <- conn })
		f.setVoters([]string{v.id.node})
		synctest.Wait()
		time.Sleep(silentAfter - time.Millisecond)
		synctest.Wait()
		if len(silent) != 1 {
			t.Errorf("dialled %d times", len(silent))
		}
		time.Sleep(time.Millisecond + backoffMin)
		synctest.Wait()
		if len(silent) != 2 {
			t.Errorf("dialled %d times", len(silent))
		}
	})
}

// countedConn counts writes.
type countedConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c countedConn) Write(b []byte) (int, error) { c.writes.Add(1); return c.Conn.Write(b) }

// In a quiet hour a forwarder is told by each voter once a second that it is there, and does nothing else.
func TestAQuietHourCostsNextToNothing(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		var voters []string
		var peers []*statusPeer
		for range 3 {
			v := n.open()
			defer v.stop()
			voters, peers = append(voters, v.id.node), append(peers, v)
		}
		var sent, dialled atomic.Int64
		f := n.open(func(c *peerConfig, _ *peerIdentity) {
			c.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				dialled.Add(1)
				conn, err := n.dial(ctx, network, addr)
				return countedConn{conn, &sent}, err
			}
		})
		defer f.stop()
		f.setVoters(voters)
		peers[1].publish(true, 1)
		time.Sleep(time.Hour)
		f.setVoters(voters) // an event of gossip that changes nothing
		f.says(1, peers[1].id.node)
		if dialled.Load() != 3 || sent.Load() != 3 {
			t.Errorf("%d dials, %d writes", dialled.Load(), sent.Load())
		}
		if n := f.metrics.Value(tracing.PeerConnections); n != 0 {
			t.Errorf("%d connections to the forwarder", n)
		}
	})
}

func TestASidecarAnswersForItself(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		a, b := n.open(), n.open()
		defer a.stop()
		defer b.stop()
		b.about = facts{ClusterID: clusterA, HasState: true, Term: 7, LastTerm: 6, LastIndex: 1 << 60, Role: "voter", Leader: a.id.node, Expect: 3, Version: "1.2.3"}
		for range 3 {
			got, err := a.ask(t.Context(), b.id.node)
			if err != nil || got != b.about {
				t.Errorf("%+v, %v", got, err)
			}
		}
		synctest.Wait()
		if n := b.metrics.Value(tracing.PeerConnections); n != 0 {
			t.Errorf("%d connections left", n)
		}
		if _, err := a.ask(t.Context(), uuid.NewString()); err == nil {
			t.Error("an unknown node answered")
		}
		b.handle(peerStatus, func(conn net.Conn, _ peerIdentity) { _, _ = io.Copy(io.Discard, conn); _ = conn.Close() })
		began := time.Now()
		if _, err := a.ask(t.Context(), b.id.node); err == nil || time.Since(began) != silentAfter {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

// A node that was removed from raft hears nothing from raft any more; it hears it here.
func TestARemovedNodeLearnsOfIt(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		a, b, removed := n.open(), n.open(), n.open()
		for _, p := range []*statusPeer{a, b, removed} {
			defer p.stop()
		}
		removed.setVoters([]string{a.id.node, b.id.node})
		hears := func(term, index uint64, members ...string) {
			t.Helper()
			synctest.Wait()
			if gotTerm, gotIndex, got, _ := removed.configuration(); gotTerm != term || gotIndex != index || !slices.Equal(got, members) {
				t.Errorf("configuration %d/%d: %v", gotTerm, gotIndex, got)
			}
		}
		hears(0, 0)
		_, _, _, changed := removed.configuration()
		a.pushConfiguration(3, 40, []string{a.id.node, b.id.node, removed.id.node})
		hears(3, 40, a.id.node, b.id.node, removed.id.node)
		<-changed
		a.pushConfiguration(3, 44, []string{a.id.node, b.id.node})
		hears(3, 44, a.id.node, b.id.node)
		_, _, _, changed = removed.configuration()
		a.pushConfiguration(3, 44, []string{a.id.node, b.id.node})
		b.pushConfiguration(2, 99, []string{removed.id.node}) // an old leader's
		b.pushConfiguration(4, 42, slices.Repeat([]string{b.id.node}, maxMembers+1))
		b.pushConfiguration(4, 42, []string{"b"})
		hears(3, 44, a.id.node, b.id.node)
		select {
		case <-changed:
			t.Error("told of no change")
		default:
		}
		b.pushConfiguration(4, 42, []string{b.id.node})
		hears(4, 42, b.id.node)
	})
}

// Two that knew no cluster id may each adopt another one later.
func TestAVoterOfAnotherClusterIsNotBelieved(t *testing.T) {
	inStatusNet(t, func(t *testing.T, n *statusNet) {
		var adopted atomic.Bool
		v := n.open(func(c *peerConfig, id *peerIdentity) {
			c.identity = func() peerIdentity {
				now := *id
				if now.clusterID = uuid.Nil; adopted.Load() {
					now.clusterID = clusterB
				}
				return now
			}
		})
		f := n.open()
		defer v.stop()
		defer f.stop()
		f.setVoters([]string{v.id.node})
		synctest.Wait()
		adopted.Store(true)
		v.publish(true, 5)
		time.Sleep(time.Minute)
		f.says(0, "")
		if v.metrics.Strangers(tracing.StrangerClusterID) == 0 {
			t.Error("still taken for one of the cluster")
		}
	})
}

// What a voter says is checked: a stream with nonsense on it ends, and changes nothing.
func TestNonsenseEndsAStream(t *testing.T) {
	stranger := peerIdentity{cluster: "orders", clusterID: clusterA, node: uuid.NewString()}
	for name, say := range map[string][]byte{
		"of somebody else":   message{kind: sayActive, term: 9}.append(nil, stranger),
		"too long":           {0, 1, 0, 1, 1},
		"empty":              {0, 0, 0, 0},
		"cut off":            {0, 0, 0, 3, sayActive, 1, 2},
		"members cut off":    append([]byte{0, 0, 0, 34, sayConfiguration}, append(make([]byte, 32), 1)...),
		"too many members":   append([]byte{0, 0, 4, 0x32, sayConfiguration}, append(append(make([]byte, 32), maxMembers+1), make([]byte, 1040)...)...),
		"facts of no object": {0, 0, 0, 3, sayFacts, '[', ']'},
	} {
		inStatusNet(t, func(t *testing.T, n *statusNet) {
			v, f := n.open(), n.open()
			defer f.stop()
			defer v.stop()
			ended := make(chan error, 8)
			v.handle(peerStatus, func(conn net.Conn, _ peerIdentity) {
				_, _ = conn.Write(append(message{kind: 99}.append(nil, stranger), say...)) // kinds not known are skipped
				_ = conn.SetReadDeadline(time.Now().Add(time.Second))
				_, err := io.ReadAll(conn)
				ended <- err
				_ = conn.Close()
			})
			f.setVoters([]string{v.id.node})
			if err := <-ended; err != nil {
				t.Errorf("%s: %v", name, err)
			}
			f.says(0, "")
		})
	}
}

// Unknown fields and longer bodies are of a later version.
func TestLaterVersionsMaySayMore(t *testing.T) {
	own := peerIdentity{clusterID: clusterA, node: uuid.NewString()}
	for _, m := range []message{
		{kind: sayActive, clusterID: clusterA, term: 1 << 50, node: own.node},
		{kind: sayNotActive, clusterID: clusterA, term: 4},
		{kind: sayAlive, term: 5},
		{kind: sayConfiguration, clusterID: clusterA, term: 6, index: 7, members: []string{own.node, uuid.NewString()}},
	} {
		b := m.append(nil, own)
		got, err := decodeMessage(append(b[4:], "more"...))
		if err != nil || fmt.Sprint(got) != fmt.Sprint(m) {
			t.Errorf("%+v came as %+v, %v", m, got, err)
		}
	}
	got, err := decodeMessage(append([]byte{sayFacts}, `{"role":"voter","later":[1,{"x":2}],"term":3}`...))
	if err != nil || *got.facts != (facts{Role: "voter", Term: 3}) {
		t.Errorf("%+v, %v", got.facts, err)
	}
}

// Peers are believed only so far: whatever comes, it is read or refused.
func FuzzPeerBytes(f *testing.F) {
	own := peerIdentity{cluster: "orders", clusterID: clusterA, node: uuid.NewString()}
	h, _ := hello{kind: peerRaft, version: 1, from: own}.encode()
	a, _ := answer{version: 1, node: uuid.New(), message: "no"}.encode()
	f.Add(h[6:])
	f.Add(a[2:])
	f.Add(message{kind: sayActive, term: 3}.append(nil, own)[4:])
	f.Add(message{kind: sayConfiguration, members: []string{own.node}}.append(nil, own)[4:])
	f.Add(message{kind: sayFacts, facts: &facts{Role: "voter"}}.append(nil, own)[4:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHello(b); err == nil && len(b) <= maxHello {
			again, err := h.encode()
			if err != nil || !bytes.HasPrefix(b, again[6:]) {
				t.Errorf("%x came from %x, %v", again, b, err)
			}
		}
		if a, err := decodeAnswer(b); err == nil && len(b) <= maxHello {
			again, err := a.encode()
			if err != nil || !bytes.HasPrefix(b, again[2:]) {
				t.Errorf("%x came from %x, %v", again, b, err)
			}
		}
		if m, err := decodeMessage(b); err == nil && m.kind == sayConfiguration {
			if again := m.append(nil, peerIdentity{clusterID: m.clusterID}); !bytes.HasPrefix(b, again[4:]) {
				t.Errorf("%x came from %x", again, b)
			}
		}
	})
}
