package replicate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"
)

// The tags that a sidecar tells the others through gossip. All of them together, with their names, take at most 512
// bytes (memberlist's MetaMaxSize).
const (
	tagPeer      = "peer"    // host:port of the peer port
	tagZone      = "zone"    // --zone
	tagMachine   = "machine" // --machine
	tagVersion   = "version" // of the program
	tagExpect    = "expect"  // --bootstrap-expect
	tagClusterID = "cluster" // the cluster's UUID, once known
	tagRole      = "role"    // voter, standby or forwarder
	tagLeaving   = "leaving" // 1: it wants to be taken out of raft's configuration
)

// gossipState is what gossip thinks of a member.
type gossipState uint8

const (
	gossipAlive gossipState = iota + 1
	gossipLeaving
	gossipLeft
	gossipFailed
)

func (s gossipState) String() string {
	return [...]string{"unknown", "alive", "leaving", "left", "failed"}[s]
}

// gossipMember is one sidecar as gossip knows it.
type gossipMember struct {
	ID         string // node id
	Name       string // serf's: the node id and when the process was started
	GossipAddr string
	PeerAddr   string
	State      gossipState
	Since      time.Time // when we learnt of State
	Tags       map[string]string
}

// alive says that the process runs, whether or not it is about to leave.
func (m gossipMember) alive() bool { return m.State == gossipAlive || m.State == gossipLeaving }

// gossipView is one state of the list. Nobody changes it once it is published.
type gossipView struct {
	members []gossipMember // ordered by ID
	changed chan struct{}  // closed when there is a newer one
}

func (v *gossipView) find(id string) (gossipMember, bool) {
	i, found := slices.BinarySearchFunc(v.members, id, func(m gossipMember, id string) int { return cmp.Compare(m.ID, id) })
	if !found {
		return gossipMember{}, false
	}
	return v.members[i], true
}

// gossip keeps the list of the sidecars of one cluster, through serf.
//
// In serf a sidecar's name is its node id and the time of its start. With the node id alone, serf would refuse a sidecar
// that came back with another address until the old one had been declared dead (hashicorp/serf#167), and a restart would
// have to outbid what was said of the process before. Of several names of one node id the newest that is alive counts.
//
// Goroutines: drain (serf's events), watch (publishes views), join; they end with close. The rest are serf's.
type gossip struct {
	node, name string
	log        *slog.Logger
	cluster    ClusterConfig
	timing     gossipTiming
	hooks      gossipHooks

	serf      *serf.Serf
	transport *gossipTransport
	view      atomic.Pointer[gossipView]
	clusterID atomic.Pointer[string] // of ourselves; "" while unknown
	strangers atomic.Uint64          // what was refused, see refuse
	joinError atomic.Pointer[string] // why the last attempt to join failed

	tagsMu sync.Mutex
	fixed  map[string]string // of the configuration
	sent   map[string]string

	warned  map[string]bool // by watch: of which duplicate
	events  chan serf.Event
	dirty   chan struct{}
	stop    chan struct{}
	workers sync.WaitGroup
	closing sync.Once
}

// gossipTiming is how often what is done. Tests are in a hurry.
type gossipTiming struct {
	firstJoin, lastJoin time.Duration // between attempts while no other sidecar is known, doubling
	rejoin, lostRejoin  time.Duration // later: between looks at --join; when somebody is missing
	gather              time.Duration // how long changes are gathered before a view is published
	probe               time.Duration // serf's: one member is probed each; three or four without an answer are its end
}

var defaultGossipTiming = gossipTiming{
	firstJoin: 250 * time.Millisecond, lastJoin: 5 * time.Second, rejoin: 30 * time.Second, lostRejoin: 10 * time.Second,
	gather: 5 * time.Millisecond, probe: time.Second,
}

// gossipHooks connect gossip with the rest. All may be left out.
type gossipHooks struct {
	lookup   func(ctx context.Context, host string) ([]string, error) // the resolver, if not the system's
	recall   func() []string                                          // gossip addresses noted by an earlier process
	remember func(addresses []string)                                 // notes them, at most rememberAddresses
	stranger func()                                                   // somebody without the key or of another cluster was refused
	parting  string                                                   // what to do about a second cluster of our name
}

