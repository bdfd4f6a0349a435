package wire_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

// ours is where this test's clients reach the brokers 0 to 99.
func ours(id int32) (string, int32, bool) { return "127.0.0.1", 19093 + id, id >= 0 && id < 100 }

// theirs gives back the addresses that the upstream has named itself.
func theirs(endpoints []wire.Endpoint) wire.Advertise {
	return func(id int32) (string, int32, bool) {
		for _, e := range endpoints {
			if e.ID == id {
				return e.Host, e.Port, true
			}
		}
		return "", 0, false
	}
}

// hosts are the upstream's, of different lengths: the last one's needs a varint of two bytes.
var hosts = []string{"broker-1.example.org", "10.0.0.2", strings.Repeat("long.", 50) + "example.org"}

var rack = kmsg.StringPtr("rack-a")

// unknownTags are tags that nobody knows.
func unknownTags() (tags kmsg.Tags) {
	tags.Set(7, []byte("unknown"))
	return tags
}

// replies gives replies of each rewritten kind, full of everything and empty.
func replies(key int16) []kmsg.Response {
	switch key {
	case 0:
		return produceReplies()
	case 3:
		full := kmsg.NewPtrMetadataResponse()
		full.ClusterID, full.UnknownTags = kmsg.StringPtr("cluster"), unknownTags()
		for i, host := range hosts {
			b := kmsg.NewMetadataResponseBroker()
			b.NodeID, b.Host, b.Port = int32(i), host, 9092
			if i == 1 {
				b.Rack, b.UnknownTags = rack, unknownTags()
			}
			full.Brokers = append(full.Brokers, b)
		}
		t := kmsg.NewMetadataResponseTopic()
		t.Topic = kmsg.StringPtr("topic")
		t.Partitions = append(t.Partitions, kmsg.NewMetadataResponseTopicPartition())
		full.Topics = append(full.Topics, t)
		return []kmsg.Response{full, kmsg.NewPtrMetadataResponse()}
	case 10:
		full := kmsg.NewPtrFindCoordinatorResponse()
		full.NodeID, full.Host, full.Port, full.ErrorMessage = 1, hosts[2], 9092, kmsg.StringPtr("NONE")
		for i, host := range append(hosts[:3:3], "") {
			c := kmsg.NewFindCoordinatorResponseCoordinator()
			c.Key, c.NodeID, c.Host, c.Port = "key", int32(i), host, 9092
			if host == "" {
				c.NodeID, c.Port, c.ErrorCode = -1, -1, 15
			}
			full.Coordinators = append(full.Coordinators, c)
		}
		failed := kmsg.NewPtrFindCoordinatorResponse()
		failed.NodeID, failed.Port, failed.ErrorCode = -1, -1, 15
		return []kmsg.Response{full, failed}
	case 60:
		full := kmsg.NewPtrDescribeClusterResponse()
		full.ClusterID = "cluster"
		for i, host := range hosts {
			b := kmsg.NewDescribeClusterResponseBroker()
			b.NodeID, b.Host, b.Port, b.IsFenced = int32(i), host, 9092, i == 2
			if i == 1 {
				b.Rack = rack
			}
			full.Brokers = append(full.Brokers, b)
		}
		return []kmsg.Response{full, kmsg.NewPtrDescribeClusterResponse()}
	}
	panic("no such key")
}

func produceReplies() []kmsg.Response {
	full := kmsg.NewPtrProduceResponse()
	for i, host := range hosts {
		t := kmsg.NewProduceResponseTopic()
		t.Topic, t.TopicID = "topic", [16]byte{1, byte(i)}
		p := kmsg.NewProduceResponseTopicPartition()
		p.ErrorCode, p.ErrorMessage, p.UnknownTags = 6, kmsg.StringPtr("moved"), unknownTags()
		p.CurrentLeader.LeaderID, p.CurrentLeader.LeaderEpoch = int32(i), 9
		p.ErrorRecords = append(p.ErrorRecords, kmsg.NewProduceResponseTopicPartitionErrorRecord())
		t.Partitions = append(t.Partitions, p, kmsg.NewProduceResponseTopicPartition())
		full.Topics = append(full.Topics, t)
		b := kmsg.NewProduceResponseBroker()
		b.NodeID, b.Host, b.Port = int32(i), host, 9092
		if i == 1 {
			b.Rack, b.UnknownTags = rack, unknownTags()
		}
		full.Brokers = append(full.Brokers, b)
	}
	one := kmsg.NewPtrProduceResponse() // ends in a zero byte although it names a broker
	one.Brokers = full.Brokers[:1]
	tail := kmsg.NewPtrProduceResponse()
	tail.Brokers, tail.UnknownTags = full.Brokers[:2], unknownTags()
	return []kmsg.Response{full, one, tail, kmsg.NewPtrProduceResponse()}
}

