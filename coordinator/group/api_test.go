package group

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// versions are the apis and versions that the core answers.
var versions = map[int16][2]int16{8: {2, 10}, 9: {1, 10}, 11: {0, 9}, 12: {0, 4}, 13: {0, 5}, 14: {0, 5}, 15: {0, 6}, 16: {0, 5}, 42: {0, 2}, 47: {0, 0}}

// Each api in each version has a response of its own version, for an error of the whole request and for a request in
// which nothing is set: nothing that may be null is looked into.
func TestEveryVersionIsAnswered(t *testing.T) {
	for key, span := range versions {
		for v := span[0]; v <= span[1]; v++ {
			req := kmsg.RequestForKey(key)
			req.SetVersion(v)
			if resp := ErrorResponse(req, 15); resp.GetVersion() != v || resp.Key() != key {
				t.Errorf("%s v%d: %T v%d", kmsg.NameForKey(key), v, resp, resp.GetVersion())
			}
			w := newWorld(t, scriptConfig())
			e := w.step("c1", fmt.Sprint(key), req, 0)
			if len(e.Replies) != 1 || e.Replies[0].Response.GetVersion() != v {
				t.Errorf("%s v%d: %+v", kmsg.NameForKey(key), v, e.Replies)
				continue
			}
			body := e.Replies[0].Response.AppendTo(nil)
			if err := req.ResponseKind().ReadFrom(body); err != nil {
				t.Errorf("%s v%d: %v", kmsg.NameForKey(key), v, err)
			}
		}
	}
}

func TestErrorsHaveTheShapeOfTheirApi(t *testing.T) {
	topics := topicTable{}
	for text, want := range map[string]string{
		"join v9 member=m":                       "COORDINATOR_NOT_AVAILABLE member=",
		"sync v5 type=consumer protocol=range":   "COORDINATOR_NOT_AVAILABLE",
		"heartbeat v4":                           "COORDINATOR_NOT_AVAILABLE",
		"leave v5 members=a,b":                   "COORDINATOR_NOT_AVAILABLE",
		"commit v9 offsets=orders/0:1,audit/1:2": "orders/0 COORDINATOR_NOT_AVAILABLE, audit/1 COORDINATOR_NOT_AVAILABLE",
		"fetch v1 topics=orders/0+1":             "NONE {orders/0 -1@-1 COORDINATOR_NOT_AVAILABLE, orders/1 -1@-1 COORDINATOR_NOT_AVAILABLE}",
		"fetch v2 topics=orders/0+1":             "COORDINATOR_NOT_AVAILABLE {}",
		"fetch v8 topics=orders/0+1 and=h":       "g COORDINATOR_NOT_AVAILABLE {} h COORDINATOR_NOT_AVAILABLE {}",
		"offsetdelete v0 topics=orders/0":        "COORDINATOR_NOT_AVAILABLE",
		"list v5":                                "COORDINATOR_NOT_AVAILABLE",
		"describe v6 groups=g,h":                 `g COORDINATOR_NOT_AVAILABLE  type="" protocol=""; h COORDINATOR_NOT_AVAILABLE  type="" protocol=""`,
		"delete v2 groups=g,h":                   "g COORDINATOR_NOT_AVAILABLE, h COORDINATOR_NOT_AVAILABLE",
	} {
		if got := showResponse(ErrorResponse(parseRequest(t, topics, text), 15)); got != want {
			t.Errorf("%s: %s", text, got)
		}
	}
}

// As Kafka's OffsetCommitResponse.Builder has it: an unknown topic is there once, a known one not at all.
func TestTopicsWithoutPartitionsInACommit(t *testing.T) {
	w := newWorld(t, scriptConfig())
	req := commitOf("g", "orders", 0)
	req.Topics[0].Partitions = slices.Repeat(req.Topics[0].Partitions, 3)
	for empty, want := range map[string]int{"nope": 2, "payments": 1} {
		with := *req
		with.Topics = append([]kmsg.OffsetCommitRequestTopic{{Topic: empty}, {Topic: empty}}, req.Topics...)
		e := w.step("c1", "commit", &with, 0)
		if got := e.Replies[0].Response.(*kmsg.OffsetCommitResponse).Topics; len(got) != want {
			t.Errorf("%s: %+v", empty, got)
		}
	}
}

