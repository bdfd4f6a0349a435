package proxy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
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
	maxTries      = 64                  // ports tried for one of them, where others hold them
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
	common   *kmsg.ApiVersionsResponse           // what the answers of current have in common; nil if there are none
	topicIDs bool                                // all of current have Metadata 10

	saved   []byte            // what storedTable is, or is to be
	unsaved map[string][]byte // by key; nil removes it
	saving  chan struct{}     // capacity 1: there is something unsaved
}

type broker struct {
	id       int32
	addr     string // the upstream's, host:port
	rack     *string
	port     int  // ours once there is a listener; 0 while none was chosen
	told     bool // clients may have been told of the port
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
	t.unsaved = map[string][]byte{}
	t.saving = make(chan struct{}, 1)
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
		switch {
		case slices.Contains(s.Current, b.ID):
			b.Seen = time.Now() // as far as we knew when we ended
		case time.Since(b.Seen) > forgetAfter:
			t.save(versionsKey(b.ID), nil)
			continue
		}
		kept := &broker{id: b.ID, addr: b.Addr, rack: b.Rack, seen: b.Seen}
		if s.Listen == t.proxy.config.Listen && t.proxy.basePort != 0 {
			kept.port, kept.told = b.Port, true
		}
		t.brokers[b.ID] = kept
		if kept.port != 0 {
			t.ports[kept.port] = b.ID
		}
	}
	for _, id := range slices.Sorted(maps.Keys(t.brokers)) {
		t.loadVersions(id)
		t.bindBroker(t.brokers[id], false)
	}
	t.loadVersions(anyNode)
	t.judgeVersions()
}

// saveBrokers is called with mu held.
func (t *table) saveBrokers() {
	s := storedBrokers{Listen: t.proxy.config.Listen, Cluster: t.cluster, Control: t.control, Current: t.current}
	for _, id := range slices.Sorted(maps.Keys(t.brokers)) {
		b := t.brokers[id]
		seen := b.seen.Truncate(time.Hour).Add(time.Hour) // so that most of what is seen changes nothing
		s.Brokers = append(s.Brokers, storedBroker{ID: b.id, Addr: b.addr, Rack: b.rack, Port: b.port, Seen: seen})
	}
	if raw, err := json.Marshal(s); err == nil && !bytes.Equal(raw, t.saved) {
		t.saved = raw
		t.save(storedTable, raw)
	}
}

// save has a value stored soon; nil removes it. It is called with mu held, and does not wait for a disk: clients do wait
// for mu.
func (t *table) save(key string, value []byte) {
	t.unsaved[key] = value
	select {
	case t.saving <- struct{}{}:
	default:
	}
}

// saveTable stores what was to be saved until the proxy ends, and what is left then.
func (p *Proxy) saveTable() {
	defer p.running.Done()
	for {
		select {
		case <-p.table.saving:
			p.table.store()
		case <-p.ctx.Done():
			return
		}
	}
}

func (t *table) store() {
	t.mu.Lock()
	unsaved := t.unsaved
	t.unsaved = map[string][]byte{}
	t.mu.Unlock()
	for key, value := range unsaved {
		if err := t.proxy.store.Put(key, value); err != nil {
			t.proxy.complain("what is known of the brokers could not be kept for the next start (%s): %v", key, err)
		}
	}
}

// setBrokers takes what our own client was told: it says which brokers there are.
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
	t.add(endpoints, true, false)
	t.cluster, t.control = b.ClusterID, b.ControllerID
	t.setCurrent(endpoints)
	t.saveBrokers()
}

// setCurrent is called with mu held.
func (t *table) setCurrent(endpoints []wire.Endpoint) {
	t.current = t.current[:0:0]
	for _, e := range endpoints {
		if t.brokers[e.ID] != nil {
			t.current = append(t.current, e.ID)
		}
	}
	slices.Sort(t.current)
	t.judgeVersions()
}

// ownAge is how old the answer to our own client may be that is believed rather than those to others.
const ownAge = 2 * time.Minute

// learn takes brokers from a reply that is about to be written, so that the listeners it names are there before it is.
// all says that it names every broker there is. Where our own client gets no answers (it may not know the password that
// our clients know) these replies are all we know.
func (t *table) learn(endpoints []wire.Endpoint, all bool) {
	if t.agrees(endpoints, all) {
		return
	}
	t.proxy.upstream.Nudge()
	own := t.proxy.upstream.Brokers()
	known := len(own.Brokers) > 0 && time.Since(own.At) < ownAge
	if known {
		t.setBrokers(own)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	changed := t.add(endpoints, !known, true)
	switch {
	case all && !known:
		t.setCurrent(endpoints)
	case len(t.current) == 0:
		t.current = slices.Sorted(maps.Keys(t.brokers))
		t.judgeVersions()
	case !changed:
		return
	}
	t.saveBrokers()
}

// agrees says whether a reply tells nothing new.
func (t *table) agrees(endpoints []wire.Endpoint, all bool) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, e := range endpoints {
		b := t.brokers[e.ID]
		if b == nil || b.listener == nil || b.addr != addrOf(e) || all && !slices.Contains(t.current, e.ID) {
			return false
		}
	}
	return !all || len(endpoints) == len(t.current)
}

func addrOf(e wire.Endpoint) string { return net.JoinHostPort(e.Host, strconv.Itoa(int(e.Port))) }

