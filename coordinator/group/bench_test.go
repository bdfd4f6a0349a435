package group

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// benchTopics is a table of one topic.
type benchTopics struct{}

func (benchTopics) Topic(string) ([16]byte, int32, bool) { return [16]byte{1}, 1 << 20, true }
func (benchTopics) TopicName(id [16]byte) (string, bool) { return "orders", true }
func benchCommit(group string, partition int32) kmsg.Request {
	return commitOf(group, "orders", partition)
}

func commitOf(group, topic string, partition int32) *kmsg.OffsetCommitRequest {
	r := kmsg.NewPtrOffsetCommitRequest()
	r.Version, r.Group, r.Generation = 9, group, -1
	r.Topics = []kmsg.OffsetCommitRequestTopic{{Topic: topic, Partitions: []kmsg.OffsetCommitRequestTopicPartition{
		{Partition: partition, Offset: 123456, LeaderEpoch: 7},
	}}}
	return r
}

// BenchmarkOffsetCommit is one partition a request, of 64 sessions and 100 groups.
func BenchmarkOffsetCommit(b *testing.B) {
	s, now := NewState(DefaultConfig()), time.Now()
	s.Activate(now, 1)
	var requests []kmsg.Request
	for i := range 100 {
		requests = append(requests, benchCommit(fmt.Sprint("group-", i), int32(i%12)))
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		c := Client{ID: "bench", Host: "/127.0.0.1", Session: Session{byte(i % 64)}, Ordinal: uint64(i/64 + 1)}
		e := s.Step(now, Input{Call: uint64(i + 1), Request: requests[i%100], Client: c, Topics: benchTopics{}})
		if len(e.Records) != 2 || len(e.Replies) != 1 {
			b.Fatal("not committed")
		}
	}
}

// BenchmarkOffsetFetch asks for one partition.
func BenchmarkOffsetFetch(b *testing.B) {
	s, now := NewState(DefaultConfig()), time.Now()
	s.Activate(now, 1)
	s.Step(now, Input{Call: 1, Request: benchCommit("g", 3), Topics: benchTopics{}})
	r := kmsg.NewPtrOffsetFetchRequest()
	r.Version = 8
	r.Groups = []kmsg.OffsetFetchRequestGroup{{Group: "g", Topics: []kmsg.OffsetFetchRequestGroupTopic{{Topic: "orders", Partitions: []int32{3}}}}}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		e := s.Step(now, Input{Call: uint64(i + 2), Request: r, Topics: benchTopics{}})
		if e.Replies[0].Response.(*kmsg.OffsetFetchResponse).Groups[0].Topics[0].Partitions[0].Offset != 123456 {
			b.Fatal("not fetched")
		}
	}
}

// BenchmarkHeartbeat is one of a thousand members.
func BenchmarkHeartbeat(b *testing.B) {
	cfg := scriptConfig()
	s, now := NewState(cfg), time.Now()
	s.Activate(now, 1)
	var beats []kmsg.Request
	for i := range 1000 {
		j := kmsg.NewPtrJoinGroupRequest()
		j.Version, j.Group, j.ProtocolType, j.SessionTimeoutMillis, j.RebalanceTimeoutMillis = 3, "g", "consumer", 45_000, 60_000
		j.Protocols = []kmsg.JoinGroupRequestProtocol{{Name: "range", Metadata: []byte("A")}}
		s.Step(now, Input{Call: uint64(i + 1), Request: j, Client: Client{ID: "c"}, NewID: fmt.Sprint(i)})
		h := kmsg.NewPtrHeartbeatRequest()
		h.Version, h.Group, h.MemberID, h.Generation = 4, "g", fmt.Sprint("c-", i), 1
		beats = append(beats, h)
	}
	s.Tick(now)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		now = now.Add(time.Millisecond)
		e := s.Step(now, Input{Call: uint64(i + 1e6), Request: beats[i%1000]})
		if e.Replies[0].Response.(*kmsg.HeartbeatResponse).ErrorCode != 0 {
			b.Fatal("not a member")
		}
		s.Deadline()
	}
}

// BenchmarkMemory reports the bytes that a key takes, of which a group has a hundred or one.
func BenchmarkMemory(b *testing.B) {
	for _, shape := range [][3]int{{1000, 10, 10}, {100_000, 1, 1}} {
		b.Run(fmt.Sprintf("%d×%d×%d", shape[0], shape[1], shape[2]), func(b *testing.B) {
			for b.Loop() {
				before := heapInUse()
				s, now := NewState(DefaultConfig()), time.Now()
				s.Activate(now, 1)
				for i := range shape[0] * shape[1] * shape[2] {
					p, rest := i%shape[2], i/shape[2]
					t, g := rest%shape[1], rest/shape[1]
					s.Step(now, Input{Call: 1, Request: commitOf(fmt.Sprint("group-", g), fmt.Sprint("topic-", t), int32(p)), Topics: benchTopics{}})
				}
				b.ReportMetric(float64(heapInUse()-before)/float64(shape[0]*shape[1]*shape[2]), "B/key")
				runtime.KeepAlive(s)
			}
		})
	}
}

func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
