//go:build e2e

package e2e

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// bystander is a group that reads on while others make mistakes: it must see none of them.
type bystander struct {
	*life
	told int
}

func newBystander(t *testing.T, k *lab.Kafka, s *lab.Sidecar) *bystander {
	t.Helper()
	name := "bystander-" + strings.ToLower(t.Name())
	l := &life{client: clients()["franz-go"], addr: s.Addr(), topic: topic(t, k, name, partitions), group: name, adm: admin(t, s.Addr())}
	t.Cleanup(l.end)
	l.a = l.join(t)
	l.shared(t, 30*time.Second, l.a)
	l.more(t, false)
	return &bystander{life: l, told: assignments(l.a)}
}

func (b *bystander) undisturbed(t *testing.T) {
	t.Helper()
	b.more(t, false)
	if told := assignments(b.a); told != b.told {
		t.Errorf("the bystander was rebalanced:\n%s", b.a.Tail(20))
	}
	for _, line := range b.a.Lines() {
		if strings.Contains(line, "WARN") || strings.Contains(line, "ERROR") || strings.HasPrefix(line, "commit:") {
			t.Errorf("the bystander noticed: %s", line)
		}
	}
}

// frame is a request as bytes, with its size.
func frame(req kmsg.Request) []byte {
	return kmsg.NewRequestFormatter(kmsg.FormatterClientID("e2e")).AppendRequest(nil, req, 7)
}

// header is the size and header of a request of which nothing else follows.
func header(size, key, version int16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(size))
	b = binary.BigEndian.AppendUint16(b, uint16(key))
	b = binary.BigEndian.AppendUint16(b, uint16(version))
	return append(b, 0, 0, 0, 7, 0xff, 0xff)
}

// TestBrokenBytesCloseTheirOwnConnection, with one line in the log that names the mistake.
func TestBrokenBytesCloseTheirOwnConnection(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k)
	aside := newBystander(t, k, s)
	random := make([]byte, 4096)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	random[0] = 0x7f // a size over every limit
	big := kmsg.NewPtrJoinGroupRequest()
	big.Version, big.Group = 5, "big"
	protocol := kmsg.NewJoinGroupRequestProtocol()
	protocol.Name, protocol.Metadata = "range", make([]byte, 9<<20)
	big.Protocols = append(big.Protocols, protocol)
	unknownVersion := kmsg.NewPtrHeartbeatRequest()
	unknownVersion.Version = 4
	versioned := frame(unknownVersion)
	binary.BigEndian.PutUint16(versioned[6:], 99)

	claimed := header(17, 18, 3) // two million tags: of this many Kafka, too, looks for the first
	claimed = append(claimed, 0, 1, 1, 0xff, 0xff, 0xff, 0x00)

	for _, c := range []struct {
		name  string
		bytes []byte
		line  []string // words of the line in the log
	}{
		{"random bytes", random, []string{"max-frame"}},
		{"http", []byte("GET / HTTP/1.1\r\nHost: kafka\r\n\r\n"), []string{"HTTP"}},
		{"2 GiB", binary.BigEndian.AppendUint32(nil, 1<<31-1), []string{"max-frame"}},
		{"a negative size", binary.BigEndian.AppendUint32(nil, 0xffffff00), []string{"client"}},
		{"a truncated header", []byte{0, 0, 0, 5, 0, 18, 0, 3, 0}, []string{"header"}},
		{"a truncated body", header(10, 12, 3), []string{"Heartbeat"}},
		{"a group request over its limit", frame(big), []string{"8"}},
		{"a group request of an unknown version", versioned, []string{"99"}},
		{"an unknown api key", header(10, 9999, 0), []string{"9999"}},
		{"a produce request of an unknown version", header(10, 0, 99), []string{"Produce", "99"}},
		{"a CreateTopics request of an unknown version", append(header(11, 19, 99), 0), []string{"CreateTopics", "99"}},
		{"tags that are claimed and not there", claimed, []string{"ApiVersions"}},
		{"a Fetch request without a body", append(header(11, 1, 12), 0), []string{"Fetch", "version 12", k.Addrs()}},
		{"a ListOffsets request without a body", append(header(11, 2, 6), 0), []string{"ListOffsets", "version 6", k.Addrs()}},
		{"a DescribeTopicPartitions request without a body", append(header(11, 75, 0), 0), []string{"DescribeTopicPartitions"}},
		{"a Produce request without acks, cut off", append(header(18, 0, 8), 0xff, 0xff, 0, 0, 0, 0, 0, 1), []string{"Produce", "version 8", k.Addrs()}},
	} {
		t.Run(c.name, func(t *testing.T) {
			mark := s.Mark()
			r := dialRaw(t, s.Addr())
			_ = r.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = r.Write(c.bytes)
			if body, err := r.reply(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection was not closed: %v, reply %x", err, body)
			}
			oneLine(t, s, mark, c.line...)
			aside.undisturbed(t)
		})
	}
	t.Run("tls", func(t *testing.T) {
		mark := s.Mark()
		d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}, NetDialer: &net.Dialer{Timeout: 5 * time.Second}}
		if _, err := d.DialContext(within(t, 10*time.Second), "tcp", s.Addr()); err == nil {
			t.Error("a TLS handshake with the plain port succeeded")
		}
		oneLine(t, s, mark, "TLS")
		aside.undisturbed(t)
	})
}

