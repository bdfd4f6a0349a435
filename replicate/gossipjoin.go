package replicate

import (
	"context"
	"log"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
	"github.com/offset-sidecar/offset-sidecar/tracing"
)

// join looks for the others for as long as this runs: often while there is nobody, and later so that the halves of a
// cluster that was cut in two find each other. Names are resolved anew each time.
func (g *gossip) join() {
	delay := g.timing.firstJoin
	for {
		g.joinOnce()
		g.note()
		wait := g.timing.rejoin
		switch alone, lost := g.company(); {
		case alone && g.hasSeeds():
			wait, delay = delay, min(2*delay, g.timing.lastJoin)
		case lost:
			wait, delay = g.timing.lostRejoin, g.timing.firstJoin
		default:
			delay = g.timing.firstJoin
		}
		changed := g.changed()
		timer := time.NewTimer(wait)
	waiting:
		for {
			select {
			case <-timer.C:
				break waiting
			case <-changed: // alone all at once: no reason to wait for long
				changed = g.changed()
				if alone, _ := g.company(); alone && g.hasSeeds() && wait > g.timing.lastJoin {
					wait = delay
					timer.Reset(wait)
				}
			case <-g.stop:
				timer.Stop()
				return
			}
		}
	}
}

func (g *gossip) hasSeeds() bool { return len(g.cluster.Join) > 0 || g.hooks.recall != nil }

// company says whether no other sidecar is alive, and whether one has failed.
func (g *gossip) company() (alone, lost bool) {
	alone = true
	for _, m := range g.members() {
		if m.ID != g.node && m.alive() {
			alone = false
		}
		lost = lost || m.State == gossipFailed
	}
	return alone, lost
}

// known gives the gossip addresses of the members that are alive, ourselves included.
func (g *gossip) known() map[string]bool {
	known := map[string]bool{}
	for _, m := range g.members() {
		if m.alive() {
			known[m.GossipAddr] = true
		}
	}
	return known
}

// joinOnce tries every address that is not a member's. The first success makes most of the others known.
func (g *gossip) joinOnce() {
	ctx, cancel := context.WithTimeout(g.transport.ctx, 2*streamTimeout)
	defer cancel()
	addresses, problems := g.seeds(ctx)
	if alone, _ := g.company(); alone && g.hooks.recall != nil {
		addresses = append(addresses, g.hooks.recall()...)
	}
	var mu sync.Mutex
	var joiners sync.WaitGroup
	slots := make(chan struct{}, joinsAtOnce)
	for _, address := range joinOrder(addresses) {
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		joiners.Go(func() {
			defer func() { <-slots }()
			if g.isMember(address) {
				return
			}
			if _, err := g.serf.Memberlist().Join([]string{address}); err != nil {
				mu.Lock()
				problems = append(problems, address+": "+lastLine(err))
				mu.Unlock()
			}
		})
	}
	joiners.Wait()
	slices.Sort(problems)
	text := strings.Join(problems, "; ")
	g.joinError.Store(&text)
}

// isMember asks serf itself: views are published a moment later.
func (g *gossip) isMember(address string) bool {
	for _, m := range g.serf.Members() {
		if member, ok := g.member(m); ok && member.alive() && member.GossipAddr == address {
			return true
		}
	}
	return false
}

// lastLine: memberlist's errors are lists.
func lastLine(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	return strings.TrimLeft(lines[len(lines)-1], "\t* ")
}

// seeds resolves --join, without ourselves.
func (g *gossip) seeds(ctx context.Context) (addresses, problems []string) {
	own := g.addr()
	for _, seed := range g.cluster.Join {
		host, port, err := net.SplitHostPort(seed)
		if err != nil {
			host, port = strings.Trim(seed, "[]"), defaultGossipPort
		}
		ips := []string{host}
		if net.ParseIP(host) == nil {
			if ips, err = g.hooks.lookup(ctx, host); err != nil {
				problems = append(problems, err.Error())
			}
		}
		for _, ip := range ips {
			if address := net.JoinHostPort(ip, port); address != own && !slices.Contains(addresses, address) {
				addresses = append(addresses, address)
			}
		}
	}
	return addresses, problems
}

// whyAlone says what the last attempt to join ran into, "" for nothing.
func (g *gossip) whyAlone() string {
	if text := g.joinError.Load(); text != nil {
		return *text
	}
	return ""
}

// note keeps the addresses of the others for the next start, which may have no --join that leads anywhere.
func (g *gossip) note() {
	if g.hooks.remember == nil {
		return
	}
	own := g.addr()
	var addresses []string
	for address := range g.known() {
		if address != own {
			addresses = append(addresses, address)
		}
	}
	if len(addresses) == 0 {
		return // those of before are better than none
	}
	slices.Sort(addresses)
	g.hooks.remember(addresses[:min(len(addresses), rememberAddresses)])
}

// gossipAddressesKey is the local key under which the others' gossip addresses are noted, one a line.
const gossipAddressesKey = "gossip-addresses"

// storedHooks keep addresses in the store, and count strangers.
func storedHooks(local *store.Local, metrics *tracing.Metrics, logger *slog.Logger) gossipHooks {
	var noted string
	return gossipHooks{
		recall: func() []string {
			value, err := local.Get(gossipAddressesKey)
			if err != nil {
				logger.Debug("reading the others' addresses", "err", err)
			}
			return strings.Fields(string(value))
		},
		remember: func(addresses []string) {
			text := strings.Join(addresses, "\n")
			if text == noted {
				return
			}
			if err := local.Put(gossipAddressesKey, []byte(text)); err != nil {
				logger.Debug("noting the others' addresses", "err", err)
				return
			}
			noted = text
		},
		stranger: func() { metrics.Stranger(tracing.StrangerGossip) },
	}
}

// gossipTransport is memberlist's own, but its dials end when it is closed; and tests cut it.
type gossipTransport struct {
	*memberlist.NetTransport
	ctx    context.Context
	cancel context.CancelFunc
	cut    atomic.Pointer[func(addr string) bool] // true: unreachable
}

func openGossipTransport(ip string, port int, logger *log.Logger) (*gossipTransport, error) {
	var inner *memberlist.NetTransport
	var err error
	// Port 0 is found by TCP and may be taken for UDP.
	for range 10 {
		inner, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{ip}, BindPort: port, Logger: logger})
		if err == nil || port != 0 {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	t := &gossipTransport{NetTransport: inner}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t, nil
}

func (t *gossipTransport) unreachable(addr string) bool {
	cut := t.cut.Load()
	return cut != nil && (*cut)(addr)
}

// WriteTo is memberlist.Transport's.
func (t *gossipTransport) WriteTo(b []byte, addr string) (time.Time, error) {
	return t.WriteToAddress(b, memberlist.Address{Addr: addr})
}

// WriteToAddress is memberlist.NodeAwareTransport's.
func (t *gossipTransport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	if t.unreachable(a.Addr) {
		return time.Now(), nil
	}
	return t.NetTransport.WriteToAddress(b, a)
}

// DialTimeout is memberlist.Transport's.
func (t *gossipTransport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// DialAddressTimeout is memberlist.NodeAwareTransport's.
func (t *gossipTransport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if t.unreachable(a.Addr) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: context.DeadlineExceeded}
	}
	dialer := net.Dialer{Timeout: timeout}
	return dialer.DialContext(t.ctx, "tcp", a.Addr)
}

// Shutdown is memberlist.Transport's.
func (t *gossipTransport) Shutdown() error {
	t.cancel()
	return t.NetTransport.Shutdown()
}
