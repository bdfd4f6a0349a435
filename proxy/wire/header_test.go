package wire_test

import (
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
)

func TestHeadersOfRealClientsAreRead(t *testing.T) {
	for _, f := range fixtures(t) {
		if f.response {
			continue
		}
		h, err := wire.ParseRequestHeader(f.frame)
		if err != nil || h.APIKey != f.key || h.APIVersion != f.version || h.ClientID == nil {
			t.Errorf("%s: api key %d, version %d: %+v, %v", f.from, f.key, f.version, h, err)
			continue
		}
		req := kmsg.RequestForKey(h.APIKey)
		req.SetVersion(h.APIVersion)
		if err := req.ReadFrom(f.frame[h.Length:]); err != nil {
			t.Errorf("%s: %v", f.from, err)
			continue
		}
		id := *h.ClientID
		again := kmsg.NewRequestFormatter(kmsg.FormatterClientID(id)).AppendRequest(nil, req, h.CorrelationID)[4:]
		if string(again) != string(f.frame) {
			t.Errorf("%s: %s version %d reads as something else:\n%x\n%x", f.from, kmsg.NameForKey(f.key), f.version, f.frame, again)
		}
	}
}

func TestEveryKnownKeyAndVersionHasItsHeader(t *testing.T) {
	for key := int16(0); key <= kmsg.MaxKey; key++ {
		req := kmsg.RequestForKey(key)
		if req == nil {
			continue
		}
		for version := int16(0); version <= req.MaxVersion(); version++ {
			frame := request(req, version)
			h, err := wire.ParseRequestHeader(frame)
			if err != nil {
				t.Fatalf("%s version %d: %v", kmsg.NameForKey(key), version, err)
			}
			if key == 7 && version == 0 {
				continue // kmsg does not write a body after its odd header
			}
			if body := len(req.AppendTo(nil)); h.Length != len(frame)-body || h.CorrelationID != 7 {
				t.Errorf("%s version %d: header of %d bytes, want %d", kmsg.NameForKey(key), version, h.Length, len(frame)-body)
			}
			for cut := range h.Length {
				if _, err := wire.ParseRequestHeader(frame[:cut]); !errors.Is(err, wire.ErrShort) {
					t.Errorf("%s version %d, %d bytes of the header: %v", kmsg.NameForKey(key), version, cut, err)
				}
			}
		}
	}
}

func TestHeaderOf(t *testing.T) {
	for _, c := range []struct {
		what   string
		frame  string
		length int
		client string // "-" for null
		err    error
	}{
		{"an unknown key", "\x27\x0f\x00\x00\x00\x00\x00\x07\x00\x01x\x00rest", 11, "x", nil},
		{"an unknown key with a null client id", "\x27\x0f\x00\x00\x00\x00\x00\x07\xff\xffrest", 10, "-", nil},
		{"a known key in a version to come", "\x00\x03\x00\x63\x00\x00\x00\x07\x00\x01x\x00rest", 12, "x", nil},
		{"tags", "\x00\x03\x00\x0d\x00\x00\x00\x07\x00\x01x\x01\x05\x02abrest", 16, "x", nil},
		{"ControlledShutdown 0, without client id", "\x00\x07\x00\x00\x00\x00\x00\x07\xff\xff", 8, "-", nil},
		{"ControlledShutdown 1", "\x00\x07\x00\x01\x00\x00\x00\x07\xff\xff", 10, "-", nil},
		{"a negative key", "\xff\xff\x00\x00\x00\x00\x00\x07\x00\x00", 0, "", wire.ErrMalformed},
		{"a negative version", "\x00\x03\xff\xff\x00\x00\x00\x07\x00\x00", 0, "", wire.ErrMalformed},
		{"a client id beyond the frame", "\x00\x03\x00\x00\x00\x00\x00\x07\x7f\xffx", 0, "", wire.ErrShort},
		{"an endless varint", "\x00\x03\x00\x0d\x00\x00\x00\x07\xff\xff\xff\xff\xff\xff\xff\xff", 0, "", wire.ErrMalformed},
		{"more tags than anybody needs", "\x00\x03\x00\x0d\x00\x00\x00\x07\xff\xff\xff\x7f" + string(make([]byte, 5000)), 0, "", wire.ErrMalformed},
		{"nothing", "", 0, "", wire.ErrShort},
	} {
		h, err := wire.ParseRequestHeader([]byte(c.frame))
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", c.what, err, c.err)
			continue
		}
		client := "-"
		if h.ClientID != nil {
			client = *h.ClientID
		}
		if err == nil && (h.Length != c.length || client != c.client) {
			t.Errorf("%s: %d bytes, client id %q", c.what, h.Length, client)
		}
	}
}

