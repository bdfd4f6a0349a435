package main

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

func embedded(t *testing.T, dir string, limit int64) *embeddedKafka {
	t.Helper()
	k, err := startKafka(dir, limit, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func newClient(t *testing.T, addr string, options ...kgo.Opt) *kgo.Client {
	t.Helper()
	c, err := kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(addr), kgo.AllowAutoTopicCreation()}, options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// eventually waits for a condition that other goroutines bring about.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not within 20 s: " + what)
		}
	}
}

func TestEmbeddedKafkaDeletesItsOldestRecordsAtItsLimit(t *testing.T) {
	for name, dir := range map[string]string{"in memory": "", "on disk": t.TempDir()} {
		t.Run(name, func(t *testing.T) {
			const limit = 48 << 20
			k := embedded(t, dir, limit)
			client := newClient(t, k.addrs()[0], kgo.ProducerBatchCompression(kgo.NoCompression()))
			value := make([]byte, 64<<10)
			for range 2048 { // 128 MiB
				client.Produce(context.Background(), &kgo.Record{Topic: "many", Value: value}, nil)
			}
			if err := client.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
			eventually(t, "data below the limit", func() bool {
				_, total, err := k.measure(context.Background())
				return err == nil && total <= limit
			})
			if _, total, _ := k.measure(context.Background()); total < limit/8 {
				t.Errorf("only %d of %d bytes are left", total, limit)
			}
		})
	}
}

// kfake panics at such a key, which would end dev.
func TestEmbeddedKafkaOutlivesAnUnknownAPIKey(t *testing.T) {
	k := embedded(t, "", kafkaDataLimit)
	for _, head := range [][]byte{
		{0, 0, 0, 10, 0x27, 0x0f, 0, 0, 0, 0, 0, 1, 0xff, 0xff},             // api key 9999
		{0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0},                                // 2 GiB
		{0, 0, 0, 2, 0, 3},                                                  // shorter than a header
		binary.BigEndian.AppendUint64([]byte("GET / HTTP/1.1\r\n\r\n"), 77), // not Kafka at all
	} {
		c, err := net.Dial("tcp", k.addrs()[0])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(head); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); err != nil && !isReset(err) {
			t.Errorf("% x: %v", head, err)
		}
		c.Close()
	}
	if err := newClient(t, k.addrs()[0]).Ping(context.Background()); err != nil {
		t.Errorf("the broker is gone: %v", err)
	}
}

// What the Java admin client cannot parse must not be shown, and everything else of kfake must be.
func TestEmbeddedKafkaHidesTheRepliesJavaCannotParse(t *testing.T) {
	k := embedded(t, "", kafkaDataLimit)
	response, err := kmsg.NewPtrApiVersionsRequest().RequestWith(context.Background(), newClient(t, k.addrs()[0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range response.ApiKeys {
		switch kmsg.Key(key.ApiKey) {
		case kmsg.CreateTopics:
			if key.MaxVersion > 4 {
				t.Errorf("CreateTopics %d: its configs are null", key.MaxVersion)
			}
		case kmsg.DescribeTopicPartitions:
			t.Error("DescribeTopicPartitions: its eligible leader replicas are null")
		}
	}
	if len(response.ApiKeys) < 50 {
		t.Errorf("only %d keys are shown", len(response.ApiKeys))
	}
}