// TestRejectedProduceWithoutAcks: as Kafka itself, the sidecar closes the connection at once.
func TestRejectedProduceWithoutAcks(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k)
	produce := kmsg.NewPtrProduceRequest()
	produce.Version, produce.Acks, produce.TimeoutMillis = 8, 0, 1000
	pt := kmsg.NewProduceRequestTopic()
	pt.Topic = "no such topic"
	pp := kmsg.NewProduceRequestTopicPartition()
	pp.Records = make([]byte, 100)
	pt.Partitions = append(pt.Partitions, pp)
	produce.Topics = append(produce.Topics, pt)
	addrs := listeners(t, s)
	addrs["Kafka"] = k.Addrs()
	for name, addr := range addrs {
		r := dialRaw(t, addr)
		began := time.Now()
		check(t, r.send(produce, 10*time.Second))
		if _, err := r.reply(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s has not closed the connection: %v", name, err)
		}
		t.Logf("%s: closed after %s", name, time.Since(began))
	}
}

// oneLine waits for a warning with these words and checks that it stays the only one.
func oneLine(t *testing.T, s *lab.Sidecar, mark int, words ...string) {
	t.Helper()
	_, err := s.Line(mark, 5*time.Second, func(line string) bool {
		for _, w := range words {
			if !strings.Contains(line, w) {
				return false
			}
		}
		return strings.Contains(line, "WARN")
	})
	if err != nil {
		t.Error(err)
		return
	}
	var warnings []string
	for _, line := range s.Lines()[mark:] {
		if strings.Contains(line, `"WARN"`) || strings.Contains(line, `"ERROR"`) {
			warnings = append(warnings, line)
		}
	}
	if len(warnings) != 1 {
		t.Errorf("%d lines for one mistake:\n%s", len(warnings), strings.Join(warnings, "\n"))
	}
}