const (
	rememberAddresses = 32 // gossip addresses kept for the next start
	joinsAtOnce       = 4
	streamTimeout     = 3 * time.Second // of a full exchange of the list with one member
	defaultGossipPort = "7946"
)

// openGossip binds the gossip port and looks for the others, for ever and in the background. peerAddr is what peers are
// told of our peer port; tags, which may be nil, gives the tags of the start.
func openGossip(c ClusterConfig, node, peerAddr string, tags func() map[string]string, logger *slog.Logger, hooks gossipHooks) (*gossip, error) {
	timing := defaultGossipTiming
	if c.seams.gossip != nil {
		timing = *c.seams.gossip
	}
	return openGossipWith(c, node, peerAddr, tags, logger, timing, hooks)
}

func openGossipWith(c ClusterConfig, node, peerAddr string, tags func() map[string]string, logger *slog.Logger, timing gossipTiming, hooks gossipHooks) (*gossip, error) {
	if node == "" || strings.Contains(node, ".") {
		return nil, fmt.Errorf("node id %q is not one", node)
	}
	g := &gossip{
		node: node, name: node + "." + strconv.FormatInt(time.Now().UnixMicro(), 36),
		log: logger, cluster: c, timing: timing, hooks: hooks,
		fixed: map[string]string{tagPeer: peerAddr}, warned: map[string]bool{},
		events: make(chan serf.Event, 64), dirty: make(chan struct{}, 1), stop: make(chan struct{}),
	}
	for tag, value := range map[string]string{tagZone: c.Zone, tagMachine: c.Machine, tagVersion: c.Version} {
		if value != "" {
			g.fixed[tag] = value
		}
	}
	if c.BootstrapExpect > 0 {
		g.fixed[tagExpect] = strconv.Itoa(c.BootstrapExpect)
	}
	if g.hooks.lookup == nil {
		g.hooks.lookup = net.DefaultResolver.LookupHost
	}
	var first map[string]string
	if tags != nil {
		first = tags()
	}
	g.sent = g.allTags(first)
	g.noteClusterID(first)
	g.view.Store(&gossipView{changed: make(chan struct{})})
	config, err := g.serfConfig()
	if err != nil {
		return nil, err
	}
	g.workers.Go(g.drain)
	if g.serf, err = serf.Create(config); err != nil {
		close(g.stop)
		return nil, errors.Join(fmt.Errorf("starting gossip: %w", err), g.transport.Shutdown())
	}
	g.publish()
	g.workers.Go(g.watch)
	g.workers.Go(g.join)
	return g, nil
}

// serfConfig binds the port, too.
func (g *gossip) serfConfig() (*serf.Config, error) {
	keys := gossipKeys(g.cluster.Security)
	logger := log.New(&gossipLog{g: g}, "", 0)
	m := memberlist.DefaultLANConfig()
	m.Logger, m.LogOutput = logger, nil
	// Packets and streams of another label are dropped before anything else is looked at.
	m.Label = g.cluster.Name
	if len(m.Label) > memberlist.LabelMaxSize {
		return nil, fmt.Errorf("the cluster's name is longer than %d bytes", memberlist.LabelMaxSize)
	}
	if len(keys) > 0 {
		ring, err := memberlist.NewKeyring(keys, keys[0])
		if err != nil {
			return nil, fmt.Errorf("gossip key: %w", err)
		}
		m.Keyring = ring
	}
	m.TCPTimeout = streamTimeout
	m.ProbeInterval = g.timing.probe
	m.ProbeTimeout = g.timing.probe / 2
	m.GossipInterval = min(m.GossipInterval, g.timing.probe)
	m.GossipToTheDeadTime = 30 * g.timing.probe
	m.EnableCompression = false // LZW: more work than the few bytes are worth

	bind, port, err := g.resolveBind()
	if err != nil {
		return nil, err
	}
	if g.transport, err = openGossipTransport(bind, port, logger); err != nil {
		return nil, fmt.Errorf("binding the gossip port %s: %w", g.cluster.Gossip, err)
	}
	m.Transport, m.BindAddr = g.transport, bind
	m.BindPort = g.transport.GetAutoBindPort()
	m.AdvertisePort = m.BindPort
	if err := g.advertise(m, bind); err != nil {
		return nil, errors.Join(err, g.transport.Shutdown())
	}

	s := serf.DefaultConfig()
	s.NodeName, s.Tags, s.MemberlistConfig = g.name, g.sent, m
	s.EventCh = g.events
	s.Merge = gossipMerge{g}
	s.Logger, s.LogOutput = logger, nil
	s.ReconnectInterval = g.timing.lostRejoin
	s.ReconnectTimeout = 10 * time.Minute
	s.TombstoneTimeout = time.Hour
	s.BroadcastTimeout = 2 * time.Second
	s.LeavePropagateDelay = min(300*time.Millisecond, g.timing.probe)
	s.EnableNameConflictResolution = false // names are unique
	s.DisableCoordinates = true
	s.EventBuffer, s.QueryBuffer = 8, 8 // we use neither, and each is sent with every full exchange
	return s, nil
}

