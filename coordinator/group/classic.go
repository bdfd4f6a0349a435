package group

import (
	"bytes"
	"cmp"
	"maps"
	"math/bits"
	"slices"
	"time"
)

// classicState is the state of a classic group. Dead is a group that is not there: nothing here is ever in it.
type classicState uint8

const (
	empty classicState = iota
	preparingRebalance
	completingRebalance
	stable
)

func (s classicState) String() string {
	return [...]string{"Empty", "PreparingRebalance", "CompletingRebalance", "Stable"}[s]
}

// consumerType is the protocol type whose subscriptions the coordinator can read.
const consumerType = "consumer"

// classic is the state machine of a group with the classic protocol (Kafka's ClassicGroup). Members are in the order
// they joined; where Kafka takes the order of a hash map of random ids, this one is taken.
type classic struct {
	state, previous classicState
	generation      int32
	protocolType    *string
	protocol        *string
	leader          string // "": none
	since           int64  // of the state, milliseconds; -1: not known
	members         []*member
	byID            map[string]*member
	static          map[string]*member // by instance id
	pending         map[string]*pendingMember
	awaitingJoin    int            // members whose join is parked
	supported       map[string]int // members by the protocols they support
	subscribed      map[string]bool
	origins         map[origin]string // ids of members and pending ones by the requests that gave them
	departed        bitmap            // who has left this generation, by seat
	noting          bool              // departed has changed in this Step or Tick
	newMember       bool              // one was added while the initial rebalance is delayed
	size            memberSize        // of all members
	joinPhase       timer
	syncPhase       timer
	initial         bool          // joinPhase is the delay of the initial rebalance
	delay, rest     time.Duration // of the initial rebalance: this delay, and what may be added
}

// protocol is one the member supports, with its metadata (for consumers: the subscription).
type protocol struct {
	name     string
	metadata []byte
}

// origin names the request by which a client got its member id: one that is sent again after a failover has no id yet.
type origin struct {
	session Session
	ordinal uint64
}

type member struct {
	id                   string
	instance             *string
	clientID, clientHost string
	rebalanceTimeout     time.Duration
	sessionTimeout       time.Duration
	protocols            []protocol
	assignment           []byte
	origin               origin
	seat                 int // in the list of its generation's members, from 1; 0: not of it

	isNew      bool   // its first join is parked
	join, sync parked // what waits for an answer
	awaitsSync bool   // has not synced in this generation
	session    timer
}

// pendingMember is a member id that was handed out with MEMBER_ID_REQUIRED and has not joined.
type pendingMember struct {
	id     string
	origin origin
	timer  timer
}

// parked is a request whose reply is held back.
type parked struct {
	call    uint64
	version int16
}

func newClassic() *classic {
	return &classic{since: -1, byID: map[string]*member{}}
}

func (c *classic) protocolName() string {
	if c.protocol == nil {
		return ""
	}
	return *c.protocol
}

func (c *classic) typeName() string {
	if c.protocolType == nil {
		return ""
	}
	return *c.protocolType
}

func (c *classic) transition(to classicState, now time.Time) {
	c.previous, c.state, c.since = c.state, to, now.UnixMilli()
}

func (c *classic) add(m *member) {
	if m.instance != nil {
		if c.static == nil {
			c.static = map[string]*member{}
		}
		c.static[*m.instance] = m
	}
	if c.leader == "" {
		c.leader = m.id
	}
	c.members = append(c.members, m)
	c.byID[m.id] = m
	c.count(m, 1)
	c.unpend(m.id)
}

// count keeps supported, size, origins and awaitingJoin right when a member comes (1) or goes (-1).
func (c *classic) count(m *member, n int) {
	if c.supported == nil {
		c.supported = map[string]int{}
	}
	for _, p := range m.protocols {
		if c.supported[p.name] += n; c.supported[p.name] == 0 {
			delete(c.supported, p.name)
		}
	}
	size := m.size()
	c.size.largest += n * size.largest
	c.size.all += n * size.all
	if m.origin.ordinal != 0 {
		c.noteOrigin(m.origin, m.id, n > 0)
	}
	if m.join.call != 0 {
		c.awaitingJoin += n
	}
}