// TestMistakesGetKafkasErrors: the same wrong requests go to Kafka itself and to the sidecar; the replies' error codes,
// or the closed connection, must be the same.
func TestMistakesGetKafkasErrors(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k)
	aside := newBystander(t, k, s)
	name := topic(t, k, "mistakes", 1)

	commit := func(group, member, metadata string, generation int32, topics ...string) *kmsg.OffsetCommitRequest {
		req := kmsg.NewPtrOffsetCommitRequest()
		req.Version, req.Group, req.MemberID, req.Generation = 7, group, member, generation
		for _, name := range topics {
			ct := kmsg.NewOffsetCommitRequestTopic()
			ct.Topic = name
			cp := kmsg.NewOffsetCommitRequestTopicPartition()
			cp.Metadata = &metadata
			ct.Partitions = append(ct.Partitions, cp)
			req.Topics = append(req.Topics, ct)
		}
		return req
	}
	join := func(group string, session, rebalance int32) *kmsg.JoinGroupRequest {
		req := kmsg.NewPtrJoinGroupRequest()
		req.Version, req.Group, req.SessionTimeoutMillis, req.RebalanceTimeoutMillis, req.ProtocolType = 5, group, session, rebalance, "consumer"
		protocol := kmsg.NewJoinGroupRequestProtocol()
		protocol.Name = "range"
		req.Protocols = append(req.Protocols, protocol)
		return req
	}
	heartbeat := func(group, member string, generation int32) *kmsg.HeartbeatRequest {
		req := kmsg.NewPtrHeartbeatRequest()
		req.Version, req.Group, req.MemberID, req.Generation = 3, group, member, generation
		return req
	}
	apiVersions := kmsg.NewPtrApiVersionsRequest()
	apiVersions.Version = 3 // its header has the newest form, which Kafka expects of a version it does not know
	find := kmsg.NewPtrFindCoordinatorRequest()
	find.Version, find.CoordinatorType, find.CoordinatorKey = 2, 9, "x"
	long, longer := strings.Repeat("g", 249), strings.Repeat("g", 32767)

	check(t, lab.Eventually(30*time.Second, func() error { // Kafka makes its own offsets topic first
		return groupCalls(dialRaw(t, k.Addrs()), "warm", name)
	}))
	// Another group's member: on both sides one member of the group "other" is made first.
	stranger := func(addr string) string {
		resp, err := dialRaw(t, addr).ask(join("other", 10000, 10000), 10*time.Second)
		check(t, err)
		return resp.(*kmsg.JoinGroupResponse).MemberID
	}
	theirs, ours := stranger(k.Brokers[0].Addr()), stranger(s.Addr())

	for _, c := range []struct {
		name string
		req  func(stranger string) kmsg.Request
	}{
		{"another group's member beats", func(m string) kmsg.Request { return heartbeat("mine", m, 1) }},
		{"another group's member commits", func(m string) kmsg.Request { return commit("mine", m, "", 1, name) }},
		{"an unknown generation", func(string) kmsg.Request { return commit("mine", "", "", 5, name) }},
		{"a negative session time-out", func(string) kmsg.Request { return join("mine", -1, 10000) }},
		{"a tiny session time-out", func(string) kmsg.Request { return join("mine", 1, 10000) }},
		{"a huge session time-out", func(string) kmsg.Request { return join("mine", 1<<30, 10000) }},
		{"a negative rebalance time-out", func(string) kmsg.Request { return join("mine", 10000, -1) }},
		{"an empty group joins", func(string) kmsg.Request { return join("", 10000, 10000) }},
		{"an empty group commits", func(string) kmsg.Request { return commit("", "", "", -1, name) }},
		{"a long group id", func(string) kmsg.Request { return commit(long, "", "", -1, name) }},
		{"the longest group id", func(string) kmsg.Request { return commit(longer, "", "", -1, name) }},
		{"the longest group id joins", func(string) kmsg.Request { return join(longer, 10000, 10000) }},
		{"huge metadata", func(string) kmsg.Request { return commit("mine", "", longer, -1, name) }},
		{"metadata at the limit", func(string) kmsg.Request { return commit("mine", "", strings.Repeat("m", 4096), -1, name) }},
		{"metadata over the limit", func(string) kmsg.Request { return commit("mine", "", strings.Repeat("m", 4097), -1, name) }},
		{"an unknown topic", func(string) kmsg.Request { return commit("mine", "", "", -1, "no-such-topic") }},
		{"a topic name that cannot be", func(string) kmsg.Request { return commit("mine", "", "", -1, "a/b", name) }},
		{"a coordinator of an unknown kind", func(string) kmsg.Request { return find }},
	} {
		t.Run(c.name, func(t *testing.T) {
			want, wantErr := dialRaw(t, k.Brokers[0].Addr()).ask(c.req(theirs), 10*time.Second)
			got, gotErr := dialRaw(t, s.Addr()).ask(c.req(ours), 10*time.Second)
			if errors.Is(wantErr, io.EOF) && errors.Is(gotErr, io.EOF) {
				return
			}
			if wantErr != nil || gotErr != nil {
				t.Fatalf("Kafka: %v, sidecar: %v", wantErr, gotErr)
			}
			if w, g := codes(reflect.ValueOf(want)), codes(reflect.ValueOf(got)); w != g {
				t.Errorf("Kafka's error codes are%s, the sidecar's%s", w, g)
			}
		})
	}
	t.Run("an unknown version of ApiVersions", func(t *testing.T) {
		b := frame(apiVersions)
		binary.BigEndian.PutUint16(b[6:], 99)
		answer := func(addr string) []byte {
			r := dialRaw(t, addr)
			_ = r.SetDeadline(time.Now().Add(5 * time.Second))
			_, err := r.Write(b)
			check(t, err)
			body, err := r.reply()
			check(t, err)
			return body[:min(len(body), 6)] // correlation id and error code
		}
		if want, got := answer(k.Brokers[0].Addr()), answer(s.Addr()); !bytes.Equal(want, got) {
			t.Errorf("Kafka: %x, sidecar: %x", want, got)
		}
	})
	aside.undisturbed(t)
}

// codes are all error codes of a reply, in order.
func codes(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			return codes(v.Elem())
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Struct {
			all := ""
			for i := range v.Len() {
				all += codes(v.Index(i))
			}
			return all
		}
	case reflect.Struct:
		all := ""
		for i := range v.NumField() {
			if v.Type().Field(i).Name == "ErrorCode" {
				all += fmt.Sprintf(" %d", v.Field(i).Int())
			} else if v.Type().Field(i).IsExported() {
				all += codes(v.Field(i))
			}
		}
		return all
	}
	return ""
}

