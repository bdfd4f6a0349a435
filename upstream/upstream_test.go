package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"

	"github.com/offset-sidecar/offset-sidecar/upstream"
)

// world is a cluster in a bubble, a client of it, and what the client asked and logged.
type world struct {
	t       *testing.T
	network kfake.VirtualNetwork
	kafka   *kfake.Cluster
	client  *upstream.Client
	ended   chan struct{}
	stop    context.CancelFunc

	mu   sync.Mutex
	log  bytes.Buffer
	asks []*kmsg.MetadataRequest
}

func (w *world) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

func (w *world) logged() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

// asked gives the Metadata requests since it was last called.
func (w *world) asked() []*kmsg.MetadataRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	asks := w.asks
	w.asks = nil
	return asks
}

// bubble runs a test in virtual time, with a client of the seeds given that has not begun to ask.
func bubble(t *testing.T, dial func(context.Context, string, string) (net.Conn, error), seeds []string, test func(*world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, ended: make(chan struct{})}
		if dial == nil {
			dial = w.network.DialContext
		}
		client, err := upstream.New(upstream.Config{
			Seeds: seeds, ClientID: "test", Dialer: dial,
			Logger: slog.New(slog.NewTextHandler(w, nil)),
		})
		if err != nil {
			t.Fatal(err)
		}
		w.client = client
		defer func() {
			client.Close()
			if w.stop != nil {
				<-w.ended
				w.stop()
			}
			if w.kafka != nil {
				w.kafka.Close()
			}
		}()
		test(w)
	})
}

// with starts the cluster, on the ports from 9092 on.
func (w *world) with(brokers int, opts ...kfake.Opt) {
	w.t.Helper()
	ports := []int{9092, 9093, 9094}[:brokers]
	kafka, err := kfake.NewCluster(append([]kfake.Opt{
		kfake.NumBrokers(brokers), kfake.Ports(ports...), kfake.ListenFn(w.network.Listen), kfake.ClusterID("cluster"),
	}, opts...)...)
	if err != nil {
		w.t.Fatal(err)
	}
	kafka.ControlKey(3, func(req kmsg.Request) (kmsg.Response, error, bool) {
		kafka.KeepControl()
		w.mu.Lock()
		w.asks = append(w.asks, req.(*kmsg.MetadataRequest))
		w.mu.Unlock()
		return nil, nil, false
	})
	w.kafka = kafka
}

func (w *world) run() {
	ctx, cancel := context.WithCancel(w.t.Context())
	w.stop = cancel
	go func() {
		w.client.Run(ctx)
		close(w.ended)
	}()
}

// refresh waits for a Refresh, and says how long it took.
func (w *world) refresh(names []string, ids ...[16]byte) (time.Duration, error) {
	began := time.Now()
	done := make(chan error, 2)
	w.client.Refresh(names, ids, func(err error) { done <- err })
	err := <-done
	return time.Since(began), err
}

func ids(b upstream.Brokers) (all []int32) {
	for _, b := range b.Brokers {
		all = append(all, b.ID)
	}
	return all
}

const seed = "127.0.0.1:9092"

func TestBrokersAreLearntAndTopicsAreNotAskedFor(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(3, kfake.SeedTopics(2, "orders"))
		var told []upstream.Brokers
		w.client.OnBrokers(func(b upstream.Brokers) {
			if len(w.client.Brokers().Brokers) > 0 {
				t.Error("the change shows before it was told")
			}
			told = append(told, b)
		})
		w.run()
		time.Sleep(5 * time.Minute)
		got := w.client.Brokers()
		if got.ClusterID != "cluster" || !slices.Equal(ids(got), []int32{0, 1, 2}) || got.Brokers[1].Port != 9093 || len(told) != 1 {
			t.Errorf("%+v, told %d times", got, len(told))
		}
		if since := time.Since(got.At); since > 30*time.Second {
			t.Errorf("%v old", since)
		}
		asks := w.asked()
		if len(asks) < 10 || len(asks) > 12 {
			t.Errorf("asked %d times in 5 minutes", len(asks))
		}
		for _, ask := range asks {
			if ask.Topics == nil || len(ask.Topics) > 0 || ask.AllowAutoTopicCreation {
				t.Errorf("asked for topics: %+v", ask)
			}
		}
		if w.logged() != "" {
			t.Error(w.logged())
		}
	})
}