// resolveBind gives the address to bind as an IP: memberlist would take a name for every address there is.
func (g *gossip) resolveBind() (ip string, port int, err error) {
	host, service, err := net.SplitHostPort(g.cluster.Gossip)
	if err != nil {
		return "", 0, fmt.Errorf("gossip address %q: %w", g.cluster.Gossip, err)
	}
	if port, err = strconv.Atoi(service); err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("gossip address %q: no such port", g.cluster.Gossip)
	}
	if host == "" {
		host = "0.0.0.0"
	}
	ip, err = g.resolveOne(host)
	return ip, port, err
}

// advertise sets the IP that others are told: --advertise, else the one that is bound, or a private one if all are.
// Without any security that must be a loopback address, and so must everybody's.
func (g *gossip) advertise(m *memberlist.Config, bind string) (err error) {
	if g.cluster.Advertise != "" {
		if m.AdvertiseAddr, err = g.resolveOne(g.cluster.Advertise); err != nil {
			return err
		}
	} else if ip := net.ParseIP(bind); ip.IsUnspecified() && ip.To4() == nil {
		return fmt.Errorf("gossip bound to %s: say with --advertise which address others shall use", bind)
	}
	ip, _, err := g.transport.FinalAdvertiseAddr(m.AdvertiseAddr, m.AdvertisePort)
	if err != nil {
		return fmt.Errorf("finding out which address to advertise (--advertise says it): %w", err)
	}
	s := g.cluster.Security
	if m.Keyring != nil || s.CAFile != "" || s.Insecure {
		return nil
	}
	if !ip.IsLoopback() {
		return fmt.Errorf("gossip on %s is open to everybody: give a gossip key, certificates or a join token, or say that peers may be insecure", ip)
	}
	m.CIDRsAllowed, err = memberlist.ParseCIDRs([]string{"127.0.0.0/8", "::1/128"})
	return err
}

// gossipKeys are those given, or one made of the join token.
func gossipKeys(s Security) [][]byte {
	if len(s.Keyring) > 0 || s.Token == "" {
		return s.Keyring
	}
	return [][]byte{gossipKey(s.Token)}
}

// resolveOne prefers IPv4, as the other end of a name with both is more likely to reach it.
func (g *gossip) resolveOne(host string) (string, error) {
	if net.ParseIP(host) != nil {
		return host, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), streamTimeout)
	defer cancel()
	found, err := g.hooks.lookup(ctx, host)
	if err == nil && len(found) == 0 {
		err = errors.New("no address")
	}
	if err != nil {
		return "", fmt.Errorf("resolving %s: %w", host, err)
	}
	for _, ip := range found {
		if parsed := net.ParseIP(ip); parsed != nil && parsed.To4() != nil {
			return ip, nil
		}
	}
	return found[0], nil
}

// drain takes serf's events at once: serf holds its lock while it sends them.
func (g *gossip) drain() {
	for {
		select {
		case <-g.events:
			select {
			case g.dirty <- struct{}{}:
			default:
			}
		case <-g.stop:
			return
		}
	}
}

// watch publishes a new view after each change.
func (g *gossip) watch() {
	for {
		select {
		case <-g.dirty:
		case <-g.stop:
			return
		}
		select {
		case <-time.After(g.timing.gather):
		case <-g.stop:
			return
		}
		select {
		case <-g.dirty:
		default:
		}
		g.publish()
	}
}