func (c *classic) noteOrigin(o origin, id string, comes bool) {
	switch {
	case comes && c.origins == nil:
		c.origins = map[origin]string{o: id}
	case comes:
		c.origins[o] = id
	case c.origins[o] == id:
		delete(c.origins, o)
	}
}

// memberSize is what members take at most in the record of a join round: with the chosen protocol of each alone, which
// may be the largest, and with all protocols.
type memberSize struct{ largest, all int }

func (m *member) size() memberSize {
	n := 64 + len(m.id) + len(m.clientID) + len(m.clientHost)
	if m.instance != nil {
		n += len(*m.instance)
	}
	largest, all := 0, 0
	for _, p := range m.protocols {
		all += 6 + len(p.name) + len(p.metadata)
		largest = max(largest, len(p.name)+len(p.metadata))
	}
	return memberSize{n + largest, n + all}
}

// fits says whether there is room for a member, in the place of old if that is not nil: in the record of the round, and
// in what the group may take besides.
func (c *classic) fits(m, old *member) bool {
	size := m.size()
	if old != nil {
		was := old.size()
		size.largest -= was.largest
		size.all -= was.all
	}
	return c.size.largest+size.largest <= maxRound && c.size.all+size.all <= maxProtocols
}

// pend remembers an id that is handed out. Beyond maxPending the oldest are forgotten, a few at once.
func (s *State) pend(c *classic, p *pendingMember) {
	if len(c.pending) >= maxPending {
		oldest := slices.SortedFunc(maps.Values(c.pending), func(a, b *pendingMember) int {
			return cmp.Compare(a.timer.order, b.timer.order)
		})
		for _, p := range oldest[:maxPending/16] {
			s.dropPending(c, p.id)
		}
	}
	if c.pending == nil {
		c.pending = map[string]*pendingMember{}
	}
	c.pending[p.id] = p
	if p.origin.ordinal != 0 {
		c.noteOrigin(p.origin, p.id, true)
	}
}

func (c *classic) unpend(id string) *pendingMember {
	p := c.pending[id]
	if p == nil {
		return nil
	}
	delete(c.pending, id)
	c.noteOrigin(p.origin, id, false)
	return p
}

// seated notes the places of the members in their generation's records.
func (c *classic) seated() {
	for i, m := range c.members {
		m.seat = i + 1
	}
}

// remove takes a member out; what it has parked must have been answered.
func (c *classic) remove(m *member) {
	delete(c.byID, m.id)
	if m.instance != nil && c.static[*m.instance] == m {
		delete(c.static, *m.instance)
	}
	c.count(m, -1)
	i := slices.Index(c.members, m)
	c.members = slices.Delete(c.members, i, i+1)
	if c.leader == m.id {
		c.leader = ""
		if len(c.members) > 0 {
			c.leader = c.members[0].id
		}
	}
}

// update is what a member says when it joins again.
func (c *classic) update(m *member, protocols []protocol, rebalance, session time.Duration, call parked) {
	c.count(m, -1)
	m.protocols, m.rebalanceTimeout, m.sessionTimeout, m.join = protocols, rebalance, session, call
	c.count(m, 1)
}

func (c *classic) allJoined() bool {
	return len(c.members) == c.awaitingJoin && len(c.pending) == 0
}

func (c *classic) rebalanceTimeout() time.Duration {
	var d time.Duration
	for _, m := range c.members {
		d = max(d, m.rebalanceTimeout)
	}
	return d
}

// supports says whether somebody with that type and those protocols may join.
func (c *classic) supports(protocolType string, protocols []protocol) bool {
	if c.state == empty {
		return protocolType != "" && len(protocols) > 0
	}
	return c.protocolType != nil && *c.protocolType == protocolType &&
		slices.ContainsFunc(protocols, func(p protocol) bool { return c.supported[p.name] == len(c.members) })
}

// elect makes sure that the leader is a member that has joined, and reports false if none has.
func (c *classic) elect() bool {
	if c.leader == "" {
		return false
	}
	if l := c.byID[c.leader]; l != nil && l.join.call != 0 {
		return true
	}
	for _, m := range c.members {
		if m.join.call != 0 {
			c.leader = m.id
			return true
		}
	}
	return false
}