func TestUnknownTopicsAreThoseToAskFor(t *testing.T) {
	topics := topicTable{}
	topics.add("orders", 3, 1)
	missing := topicTable{}
	missing.add("lost", 1, 1)
	missing.add("orders", 3, 1)
	w := newWorld(t, scriptConfig())
	w.topics.add("lost", 1, 1)
	w.step("c1", "commit", parseRequest(t, w.topics, "commit v9 offsets=orders/0:5,lost/0:6"), 0)
	for text, want := range map[string]string{
		"fetch v10 topics=null":                           "[lost]",
		"fetch v9 topics=null":                            "[]",
		"commit v9 offsets=orders/2:1,orders/0:1":         "[]",
		"commit v9 offsets=orders/3:1,nope/0:1,nope/1:1":  "[orders nope]",
		"commit v10 offsets=orders/3:1,lost/0:1,lost/1:1": "[orders] lost",
		"fetch v9 topics=nope/0":                          "[]",
		"fetch v10 topics=lost/0,orders/9,unheard/0":      "[] lost",
		"offsetdelete v0 topics=orders/2,orders/3,nope/0": "[orders nope]",
		"commit v9 offsets=rep(x,250)/0:1":                "[]",
		"join v9":                                         "[]",
	} {
		names, ids := w.state.UnknownTopics(parseRequest(t, missing, text), topics)
		got := fmt.Sprint(names)
		for _, id := range ids {
			got += " " + nameOf("", id)[len("id:"):]
		}
		if got != want {
			t.Errorf("%s: %s, not %s", text, got, want)
		}
	}
}

// While the upstream cannot be asked, a topic id is looked up in the group's own commits.
func TestTopicIDsAreRememberedWhileTheUpstreamIsDown(t *testing.T) {
	w := newWorld(t, scriptConfig())
	all := w.topics
	w.step("c1", "commit", parseRequest(t, all, "commit v9 offsets=orders/0:5"), 0)
	w.topics, w.blind = topicTable{}, true
	e := w.step("c1", "all", parseRequest(t, all, "fetch v10 topics=null"), 0)
	if got := showResponse(e.Replies[0].Response); got != "g NONE {id:orders/0 5@-1}" { // else it would be left out
		t.Errorf("all offsets: %s", got)
	}
	for text, want := range map[string]string{
		"fetch v10 topics=orders/0,audit/0": "g NONE {id:orders/0 5@-1, id:audit/0 -1@-1 UNKNOWN_TOPIC_ID}",
		"commit v10 offsets=orders/1:6":     "id:orders/1 NONE",
		"commit v10 offsets=audit/0:6":      "id:audit/0 UNKNOWN_TOPIC_ID",
		"offsetdelete v0 topics=orders/2":   "NONE, orders/2 NONE",
	} {
		e := w.step("c1", text, parseRequest(t, all, text), 0)
		if got := showResponse(e.Replies[0].Response); got != want {
			t.Errorf("%s: %s", text, got)
		}
	}
}

// A session's map covers 64 ordinals; what is older is long answered.
func TestSessionsRememberSixtyFourOrdinals(t *testing.T) {
	var v sessionState
	for _, n := range []uint64{1, 2, 5, 64} {
		v = v.with(n)
	}
	if !v.has(1) || !v.has(2) || v.has(3) || !v.has(5) || !v.has(64) || v.has(65) || v.has(0) {
		t.Errorf("%+v", v)
	}
	v = v.with(65).with(3)
	if v.has(1) || !v.has(2) || !v.has(3) || v.has(4) || !v.has(65) {
		t.Errorf("%+v", v)
	}
	if v = v.with(1000); v.has(65) || !v.has(1000) || v.done != 1 {
		t.Errorf("%+v", v)
	}
	if before := v; v.with(2) != before {
		t.Error("an ordinal that is too old changes nothing")
	}
}

// A sweep makes way for requests: what is due is done in pieces, each due at once.
func TestASweepMakesWay(t *testing.T) {
	cfg := scriptConfig()
	cfg.OffsetsRetention = time.Hour
	w := newWorld(t, cfg)
	now := w.now
	for i := range 3 * sweepRecords {
		w.state.Step(now, Input{Call: 1, Request: commitOf(fmt.Sprint("g", i), "orders", 0), Topics: w.topics})
	}
	now = now.Add(2 * time.Hour)
	var sizes []int
	for w.state.Deadline().Compare(now) <= 0 {
		sizes = append(sizes, len(w.state.Tick(now).Records))
	}
	if want := []int{sweepRecords, sweepRecords, sweepRecords}; !slices.Equal(sizes, want) {
		t.Errorf("tombstones come in %v, not %v", sizes, want)
	}
	if len(w.state.groups) > 0 {
		t.Errorf("%d groups are left", len(w.state.groups))
	}
}
