package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"
)

// produce writes count numbered records, the first with number from.
func produce(t *testing.T, addr, topic string, from, count int) {
	t.Helper()
	client := newClient(t, addr)
	defer client.Close()
	for i := range count {
		r := &kgo.Record{Topic: topic, Value: []byte(strconv.Itoa(from + i))}
		if err := client.ProduceSync(context.Background(), r).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
}

// consume reads count records in a group, commits them and leaves.
func consume(t *testing.T, addr, topic, group string, count int) (values []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client := newClient(t, addr, kgo.ConsumerGroup(group), kgo.ConsumeTopics(topic), kgo.DisableAutoCommit(),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	for len(values) < count {
		fetches := client.PollRecords(ctx, count-len(values))
		if err := fetches.Err(); err != nil {
			t.Fatalf("after %d of %d: %v", len(values), count, err)
		}
		fetches.EachRecord(func(r *kgo.Record) { values = append(values, string(r.Value)) })
	}
	if err := client.CommitUncommittedOffsets(ctx); err != nil {
		t.Fatal(err)
	}
	if err := client.LeaveGroupContext(ctx); err != nil {
		t.Fatal(err)
	}
	client.Close()
	return values
}

func sameSet(t *testing.T, got []string, from, count int) {
	t.Helper()
	seen := map[string]int{}
	for _, v := range got {
		seen[v]++
	}
	for i := range count {
		if seen[strconv.Itoa(from+i)] != 1 {
			t.Errorf("record %d was read %d times", from+i, seen[strconv.Itoa(from+i)])
		}
	}
	if len(got) != count {
		t.Errorf("%d records, not %d", len(got), count)
	}
}

// run starts a sidecar in front of an upstream, on free ports.
func run(t *testing.T, dir string, upstreams []string, more ...string) (*invocation, *Sidecar) {
	t.Helper()
	args := ephemeral("run", "--upstream", strings.Join(upstreams, ","), "--data-dir", dir, "--group-initial-rebalance-delay", "0s")
	i := start(t, nil, append(args, more...)...)
	return i, i.sidecar(t)
}

func TestConsumerResumesAtItsCommitAfterARestartOfTheSidecar(t *testing.T) {
	kafka, dir := embedded(t, "", kafkaDataLimit), t.TempDir()
	i, s := run(t, dir, kafka.addrs())
	produce(t, s.Addr(), "numbers", 0, 20)
	sameSet(t, consume(t, s.Addr(), "numbers", "readers", 20), 0, 20)
	i.stop(t)

	_, s = run(t, dir, kafka.addrs())
	produce(t, s.Addr(), "numbers", 20, 10)
	sameSet(t, consume(t, s.Addr(), "numbers", "readers", 10), 20, 10)

	// The upstream has seen none of it.
	groups, err := kadm.NewClient(newClient(t, kafka.addrs()[0])).ListGroups(context.Background())
	if err != nil || len(groups) != 0 {
		t.Errorf("groups upstream: %v %v", groups.Groups(), err)
	}
}

// commitAndFetch moves a group's position as a client does that knows its partitions already, and reads it back.
func commitAndFetch(t *testing.T, addr, group, topic string, offset int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client := newClient(t, addr, kgo.MaxVersions(kversion.V3_0_0())) // topics by name
	defer client.Close()
	commit := kmsg.NewPtrOffsetCommitRequest()
	commit.Group, commit.Generation = group, -1
	commit.Topics = []kmsg.OffsetCommitRequestTopic{{Topic: topic, Partitions: []kmsg.OffsetCommitRequestTopicPartition{{Offset: offset, LeaderEpoch: -1}}}}
	committed, err := commit.RequestWith(ctx, client)
	if err != nil {
		t.Fatalf("committing: %v", err)
	}
	if err := kerr.ErrorForCode(committed.Topics[0].Partitions[0].ErrorCode); err != nil {
		t.Fatalf("committing: %v", err)
	}
	fetch := kmsg.NewPtrOffsetFetchRequest()
	fetch.Group = group
	fetch.Topics = []kmsg.OffsetFetchRequestTopic{{Topic: topic, Partitions: []int32{0}}}
	fetched, err := fetch.RequestWith(ctx, client)
	if err != nil {
		t.Fatalf("fetching: %v", err)
	}
	if p := fetched.Groups[0].Topics[0].Partitions[0]; p.ErrorCode != 0 || p.Offset != offset {
		t.Errorf("fetched %+v, not %d", p, offset)
	}
}

// Once the brokers' ids are known, groups and offsets need no broker, not even after a restart of the sidecar.
func TestGroupsWorkWhileEveryBrokerIsDown(t *testing.T) {
	kafka, dir := embedded(t, "", kafkaDataLimit), t.TempDir()
	i, s := run(t, dir, kafka.addrs())
	produce(t, s.Addr(), "t", 0, 10)
	commitAndFetch(t, s.Addr(), "g", "t", 3)
	addrs := kafka.addrs()
	kafka.Close()
	commitAndFetch(t, s.Addr(), "g", "t", 5)
	i.stop(t)
	_, s = run(t, dir, addrs)
	commitAndFetch(t, s.Addr(), "g", "t", 7)
}

func TestThreeSidecarsLiveInOneProcess(t *testing.T) {
	kafka := embedded(t, "", kafkaDataLimit)
	for range 3 {
		_, s := run(t, t.TempDir(), kafka.addrs())
		produce(t, s.Addr(), "shared", 0, 1)
		offsets := consume(t, s.Addr(), "shared", "same-group", 1)
		if len(offsets) != 1 {
			t.Error(offsets)
		}
	}
}

// The limit is the design's for an empty store; a test machine is busy, so the median of several starts counts.
func TestReadyWithAnEmptyStoreWithin300ms(t *testing.T) {
	fast := 0
	const starts = 5
	for range starts {
		began := time.Now()
		i, _ := run(t, t.TempDir(), []string{"127.0.0.1:1"}) // nobody listens there: ready does not wait for the upstream
		took := time.Since(began)
		if took <= 300*time.Millisecond {
			fast++
		}
		t.Log(took)
		i.stop(t)
	}
	if fast <= starts/2 {
		t.Errorf("only %d of %d starts were ready within 300 ms", fast, starts)
	}
}

func TestReadyLineHasEveryAddress(t *testing.T) {
	i, s := run(t, t.TempDir(), []string{"127.0.0.1:1"})
	var line map[string]any
	for text := range strings.Lines(i.stderr.String()) {
		if strings.Contains(text, `"msg":"ready"`) {
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				t.Fatal(err)
			}
		}
	}
	if line == nil {
		t.Fatalf("no line\n%s", i.stderr.String())
	}
	for key, want := range map[string]string{"listen": s.Addr(), "http": addrOf(s.health), "admin": addrOf(s.pages), "upstream": "127.0.0.1:1", "cluster": "default"} {
		if line[key] != want {
			t.Errorf("%s is %v, not %s", key, line[key], want)
		}
	}
	if dir, _ := line["data_dir"].(string); !filepath.IsAbs(dir) {
		t.Errorf("data_dir is %v", line["data_dir"])
	}
}

func getJSON(t *testing.T, url string, into any) int {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(body, into); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return resp.StatusCode
}

// An upstream that is away is shown, and is no reason to take the sidecar out of service.
func TestHealthAndStatusWithoutAnUpstream(t *testing.T) {
	_, s := run(t, t.TempDir(), []string{"127.0.0.1:1"})
	for _, page := range []string{"/startup", "/livez", "/readyz"} {
		var got struct{ Status string }
		if code := getJSON(t, "http://"+addrOf(s.health)+page, &got); code != 200 || got.Status != "ok" {
			t.Errorf("%s: %d %+v", page, code, got)
		}
	}
	var status Status
	if code := getJSON(t, "http://"+addrOf(s.pages)+"/status", &status); code != 200 || !status.Active || status.Listen != s.Addr() || status.Term == 0 {
		t.Errorf("%d %+v", code, status)
	}
	resp, err := http.Get("http://" + addrOf(s.health) + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, _ := io.ReadAll(resp.Body); !strings.Contains(string(text), "offset_sidecar_active 1\n") {
		t.Errorf("%s", text)
	}
}

// The last commit and LeaveGroup of a consumer come after SIGTERM.
func TestStoppingSidecarServesItsClientsUntilTheLastHasGone(t *testing.T) {
	kafka := embedded(t, "", kafkaDataLimit)
	i, s := run(t, t.TempDir(), kafka.addrs())
	produce(t, s.Addr(), "t", 0, 3)
	ctx := context.Background()
	client := newClient(t, s.Addr(), kgo.ConsumerGroup("g"), kgo.ConsumeTopics("t"), kgo.DisableAutoCommit(), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	for n := 0; n < 3; {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			t.Fatal(err)
		}
		n += fetches.NumRecords()
	}
	i.terminate()
	eventually(t, "draining", func() bool { return s.draining.Load() })
	var got struct{ Status string }
	if code := getJSON(t, "http://"+addrOf(s.health)+"/readyz", &got); code != 503 {
		t.Errorf("/readyz while stopping: %d", code)
	}
	if err := client.CommitUncommittedOffsets(ctx); err != nil {
		t.Errorf("the last commit: %v", err)
	}
	if err := client.LeaveGroupContext(ctx); err != nil {
		t.Errorf("leaving: %v", err)
	}
	client.Close()
	i.stop(t)
	if strings.Contains(i.stderr.String(), "cut off") {
		t.Errorf("clients were cut off\n%s", i.stderr.String())
	}
}

func TestStoppingSidecarCutsClientsOffAfterMaxDrain(t *testing.T) {
	kafka := embedded(t, "", kafkaDataLimit)
	i, s := run(t, t.TempDir(), kafka.addrs(), "--max-drain", "50ms")
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, "the connection", func() bool { return s.proxy.Clients() == 1 })
	i.stop(t)
	if !strings.Contains(i.stderr.String(), "cut off") {
		t.Errorf("no line says so\n%s", i.stderr.String())
	}
}

func TestSecondSignalEndsTheProcessAtOnce(t *testing.T) {
	i, s := run(t, t.TempDir(), []string{"127.0.0.1:1"})
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, "the connection", func() bool { return s.proxy.Clients() == 1 })
	i.terminate()
	eventually(t, "draining", func() bool { return s.draining.Load() })
	i.signals <- syscall.SIGTERM // of the first, as timeout(1) sends it
	time.Sleep(sameSignal)
	i.signals <- syscall.SIGTERM
	if code := i.wait(t); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	conn.Close() // and the real end, which a test must wait for
	if code := i.wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	i.ended = true
}

