package coordinator

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing/synctest"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// simClient is a client of the simulation.
type simClient interface {
	step()       // does something
	rest()       // does what it must to come to rest
	rests() bool // nothing is left to do
}

// conn is a client connection with its sidecar's session: what comes back unanswered is sent again, in order and before
// anything newer, to whoever the sidecar takes for active.
type conn struct {
	*simulation
	name       string
	client     group.Client
	unanswered []*simCall
	flying     int
	returned   bool
	stream     int // answers to an older one are not read
	with       *simReplica
	term       uint64
}

type simCall struct {
	conn    *conn
	body    kmsg.Request
	ordinal uint64
	flying  bool
	floor   int // when it was sent
	answer  func(kmsg.Response)
}

func (s *simulation) connect(name string) *conn {
	c := &conn{simulation: s, name: fmt.Sprint(name, "#", len(s.conns)), client: group.Client{ID: name, Host: "/127.0.0.1"}}
	copy(c.client.Session[:], c.name)
	s.conns = append(s.conns, c)
	return c
}

func (c *conn) send(body kmsg.Request, answer func(kmsg.Response)) *simCall {
	c.client.Ordinal++
	call := &simCall{conn: c, body: body, ordinal: c.client.Ordinal, floor: c.floor, answer: answer}
	c.unanswered = append(c.unanswered, call)
	c.note("%s sends %d: %s", c.name, call.ordinal, showRequest(body))
	c.sendHeld()
	return call
}

func (c *conn) sendHeld() {
	if c.with == nil || c.flying > 0 && c.returned {
		return
	}
	c.returned = false
	for _, call := range slices.Clone(c.unanswered) {
		if call.flying {
			continue
		}
		call.flying = true
		c.flying++
		client, stream, with := c.client, c.stream, c.with
		client.Ordinal = call.ordinal
		with.c.Submit(&Request{Body: call.body, Client: client, Term: c.term, Done: func(response kmsg.Response, err error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.answers = append(c.answers, simAnswer{call, stream, with, response, err})
		}})
		synctest.Wait() // so that a seed always does the same
	}
}

// look learns who is active now: a newer one ends the stream to the older, whatever is still out there.
func (c *conn) look() {
	synctest.Wait()
	for _, r := range c.sims {
		if status := r.c.Status(); status.Active && status.Term > c.term {
			c.note("%s turns to %s in term %d", c.name, c.simulation.name(r.replica), status.Term)
			c.with, c.term = r, status.Term
			c.stream++
			c.flying, c.returned = 0, false
			for _, call := range c.unanswered {
				call.flying = false
			}
		}
	}
	if c.flying == 0 {
		c.sendHeld()
	}
}

func (c *conn) take(a simAnswer) {
	if a.stream != c.stream || !a.call.flying {
		return
	}
	a.call.flying = false
	c.flying--
	if a.err != nil {
		c.note("%s gets %d back", c.name, a.call.ordinal)
		c.returned = true
		return
	}
	i := slices.Index(c.unanswered, a.call)
	if i < 0 {
		return
	}
	c.unanswered = slices.Delete(c.unanswered, i, i+1)
	c.note("%s is answered %d: %s", c.name, a.call.ordinal, showAnswer(a.response))
	c.check(a)
	a.call.answer(a.response)
}

// close is the client's: what is out there may still be executed.
func (c *conn) close() {
	c.unanswered, c.flying = nil, 0
	c.stream++
}

// simCommit is a commit of a value that nobody else commits.
type simCommit struct {
	conn         *conn
	ordinal      uint64
	value        int64
	acknowledged bool
}

func (c *conn) commit(groupID, member string, generation int32, answer func(code int16)) {
	c.values++
	r := commit("orders", c.values).(*kmsg.OffsetCommitRequest)
	r.Group, r.MemberID, r.Generation = groupID, member, generation
	r.Topics[0].Partitions[0].Partition = int32(c.IntN(2))
	mine := &simCommit{conn: c, value: c.values}
	c.commits = append(c.commits, mine)
	c.simulation.groups[groupID] = true
	mine.ordinal = c.client.Ordinal + 1
	c.send(r, func(response kmsg.Response) {
		code := response.(*kmsg.OffsetCommitResponse).Topics[0].Partitions[0].ErrorCode
		mine.acknowledged = code == 0
		answer(code)
	})
}

