package proxy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/offset-sidecar/offset-sidecar/upstream"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	maxBrokers    = 1024                // listeners for brokers
	spread        = 256                 // ports a cluster whose ids do not clash takes
	forgetAfter   = 24 * time.Hour      // a broker that has gone keeps its port so long
	storedTable   = "proxy/brokers"     // JSON of storedBrokers
	storedAnswers = "proxy/apiversions" // and the node id: ApiVersions responses, a version in two bytes before each
	anyNode       = int32(-1)           // the bootstrap listener's node, and a broker's whose id is not known
)

// Store keeps small values of this sidecar over a restart.
type Store interface {
	// Get gives nil when there is no such value.
	Get(key string) ([]byte, error)
	Put(key string, value []byte) error
}

// table knows the upstream's brokers and under which of our addresses each is reached. An id keeps its port whatever
// address its broker moves to.
type table struct {
	proxy *Proxy

	mu       sync.RWMutex
	brokers  map[int32]*broker
	ports    map[int]int32 // of brokers
	own      []*net.TCPAddr
	current  []int32 // ids of the newest known set of brokers that was not empty, ascending
	cluster  string
	control  int32
	answers  map[int32]*kmsg.ApiVersionsResponse // by node id
	topicIDs bool                                // all of current have Metadata 10
}

type broker struct {
	id       int32
	addr     string // the upstream's, host:port
	rack     *string
	port     int // ours; 0 while an ephemeral one is not bound
	seen     time.Time
	listener *listener // nil while the port is not ours yet
}

type storedBrokers struct {
	Listen  string         `json:"listen"` // ports count from here
	Cluster string         `json:"cluster"`
	Control int32          `json:"controller"`
	Current []int32        `json:"current"`
	Brokers []storedBroker `json:"brokers"`
}

type storedBroker struct {
	ID   int32     `json:"id"`
	Addr string    `json:"upstream"`
	Rack *string   `json:"rack,omitempty"`
	Port int       `json:"port"`
	Seen time.Time `json:"seen"`
}

func (t *table) init(p *Proxy) {
	t.proxy = p
	t.brokers = map[int32]*broker{}
	t.ports = map[int]int32{}
	t.answers = map[int32]*kmsg.ApiVersionsResponse{}
	t.control = -1
}