// publish brings the view up to serf's list.
func (g *gossip) publish() {
	old := g.view.Load()
	best := map[string]gossipMember{}
	for _, m := range g.serf.Members() {
		member, ok := g.member(m)
		if !ok || g.foreign(member.Tags) {
			continue
		}
		g.checkDuplicate(member)
		if other, there := best[member.ID]; !there || g.better(member, other) {
			best[member.ID] = member
		}
	}
	now := time.Now()
	next := &gossipView{changed: make(chan struct{})}
	for _, id := range slices.Sorted(maps.Keys(best)) {
		member := best[id]
		member.Since = now
		if before, there := old.find(id); there && before.Name == member.Name && before.State == member.State {
			member.Since = before.Since
		}
		next.members = append(next.members, member)
	}
	if slices.EqualFunc(old.members, next.members, sameMember) {
		return
	}
	g.view.Store(next)
	close(old.changed)
}

func sameMember(a, b gossipMember) bool {
	return a.Name == b.Name && a.State == b.State && a.GossipAddr == b.GossipAddr && a.PeerAddr == b.PeerAddr && maps.Equal(a.Tags, b.Tags)
}

// checkDuplicate looks for somebody who was started with our identity after us.
func (g *gossip) checkDuplicate(m gossipMember) {
	if m.ID != g.node || m.Name == g.name || !m.alive() || g.warned[m.Name] {
		return
	}
	_, ours, _ := splitName(g.name)
	if _, theirs, _ := splitName(m.Name); theirs > ours {
		g.warned[m.Name] = true
		g.log.Error("another process uses this sidecar's identity: its data directory was copied, or is used twice; stop one of them", "node", m.ID, "gossip", m.GossipAddr)
	}
}

// member translates serf's; false if it is none of ours.
func (g *gossip) member(m serf.Member) (gossipMember, bool) {
	id, _, ok := splitName(m.Name)
	if !ok {
		return gossipMember{}, false
	}
	member := gossipMember{
		ID: id, Name: m.Name, Tags: m.Tags, PeerAddr: m.Tags[tagPeer],
		GossipAddr: net.JoinHostPort(m.Addr.String(), strconv.Itoa(int(m.Port))),
	}
	switch m.Status {
	case serf.StatusAlive:
		member.State = gossipAlive
		if m.Tags[tagLeaving] != "" {
			member.State = gossipLeaving
		}
	case serf.StatusLeaving:
		member.State = gossipLeaving
	case serf.StatusLeft:
		member.State = gossipLeft
	default:
		member.State = gossipFailed
	}
	return member, true
}

// better says which of two names of a node id counts.
func (g *gossip) better(a, b gossipMember) bool {
	if a.Name == g.name || b.Name == g.name {
		return a.Name == g.name
	}
	if a.alive() != b.alive() {
		return a.alive()
	}
	_, bootA, _ := splitName(a.Name)
	_, bootB, _ := splitName(b.Name)
	return bootA > bootB
}

// splitName gives the parts of a name in serf.
func splitName(name string) (node string, boot int64, ok bool) {
	node, at, found := strings.Cut(name, ".")
	boot, err := strconv.ParseInt(at, 36, 64)
	return node, boot, found && node != "" && err == nil && boot > 0
}

// members gives everyone, ourselves included, ordered by node id. The slice and its maps are shared: read only.
func (g *gossip) members() []gossipMember { return g.view.Load().members }

// changed is closed when members would give something else. Take it before members.
func (g *gossip) changed() <-chan struct{} { return g.view.Load().changed }

// resolve gives where a node's peer port is, alive or not.
func (g *gossip) resolve(node string) (peerAddr string, known bool) {
	m, known := g.view.Load().find(node)
	return m.PeerAddr, known && m.PeerAddr != ""
}

// addr is where we can be reached by gossip.
func (g *gossip) addr() string {
	local := g.serf.LocalMember()
	return net.JoinHostPort(local.Addr.String(), strconv.Itoa(int(local.Port)))
}