func TestProduceAcksAreReadFromTheBeginning(t *testing.T) {
	long := string(make([]byte, 300))
	for _, transactional := range []*string{nil, new(string), kmsg.StringPtr("tx"), &long} {
		for _, acks := range []int16{0, 1, -1} {
			for version := int16(0); version <= 13; version++ {
				req := kmsg.NewPtrProduceRequest()
				req.Version, req.TransactionID, req.Acks, req.TimeoutMillis = version, transactional, acks, 9
				body := req.AppendTo(nil)
				read := 0
				for cut := range len(body) + 1 {
					got, timeout, err := wire.ProduceAcks(version, body[:cut])
					switch {
					case err == nil && (got != acks || timeout != 9):
						t.Fatalf("version %d, %d bytes: acks %d, want %d; time-out %d, want 9", version, cut, got, acks, timeout)
					case err == nil:
						read++
					case !errors.Is(err, wire.ErrShort) || read > 0:
						t.Fatalf("version %d, %d bytes: %v", version, cut, err)
					}
				}
				if read == 0 {
					t.Errorf("version %d: acks not found", version)
				}
			}
		}
	}
}

func TestGroupRequestsThatKafkaDoesNotReadAreRefused(t *testing.T) {
	for _, c := range []struct {
		what         string
		key, version int16
		body         string
	}{
		// Kafka closes the connection for each of these (oracle: wire-null-arrays, wire-cut-off, *-null-*).
		{"JoinGroup with null protocols", 11, 0, "\x00\x01g\x00\x00\xea\x60\x00\x00\x00\x08consumer\xff\xff\xff\xff"},
		{"SyncGroup with null assignments", 14, 0, "\x00\x01g\x00\x00\x00\x01\x00\x01x\xff\xff\xff\xff"},
		{"DescribeGroups with null groups", 15, 0, "\xff\xff\xff\xff"},
		{"DescribeGroups with 2 billion groups", 15, 0, "\x7f\xff\xff\xff"},
		{"DeleteGroups with null groups", 42, 0, "\xff\xff\xff\xff"},
		{"DeleteGroups with a null group", 42, 0, "\x00\x00\x00\x01\xff\xff"},
		{"OffsetCommit with null topics", 8, 2, "\x00\x01g\xff\xff\xff\xff\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"},
		{"OffsetFetch 1 with null topics", 9, 1, "\x00\x01g\xff\xff\xff\xff"},
		{"OffsetFetch 7 of an endless length", 9, 7, "\xff"},
		{"Heartbeat with a null group", 12, 0, "\xff\xff\x00\x00\x00\x01\x00\x00"},
		{"Heartbeat with a length of -2", 12, 0, "\xff\xfe"},
		{"Heartbeat that is cut off", 12, 0, "\x7f\xffabc"},
		{"Heartbeat 4 with a null group", 12, 4, "\x00\x00\x00\x00\x01\x01\x00\x00"},
		{"Heartbeat 4 with a group of 32,768 bytes", 12, 4, "\x81\x80\x02" + string(make([]byte, 32768)) + "\x00\x00\x00\x01\x01\x00\x00"},
		{"JoinGroup without a body", 11, 0, ""},
		{"JoinGroup with null metadata", 11, 0, "\x00\x01g\x00\x00\xea\x60\x00\x00\x00\x01t\x00\x00\x00\x01\x00\x01p\xff\xff\xff\xff"},
		{"SyncGroup with a null assignment", 14, 0, "\x00\x01g\x00\x00\x00\x01\x00\x01x\x00\x00\x00\x01\x00\x01m\xff\xff\xff\xff"},
		{"FindCoordinator with a null key", 10, 0, "\xff\xff"},
		{"FindCoordinator 4 with null keys", 10, 4, "\x00\x00\x00"},
		{"ListGroups 4 with null states", 16, 4, "\x00\x00"},
		{"LeaveGroup 3 with null members", 13, 3, "\x00\x01g\xff\xff\xff\xff"},
		{"OffsetDelete with null topics", 47, 0, "\x00\x01g\xff\xff\xff\xff"},
	} {
		req := kmsg.RequestForKey(c.key)
		req.SetVersion(c.version)
		frame := request(req, c.version)
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			t.Fatal(err)
		}
		if req, err := wire.DecodeRequest(h, append(frame[:h.Length:h.Length], c.body...)); err == nil {
			t.Errorf("%s was read as %+v", c.what, req)
		}
	}
}

func TestBytesAfterTheLastFieldAreIgnoredAsKafkaDoes(t *testing.T) {
	for version := int16(0); version <= 4; version++ {
		hb := kmsg.NewPtrHeartbeatRequest()
		hb.Group, hb.MemberID = "g", "m"
		frame := append(request(hb, version), 1, 2, 3)
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			t.Fatal(err)
		}
		got, err := wire.DecodeRequest(h, frame)
		if err != nil || !reflect.DeepEqual(got, hb) {
			t.Errorf("version %d: %+v, %v", version, got, err)
		}
	}
}