// load takes over what an earlier run knew, and binds its ports: clients go on connecting to them.
func (t *table) load() {
	raw, err := t.proxy.store.Get(storedTable)
	if err != nil || raw == nil {
		return
	}
	var s storedBrokers
	if err := json.Unmarshal(raw, &s); err != nil {
		t.proxy.logger.Warn("the kept broker table cannot be read and is made anew", "err", err)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cluster, t.control, t.current = s.Cluster, s.Control, s.Current
	for _, b := range s.Brokers {
		if time.Since(b.Seen) > forgetAfter && !slices.Contains(s.Current, b.ID) {
			continue
		}
		kept := &broker{id: b.ID, addr: b.Addr, rack: b.Rack, seen: b.Seen}
		if s.Listen == t.proxy.config.Listen && t.proxy.basePort != 0 {
			kept.port = b.Port
		}
		t.brokers[b.ID] = kept
		if kept.port != 0 {
			t.ports[kept.port] = b.ID
		}
	}
	for _, id := range slices.Sorted(maps.Keys(t.brokers)) {
		t.loadVersions(id)
		t.bindBroker(t.brokers[id])
	}
	t.loadVersions(anyNode)
	t.judgeTopicIDs()
}

// save is called with mu held.
func (t *table) save() {
	s := storedBrokers{Listen: t.proxy.config.Listen, Cluster: t.cluster, Control: t.control, Current: t.current}
	for _, id := range slices.Sorted(maps.Keys(t.brokers)) {
		b := t.brokers[id]
		s.Brokers = append(s.Brokers, storedBroker{ID: b.id, Addr: b.addr, Rack: b.rack, Port: b.port, Seen: b.seen})
	}
	raw, err := json.Marshal(s)
	if err == nil {
		err = t.proxy.store.Put(storedTable, raw)
	}
	if err != nil {
		t.proxy.logger.Warn("the broker table could not be kept for the next start", "err", err)
	}
}

// setBrokers takes the upstream's own answer: it alone says which brokers there are.
func (t *table) setBrokers(b upstream.Brokers) {
	if len(b.Brokers) == 0 {
		return
	}
	endpoints := make([]wire.Endpoint, 0, len(b.Brokers))
	for _, x := range b.Brokers {
		endpoints = append(endpoints, wire.Endpoint{ID: x.ID, Host: x.Host, Port: x.Port, Rack: x.Rack})
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.add(endpoints)
	t.cluster, t.control = b.ClusterID, b.ControllerID
	t.current = t.current[:0:0]
	for _, e := range endpoints {
		t.current = append(t.current, e.ID)
	}
	slices.Sort(t.current)
	t.judgeTopicIDs()
	t.save()
}

// learn takes brokers from a reply that is about to be written, so that the listeners it names are there before it is.
func (t *table) learn(endpoints []wire.Endpoint) {
	defer t.proxy.upstream.Nudge()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.add(endpoints) {
		if len(t.current) == 0 {
			t.current = slices.Sorted(maps.Keys(t.brokers))
		}
		t.save()
	}
}

// add is called with mu held.
func (t *table) add(endpoints []wire.Endpoint) (changed bool) {
	if t.proxy.ctx.Err() != nil {
		return false // shutting down: no more listeners
	}
	now := time.Now()
	endpoints = slices.SortedFunc(slices.Values(endpoints), func(a, b wire.Endpoint) int { return cmp.Compare(a.ID, b.ID) })
	for _, e := range endpoints {
		addr := net.JoinHostPort(e.Host, strconv.Itoa(int(e.Port)))
		b := t.brokers[e.ID]
		if b == nil {
			if len(t.brokers) >= maxBrokers || e.ID < 0 {
				t.proxy.complain("no listener for upstream broker %d: there are %d already", e.ID, maxBrokers)
				continue
			}
			b = &broker{id: e.ID}
			t.brokers[e.ID] = b
			t.loadVersions(e.ID)
		}
		changed = changed || b.addr != addr
		b.addr, b.rack, b.seen = addr, e.Rack, now
		if b.listener == nil {
			t.bindBroker(b)
			changed = true
		}
	}
	return changed
}

// bindBroker opens the listener of a broker. It is called with mu held.
func (t *table) bindBroker(b *broker) {
	p := t.proxy
	if p.basePort != 0 && b.port == 0 {
		b.port = t.freePort(b.id)
		t.ports[b.port] = b.id
	}
	lns, port, err := p.bind(b.port)
	if err != nil {
		way := "free it, or choose other ports with --listen; trying again every second"
		p.complain("port %d, for upstream broker %d, cannot be bound (%v): %s", b.port, b.id, err, way)
		p.wakeKeeper()
		return
	}
	b.port = port
	b.listener = &listener{node: b.id, lns: lns}
	t.addOwn(lns)
	p.metrics.Add(tracing.BrokerListeners, 1)
	p.logger.Info("listening for upstream broker", "node", b.id, "addr", net.JoinHostPort(p.advertiseHost, strconv.Itoa(port)), "upstream", b.addr)
	p.accept(b.listener)
}

// freePort gives the port of a new broker: that of its id, or the next one that no other broker has.
func (t *table) freePort(id int32) int {
	first := t.proxy.basePort + 1
	for i := range maxBrokers {
		port := first + (int(id)%spread+i)%maxBrokers
		if _, taken := t.ports[port]; !taken && port < 1<<16 {
			return port
		}
	}
	return first + int(id)%spread // more brokers than ports below 65,536: it will be said when it cannot be bound
}

func (t *table) addOwn(lns []net.Listener) {
	for _, ln := range lns {
		if addr, ok := ln.Addr().(*net.TCPAddr); ok {
			t.own = append(t.own, addr)
		}
	}
}

// isOwn says whether a connection that we dialled has ended at one of our own listeners.
func (t *table) isOwn(remote, local net.Addr) bool {
	to, ok := remote.(*net.TCPAddr)
	from, ok2 := local.(*net.TCPAddr)
	if !ok || !ok2 {
		return false
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.ContainsFunc(t.own, func(own *net.TCPAddr) bool {
		return own.Port == to.Port && (own.IP.Equal(to.IP) || own.IP.IsUnspecified() && to.IP.Equal(from.IP))
	})
}

// advertise gives our address for a node id.
func (t *table) advertise(node int32) (host string, port int32, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	b := t.brokers[node]
	if b == nil || b.port == 0 {
		return "", 0, false
	}
	return t.proxy.advertiseHost, int32(b.port), true
}

// place gives the node that stands for a group, and its address.
func (t *table) place(group string) (node int32, host string, port int32, ok bool) {
	node, ok = place(group, t.nodes())
	if !ok {
		return -1, "", -1, false
	}
	host, port, ok = t.advertise(node)
	return node, host, port, ok
}

// nodes are the ids of the brokers; the slice must not be changed.
func (t *table) nodes() []int32 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.current
}

// addrOf gives the upstream address of a node, or "".
func (t *table) addrOf(node int32) string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if b := t.brokers[node]; b != nil {
		return b.addr
	}
	return ""
}

// others are addresses that may answer what any broker can: the current brokers from some way into the list on, then
// the bootstrap servers; those that are suspected to be down come last.
func (t *table) others(avoid string, start int) []string {
	t.mu.RLock()
	var all []string
	for i := range t.current {
		if b := t.brokers[t.current[(i+start)%len(t.current)]]; b != nil && b.addr != avoid {
			all = append(all, b.addr)
		}
	}
	t.mu.RUnlock()
	for _, seed := range t.proxy.config.Upstream {
		if seed != avoid && !slices.Contains(all, seed) {
			all = append(all, seed)
		}
	}
	return t.healthyFirst(all)
}

// anyAddrs are the addresses for a connection to the bootstrap listener: the bootstrap servers, then all others.
func (t *table) anyAddrs() []string {
	all := slices.Clone(t.proxy.config.Upstream)
	for _, addr := range t.others("", 0) {
		if !slices.Contains(all, addr) {
			all = append(all, addr)
		}
	}
	return t.healthyFirst(all)
}

func (t *table) healthyFirst(addrs []string) []string {
	rank := func(addr string) int {
		if t.proxy.health.suspected(addr) {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(addrs, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	return addrs
}

// wanted says whether an address is a broker's or a bootstrap server's.
func (t *table) wanted(addr string) bool {
	if slices.Contains(t.proxy.config.Upstream, addr) {
		return true
	}
	return t.nodeOf(addr) != anyNode
}

func (t *table) nodeOf(addr string) int32 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, b := range t.brokers {
		if b.addr == addr {
			return b.id
		}
	}
	return anyNode
}

// keep binds what could not be bound and gives back the ports of brokers that have gone. It says when to come again.
func (t *table) keep(now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	again := time.Hour
	changed := false
	for _, id := range t.current {
		if b := t.brokers[id]; b != nil {
			b.seen = now
		}
	}
	for _, b := range t.brokers {
		switch {
		case now.Sub(b.seen) > forgetAfter:
			t.forget(b)
			changed = true
		case b.listener == nil:
			t.bindBroker(b)
			if b.listener == nil {
				again = time.Second
			} else {
				changed = true
			}
		}
	}
	if changed {
		t.save()
	}
	return again
}

func (t *table) forget(b *broker) {
	delete(t.brokers, b.id)
	delete(t.ports, b.port)
	delete(t.answers, b.id)
	if b.listener == nil {
		return
	}
	t.proxy.logger.Info("upstream broker has been gone for a day; its port is given back", "node", b.id, "port", b.port)
	t.proxy.metrics.Add(tracing.BrokerListeners, -1)
	b.listener.close()
	t.own = slices.DeleteFunc(t.own, func(a *net.TCPAddr) bool { return a.Port == b.port })
}

// bind listens on a port of the configured host (0: any), on both loopback addresses if it is one of them.
func (p *Proxy) bind(port int) ([]net.Listener, int, error) {
	first, err := p.config.Listener("tcp", net.JoinHostPort(p.listenHost, strconv.Itoa(port)))
	if err != nil {
		return nil, 0, err
	}
	if addr, ok := first.Addr().(*net.TCPAddr); ok {
		port = addr.Port
	}
	lns := []net.Listener{first}
	if p.listenHost != loopback {
		return lns, port, nil
	}
	second, err := p.config.Listener("tcp", net.JoinHostPort("::1", strconv.Itoa(port)))
	switch {
	case err == nil:
		lns = append(lns, second)
	case errors.Is(err, syscall.EADDRINUSE):
		p.complain("port %d is taken on ::1, so clients that use localhost should be given 127.0.0.1", port)
	default: // no IPv6 here
	}
	return lns, port, nil
}

// splitListen reads --listen.
func splitListen(listen, advertise string) (host string, port int, advertiseHost string, err error) {
	host, portText, err := net.SplitHostPort(listen)
	if err != nil {
		return "", 0, "", fmt.Errorf("--listen %s: %w", listen, err)
	}
	if port, err = strconv.Atoi(portText); err != nil || port < 0 || port > 1<<16-1 {
		return "", 0, "", fmt.Errorf("--listen %s: %q is no port", listen, portText)
	}
	switch host {
	case "", "localhost", loopback, "::1":
		return loopback, port, cmp.Or(advertise, loopback), nil
	}
	if advertise == "" {
		return "", 0, "", fmt.Errorf("--listen %s is no loopback address: say with --advertise-clients HOST under which name clients reach it", listen)
	}
	return host, port, advertise, nil
}