// check holds an answer against the log.
func (c *conn) check(a simAnswer) {
	switch r := a.response.(type) {
	case *kmsg.OffsetCommitResponse:
		if r.Topics[0].Partitions[0].ErrorCode != 0 {
			return
		}
		value := a.call.body.(*kmsg.OffsetCommitRequest).Topics[0].Partitions[0].Offset
		index, place := c.find(value)
		switch {
		case index == 0:
			c.t.Errorf("commit %d is acknowledged, and not replicated", value)
		case c.log[index-1].term == c.term && a.replica.told == c.term && uint64(index) > a.replica.stored:
			c.t.Errorf("commit %d at %d is acknowledged, and not stored beyond %d", value, index, a.replica.stored)
		}
		c.simulation.floor = max(c.floor, place)
	case *kmsg.OffsetFetchResponse:
		if r.Groups[0].ErrorCode == 0 {
			c.checkFetch(a.call, r)
		}
	case *kmsg.ListGroupsResponse:
		known := map[string]bool{}
		for _, records := range c.counted(len(c.log)) {
			for _, record := range records {
				if len(record.Key) > 4 && record.Key[0] == 0 { // key 1 or 2: a group's
					known[string(record.Key[4:4+int(record.Key[3])])] = true
				}
			}
		}
		for _, g := range r.Groups {
			if !known[g.Group] {
				c.t.Errorf("group %s is listed, and not replicated", g.Group)
			}
		}
	}
}

// find gives the index of the entry that commits a value, 0 if there is none, and the place where its request ends.
func (s *simulation) find(value int64) (index, place int) {
	for i, records := range s.counted(len(s.log)) {
		for _, record := range records {
			place++
			if v, ok := readOffset(record); ok && v == value {
				index = i + 1
			}
			if _, _, _, ends := readSession(record); ends && index > 0 {
				return index, place
			}
		}
	}
	return 0, 0
}

// checkFetch: what was read is the state at a place in the log where a request ends, and no older than what was known when
// it was asked for.
func (c *conn) checkFetch(call *simCall, r *kmsg.OffsetFetchResponse) {
	want := map[int32]int64{0: -1, 1: -1}
	for _, t := range r.Groups[0].Topics {
		for _, p := range t.Partitions {
			want[p.Partition] = p.Offset
		}
	}
	at, place := map[int32]int64{0: -1, 1: -1}, 0
	if call.floor == 0 && maps.Equal(at, want) {
		return
	}
	prefix := fmt.Sprintf("\x00\x01\x00%c%s\x00\x06orders\x00\x00\x00", len(r.Groups[0].Group), r.Groups[0].Group)
	for _, records := range c.counted(len(c.log)) {
		for _, record := range records {
			place++
			if partition, ok := strings.CutPrefix(string(record.Key), prefix); ok {
				at[int32(partition[0])] = -1
				if v, ok := readOffset(record); ok {
					at[int32(partition[0])] = v
				}
			}
			if _, _, _, ends := readSession(record); ends && place >= call.floor && maps.Equal(at, want) {
				c.simulation.floor = max(c.floor, place)
				return
			}
		}
	}
	c.t.Errorf("%s read %v, which is the state of no place from %d to %d", c.name, want, call.floor, place)
}

// committer commits offsets of a group without members, and of groups that nobody knows yet, several at once; now and then
// it deletes the group.
type committer struct {
	*conn
	born int
}

func (c *committer) step() {
	if len(c.unanswered) >= 4 {
		return
	}
	switch c.IntN(12) {
	case 0:
		r := kmsg.NewPtrDeleteGroupsRequest()
		r.Version, r.Groups = 2, []string{"s"}
		c.send(r, func(kmsg.Response) {})
	case 1:
		c.born++
		c.commit(fmt.Sprint("n-", c.name, c.born), "", -1, func(int16) {})
	default:
		c.commit("s", "", -1, func(int16) {})
	}
}

func (c *committer) rest() {}

// rests is every client's: nothing is unanswered.
func (c *conn) rests() bool { return len(c.unanswered) == 0 }

// reader reads what there is.
type reader struct{ *conn }

