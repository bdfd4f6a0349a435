package group

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// TestScripts runs testdata. In a script, time stands still but for "tick D"; member ids are made of the client id, which
// is the connection's name, and a number that counts the requests. The directives:
//
//	config initial=3s max-size=2 retention=1h      begins anew with other settings
//	settings max-size=1                            the settings of the next replica that takes over
//	step                                           a line for each request: CONNECTION VERB vVERSION KEY=VALUE …
//	tick D                                         time passes; timers fire when they are due
//	failover [undo=N]                              another replica takes over (the last N Steps and Ticks undone)
//	topics orders:3/2                              the topic has three partitions, and its second id; "-name": gone
//	blind                                          from now on the upstream cannot be asked
//	rearm, deadline                                State.Rearm, State.Deadline
//	state                                          groups, members, offsets, sessions
//
// The answer of a step is its records and replies. A line "c1 again" sends the last request of c1 once more, with its
// ordinal, as a sidecar does after a failover; "c1 again 2" the one before.
func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/scripts", func(t *testing.T, path string) {
		s := &scripted{world: newWorld(t, scriptConfig())}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s.t = t
			return s.directive(d)
		})
	})
}

func scriptConfig() Config {
	cfg := DefaultConfig()
	cfg.InitialRebalanceDelay = 0
	return cfg
}

type scripted struct {
	*world
	sent map[string][]sent // by connection
}

type sent struct {
	text    string
	ordinal uint64
}

func (s *scripted) directive(d *datadriven.TestData) string {
	var out strings.Builder
	took := func(e Effects) { s.write(&out, e) }
	switch d.Cmd {
	case "config":
		s.world = newWorld(s.t, s.config(d))
	case "settings":
		s.cfg = s.config(d)
	case "step":
		for _, line := range strings.Split(d.Input, "\n") {
			took(s.line(strings.TrimSpace(line)))
			s.checkParked()
		}
	case "tick":
		by, err := time.ParseDuration(d.CmdArgs[0].Key)
		if err != nil {
			d.Fatalf(s.t, "%v", err)
		}
		s.advance(by, took)
		s.checkParked()
	case "failover":
		undo, order := 0, slices.Sorted(maps.Keys(s.newest))
		d.MaybeScanArgs(s.t, "undo", &undo)
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		took(s.failover(undo, order))
	case "rearm":
		s.state.Rearm(s.now)
	case "topics":
		for _, a := range d.CmdArgs {
			s.topic(a.Key)
		}
	case "blind":
		s.blind = true
	case "deadline":
		at := s.state.Deadline()
		if at.IsZero() {
			return "none\n"
		}
		return fmt.Sprintf("in %v\n", at.Sub(s.now))
	case "state":
		s.dump(&out)
	default:
		d.Fatalf(s.t, "unknown directive %s", d.Cmd)
	}
	if out.Len() == 0 {
		return "ok\n"
	}
	return out.String()
}

func (s *scripted) config(d *datadriven.TestData) Config {
	cfg := scriptConfig()
	for _, a := range d.CmdArgs {
		value := a.Vals[0]
		dur, _ := time.ParseDuration(value)
		n, _ := strconv.Atoi(value)
		switch a.Key {
		case "initial":
			cfg.InitialRebalanceDelay = dur
		case "max-size":
			cfg.MaxSize = n
		case "retention":
			cfg.OffsetsRetention = dur
		case "check":
			cfg.OffsetsRetentionCheck = dur
		case "max-sessions":
			cfg.MaxSessions = n
		default:
			d.Fatalf(s.t, "unknown setting %s", a.Key)
		}
	}
	return cfg
}

func (s *scripted) topic(arg string) {
	if name, gone := strings.CutPrefix(arg, "-"); gone {
		delete(s.topics, name)
		return
	}
	name, rest, _ := strings.Cut(arg, ":")
	partitions, generation, _ := strings.Cut(rest, "/")
	n, _ := strconv.Atoi(partitions)
	g, _ := strconv.Atoi(generation)
	s.topics.add(name, int32(n), byte(max(1, g)))
}

// line runs one request.
func (s *scripted) line(line string) Effects {
	conn, text, _ := strings.Cut(line, " ")
	ordinal := uint64(0)
	if back, again := strings.CutPrefix(text, "again"); again {
		n, _ := strconv.Atoi(strings.TrimSpace(back))
		all := s.sent[conn]
		before := all[len(all)-max(1, n)]
		text, ordinal = before.text, before.ordinal
	}
	req := parseRequest(s.t, s.topics, text)
	verb, _, _ := strings.Cut(text, " ")
	e := s.step(conn, conn+" "+verb, req, ordinal)
	if s.sent == nil {
		s.sent = map[string][]sent{}
	}
	if ordinal == 0 {
		ordinal = s.ordinals[conn]
	}
	s.sent[conn] = append(s.sent[conn], sent{text, ordinal})
	return e
}