func TestNullTopicsOfOffsetFetchMeanAllOfThem(t *testing.T) {
	for version := int16(2); version <= 10; version++ {
		fetch := kmsg.NewPtrOffsetFetchRequest()
		fetch.Group = "g"
		g := kmsg.NewOffsetFetchRequestGroup()
		g.Group, g.Topics = "g", nil
		fetch.Groups = append(fetch.Groups, g)
		for _, all := range []bool{true, false} {
			if !all {
				fetch.Topics, fetch.Groups[0].Topics = []kmsg.OffsetFetchRequestTopic{}, []kmsg.OffsetFetchRequestGroupTopic{}
			}
			frame := request(fetch, version)
			h, err := wire.ParseRequestHeader(frame)
			if err != nil {
				t.Fatal(err)
			}
			decoded, err := wire.DecodeRequest(h, frame)
			if err != nil {
				t.Fatal(err)
			}
			got := decoded.(*kmsg.OffsetFetchRequest)
			if version < 8 && (got.Topics == nil) != all || version >= 8 && (got.Groups[0].Topics == nil) != all {
				t.Errorf("version %d, all topics %v: %+v", version, all, got)
			}
		}
	}
}

func TestUnknownKeysAndVersionsAreNotDecoded(t *testing.T) {
	for _, h := range []wire.RequestHeader{{APIKey: 9999}, {APIKey: 12, APIVersion: 5}} {
		if _, err := wire.DecodeRequest(h, make([]byte, 100)); !errors.Is(err, wire.ErrVersion) {
			t.Errorf("%+v: %v", h, err)
		}
	}
}

// A frame may claim arrays as long as itself, whose elements are larger in memory than on the wire.
func TestClaimedLengthsDoNotAllocate(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		key, version int16
		head         string
	}{
		{11, 0, "\x00\x01g\x00\x00\xea\x60\x00\x00\x00\x00\x00\x0f\x00\x00"},                                                 // JoinGroup: 983,040 protocols
		{8, 2, "\x00\x01g\xff\xff\xff\xff\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x0f\x00\x00"},                          // OffsetCommit: as many topics
		{8, 2, "\x00\x01g\xff\xff\xff\xff\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x01\x00\x01t\x00\x0f\x00\x00"}, // partitions
		{15, 0, "\x00\x0f\x00\x00"},
		{9, 8, "\x80\x80\x3c"},
	} {
		frame := request(kmsg.RequestForKey(c.key), c.version)
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			t.Fatal(err)
		}
		frame = append(frame[:h.Length], c.head...)
		frame = append(frame, make([]byte, size)...)
		for i := h.Length + len(c.head); i < len(frame); i++ {
			frame[i] = 0xff // no element is whole
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = wire.DecodeRequest(h, frame)
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; err == nil || got > 64<<10 {
			t.Errorf("%s version %d: %d bytes allocated, %v", kmsg.NameForKey(c.key), c.version, got, err)
		}
	}
}

func TestMoreElementsThanAnybodyNeedsAreRefused(t *testing.T) {
	describe := kmsg.NewPtrDescribeGroupsRequest()
	describe.Groups = make([]string, 1<<19)
	for _, c := range []struct {
		more int
		ok   bool
	}{{0, true}, {1, false}} {
		describe.Groups = append(describe.Groups, make([]string, c.more)...)
		frame := request(describe, 5)
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wire.DecodeRequest(h, frame); (err == nil) != c.ok {
			t.Errorf("%d groups: %v", len(describe.Groups), err)
		}
	}
}

// full gives a value in each field of a message, two in each array, and an unknown tag at the end of each struct.
func full(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		full(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			full(v.Index(i))
		}
	case reflect.String:
		v.SetString("ab")
	case reflect.Struct:
		if tags, ok := v.Addr().Interface().(*kmsg.Tags); ok {
			tags.Set(99, []byte("ok"))
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).Name != "Version" {
				full(v.Field(i))
			}
		}
	}
}