// moved does to a decoded reply what RewriteResponse does to its bytes.
func moved(resp kmsg.Response) kmsg.Response {
	move := func(id int32, host *string, port *int32) {
		if *host != "" {
			*host, *port, _ = ours(id)
		}
	}
	switch r := resp.(type) {
	case *kmsg.ProduceResponse:
		for i := range r.Brokers {
			move(r.Brokers[i].NodeID, &r.Brokers[i].Host, &r.Brokers[i].Port)
		}
	case *kmsg.MetadataResponse:
		for i := range r.Brokers {
			move(r.Brokers[i].NodeID, &r.Brokers[i].Host, &r.Brokers[i].Port)
		}
	case *kmsg.FindCoordinatorResponse:
		move(r.NodeID, &r.Host, &r.Port)
		for i := range r.Coordinators {
			move(r.Coordinators[i].NodeID, &r.Coordinators[i].Host, &r.Coordinators[i].Port)
		}
	case *kmsg.DescribeClusterResponse:
		for i := range r.Brokers {
			move(r.Brokers[i].NodeID, &r.Brokers[i].Host, &r.Brokers[i].Port)
		}
	}
	return resp
}

func eachRewritten(t *testing.T, fn func(key, version int16, frame []byte)) {
	t.Helper()
	for _, key := range []int16{0, 3, 10, 60} {
		newest, known := wire.MaxRewritten(key)
		if !known {
			t.Fatalf("api key %d is not rewritten", key)
		}
		for version := int16(0); version <= newest; version++ {
			for _, resp := range replies(key) {
				fn(key, version, response(resp, version))
			}
		}
	}
	for _, f := range fixtures(t) {
		if _, known := wire.MaxRewritten(f.key); known && f.response {
			fn(f.key, f.version, f.frame)
		}
	}
}

func TestAddressesBecomeOursAndNothingElseChanges(t *testing.T) {
	eachRewritten(t, func(key, version int16, frame []byte) {
		kept := bytes.Clone(frame)
		got, err := wire.RewriteResponse(key, version, frame, ours)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(frame, kept) {
			t.Fatalf("api key %d, version %d: the frame itself was changed", key, version)
		}
		if want := moved(decode(t, key, version, frame)); !reflect.DeepEqual(decode(t, key, version, got), want) {
			t.Errorf("api key %d, version %d: %+v, want %+v", key, version, decode(t, key, version, got), want)
		}
		if bytes.Contains(got, []byte("example.org")) {
			t.Errorf("api key %d, version %d: a real address was relayed", key, version)
		}
	})
}

func TestSameAddressesGiveTheSameBytes(t *testing.T) {
	eachRewritten(t, func(key, version int16, frame []byte) {
		endpoints, err := wire.Endpoints(key, version, frame)
		if err != nil {
			t.Fatal(err)
		}
		got, err := wire.RewriteResponse(key, version, frame, theirs(endpoints))
		if err != nil || !bytes.Equal(got, frame) {
			t.Errorf("api key %d, version %d: %v\n%x\n%x", key, version, err, frame, got)
		}
	})
}

func TestUnknownNodeIsNeverRelayed(t *testing.T) {
	nobody := func(int32) (string, int32, bool) { return "", 0, false }
	eachRewritten(t, func(key, version int16, frame []byte) {
		endpoints, err := wire.Endpoints(key, version, frame)
		if err != nil {
			t.Fatal(err)
		}
		got, err := wire.RewriteResponse(key, version, frame, nobody)
		if len(endpoints) > 0 != errors.Is(err, wire.ErrUnknownNode) || err != nil && got != nil {
			t.Errorf("api key %d, version %d: %v", key, version, err)
		}
	})
}

func TestTruncatedRepliesAreErrors(t *testing.T) {
	eachRewritten(t, func(key, version int16, frame []byte) {
		whole, err := wire.Endpoints(key, version, frame)
		if err != nil {
			t.Fatal(err)
		}
		for cut := range frame {
			some, err := wire.Endpoints(key, version, frame[:cut])
			if err == nil && len(some) != len(whole) {
				t.Fatalf("api key %d, version %d: %d bytes of %d name %d brokers of %d", key, version, cut, len(frame), len(some), len(whole))
			}
		}
	})
}