func (r *reader) step() {
	if len(r.unanswered) >= 4 {
		return
	}
	switch r.IntN(4) {
	case 0:
		list := kmsg.NewPtrListGroupsRequest()
		list.Version = 4
		r.send(list, func(kmsg.Response) {})
	default:
		f := fetch().(*kmsg.OffsetFetchRequest)
		f.Groups[0].Group, f.Groups[0].Topics[0].Partitions = []string{"s", "s", "g"}[r.IntN(3)], []int32{0, 1}
		r.send(f, func(kmsg.Response) {})
	}
}

func (r *reader) rest() {}

// simMember is a consumer of group g.
type simMember struct {
	*conn
	version    int16
	id         string
	instance   *string
	state      memberState
	generation int32
	leader     bool
	members    []string
	restarted  bool // a static member may have been replaced by itself
}

type memberState uint8

const (
	memberOut memberState = iota
	memberBusy
	memberJoined
	memberStable
	memberRejoins
)

func (m *simMember) step() {
	switch {
	case m.state == memberStable && m.IntN(12) == 0:
		m.leave()
	case m.instance != nil && m.IntN(30) == 0:
		m.restart()
	case m.state == memberBusy && m.generation > 0 && len(m.unanswered) < 3 && m.IntN(8) == 0:
		m.commitOne() // behind a join or a sync
	case m.state == memberStable && m.IntN(3) == 0:
		m.commitOne()
	default:
		m.proceed()
	}
}

// proceed takes the next step of the membership.
func (m *simMember) proceed() {
	switch m.state {
	case memberOut, memberRejoins:
		m.join()
	case memberJoined:
		m.sync()
	case memberStable:
		m.beat()
	case memberBusy:
	}
}

func (m *simMember) rest() { m.proceed() }

func (m *simMember) rests() bool { return m.state == memberStable && m.conn.rests() }

func (m *simMember) join() {
	r := kmsg.NewPtrJoinGroupRequest()
	r.Version, r.Group, r.ProtocolType = m.version, "g", "consumer"
	r.SessionTimeoutMillis, r.RebalanceTimeoutMillis = 10_000, 10_000
	r.MemberID, r.InstanceID = m.id, m.instance
	r.Protocols = []kmsg.JoinGroupRequestProtocol{{Name: "range", Metadata: []byte{1}}}
	m.state = memberBusy
	m.send(r, func(response kmsg.Response) {
		r := response.(*kmsg.JoinGroupResponse)
		switch r.ErrorCode {
		case 0:
			m.id, m.generation, m.leader, m.members = r.MemberID, r.Generation, r.MemberID == r.LeaderID, nil
			for _, other := range r.Members {
				m.members = append(m.members, other.MemberID)
			}
			m.state = memberJoined
			m.checkRound(r)
		case kerr.MemberIDRequired.Code:
			m.id, m.state = r.MemberID, memberRejoins
		default:
			m.failed(r.ErrorCode, false)
		}
	})
}

// sync brings the assignment if it leads: partitions 0 to 3, dealt out in some order.
func (m *simMember) sync() {
	r := kmsg.NewPtrSyncGroupRequest()
	r.Version, r.Group, r.Generation, r.MemberID, r.InstanceID = 3, "g", m.generation, m.id, m.instance
	if m.leader {
		first := m.IntN(4)
		assignments := map[string][]byte{}
		for p := range 4 {
			if n := len(m.members); n > 0 {
				to := m.members[(p+first)%n]
				assignments[to] = append(assignments[to], byte('0'+p))
			}
		}
		for _, id := range m.members {
			r.GroupAssignment = append(r.GroupAssignment, kmsg.SyncGroupRequestGroupAssignment{MemberID: id, MemberAssignment: assignments[id]})
		}
	}
	m.state = memberBusy
	m.send(r, func(response kmsg.Response) {
		r := response.(*kmsg.SyncGroupResponse)
		if r.ErrorCode != 0 {
			m.failed(r.ErrorCode, true)
			return
		}
		m.state = memberStable
		for _, p := range r.MemberAssignment {
			at := fmt.Sprintf("partition %c of generation %d", p, m.generation)
			if owner := m.owners[at]; owner != "" && owner != m.person(m.id) {
				m.t.Errorf("%s belongs to %s and to %s", at, owner, m.id)
			}
			m.owners[at] = m.person(m.id)
		}
	})
}