// add takes in brokers that are not known, and if it is to move them the new addresses of those that are. With named
// they are about to be named to a client. It is called with mu held.
func (t *table) add(endpoints []wire.Endpoint, move, named bool) (changed bool) {
	if t.proxy.ctx.Err() != nil {
		return false // shutting down: no more listeners
	}
	now := time.Now()
	endpoints = slices.SortedFunc(slices.Values(endpoints), func(a, b wire.Endpoint) int { return cmp.Compare(a.ID, b.ID) })
	for _, e := range endpoints {
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
		if b.addr == "" || move {
			changed = changed || b.addr != addrOf(e)
			b.addr, b.rack = addrOf(e), e.Rack
		}
		b.seen = now
		if b.listener == nil {
			t.bindBroker(b, named)
			changed = true
		}
	}
	return changed
}

// bindBroker opens the listener of a broker. A port that another process holds is never told to a client. One that none
// was told of is left to it for the next free one; one that clients may remember is waited for, unless the broker is to
// be named now. It is called with mu held.
func (t *table) bindBroker(b *broker, named bool) {
	p := t.proxy
	if p.ctx.Err() != nil {
		return
	}
	var held []int
	for {
		if p.basePort != 0 && b.port == 0 {
			b.port = t.freePort(b.id, held)
			t.ports[b.port] = b.id
		}
		lns, port, err := p.bind(b.port)
		if err == nil {
			b.port = port
			t.listen(b, lns)
			return
		}
		taken := errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EACCES)
		if p.basePort == 0 || !taken || b.told && !named || len(held) == maxTries {
			p.complain("port %d, for upstream broker %d, cannot be bound (%v): free it, or choose other ports with --listen; trying again every second", b.port, b.id, err)
			p.wakeKeeper()
			return
		}
		p.complain("port %d, for upstream broker %d, is held by another process, so the next free one is taken; --listen moves them all", b.port, b.id)
		held = append(held, b.port)
		delete(t.ports, b.port)
		b.port, b.told = 0, false
	}
}

func (t *table) listen(b *broker, lns []net.Listener) {
	p := t.proxy
	b.told = true
	b.listener = &listener{node: b.id, lns: lns}
	t.addOwn(lns)
	p.metrics.Add(tracing.BrokerListeners, 1)
	p.logger.Info("listening for upstream broker", "node", b.id, "addr", net.JoinHostPort(p.advertiseHost, strconv.Itoa(b.port)), "upstream", b.addr)
	p.accept(b.listener)
}

// freePort gives the port of a new broker: that of its id, or the next one that no other broker has and that was not
// found to be held.
func (t *table) freePort(id int32, held []int) int {
	first := t.proxy.basePort + 1
	for i := range maxBrokers {
		port := first + (int(id)%spread+i)%maxBrokers
		if _, taken := t.ports[port]; !taken && port < 1<<16 && !slices.Contains(held, port) {
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

// advertise gives our address for a node id, if its listener is there.
func (t *table) advertise(node int32) (host string, port int32, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	b := t.brokers[node]
	if b == nil || b.listener == nil {
		return "", 0, false
	}
	return t.proxy.advertiseHost, int32(b.port), true
}

// open binds the listener of a broker that is about to be named, where it could not be bound before.
func (t *table) open(node int32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if b := t.brokers[node]; b != nil && b.listener == nil {
		t.bindBroker(b, true)
		t.saveBrokers()
	}
}

// place gives the node that stands for a group, and its address.
func (t *table) place(group string) (node int32, host string, port int32, ok bool) {
	node, ok = place(group, t.nodes())
	if !ok {
		return -1, "", -1, false
	}
	if host, port, ok = t.advertise(node); !ok {
		t.open(node)
		host, port, ok = t.advertise(node)
	}
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
			t.bindBroker(b, false)
			if b.listener == nil {
				again = time.Second
			} else {
				changed = true
			}
		}
	}
	if changed {
		t.saveBrokers()
	}
	return again
}

func (t *table) forget(b *broker) {
	delete(t.brokers, b.id)
	delete(t.ports, b.port)
	delete(t.answers, b.id)
	t.save(versionsKey(b.id), nil)
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

// ReadListen reads --listen and --advertise-clients: what to bind, and what clients are told. Without a host, and for
// localhost, 127.0.0.1 and ::1, host is 127.0.0.1, which stands for both loopback addresses; any other address is bound
// just as it is. Clients are told 127.0.0.1, or the address in 127.0.0.0/8 that was asked for; elsewhere they must be
// given a name.
func ReadListen(listen, advertise string) (host string, port int, advertised string, err error) {
	host, portText, err := net.SplitHostPort(listen)
	if err != nil {
		return "", 0, "", fmt.Errorf("--listen %s: %w", listen, err)
	}
	if port, err = strconv.Atoi(portText); err != nil || port < 0 || port > 1<<16-1 {
		return "", 0, "", fmt.Errorf("--listen %s: %q is no port", listen, portText)
	}
	if ip := net.ParseIP(host); host == "" || strings.EqualFold(host, "localhost") || ip.Equal(net.IPv6loopback) {
		host = loopback
	}
	switch {
	case net.ParseIP(host).IsLoopback():
		return host, port, cmp.Or(advertise, host), nil
	case advertise == "":
		return "", 0, "", fmt.Errorf("--listen %s: clients elsewhere could connect, without encryption or a password, and must be told a name to reach this sidecar by: "+
			"add --advertise-clients HOST, or listen on 127.0.0.1", listen)
	}
	return host, port, advertise, nil
}
