package group

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// A sorted list is one whatever is put in or taken out where, and no chunk of it is empty or above its limit.
func TestASortedListStaysSorted(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, next := range []func(i int) int32{
		func(i int) int32 { return int32(i) },
		func(i int) int32 { return int32(-i) },
		func(i int) int32 { return int32(i*7919) % 5003 },
		func(int) int32 { return int32(r.IntN(4000)) },
	} {
		var list topicOffsets
		model := map[int32]byte{}
		for i := range 12_000 {
			n := next(i % 5000)
			p, found := list.find(n)
			if _, there := model[n]; there != found {
				t.Fatalf("%d: found %v", n, found)
			}
			switch {
			case found && (i >= 5000 || i%3 == 0):
				list.list.remove(p)
				delete(model, n)
			case found:
				list.list.at(p).value = []byte{byte(i)}
				model[n] = byte(i)
			default:
				list.list.insert(p, partitionOffset{n, []byte{byte(i)}})
				model[n] = byte(i)
			}
			if i%500 == 0 || len(model) < 3 {
				checkSorted(t, &list.list, model)
			}
		}
	}
}

func checkSorted(t *testing.T, l *sorted[partitionOffset], model map[int32]byte) {
	t.Helper()
	n, last := 0, int64(math.MinInt64)
	for e := range l.all() {
		if v, there := model[e.partition]; !there || v != e.value[0] || int64(e.partition) <= last {
			t.Fatalf("%d: %d after %d", e.partition, e.value, last)
		}
		n, last = n+1, int64(e.partition)
	}
	if n != len(model) || l.empty() != (n == 0) {
		t.Fatalf("%d elements, not %d", n, len(model))
	}
	if l.rest != nil {
		for _, c := range append(*l.rest, l.head) {
			if len(c) == 0 || len(c) > maxChunk {
				t.Fatalf("a chunk of %d", len(c))
			}
		}
	}
}

// Whoever names more topics than the upstream is asked for at once has the rest judged by what is known.
func TestTheUpstreamIsAskedForSoManyTopics(t *testing.T) {
	byName, byID := commitOf("g", "orders", 0), commitOf("g", "orders", 0)
	byID.Version = 10
	for i := range 3 * maxAsked {
		topic := kmsg.OffsetCommitRequestTopic{Topic: fmt.Sprint("t", i/2), TopicID: [16]byte{1, byte(i), byte(i >> 8)}}
		byName.Topics, byID.Topics = append(byName.Topics, topic), append(byID.Topics, topic)
	}
	w := newWorld(t, scriptConfig())
	if names, _ := w.state.UnknownTopics(byName, w.topics); len(names) != maxAsked || names[1] != "t1" {
		t.Errorf("%d names", len(names))
	}
	if _, ids := w.state.UnknownTopics(byID, w.topics); len(ids) != maxAsked {
		t.Errorf("%d ids", len(ids))
	}
}

// Ids that are handed out are forgotten once there are too many, the oldest first; a join that is sent again gets its
// id again.
func TestPendingMemberIDsAreBounded(t *testing.T) {
	s, now := NewState(scriptConfig()), time.Now()
	s.Activate(now, 1)
	join := kmsg.NewPtrJoinGroupRequest()
	join.Version, join.Group, join.ProtocolType, join.SessionTimeoutMillis = 4, "g", "consumer", 10_000
	join.Protocols = []kmsg.JoinGroupRequestProtocol{{Name: "range"}}
	give := func(ordinal int, id string) string {
		c := Client{ID: "c", Session: Session{1}, Ordinal: uint64(ordinal)}
		e := s.Step(now, Input{Call: 1, Request: join, Client: c, NewID: id})
		return e.Replies[0].Response.(*kmsg.JoinGroupResponse).MemberID
	}
	for i := range 3 * maxPending {
		if got, want := give(i+1, fmt.Sprint(i)), fmt.Sprint("c-", i); got != want {
			t.Fatalf("%s, not %s", got, want)
		}
	}
	c := s.groups["g"].live
	if n := len(c.pending); n > maxPending || n < maxPending/2 || len(c.origins) != n || len(s.timers.heap) != n+1 {
		t.Errorf("%d ids are pending, of %d requests, with %d timers", n, len(c.origins), len(s.timers.heap))
	}
	if c.pending["c-0"] != nil || c.pending[fmt.Sprint("c-", 3*maxPending-1)] == nil {
		t.Error("those kept are not the newest")
	}
	if got := give(3*maxPending, "other"); got != fmt.Sprint("c-", 3*maxPending-1) {
		t.Errorf("sent again, it gets %s", got)
	}
}