func TestNewBrokerIsSeenAtOnceWhenNudged(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(1)
		w.run()
		time.Sleep(time.Second)
		var told []int32
		w.client.OnBrokers(func(b upstream.Brokers) { told = ids(b) })
		if _, _, err := w.kafka.AddNode(7, 9099); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if got := ids(w.client.Brokers()); !slices.Equal(got, []int32{0}) {
			t.Fatalf("%v before anybody asked", got)
		}
		w.client.Nudge()
		time.Sleep(250 * time.Millisecond)
		if got := ids(w.client.Brokers()); !slices.Equal(got, []int32{0, 7}) || !slices.Equal(told, got) {
			t.Errorf("%v, told %v", got, told)
		}
		w.asked()
		for range 1000 {
			w.client.Nudge()
			time.Sleep(time.Millisecond)
		}
		if n := len(w.asked()); n > 5 {
			t.Errorf("asked %d times in a second", n)
		}
	})
}

func TestUpstreamThatIsDownAtStartIsAwaited(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.run()
		time.Sleep(time.Minute)
		if n := strings.Count(w.logged(), "\n"); n != 1 || !strings.Contains(w.logged(), seed) {
			t.Errorf("%d lines:\n%s", n, w.logged())
		}
		if got := w.client.Brokers(); len(got.Brokers) != 0 || got.ControllerID != -1 {
			t.Errorf("%+v", got)
		}
		if took, err := w.refresh([]string{"orders"}); err == nil || took > 2*time.Second {
			t.Errorf("refreshed after %v: %v", took, err)
		}
		w.with(1)
		time.Sleep(7 * time.Second)
		if got := ids(w.client.Brokers()); !slices.Equal(got, []int32{0}) {
			t.Errorf("%v", got)
		}
		time.Sleep(time.Minute)
		if n := strings.Count(w.logged(), "\n"); n != 2 || !strings.Contains(w.logged(), "answers again") {
			t.Errorf("%d lines:\n%s", n, w.logged())
		}
	})
}

func TestBrokersStayKnownWhenTheUpstreamGoes(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(2, kfake.SeedTopics(2, "orders"))
		w.run()
		if _, err := w.refresh([]string{"orders"}); err != nil {
			t.Fatal(err)
		}
		w.kafka.Close()
		w.kafka = nil
		time.Sleep(10 * time.Minute)
		if got := ids(w.client.Brokers()); !slices.Equal(got, []int32{0, 1}) {
			t.Errorf("%v", got)
		}
		if _, n, known := w.client.Topic("orders"); !known || n != 2 {
			t.Error("the topic was forgotten")
		}
		if n := strings.Count(w.logged(), "\n"); n < 1 || n > 3 {
			t.Errorf("%d lines in 10 minutes:\n%s", n, w.logged())
		}
	})
}

func TestAllSeedsAreTriedThoughTheFirstIsSilent(t *testing.T) {
	var w *world
	dial := func(ctx context.Context, network, host string) (net.Conn, error) {
		switch host {
		case "silent:9092":
			<-ctx.Done()
			return nil, ctx.Err()
		case "refused:9092":
			return nil, errors.New("connection refused")
		}
		return w.network.DialContext(ctx, network, host)
	}
	bubble(t, dial, []string{"silent:9092", "refused:9092", seed}, func(world *world) {
		w = world
		w.with(1)
		w.run()
		time.Sleep(4 * time.Second)
		if got := ids(w.client.Brokers()); !slices.Equal(got, []int32{0}) {
			t.Errorf("%v; log: %s", got, w.logged())
		}
	})
}

func TestUpstreamThatSpeaksNoKafkaIsNamedOnce(t *testing.T) {
	for what, reply := range map[string]string{
		"HTTP": "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "TLS": "\x15\x03\x03\x00\x02\x02\x46", "closes": "", "short": "\x00\x00\x00\x01x",
	} {
		t.Run(what, func(t *testing.T) {
			dial := func(context.Context, string, string) (net.Conn, error) {
				ours, theirs := net.Pipe()
				go func() {
					defer theirs.Close()
					if n, err := theirs.Read(make([]byte, 1000)); n == 0 || err != nil {
						return
					}
					_, _ = io.WriteString(theirs, reply)
				}()
				return ours, nil
			}
			bubble(t, dial, []string{seed}, func(w *world) {
				w.run()
				time.Sleep(time.Minute)
				if n := strings.Count(w.logged(), "\n"); n != 1 || !strings.Contains(w.logged(), seed) {
					t.Errorf("%d lines:\n%s", n, w.logged())
				}
			})
		})
	}
}