func (m *simMember) beat() {
	if len(m.unanswered) > 0 {
		return
	}
	r := kmsg.NewPtrHeartbeatRequest()
	r.Version, r.Group, r.Generation, r.MemberID, r.InstanceID = 3, "g", m.generation, m.id, m.instance
	generation, id := m.generation, m.id
	m.send(r, func(response kmsg.Response) {
		code := response.(*kmsg.HeartbeatResponse).ErrorCode
		if code != 0 && m.state == memberStable && m.generation == generation && m.id == id {
			m.failed(code, true)
		}
	})
}

func (m *simMember) commitOne() {
	generation, id := m.generation, m.id
	m.commit("g", id, generation, func(code int16) {
		if code == kerr.CoordinatorNotAvailable.Code {
			return // perhaps it had been refused, and a newer one had not
		}
		if m.state == memberStable && code != 0 && m.generation == generation && m.id == id {
			m.failed(code, true)
		}
	})
}

func (m *simMember) leave() {
	r := kmsg.NewPtrLeaveGroupRequest()
	r.Version, r.Group = 3, "g"
	r.Members = []kmsg.LeaveGroupRequestMember{{MemberID: m.id, InstanceID: m.instance}}
	m.state = memberBusy
	m.send(r, func(response kmsg.Response) {
		r := response.(*kmsg.LeaveGroupResponse)
		if r.ErrorCode != 0 && !m.slow {
			m.t.Errorf("%s leaves: %s", m.id, errorName(r.ErrorCode))
		}
		m.id, m.generation, m.state = "", 0, memberOut
	})
}

// restart is a static member's process that begins anew.
func (m *simMember) restart() {
	m.note("%s restarts", m.name)
	m.conn.close()
	m.conn = m.connect("member2")
	m.id, m.generation, m.state, m.restarted = "", 0, memberOut, true
}

// failed does what clients do about an error. What a member was told of may not be forgotten while no time passes.
func (m *simMember) failed(code int16, wasMember bool) {
	switch code {
	case kerr.RebalanceInProgress.Code:
	case kerr.CoordinatorNotAvailable.Code, kerr.NotCoordinator.Code:
		if !m.slow {
			m.t.Errorf("%s: %s, though no time has passed", m.id, errorName(code))
		}
	case kerr.UnknownMemberID.Code, kerr.FencedInstanceID.Code, kerr.IllegalGeneration.Code:
		if wasMember && !m.slow && !m.restarted {
			m.t.Errorf("%s of generation %d: %s", m.id, m.generation, errorName(code))
		}
		if code != kerr.IllegalGeneration.Code {
			m.id = ""
		}
	default:
		m.t.Errorf("%s: %s", m.id, errorName(code))
	}
	m.state = memberRejoins
}

// person is whose member id it is: a static member has many.
func (s *simulation) person(id string) string {
	if strings.HasPrefix(id, "static-") {
		return "static"
	}
	return id
}

// checkRound: a generation has one leader and one list of members.
func (m *simMember) checkRound(r *kmsg.JoinGroupResponse) {
	if len(r.Members) == 0 {
		return
	}
	var members []string
	for _, other := range r.Members {
		members = append(members, m.person(other.MemberID))
	}
	slices.Sort(members)
	round := m.person(r.LeaderID) + " of " + strings.Join(members, ", ")
	if was := m.rounds[r.Generation]; was != "" && was != round {
		m.t.Errorf("generation %d was told as %s and as %s", r.Generation, was, round)
	}
	m.rounds[r.Generation] = round
}

func showRequest(body kmsg.Request) string {
	text := fmt.Sprintf("%T", body)
	switch r := body.(type) {
	case *kmsg.OffsetCommitRequest:
		return fmt.Sprintf("commit %s %d, generation %d", r.Group, r.Topics[0].Partitions[0].Offset, r.Generation)
	case *kmsg.JoinGroupRequest:
		return fmt.Sprintf("join %q", r.MemberID)
	case *kmsg.SyncGroupRequest:
		return fmt.Sprintf("sync %q, generation %d", r.MemberID, r.Generation)
	}
	return strings.TrimPrefix(text, "*kmsg.")
}

func showAnswer(response kmsg.Response) string {
	a := &answer{response: response, calls: 1}
	switch r := response.(type) {
	case *kmsg.OffsetFetchResponse:
		return fmt.Sprintf("%+v", r.Groups[0])
	case *kmsg.JoinGroupResponse:
		return fmt.Sprintf("%v, member %s, leader %s", a, r.MemberID, r.LeaderID)
	}
	return a.String()
}