// setTags replaces the tags that are not of the configuration. It returns when they were sent to some member, if there
// is one, or when gossip is closed; an error that is not about their size does not mean that they are not spread later.
func (g *gossip) setTags(tags map[string]string) error {
	g.tagsMu.Lock()
	defer g.tagsMu.Unlock()
	all := g.allTags(tags)
	if maps.Equal(all, g.sent) || g.closed() {
		return nil
	}
	g.noteClusterID(tags)
	g.sent = nil // until they are known to be spread, anything is a change
	told := make(chan error, 1)
	go func() { told <- g.serf.SetTags(all) }() // waits for as long as BroadcastTimeout, even for a memberlist that is shut down
	select {
	case err := <-told:
		if err != nil {
			return fmt.Errorf("setting gossip tags: %w", err)
		}
	case <-g.stop:
		return nil
	}
	g.sent = all
	return nil
}

func (g *gossip) closed() bool {
	select {
	case <-g.stop:
		return true
	default:
		return false
	}
}

func (g *gossip) allTags(tags map[string]string) map[string]string {
	all := maps.Clone(g.fixed)
	for tag, value := range tags {
		if value != "" {
			all[tag] = value
		}
	}
	return all
}

func (g *gossip) noteClusterID(tags map[string]string) {
	id := tags[tagClusterID]
	g.clusterID.Store(&id)
	select { // who is foreign has perhaps changed
	case g.dirty <- struct{}{}:
	default:
	}
}

// foreign says that a member has told another cluster's id than ours.
func (g *gossip) foreign(tags map[string]string) bool {
	ours, theirs := *g.clusterID.Load(), tags[tagClusterID]
	return ours != "" && theirs != "" && ours != theirs
}

// leave tells everybody that this is an exit and not a failure. The port stays open until close.
func (g *gossip) leave() error {
	if err := g.serf.Leave(); err != nil {
		return fmt.Errorf("leaving gossip: %w", err)
	}
	return nil
}

// close ends everything; without leave before, the others have to find out.
func (g *gossip) close() (err error) {
	g.closing.Do(func() {
		g.transport.cancel()
		err = g.serf.Shutdown()
		close(g.stop)
		g.workers.Wait()
		g.note()
	})
	return err
}

// gossipMerge keeps members of other clusters out.
type gossipMerge struct{ g *gossip }

// NotifyMerge is asked for each single member heard of, and before for the list of a whole exchange, where one wrong
// entry shall not keep out the rest. memberlist holds its lock meanwhile.
func (m gossipMerge) NotifyMerge(members []*serf.Member) error {
	if len(members) != 1 {
		return nil
	}
	member := members[0]
	if _, _, ok := splitName(member.Name); !ok {
		m.g.refuse(fmt.Sprintf("%q is no sidecar", member.Name))
		return errors.New("no sidecar")
	}
	if m.g.foreign(member.Tags) {
		m.g.refuse(fmt.Sprintf("%s at %s has another cluster id, %s: two clusters of the same name; %s", member.Name, member.Tags[tagPeer], member.Tags[tagClusterID], m.g.hooks.parting))
		return errors.New("another cluster id")
	}
	return nil
}

// refuse counts what was kept out, and tells the operator of the first and then of ever fewer.
func (g *gossip) refuse(why string) {
	if g.hooks.stranger != nil {
		g.hooks.stranger()
	}
	if n := g.strangers.Add(1); n&(n-1) == 0 {
		g.log.Warn("gossip of a stranger was refused", "why", why, "count", n)
	}
}

// gossipLog passes serf's and memberlist's messages on, and finds in them what memberlist tells in no other way.
type gossipLog struct{ g *gossip }

// refusals of memberlist: another cluster's label; a wrong key; no key, or a key where we have none; no gossip at all.
var refusals = []string{
	"unacceptable label", "Decrypt packet failed", "failed to receive: ", "stream label header", "double packet label", "not supported",
}

func (l *gossipLog) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	if strings.HasPrefix(text, "[ERR]") && slices.ContainsFunc(refusals, func(r string) bool { return strings.Contains(text, r) }) {
		l.g.refuse(text)
	}
	l.g.log.Debug("gossip: " + text)
	return len(line), nil
}

// joinOrder is random, so that sidecars started together do not all ask the same one.
func joinOrder(addresses []string) []string {
	rand.Shuffle(len(addresses), func(i, j int) { addresses[i], addresses[j] = addresses[j], addresses[i] })
	return addresses
}