func TestEmptyListOfBrokersIsNotBelieved(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(2)
		w.run()
		time.Sleep(time.Second)
		w.kafka.ControlKey(3, func(req kmsg.Request) (kmsg.Response, error, bool) {
			w.kafka.KeepControl()
			return req.ResponseKind(), nil, true
		})
		time.Sleep(2 * time.Minute)
		if got := ids(w.client.Brokers()); !slices.Equal(got, []int32{0, 1}) {
			t.Errorf("%v", got)
		}
	})
}

func TestTopicsAreKnownByNameAndId(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(1, kfake.SeedTopics(3, "orders"), kfake.SeedTopics(2, "payments"), kfake.AllowAutoTopicCreation())
		w.run()
		if _, _, known := w.client.Topic("orders"); known {
			t.Error("known before anybody asked")
		}
		if _, err := w.refresh([]string{"orders", "nope"}, w.kafka.TopicInfo("payments").TopicID, [16]byte{1}); err != nil {
			t.Fatal(err)
		}
		for name, partitions := range map[string]int32{"orders": 3, "payments": 2} {
			id, n, known := w.client.Topic(name)
			if want := w.kafka.TopicInfo(name).TopicID; !known || n != partitions || id != want {
				t.Errorf("%s: %x, %d, %v", name, id, n, known)
			}
			if got, known := w.client.TopicName(id); got != name || !known {
				t.Errorf("%x is %q", id, got)
			}
		}
		if _, _, known := w.client.Topic("nope"); known || w.kafka.TopicInfo("nope") != nil {
			t.Error("a topic was made by asking for it")
		}
		if name, known := w.client.TopicName([16]byte{1}); known {
			t.Errorf("unknown id is %q", name)
		}
		if _, err := w.refresh(nil); err != nil {
			t.Errorf("asking for nothing: %v", err)
		}
	})
}

func TestDeletedAndRecreatedTopicsAreNoticed(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(1, kfake.SeedTopics(3, "orders"))
		w.run()
		if _, err := w.refresh([]string{"orders"}); err != nil {
			t.Fatal(err)
		}
		before, _, _ := w.client.Topic("orders")
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(w.kafka.DeleteTopic("orders"))
		must(w.kafka.CreateTopic("orders", 5, nil))
		if _, err := w.refresh([]string{"orders"}); err != nil {
			t.Fatal(err)
		}
		id, n, known := w.client.Topic("orders")
		if !known || n != 5 || id == before {
			t.Errorf("recreated: %x, %d, %v", id, n, known)
		}
		if name, known := w.client.TopicName(before); known {
			t.Errorf("the id of the deleted topic is still %q", name)
		}
		must(w.kafka.DeleteTopic("orders"))
		if _, err := w.refresh(nil, id); err != nil {
			t.Fatal(err)
		}
		if _, _, known := w.client.Topic("orders"); known {
			t.Error("still known, though its id is gone")
		}
		must(w.kafka.CreateTopic("orders", 1, nil))
		if _, err := w.refresh([]string{"orders"}); err != nil {
			t.Fatal(err)
		}
		must(w.kafka.DeleteTopic("orders"))
		time.Sleep(31 * time.Second)
		if _, _, known := w.client.Topic("orders"); known {
			t.Error("still known half a minute after it was deleted")
		}
	})
}

func TestTopicsThatNobodyNeedsAreForgotten(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(1, kfake.SeedTopics(3, "orders", "payments"))
		w.run()
		if _, err := w.refresh([]string{"orders", "payments"}); err != nil {
			t.Fatal(err)
		}
		for range 3 * 60 {
			time.Sleep(time.Minute)
			if _, _, known := w.client.Topic("orders"); !known {
				t.Fatal("forgotten although it is used")
			}
		}
		w.asked()
		time.Sleep(time.Minute)
		for _, ask := range w.asked() {
			for _, topic := range ask.Topics {
				if *topic.Topic != "orders" {
					t.Errorf("still asks for %s", *topic.Topic)
				}
			}
		}
		if _, _, known := w.client.Topic("payments"); known {
			t.Error("payments is still known")
		}
	})
}

func TestManyRefreshesShareAFewRequests(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(1, kfake.SeedTopics(1, "orders"))
		w.run()
		time.Sleep(time.Second)
		w.asked()
		var answered atomic.Int32
		for i := range 1000 {
			w.client.Refresh([]string{"orders", fmt.Sprint("nope-", i)}, nil, func(err error) {
				if err == nil {
					answered.Add(1)
				}
			})
		}
		time.Sleep(time.Second)
		if n, asks := answered.Load(), len(w.asked()); n != 1000 || asks > 100 {
			t.Errorf("%d answered, by %d requests", n, asks)
		}
	})
}

