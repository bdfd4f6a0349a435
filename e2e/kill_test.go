//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// commitRequest commits one offset as a consumer without a group membership does.
func commitRequest(group, topic string, offset int64) *kmsg.OffsetCommitRequest {
	req := kmsg.NewPtrOffsetCommitRequest()
	req.Version, req.Group, req.Generation = 7, group, -1
	ct := kmsg.NewOffsetCommitRequestTopic()
	ct.Topic = topic
	cp := kmsg.NewOffsetCommitRequestTopicPartition()
	cp.Offset = offset
	ct.Partitions = append(ct.Partitions, cp)
	req.Topics = append(req.Topics, ct)
	return req
}

// commitError is what became of it.
func commitError(resp kmsg.Response) error {
	return kerr.ErrorForCode(resp.(*kmsg.OffsetCommitResponse).Topics[0].Partitions[0].ErrorCode)
}

// commitWait is how long a commit is waited for: its time-out at the sidecar, and time to be told.
const commitWait = 8 * time.Second

func (r *raw) simpleCommit(group, topic string, offset int64) error {
	resp, err := r.ask(commitRequest(group, topic, offset), commitWait)
	if err != nil {
		return err
	}
	return commitError(resp)
}

// committed asks for that offset; -1 is none.
func (r *raw) committed(group, topic string) (int64, error) {
	req := kmsg.NewPtrOffsetFetchRequest()
	req.Version, req.Group = 5, group
	ft := kmsg.NewOffsetFetchRequestTopic()
	ft.Topic, ft.Partitions = topic, []int32{0}
	req.Topics = append(req.Topics, ft)
	resp, err := r.ask(req, commitWait)
	if err != nil {
		return 0, err
	}
	f := resp.(*kmsg.OffsetFetchResponse)
	return f.Topics[0].Partitions[0].Offset, errors.Join(kerr.ErrorForCode(f.ErrorCode), kerr.ErrorForCode(f.Topics[0].Partitions[0].ErrorCode))
}

// TestNothingAcknowledgedIsLost: the sidecar is killed at random moments while eight clients commit ever higher offsets;
// what each finds afterwards is no less than its last acknowledged offset and no more than its last sent one.
func TestNothingAcknowledgedIsLost(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k)
	name := topic(t, k, "killed", 1)
	const clients = 8
	var sent, acked [clients]atomic.Int64
	times := 15
	if long {
		times = 500
	}
	check(t, lab.Eventually(10*time.Second, func() error { return dialRaw(t, s.Addr()).simpleCommit("ready", name, 0) }))
	for n := range times {
		ended := make(chan struct{}, clients)
		for i := range clients {
			go func() {
				defer func() { ended <- struct{}{} }()
				c, err := net.Dial("tcp", s.Addr())
				if err != nil {
					return
				}
				defer func() { _ = c.Close() }()
				r := &raw{Conn: c}
				for {
					offset := sent[i].Add(1)
					if r.simpleCommit(fmt.Sprint("killed-", i), name, offset) != nil {
						return // the sidecar was killed: what has become of this one is open
					}
					acked[i].Store(offset)
				}
			}()
		}
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond) // the moment of the kill is what is random here
		s.Kill()
		for range clients {
			<-ended
		}
		check(t, s.Up())
		r := dialRaw(t, s.Addr())
		for i := range clients {
			have, err := r.committed(fmt.Sprint("killed-", i), name)
			check(t, err)
			if low, high := acked[i].Load(), sent[i].Load(); have < low && low > 0 || have > high {
				t.Fatalf("after kill %d client %d finds offset %d; %d was acknowledged, %d sent", n+1, i, have, low, high)
			}
		}
	}
	t.Logf("%d kills, %d commits of the first client acknowledged", times, acked[0].Load())
}

// TestDrain: after SIGTERM a consumer can still read, commit and leave; the sidecar ends with its last client.
func TestDrain(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k, "--max-drain", "20s")
	l := &life{client: clients()["franz-go"], addr: s.Addr(), topic: topic(t, k, "drain", partitions), group: "drain", adm: admin(t, k.Addrs())}
	defer l.end()
	l.a = l.join(t)
	l.shared(t, 30*time.Second, l.a)
	check(t, s.Signal(syscall.SIGTERM))
	produce(t, k.Addrs(), l.topic, 0, batch)
	check(t, lab.Eventually(10*time.Second, func() error {
		if got := len(l.a.got()); got != batch {
			return fmt.Errorf("%d records read while draining", got)
		}
		return nil
	}))
	_, err := l.a.Line(0, 10*time.Second, func(line string) bool { return line == "committed" })
	check(t, err)
	l.a.leaves(t)
	left := time.Now()
	code, err := s.Wait(10 * time.Second)
	check(t, err)
	if code != 0 {
		t.Errorf("exit status %d", code)
	}
	t.Logf("the sidecar ended %s after its last client", time.Since(left))
	check(t, s.Up())
	l.adm = admin(t, s.Addr())
	caughtUp(t, l.adm, l.group, l.topic, 5*time.Second)
	if groups, err := l.adm.DescribeGroups(within(t, 5*time.Second), l.group); err != nil || groups[l.group].State != "Empty" {
		t.Errorf("after the restart the group is %+v (%v)", groups[l.group], err)
	}
}

// TestSignalsEndIt: without clients SIGTERM ends it at once, and with clients a second one does.
func TestSignalsEndIt(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k)
	code, err := s.Terminate(3 * time.Second)
	check(t, err)
	if code != 0 {
		t.Errorf("exit status %d without clients", code)
	}
	s.Args = append(s.Args, "--max-drain", "25s")
	check(t, s.Up())
	_, err = dialRaw(t, s.Addr()).metadata("")
	check(t, err)
	mark := s.Mark()
	check(t, s.Signal(syscall.SIGTERM))
	_, err = s.Line(mark, 5*time.Second, func(line string) bool { return len(line) > 0 })
	check(t, err)
	check(t, lab.Eventually(5*time.Second, func() error { // one that comes at once is taken for an echo of the first
		_ = s.Signal(syscall.SIGINT)
		if s.Alive() {
			return errors.New("it goes on after a second signal")
		}
		return nil
	}))
}