// What is decoded is walked over before, field by field: to the last byte of every version, or else a client could have
// kmsg read what was not looked at.
func TestWholeRequestsAreWalkedOver(t *testing.T) {
	for _, key := range wire.Decoded() {
		for version := int16(0); version <= kmsg.RequestForKey(key).MaxVersion(); version++ {
			want := kmsg.RequestForKey(key)
			full(reflect.ValueOf(want).Elem())
			frame := request(want, version)
			h, err := wire.ParseRequestHeader(frame)
			if err != nil {
				t.Fatal(err)
			}
			got, err := wire.DecodeRequest(h, frame)
			if err != nil {
				t.Errorf("%s version %d: %v", kmsg.NameForKey(key), version, err)
				continue
			}
			if again := request(got, version); string(again) != string(frame) {
				t.Errorf("%s version %d reads as something else:\n%x\n%x", kmsg.NameForKey(key), version, frame, again)
			}
			for cut := h.Length; cut < len(frame); cut++ {
				if _, err := wire.DecodeRequest(h, frame[:cut]); err == nil {
					t.Errorf("%s version %d is whole with %d of %d bytes", kmsg.NameForKey(key), version, cut, len(frame))
				}
			}
		}
	}
}

// Five bytes can claim four thousand million tags, and kmsg counts them all. The fuzz target for acks found that.
func TestClaimedTagsAreNotCounted(t *testing.T) {
	began := time.Now()
	for key := int16(0); key <= kmsg.MaxKey; key++ {
		req := kmsg.RequestForKey(key)
		if req == nil {
			continue
		}
		version := req.MaxVersion()
		if req.SetVersion(version); !req.IsFlexible() {
			continue
		}
		full(reflect.ValueOf(req).Elem())
		frame := request(req, version)
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			t.Fatal(err)
		}
		// In the place of every byte once, that of the tags among them.
		for at := h.Length; at < len(frame); at++ {
			_, _ = wire.DecodeRequest(h, append(frame[:at:at], 0xff, 0xff, 0xff, 0xff, 0x0f))
		}
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Fatalf("it took %s", took)
	}
}

func BenchmarkParseRequestHeader(b *testing.B) {
	frame := request(kmsg.NewPtrProduceRequest(), 9)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := wire.ParseRequestHeader(frame); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeOffsetCommit(b *testing.B) {
	commit := kmsg.NewPtrOffsetCommitRequest()
	commit.Group, commit.MemberID = "group", "member"
	topic := kmsg.NewOffsetCommitRequestTopic()
	topic.Topic = "topic"
	topic.Partitions = append(topic.Partitions, kmsg.NewOffsetCommitRequestTopicPartition())
	commit.Topics = append(commit.Topics, topic)
	frame := request(commit, 9)
	h, err := wire.ParseRequestHeader(frame)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := wire.DecodeRequest(h, frame); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzParseRequestHeader(f *testing.F) {
	for _, x := range fixtures(f) {
		f.Add(x.frame[:min(len(x.frame), 64)])
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			return
		}
		if h.Length > len(frame) {
			t.Fatalf("a header of %d bytes in a frame of %d", h.Length, len(frame))
		}
		if again, err := wire.ParseRequestHeader(frame[:h.Length]); err != nil || fmt.Sprint(again.Length, again.APIKey) != fmt.Sprint(h.Length, h.APIKey) {
			t.Fatalf("the header alone is read otherwise: %+v, %v", again, err)
		}
	})
}

func FuzzProduceAcks(f *testing.F) {
	f.Add(int16(2), []byte("\xff\xff"))
	f.Add(int16(8), []byte("\x00\x02tx\x00\x01"))
	f.Add(int16(13), []byte("\x03tx\x00\x01"))
	f.Fuzz(func(t *testing.T, version int16, body []byte) {
		got, timeout, err := wire.ProduceAcks(version, body)
		req := kmsg.NewPtrProduceRequest()
		req.Version = version
		if version < 0 || version > 13 || err != nil || req.IsFlexible() && mayClaimTags(body) || req.ReadFrom(body) != nil {
			return
		}
		if got != req.Acks || timeout != req.TimeoutMillis {
			t.Fatalf("version %d: acks %d, want %d; time-out %d, want %d", version, got, req.Acks, timeout, req.TimeoutMillis)
		}
	})
}

func FuzzDecodeRequest(f *testing.F) {
	for _, x := range fixtures(f) {
		if !x.response {
			f.Add(x.frame)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		h, err := wire.ParseRequestHeader(frame)
		if err != nil {
			return
		}
		req, err := wire.DecodeRequest(h, frame)
		if err != nil {
			return
		}
		// What was read means the same when it is written and read again.
		body := req.AppendTo(nil)
		again := kmsg.RequestForKey(h.APIKey)
		again.SetVersion(h.APIVersion)
		if err := again.ReadFrom(body); err != nil {
			t.Fatalf("%s version %d: %v", kmsg.NameForKey(h.APIKey), h.APIVersion, err)
		}
		if second := again.AppendTo(nil); string(second) != string(body) {
			t.Fatalf("%s version %d:\n%x\n%x", kmsg.NameForKey(h.APIKey), h.APIVersion, body, second)
		}
	})
}