// choose selects the protocol: each member votes for the first of its own that all support, most votes win. Ties are
// decided as in Kafka by the order of a java.util.HashMap of the names, for clients may have come to rely on it.
func (c *classic) choose() string {
	votes := map[string]int{}
	var names []string
	for _, m := range c.members {
		for _, p := range m.protocols {
			if c.supported[p.name] == len(c.members) {
				if votes[p.name]++; votes[p.name] == 1 {
					names = append(names, p.name)
				}
				break
			}
		}
	}
	sortLikeHashMap(names)
	best := ""
	for _, n := range names {
		if votes[n] > votes[best] {
			best = n
		}
	}
	return best
}

// sortLikeHashMap gives names, in the order they were put, the order in which a java.util.HashMap iterates over them:
// by bucket, in a bucket as they were put. The table has 16 buckets and doubles when it is three quarters full.
func sortLikeHashMap(names []string) {
	buckets := 16
	if n := len(names); n > 12 {
		buckets = 1 << bits.Len(uint((n*4-1)/3))
	}
	bucket := func(s string) int {
		h := uint32(javaHash(s))
		return int((h ^ h>>16) & uint32(buckets-1))
	}
	slices.SortStableFunc(names, func(a, b string) int { return bucket(a) - bucket(b) })
}

func (m *member) metadata(protocol string) []byte {
	for _, p := range m.protocols {
		if p.name == protocol {
			return p.metadata
		}
	}
	return nil
}

func (m *member) matches(protocols []protocol) bool {
	return slices.EqualFunc(m.protocols, protocols, func(a, b protocol) bool {
		return a.name == b.name && bytes.Equal(a.metadata, b.metadata)
	})
}

// showAssignments takes over the assignments of the generation before: Describe shows them until the next are there.
func (c *classic) showAssignments(before *classic) {
	for _, m := range c.members {
		if b := before.byID[m.id]; b != nil {
			m.assignment = b.assignment
		}
	}
}

// enrich adds to a group that was read from its GroupMetadataValue what only the record of its join round has: all
// protocols of the members, and how they came by their ids. Membership stays as it was: an append that was cut off
// between the two records may have left the round a step ahead.
func (c *classic) enrich(round *classic) {
	for _, m := range c.members {
		if r := round.byID[m.id]; r != nil {
			c.count(m, -1)
			m.protocols, m.origin = r.protocols, r.origin
			c.count(m, 1)
		}
	}
}

// subscribedTopics is the union of the members' subscriptions, nil if it cannot be known: no consumers, or metadata that
// does not parse.
//
// Unlike Kafka: metadata that promises more topics than it holds is treated like any other that does not parse; there
// the generation cannot be made, and the member waits for ever (ClassicGroup.computeSubscribedTopics).
func (c *classic) subscribedTopics() map[string]bool {
	if c.typeName() != consumerType {
		return nil
	}
	topics := map[string]bool{}
	for _, m := range c.members {
		if c.protocol == nil {
			return nil
		}
		// Only the prefix that all versions of ConsumerProtocolSubscription share: topics and user data.
		r := reader{b: m.metadata(*c.protocol)}
		r.int16()
		for n := r.int32(); n > 0 && !r.bad; n-- {
			topics[r.string()] = true
		}
		r.bytes()
		if r.bad {
			return nil
		}
	}
	return topics
}

// subscribesTo treats every topic of a consumer group as subscribed while its subscriptions are not known.
func (c *classic) subscribesTo(topic string) bool {
	if c.subscribed == nil {
		return c.typeName() == consumerType
	}
	return c.subscribed[topic]
}

func (c *classic) staticID(instance string) (string, bool) {
	m := c.static[instance]
	if m == nil {
		return "", false
	}
	return m.id, true
}

// validate is ClassicGroup.validateMember: the error code of a request that names this member and instance.
func (c *classic) validate(id string, instance *string) int16 {
	if instance != nil {
		existing, ok := c.staticID(*instance)
		if !ok {
			return errUnknownMember
		}
		if existing != id {
			return errFencedInstance
		}
	}
	if c.byID[id] == nil {
		return errUnknownMember
	}
	return 0
}