func TestEndpointsAreTheUpstreamsOwn(t *testing.T) {
	resp := replies(3)[0]
	got, err := wire.Endpoints(3, 13, response(resp, 13))
	if err != nil || len(got) != 3 {
		t.Fatalf("%v, %v", got, err)
	}
	text := fmt.Sprintf("%d %s:%d %v, %d %s:%d %s", got[0].ID, got[0].Host, got[0].Port, got[0].Rack, got[1].ID, got[1].Host, got[1].Port, *got[1].Rack)
	if text != "0 broker-1.example.org:9092 <nil>, 1 10.0.0.2:9092 rack-a" {
		t.Error(text)
	}
}

func TestControllersAreNotBrokers(t *testing.T) {
	resp := replies(60)[0].(*kmsg.DescribeClusterResponse)
	resp.EndpointType = 2
	if got, err := wire.RewriteResponse(60, 2, response(resp, 2), ours); err == nil {
		t.Errorf("controllers' addresses were relayed: %x", got)
	}
}

func TestWhatIsNotKnownIsNotRewritten(t *testing.T) {
	for key, version := range map[int16]int16{0: 14, 3: 14, 10: 7, 60: 3, 1: 12, 9999: 0} {
		if _, err := wire.RewriteResponse(key, version, make([]byte, 100), ours); !errors.Is(err, wire.ErrVersion) {
			t.Errorf("api key %d, version %d: %v", key, version, err)
		}
	}
}

func TestProduceWithoutLeadersIsNotCopied(t *testing.T) {
	resp := kmsg.NewPtrProduceResponse()
	topic := kmsg.NewProduceResponseTopic()
	topic.Topic = "t"
	topic.Partitions = append(topic.Partitions, kmsg.NewProduceResponseTopicPartition())
	resp.Topics = append(resp.Topics, topic)
	frame := response(resp, 12)
	if n := testing.AllocsPerRun(100, func() {
		if got, err := wire.RewriteResponse(0, 12, frame, ours); err != nil || &got[0] != &frame[0] {
			t.Fatal("copied", err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRewriteMetadata(b *testing.B) {
	frame := response(replies(3)[0], 13)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := wire.RewriteResponse(3, 13, frame, ours); err != nil {
			b.Fatal(err)
		}
	}
}

// mayClaimTags says whether somewhere a count of more than 16 million could be read: kmsg counts that many tags although
// they are not there, for longer than a fuzzing process may take.
func mayClaimTags(frame []byte) bool {
	for i := range frame {
		if n, size := binary.Uvarint(frame[i:]); size > 0 && n > 1<<24 && n <= math.MaxUint32 {
			return true
		}
	}
	return false
}

func FuzzRewriteResponse(f *testing.F) {
	for _, key := range []int16{0, 3, 10, 60} {
		newest, _ := wire.MaxRewritten(key)
		for version := int16(0); version <= newest; version++ {
			for _, resp := range replies(key) {
				f.Add(key, version, response(resp, version))
			}
		}
	}
	for _, x := range fixtures(f) {
		if _, known := wire.MaxRewritten(x.key); known && x.response {
			f.Add(x.key, x.version, x.frame)
		}
	}
	f.Fuzz(func(t *testing.T, key, version int16, frame []byte) {
		got, err := wire.RewriteResponse(key, version, frame, ours)
		if err != nil {
			return
		}
		endpoints, err := wire.Endpoints(key, version, got)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		for _, e := range endpoints {
			if host, port, ok := ours(e.ID); !ok || e.Host != host || e.Port != port {
				t.Fatalf("a real address was relayed: %+v", e)
			}
		}
		again, err := wire.RewriteResponse(key, version, got, ours)
		if err != nil || !bytes.Equal(again, got) {
			t.Fatalf("an untouched message changes: %v\n%x\n%x", err, got, again)
		}
		resp := kmsg.ResponseForKey(key)
		resp.SetVersion(version)
		if resp.IsFlexible() && (len(frame) < 5 || frame[4] != 0) {
			return
		}
		header := 4
		if resp.IsFlexible() {
			header = 5
		}
		if resp.IsFlexible() && mayClaimTags(frame) || resp.ReadFrom(frame[header:]) != nil {
			return // what lies behind the addresses is not looked at
		}
		if want := moved(resp); !reflect.DeepEqual(decode(t, key, version, got), want) {
			t.Fatalf("%+v, want %+v", decode(t, key, version, got), want)
		}
	})
}