// A directory that cannot be used ends the start with one line that names it, before anything is bound or changed.
func TestUnusableDataDirectoriesAreNamed(t *testing.T) {
	occupied := t.TempDir()
	run(t, occupied, []string{"127.0.0.1:1"})
	file := write(t, "file", "x")
	newer := t.TempDir()
	i, _ := run(t, newer, []string{"127.0.0.1:1"})
	i.stop(t)
	if err := os.WriteFile(filepath.Join(newer, "FORMAT"), []byte("offset-sidecar store 99\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dir  string
		want string
	}{
		"locked":   {occupied, "in use"},
		"newer":    {newer, "newer"},
		"a file":   {file, "not a directory"},
		"below it": {filepath.Join(file, "sub"), "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, stderr := call(t, nil, ephemeral("run", "--upstream", "127.0.0.1:1", "--data-dir", c.dir)...)
			last := stderr[strings.LastIndex(strings.TrimSpace(stderr), "\n")+1:]
			if code != exitFailed || !strings.Contains(last, "--data-dir") || !strings.Contains(last, c.dir) || !strings.Contains(last, c.want) {
				t.Errorf("%d %s", code, stderr)
			}
		})
	}
}

// dev --data-dir keeps topics and offsets.
func TestDevKeepsItsTopicsAndOffsets(t *testing.T) {
	dir := t.TempDir()
	i := start(t, nil, ephemeral("dev", "--data-dir", dir)...)
	s := i.sidecar(t)
	produce(t, s.Addr(), "kept", 0, 5)
	sameSet(t, consume(t, s.Addr(), "kept", "g", 5), 0, 5)
	i.stop(t)
	if !strings.Contains(i.stdout.String(), "bootstrap.servers = "+s.Addr()) || !strings.Contains(i.stdout.String(), dir) {
		t.Errorf("it printed\n%s", i.stdout.String())
	}

	i = start(t, nil, ephemeral("dev", "--data-dir", dir)...)
	s = i.sidecar(t)
	produce(t, s.Addr(), "kept", 5, 5)
	sameSet(t, consume(t, s.Addr(), "kept", "g", 5), 5, 5)
}

func TestDevInMemoryLeavesNothingBehind(t *testing.T) {
	home := t.TempDir()
	i := start(t, []string{"HOME=" + home}, ephemeral("dev")...)
	s := i.sidecar(t)
	produce(t, s.Addr(), "t", 0, 1)
	sameSet(t, consume(t, s.Addr(), "t", "g", 1), 0, 1)
	i.stop(t)
	err := filepath.WalkDir(home, func(path string, _ fs.DirEntry, err error) error {
		if path != home {
			return fmt.Errorf("%s was written", path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