func parseRequest(t testing.TB, topics topicTable, text string) kmsg.Request {
	words := strings.Fields(text)
	if len(words) < 2 || words[1][0] != 'v' {
		t.Fatalf("%q is no request", text)
	}
	version, err := strconv.Atoi(words[1][1:])
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	a := arguments{t: t, values: map[string]string{}, topics: topics}
	for _, w := range words[2:] {
		k, v, ok := strings.Cut(w, "=")
		if !ok {
			t.Fatalf("%q: %s has no value", text, w)
		}
		a.values[k] = v
	}
	req := a.request(words[0], version)
	req.SetVersion(int16(version))
	for k := range a.values {
		t.Fatalf("%q: %s is not known", text, k)
	}
	return req
}

// arguments are the KEY=VALUE of a line; what was used is taken out.
type arguments struct {
	t      testing.TB
	values map[string]string
	topics topicTable
}

func (a arguments) str(key, otherwise string) string {
	v, ok := a.values[key]
	if !ok {
		return otherwise
	}
	delete(a.values, key)
	if v == `""` {
		return ""
	}
	if body, ok := strings.CutPrefix(v, "rep("); ok { // rep(x,5000)
		what, n, _ := strings.Cut(strings.TrimSuffix(body, ")"), ",")
		times, _ := strconv.Atoi(n)
		return strings.Repeat(what, times)
	}
	return v
}

func (a arguments) pointer(key string) *string {
	v, ok := a.values[key]
	if !ok || v == "null" {
		delete(a.values, key)
		return nil
	}
	v = a.str(key, "")
	return &v
}

func (a arguments) millis(key string, otherwise time.Duration) int32 {
	v, ok := a.values[key]
	if !ok {
		return millis(otherwise)
	}
	delete(a.values, key)
	d, err := time.ParseDuration(v)
	if err != nil {
		a.t.Fatal(err)
	}
	return millis(d)
}

func (a arguments) number(key string, otherwise int32) int32 {
	n, err := strconv.ParseInt(a.str(key, strconv.Itoa(int(otherwise))), 10, 32)
	if err != nil {
		a.t.Fatal(err)
	}
	return int32(n)
}

// list splits at commas that are not in parentheses; nil if the key is absent or null.
func (a arguments) list(key string) []string {
	v, ok := a.values[key]
	delete(a.values, key)
	if !ok || v == "null" {
		return nil
	}
	items, depth, from := []string{}, 0, 0
	for i, r := range v {
		switch {
		case r == '(':
			depth++
		case r == ')':
			depth--
		case r == ',' && depth == 0:
			items, from = append(items, v[from:i]), i+1
		}
	}
	if from < len(v) {
		items = append(items, v[from:])
	}
	return items
}

// metadata is the text itself, sub(orders,payments) a consumer's subscription, or rep(x,9).
func (a arguments) metadata(v string) []byte {
	if topics, ok := strings.CutPrefix(v, "sub("); ok {
		m := kmsg.NewConsumerMemberMetadata()
		m.Version = 1
		m.Topics = strings.Split(strings.TrimSuffix(topics, ")"), ",")
		return m.AppendTo(nil)
	}
	if v == "garbage" { // a topic count, and nothing after it
		return []byte{0, 1, 0x7f, 0xff, 0xff, 0xff}
	}
	return []byte(arguments{values: map[string]string{"": v}}.str("", ""))
}

func (a arguments) topic(text string) (name string, id [16]byte, rest string) {
	name, rest, _ = strings.Cut(text, "/")
	name = string(a.metadata(name))
	id = a.topics[name].id
	return name, id, rest
}

func (a arguments) request(verb string, version int) kmsg.Request {
	group := func() string { return a.str("group", "g") }
	switch verb {
	case "join":
		r := kmsg.NewPtrJoinGroupRequest()
		r.Group, r.MemberID, r.InstanceID = group(), a.str("member", ""), a.pointer("instance")
		r.SessionTimeoutMillis, r.RebalanceTimeoutMillis = a.millis("session", 10*time.Second), a.millis("rebalance", time.Minute)
		r.ProtocolType = a.str("type", consumerType)
		if _, ok := a.values["protocols"]; !ok {
			a.values["protocols"] = "range:A"
		}
		for _, p := range a.list("protocols") {
			name, m, _ := strings.Cut(p, ":")
			r.Protocols = append(r.Protocols, kmsg.JoinGroupRequestProtocol{Name: string(a.metadata(name)), Metadata: a.metadata(m)})
		}
		return r
	case "sync":
		r := kmsg.NewPtrSyncGroupRequest()
		r.Group, r.MemberID, r.InstanceID, r.Generation = group(), a.str("member", ""), a.pointer("instance"), a.number("generation", -1)
		r.ProtocolType, r.Protocol = a.pointer("type"), a.pointer("protocol")
		for _, p := range a.list("assign") {
			id, m, _ := strings.Cut(p, ":")
			r.GroupAssignment = append(r.GroupAssignment, kmsg.SyncGroupRequestGroupAssignment{MemberID: id, MemberAssignment: a.metadata(m)})
		}
		return r
	case "heartbeat":
		r := kmsg.NewPtrHeartbeatRequest()
		r.Group, r.MemberID, r.InstanceID, r.Generation = group(), a.str("member", ""), a.pointer("instance"), a.number("generation", -1)
		return r
	case "leave":
		r := kmsg.NewPtrLeaveGroupRequest()
		r.Group, r.MemberID = group(), a.str("member", "")
		for _, m := range a.list("members") { // id, id@instance, @instance
			id, instance, static := strings.Cut(m, "@")
			l := kmsg.LeaveGroupRequestMember{MemberID: id}
			if static {
				l.InstanceID = &instance
			}
			r.Members = append(r.Members, l)
		}
		return r
	case "commit":
		return a.commit(version)
	case "fetch":
		return a.fetch(version)
	case "offsetdelete":
		return a.offsetDelete()
	case "list":
		r := kmsg.NewPtrListGroupsRequest()
		r.StatesFilter, r.TypesFilter = a.list("states"), a.list("types")
		return r
	case "describe":
		r := kmsg.NewPtrDescribeGroupsRequest()
		r.Groups, r.IncludeAuthorizedOperations = a.list("groups"), a.str("operations", "") == "true"
		return r
	case "delete":
		r := kmsg.NewPtrDeleteGroupsRequest()
		r.Groups = a.list("groups")
		return r
	}
	a.t.Fatalf("unknown verb %s", verb)
	return nil
}