// refused starts a sidecar that must end by itself, with words on what was wrong.
func refused(t *testing.T, s *lab.Sidecar, words ...string) {
	t.Helper()
	check(t, s.Start())
	code, err := s.Wait(20 * time.Second)
	check(t, err)
	if code == 0 {
		t.Error("exit status 0")
	}
	for _, w := range words {
		if !strings.Contains(s.Tail(100), w) {
			t.Errorf("%q is not in its words:\n%s", w, s.Tail(10))
		}
	}
}

// TestUnusableDirectories are refused at start by name.
func TestUnusableDirectories(t *testing.T) {
	t.Run("read-only", func(t *testing.T) {
		s := newSidecar(t, "127.0.0.1:1")
		if os.Geteuid() == 0 { // root writes everywhere: it runs as nobody
			s.Command = func(cmd *exec.Cmd) {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
		}
		check(t, os.Chmod(s.Dir, 0o555))
		refused(t, s, s.Dir)
	})
	t.Run("a file", func(t *testing.T) {
		s := newSidecar(t, "127.0.0.1:1")
		s.Dir += "/file"
		check(t, os.WriteFile(s.Dir, nil, 0o644))
		refused(t, s, s.Dir)
	})
	t.Run("locked", func(t *testing.T) {
		first := newSidecar(t, "127.0.0.1:1")
		check(t, first.Up())
		second := newSidecar(t, "127.0.0.1:1")
		second.Dir = first.Dir
		refused(t, second, second.Dir)
		if !first.Alive() {
			t.Error("the first sidecar did not survive the second")
		}
	})
	t.Run("port in use", func(t *testing.T) {
		first := newSidecar(t, "127.0.0.1:1")
		check(t, first.Up())
		second := newSidecar(t, "127.0.0.1:1")
		second.Port = first.Port
		refused(t, second, "--listen", second.Addr())
	})
}

// TestUpstreamDown: the sidecar starts without its upstream, and its groups go on when the upstream goes.
func TestUpstreamDown(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	name := topic(t, k, "down", 1)
	s := sidecar(t, k)
	check(t, groupCalls(dialRaw(t, s.Addr()), "before", name))
	addrs := listeners(t, s)
	k.Brokers[0].Kill()
	everyListener(t, "the upstream is down", addrs, name)
	again(t, s, addrs)
	everyListener(t, "the upstream is down and the sidecar restarted", addrs, name)

	fresh := newSidecar(t, k.Addrs()) // one that never saw it
	check(t, fresh.Up())
	restore(t, k)
	for _, s := range []*lab.Sidecar{s, fresh} {
		began := time.Now()
		check(t, lab.Eventually(15*time.Second, func() error { return groupCalls(dialRaw(t, s.Addr()), "after", name) }))
		t.Logf("group calls work %s after the upstream's return", time.Since(began))
		produce(t, s.Addr(), name, 0, 10)
	}
}

// TestUpstreamIsNoKafka: it is named in the log, and neither crashes the sidecar nor makes it storm.
func TestUpstreamIsNoKafka(t *testing.T) {
	for _, c := range []struct{ name, says, word string }{
		{"http", "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "HTTP"},
		{"silence", "", "upstream"},
		{"noise", "\xff\xfe\xfd\xfc\xfb\xfa", "Kafka"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			other, err := net.Listen("tcp", "127.0.0.1:0")
			check(t, err)
			defer func() { _ = other.Close() }()
			var asked atomic.Int64
			go func() {
				for {
					conn, err := other.Accept()
					if err != nil {
						return
					}
					asked.Add(1)
					go func() {
						_, _ = conn.Read(make([]byte, 1))
						_, _ = io.WriteString(conn, c.says)
						_, _ = io.Copy(io.Discard, conn)
						_ = conn.Close()
					}()
				}
			}()
			s := newSidecar(t, other.Addr().String())
			check(t, s.Up())
			if _, err = s.Line(0, 20*time.Second, func(line string) bool {
				return strings.Contains(line, other.Addr().String()) && strings.Contains(line, c.word) && strings.Contains(line, "WARN")
			}); err != nil {
				t.Error(err)
			}
			for range 3 {
				if _, err := askMetadata(s.Addr(), ""); err == nil {
					t.Error("Metadata was answered without an upstream")
				}
			}
			if n := asked.Load(); n > 100 {
				t.Errorf("%d connections to it", n)
			}
			if !s.Alive() {
				t.Error("the sidecar ended")
			}
		})
	}
}