// A client id that leaves no room in a member id.
func TestAMemberIDCanBeTold(t *testing.T) {
	for length, want := range map[int]string{32_000: "MEMBER_ID_REQUIRED", 32_731: "INVALID_REQUEST", math.MaxInt16: "INVALID_REQUEST"} {
		w := newWorld(t, scriptConfig())
		e := w.step(strings.Repeat("x", length), "join", parseRequest(t, w.topics, "join v4"), 0)
		resp := e.Replies[0].Response.(*kmsg.JoinGroupResponse)
		if got := errName(resp.ErrorCode); got != want || len(resp.MemberID) > maxString {
			t.Errorf("%d bytes: %s, an id of %d", length, got, len(resp.MemberID))
		}
	}
}

// What a thousand members write that leave one by one is small.
func TestDeparturesAreSmall(t *testing.T) {
	w, members := crowd(t, 1000)
	written := 0
	for _, id := range members[:999] {
		l := kmsg.NewPtrLeaveGroupRequest()
		l.Version, l.Group, l.Members = 3, "g", []kmsg.LeaveGroupRequestMember{{MemberID: id}}
		e := w.state.Step(w.now, Input{Call: 1, Request: l})
		for _, r := range e.Records {
			written += len(r.Value)
		}
	}
	if written > 256<<10 {
		t.Errorf("%d bytes of records", written)
	}
	w.state.Deactivate()
	w.state.Activate(w.now, 9)
	if c := w.state.groups["g"].live; len(c.members) != 1 || c.members[0].id != members[999] || c.state != preparingRebalance {
		t.Errorf("after a failover %d members, %s", len(c.members), c.state)
	}
}

// crowd is a group whose members have joined once.
func crowd(t *testing.T, n int) (w *world, ids []string) {
	w = newWorld(t, scriptConfig())
	for i := range n {
		join := parseRequest(t, w.topics, "join v3 session=30s protocols=range:rep(A,100)")
		w.state.Step(w.now, Input{Call: uint64(i + 1), Request: join, Client: Client{ID: "c", Host: "/h"}, NewID: fmt.Sprint(i)})
		ids = append(ids, fmt.Sprint("c-", i))
	}
	w.state.Tick(w.now)
	return w, ids
}

// A request that names one partition again and again gets one copy of its metadata, and an error where the response
// would be huge.
func TestOffsetFetchKeepsItsMeasure(t *testing.T) {
	w := newWorld(t, scriptConfig())
	w.step("c1", "commit", parseRequest(t, w.topics, "commit v9 offsets=orders/0:5:rep(m,4096)"), 0)
	w.step("c1", "commit", parseRequest(t, w.topics, "commit v9 group=h offsets=orders/0:7"), 0)
	fetch := func(version int16, n int, groups ...string) *kmsg.OffsetFetchResponse {
		r := kmsg.NewPtrOffsetFetchRequest()
		r.Version, r.Group = version, groups[0]
		r.Topics = []kmsg.OffsetFetchRequestTopic{{Topic: "orders", Partitions: make([]int32, n)}}
		for _, g := range groups {
			rg := kmsg.OffsetFetchRequestGroup{Group: g}
			if n > 0 {
				rg.Topics = []kmsg.OffsetFetchRequestGroupTopic{{Topic: "orders", Partitions: make([]int32, n)}}
			}
			r.Groups = append(r.Groups, rg)
		}
		return w.step("c1", "fetch", r, 0).Replies[0].Response.(*kmsg.OffsetFetchResponse)
	}
	all := fetch(8, 1000, "g").Groups[0].Topics[0].Partitions
	if len(all) != 1000 || len(*all[0].Metadata) != 4096 || all[0].Metadata != all[999].Metadata {
		t.Error("the metadata is not one copy")
	}
	if resp := fetch(7, 20_000, "g"); errName(resp.ErrorCode) != "UNKNOWN_SERVER_ERROR" || len(resp.Topics) > 0 {
		t.Errorf("v7: %s", errName(resp.ErrorCode))
	}
	resp := fetch(8, 10_000, "g", "g", "h") // each below the measure, the first two above it
	var codes []string
	for _, g := range resp.Groups {
		codes = append(codes, errName(g.ErrorCode))
	}
	if want := []string{"NONE", "UNKNOWN_SERVER_ERROR", "NONE"}; !slices.Equal(codes, want) {
		t.Errorf("v8: %s", codes)
	}
	whole := fetch(8, 0, slices.Repeat([]string{"g"}, 20_000)...).Groups
	if &whole[0].Topics[0] != &whole[9000].Topics[0] || whole[9000].ErrorCode != 0 {
		t.Error("a group that is asked for again is put together again")
	}
	if last := whole[19_999]; errName(last.ErrorCode) != "UNKNOWN_SERVER_ERROR" || len(last.Topics) > 0 {
		t.Errorf("all offsets again and again: %s", errName(last.ErrorCode))
	}
}