func (a arguments) offsetDelete() kmsg.Request {
	r := kmsg.NewPtrOffsetDeleteRequest()
	r.Group = a.str("group", "g")
	for _, t := range a.list("topics") {
		name, _, rest := a.topic(t)
		topic := kmsg.OffsetDeleteRequestTopic{Topic: name}
		for _, p := range partitionsOf(a.t, rest) {
			topic.Partitions = append(topic.Partitions, kmsg.OffsetDeleteRequestTopicPartition{Partition: p})
		}
		r.Topics = append(r.Topics, topic)
	}
	return r
}

func (a arguments) commit(version int) kmsg.Request {
	r := kmsg.NewPtrOffsetCommitRequest()
	r.Group, r.MemberID, r.InstanceID, r.Generation = a.str("group", "g"), a.str("member", ""), a.pointer("instance"), a.number("generation", -1)
	if version >= 2 && version <= 4 {
		r.RetentionTimeMillis = int64(a.number("retention", -1))
	}
	for _, o := range a.list("offsets") { // topic/partition:offset@epoch:metadata
		name, id, rest := a.topic(o)
		at, value, _ := strings.Cut(rest, ":")
		value, metadata, has := strings.Cut(value, ":")
		offset, epoch, _ := strings.Cut(value, "@")
		p := kmsg.NewOffsetCommitRequestTopicPartition()
		p.Partition = partitionsOf(a.t, at)[0]
		p.Offset, _ = strconv.ParseInt(offset, 10, 64)
		if e, err := strconv.Atoi(epoch); err == nil {
			p.LeaderEpoch = int32(e)
		}
		if has {
			m := string(a.metadata(metadata))
			p.Metadata = &m
		}
		t := kmsg.OffsetCommitRequestTopic{Topic: name}
		if version >= 10 {
			t = kmsg.OffsetCommitRequestTopic{TopicID: id}
		}
		t.Partitions = append(t.Partitions, p)
		r.Topics = append(r.Topics, t)
	}
	return r
}

func (a arguments) fetch(version int) kmsg.Request {
	r := kmsg.NewPtrOffsetFetchRequest()
	group := a.str("group", "g")
	r.RequireStable = a.str("stable", "") == "true"
	g := kmsg.NewOffsetFetchRequestGroup()
	g.Group = group
	if v, ok := a.values["topics"]; ok && v != "null" {
		g.Topics, r.Topics = []kmsg.OffsetFetchRequestGroupTopic{}, []kmsg.OffsetFetchRequestTopic{}
	}
	for _, text := range a.list("topics") {
		name, id, rest := a.topic(text)
		gt := kmsg.OffsetFetchRequestGroupTopic{Topic: name, Partitions: partitionsOf(a.t, rest)}
		if version >= 10 {
			gt.Topic, gt.TopicID = "", id
		}
		g.Topics = append(g.Topics, gt)
		r.Topics = append(r.Topics, kmsg.OffsetFetchRequestTopic{Topic: name, Partitions: gt.Partitions})
	}
	if version >= 8 {
		r.Topics = nil
		r.Groups = append(r.Groups, g)
		for _, other := range a.list("and") { // groups besides, of which all offsets are asked for
			o := kmsg.NewOffsetFetchRequestGroup()
			o.Group = other
			r.Groups = append(r.Groups, o)
		}
	} else {
		r.Group = group
	}
	return r
}

func partitionsOf(t testing.TB, text string) (list []int32) {
	for _, p := range strings.Split(text, "+") {
		if n, err := strconv.Atoi(p); err == nil {
			list = append(list, int32(n))
		} else if p != "" {
			t.Fatalf("partition %q", p)
		}
	}
	return list
}

func errName(code int16) string {
	if e := kerr.TypedErrorForCode(code); e != nil {
		return e.Message
	}
	return "NONE"
}