// mute is a connection whose other end hears nothing any more once it is muted.
type mute struct {
	net.Conn
	muted *atomic.Bool
}

func (m mute) Write(p []byte) (int, error) {
	if m.muted.Load() {
		return len(p), nil
	}
	return m.Conn.Write(p)
}

func TestRefreshGivesUpAfterTwoSeconds(t *testing.T) {
	var w *world
	var muted atomic.Bool
	dial := func(ctx context.Context, network, host string) (net.Conn, error) {
		conn, err := w.network.DialContext(ctx, network, host)
		return mute{conn, &muted}, err
	}
	bubble(t, dial, []string{seed}, func(world *world) {
		w = world
		w.with(1, kfake.SeedTopics(1, "orders"))
		w.run()
		time.Sleep(time.Second)
		muted.Store(true)
		for range 3 {
			if took, err := w.refresh([]string{"orders"}); err == nil || took > 2*time.Second {
				t.Errorf("after %v: %v", took, err)
			}
		}
		muted.Store(false)
		time.Sleep(10 * time.Second)
		if took, err := w.refresh([]string{"orders"}); err != nil {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

// Two of three brokers are silent, then refuse: whoever asks still gets an answer, and soon.
func TestOneLiveBrokerIsEnough(t *testing.T) {
	var w *world
	var muted, refused atomic.Bool
	dial := func(ctx context.Context, network, host string) (net.Conn, error) {
		lives := strings.HasSuffix(host, ":9094")
		if refused.Load() && !lives {
			return nil, &net.OpError{Op: "dial", Err: errors.New("refused")}
		}
		conn, err := w.network.DialContext(ctx, network, host)
		if err != nil || lives {
			return conn, err
		}
		return mute{conn, &muted}, nil
	}
	bubble(t, dial, []string{seed, "127.0.0.1:9093"}, func(world *world) {
		w = world
		w.with(3, kfake.SeedTopics(1, "orders"))
		w.run()
		for range 5 { // until each broker has a connection
			if _, err := w.refresh([]string{"orders"}); err != nil {
				t.Fatal(err)
			}
		}
		for what, flag := range map[string]*atomic.Bool{"silent": &muted, "refused": &refused} {
			flag.Store(true)
			for range 20 {
				if took, err := w.refresh([]string{"orders"}); err != nil || took > 1900*time.Millisecond {
					t.Errorf("%s, after %v: %v", what, took, err)
				}
				time.Sleep(time.Second)
			}
			flag.Store(false)
			time.Sleep(10 * time.Second)
		}
	})
}

func TestErrorOfOneTopicLeavesWhatWasKnown(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(1, kfake.SeedTopics(1, "orders"))
		w.run()
		if _, err := w.refresh([]string{"orders"}); err != nil {
			t.Fatal(err)
		}
		w.kafka.ControlKey(3, func(req kmsg.Request) (kmsg.Response, error, bool) {
			w.kafka.KeepControl()
			resp := req.ResponseKind().(*kmsg.MetadataResponse)
			b := kmsg.NewMetadataResponseBroker()
			b.Host, b.Port = "127.0.0.1", 9092
			resp.Brokers = append(resp.Brokers, b)
			topic := kmsg.NewMetadataResponseTopic()
			topic.Topic, topic.ErrorCode = kmsg.StringPtr("orders"), kerr.UnknownServerError.Code
			resp.Topics = append(resp.Topics, topic)
			return resp, nil, true
		})
		if _, err := w.refresh([]string{"orders"}); err != nil {
			t.Fatal(err)
		}
		if _, _, known := w.client.Topic("orders"); !known {
			t.Error("forgotten for an error that says nothing about it")
		}
	})
}

// Below Metadata 4 a topic is created by asking for it, below 12 it cannot be asked for by its id: then all topics
// are listed, which needs neither.
func TestOldBrokersAreAskedForAllTopics(t *testing.T) {
	for _, c := range []struct {
		metadata       int16
		names, byID    bool
		listed, hasIDs bool
	}{
		{metadata: 1, names: true, listed: true},
		{metadata: 3, names: true, listed: true},
		{metadata: 4, names: true},
		{metadata: 9, names: true, byID: true},
		{metadata: 10, names: true, hasIDs: true},
		{metadata: 10, byID: true, listed: true, hasIDs: true},
		{metadata: 11, names: true, byID: true, listed: true, hasIDs: true},
		{metadata: 12, names: true, byID: true, hasIDs: true},
	} {
		t.Run(fmt.Sprintf("Metadata %d, names %v, ids %v", c.metadata, c.names, c.byID), func(t *testing.T) {
			bubble(t, nil, []string{seed}, func(w *world) {
				old := kversion.V4_3_0()
				old.SetMaxKeyVersion(3, c.metadata)
				w.with(1, kfake.SeedTopics(3, "orders", "payments"), kfake.MaxVersions(old), kfake.AllowAutoTopicCreation())
				w.run()
				var names []string
				var byID [][16]byte
				if c.names {
					names = []string{"orders", "nope"}
				}
				if c.byID {
					byID = [][16]byte{w.kafka.TopicInfo("payments").TopicID}
				}
				if _, err := w.refresh(names, byID...); err != nil {
					t.Fatal(err)
				}
				id, n, known := w.client.Topic("orders")
				if known != c.names || known && (n != 3 || (id != [16]byte{}) != c.hasIDs) {
					t.Errorf("orders: %x, %d, %v", id, n, known)
				}
				if _, known := w.client.TopicName(w.kafka.TopicInfo("payments").TopicID); known != (c.byID && c.hasIDs) {
					t.Errorf("payments by its id: %v", known)
				}
				if w.kafka.TopicInfo("nope") != nil {
					t.Error("a topic was made by asking for it")
				}
				listed := false
				for _, ask := range w.asked() {
					listed = listed || ask.Topics == nil
				}
				if listed != c.listed {
					t.Errorf("listed all topics: %v", listed)
				}
			})
		})
	}
}

func TestCloseEndsRunAndAllWaiting(t *testing.T) {
	bubble(t, func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}, []string{seed}, func(w *world) {
		w.run()
		var errs [3]error
		var answers atomic.Int32
		for i := range errs {
			w.client.Refresh([]string{"orders"}, nil, func(err error) { errs[i] = err; answers.Add(1) })
		}
		time.Sleep(100 * time.Millisecond)
		w.client.Close()
		<-w.ended
		time.Sleep(time.Minute)
		if answers.Load() != 3 || slices.Contains(errs[:], nil) {
			t.Errorf("%d answers: %v", answers.Load(), errs)
		}
		if _, err := w.refresh([]string{"orders"}); !errors.Is(err, upstream.ErrClosed) {
			t.Error(err)
		}
	})
}

func TestEndOfContextEndsRun(t *testing.T) {
	bubble(t, nil, []string{seed}, func(w *world) {
		w.with(1)
		w.run()
		time.Sleep(time.Second)
		w.stop()
		<-w.ended
		if took, err := w.refresh([]string{"orders"}); err == nil || took > 0 {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

func TestConfigurationThatCannotWorkIsRefused(t *testing.T) {
	for _, seeds := range [][]string{nil, {""}, {"broker"}, {"broker:9092", "b:1:2"}} {
		if _, err := upstream.New(upstream.Config{Seeds: seeds}); err == nil {
			t.Errorf("%q was accepted", seeds)
		}
	}
}

// Real sockets and no virtual time: for the race detector.
func TestConcurrentUse(t *testing.T) {
	kafka, err := kfake.NewCluster(kfake.NumBrokers(3), kfake.SeedTopics(2, "orders", "payments"))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	client, err := upstream.New(upstream.Config{Seeds: kafka.ListenAddrs(), ClientID: "test"})
	if err != nil {
		t.Fatal(err)
	}
	client.OnBrokers(func(upstream.Brokers) {})
	var run, users sync.WaitGroup
	run.Go(func() { client.Run(t.Context()) })
	for i := range 8 {
		users.Go(func() {
			for range 50 {
				done := make(chan error, 1)
				client.Refresh([]string{"orders", fmt.Sprint("topic-", i)}, nil, func(err error) { done <- err })
				if err := <-done; err != nil {
					t.Error(err)
				}
				id, _, known := client.Topic("orders")
				if name, ok := client.TopicName(id); !known || !ok || name != "orders" {
					t.Errorf("orders: %x %v, %q", id, known, name)
				}
				client.Nudge()
				_ = client.Brokers()
			}
		})
	}
	users.Wait()
	client.Close()
	run.Wait()
}