func TestDescribeGroupsKeepsItsMeasure(t *testing.T) {
	w, _ := crowd(t, 100)
	r := kmsg.NewPtrDescribeGroupsRequest()
	r.Version, r.Groups = 5, slices.Repeat([]string{"g"}, 20_000)
	groups := w.state.Step(w.now, Input{Call: 9999, Request: r}).Replies[0].Response.(*kmsg.DescribeGroupsResponse).Groups
	if &groups[0].Members[0] != &groups[1].Members[0] {
		t.Error("a group that is asked for again is put together again")
	}
	if last := groups[19_999]; last.Group != "g" || errName(last.ErrorCode) != "UNKNOWN_SERVER_ERROR" || len(last.Members) > 0 {
		t.Errorf("again and again: %s with %d members", errName(last.ErrorCode), len(last.Members))
	}
}

// Protocols that are not chosen take memory, too.
func TestTheProtocolsOfAGroupAreBounded(t *testing.T) {
	w := newWorld(t, scriptConfig())
	join := kmsg.NewPtrJoinGroupRequest()
	join.Version, join.Group, join.ProtocolType, join.SessionTimeoutMillis = 3, "g", "consumer", 10_000
	for i := range 100 {
		join.Protocols = append(join.Protocols, kmsg.JoinGroupRequestProtocol{Name: fmt.Sprint("p", i), Metadata: make([]byte, 20_000)})
	}
	var codes []string
	for i := range 5 {
		for _, r := range w.step(fmt.Sprint("c", i), "join", join, 0).Replies {
			codes = append(codes, errName(r.Response.(*kmsg.JoinGroupResponse).ErrorCode))
		}
	}
	if want := []string{"UNKNOWN_SERVER_ERROR", "UNKNOWN_SERVER_ERROR"}; !slices.Equal(codes, want) || len(w.state.groups["g"].live.members) != 3 {
		t.Errorf("%s, %d members", codes, len(w.state.groups["g"].live.members))
	}
}

// A sweep makes way within a group as well, and goes on where it stopped, whatever comes in between.
func TestASweepMakesWayWithinAGroup(t *testing.T) {
	cfg := scriptConfig()
	cfg.OffsetsRetention = time.Hour
	w := newWorld(t, cfg)
	w.topics.add("orders", math.MaxInt32, 1)
	r := commitOf("g", "orders", 0)
	for i := range 3*sweepRecords - 1 {
		p := r.Topics[0].Partitions[0]
		p.Partition = int32(2 * (i + 1))
		r.Topics[0].Partitions = append(r.Topics[0].Partitions, p)
	}
	w.state.Step(w.now, Input{Call: 1, Request: r, Topics: w.topics})
	w.now = w.now.Add(2 * time.Hour)
	var sizes []int
	for w.state.Deadline().Compare(w.now) <= 0 {
		sizes = append(sizes, len(w.state.Tick(w.now).Records))
		other := commitOf("a", "orders", int32(len(sizes)))
		w.state.Step(w.now, Input{Call: 1, Request: other, Topics: w.topics})
	}
	if want := []int{sweepRecords, sweepRecords, sweepRecords}; !slices.Equal(sizes, want) {
		t.Errorf("tombstones come in %v, not %v", sizes, want)
	}
	if g := w.state.groups["g"]; g != nil {
		t.Error("the group is left")
	}
	// One that has nothing expired is looked at in pieces, too.
	w.state.Step(w.now, Input{Call: 1, Request: r, Topics: w.topics})
	if looked, all := w.state.expireGroup(w.state.groups["g"], sweepRecords); looked != sweepRecords || all {
		t.Errorf("looked at %d, all: %v", looked, all)
	}
	if looked, all := w.state.expireGroup(w.state.groups["g"], 9*sweepRecords); looked != 2*sweepRecords || !all {
		t.Errorf("then at %d, all: %v", looked, all)
	}
}

// No timer fires twice in a Tick, however short its time is.
func TestATickEnds(t *testing.T) {
	cfg := scriptConfig()
	cfg.OffsetsRetentionCheck = -time.Second
	w := newWorld(t, cfg)
	w.state.Tick(w.now)
	if w.state.Deadline().Before(w.now) {
		t.Errorf("due %v", w.state.Deadline())
	}
}
