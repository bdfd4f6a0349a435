package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"
)

// Limits and settings of the embedded Kafka.
const (
	kafkaDataLimit    = 512 << 20 // bytes of all topics; then each large partition loses its older half
	kafkaSegment      = 1 << 20   // what is deleted is given back in files of this size
	kafkaCheckEvery   = 8 << 20   // bytes received between two looks at the limit, which is kept twice as far away
	kafkaPartitions   = 4         // of a topic created on demand
	kafkaFrameLimit   = 128 << 20 // of a request; the proxy in front allows less
	kafkaClusterID    = "offset-sidecar-dev-kfake"
	kafkaReadBuffered = 64 << 10
)

// embeddedKafka is franz-go's kfake with what dev needs besides: an end to its data, and no way for a client to crash it.
type embeddedKafka struct {
	cluster  *kfake.Cluster
	logger   *slog.Logger
	limit    int64
	client   *kgo.Client // asks for the names of topics
	received atomic.Int64
	grown    chan struct{} // holds a token when kafkaCheckEvery more bytes have come
	stop     context.CancelFunc
	done     sync.WaitGroup
	closing  sync.Once
}

// startKafka starts one broker on a free loopback port, which keeps its data in dir, or in memory if dir is empty.
func startKafka(dir string, limit int64, logger *slog.Logger) (*embeddedKafka, error) {
	k := &embeddedKafka{logger: logger, limit: limit, grown: make(chan struct{}, 1)}
	options := []kfake.Opt{
		kfake.NumBrokers(1),
		kfake.ClusterID(kafkaClusterID),
		kfake.AllowAutoTopicCreation(),
		kfake.DefaultNumPartitions(kafkaPartitions),
		kfake.MaxVersions(kafkaVersions()),
		kfake.BrokerConfigs(map[string]string{"log.segment.bytes": fmt.Sprint(kafkaSegment)}),
		kfake.ListenFn(k.listen),
	}
	if dir != "" {
		options = append(options, kfake.DataDir(dir))
	}
	cluster, err := kfake.NewCluster(options...)
	if err != nil {
		return nil, fmt.Errorf("starting the embedded Kafka: %w", err)
	}
	k.cluster = cluster
	if k.client, err = kgo.NewClient(kgo.SeedBrokers(cluster.ListenAddrs()...), kgo.ClientID("offset-sidecar-dev")); err != nil {
		cluster.Close()
		return nil, fmt.Errorf("starting the embedded Kafka: %w", err)
	}
	cluster.ControlKey(int16(kmsg.CreateTopics), k.createTopics)
	ctx, stop := context.WithCancel(context.Background())
	k.stop = stop
	k.done.Go(func() { k.boundData(ctx) })
	k.grown <- struct{}{} // what an earlier process left
	return k, nil
}

// kafkaVersions is Kafka 4.3 without the two replies that kfake gives null arrays in, which the Java client's parser
// refuses: CreateTopics from 5 on (configs) and DescribeTopicPartitions (eligible leader replicas). Clients use older
// CreateTopics and Metadata in their place.
func kafkaVersions() *kversion.Versions {
	v := kversion.V4_3_0()
	v.SetMaxKeyVersion(int16(kmsg.CreateTopics), 4)
	v.SetMaxKeyVersion(int16(kmsg.DescribeTopicPartitions), -1)
	return v
}

func (k *embeddedKafka) addrs() []string { return k.cluster.ListenAddrs() }

// Close stops the broker; with a directory its data is kept. Only the first call does anything.
func (k *embeddedKafka) Close() {
	k.closing.Do(func() {
		k.stop()
		k.done.Wait()
		k.client.Close()
		k.cluster.Close()
	})
}

// boundData keeps the topics' data below the limit: one goroutine, until Close.
func (k *embeddedKafka) boundData(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.grown:
		}
		if err := k.trim(ctx); err != nil && ctx.Err() == nil {
			k.logger.Warn("embedded Kafka: the size of its data is not known", "err", err)
		}
	}
}

// kept is a partition as trim sees it.
type kept struct {
	topic     string
	partition int32
	bytes     int64 // of its files, at most
	low, high int64
}

// trim deletes the older half of the largest partition until all are below the limit.
func (k *embeddedKafka) trim(ctx context.Context) error {
	partitions, total, err := k.measure(ctx)
	most := k.limit - 2*kafkaCheckEvery // one look's worth may come before the next, and some is still on its way
	if err != nil || total <= most {
		return err
	}
	deleted := int64(0)
	for total-deleted > most*7/8 && len(partitions) > 0 {
		i := largest(partitions)
		p := &partitions[i]
		before, to := p.bytes, p.low+(p.high-p.low+1)/2
		if before <= 2*kafkaSegment {
			to = p.high // smaller than what is given back at once
		}
		if err := k.cluster.DeleteRecords(p.topic, p.partition, to); err != nil {
			return fmt.Errorf("deleting old records of %s: %w", p.topic, err)
		}
		info := k.cluster.PartitionInfo(p.topic, p.partition)
		if info == nil || info.NumBytes == 0 {
			partitions, deleted = slices.Delete(partitions, i, i+1), deleted+before
			continue
		}
		*p = keptOf(p.topic, info)
		deleted += before - p.bytes
	}
	k.logger.Info("embedded Kafka: the oldest records were deleted", "limit_bytes", k.limit, "deleted_bytes", deleted)
	return nil
}

func largest(partitions []kept) (at int) {
	for i := range partitions {
		if partitions[i].bytes > partitions[at].bytes {
			at = i
		}
	}
	return at
}

func keptOf(topic string, info *kfake.PartitionInfo) kept {
	size := info.NumBytes
	if info.LogStartOffset > 0 {
		size += min(size, kafkaSegment) // deleted records at the head of the oldest file
	}
	return kept{topic, info.Partition, size, info.LogStartOffset, info.HighWatermark}
}

// measure lists all partitions that hold data.
func (k *embeddedKafka) measure(ctx context.Context) (partitions []kept, total int64, err error) {
	request := kmsg.NewPtrMetadataRequest() // null topics: all
	response, err := request.RequestWith(ctx, k.client)
	if err != nil {
		return nil, 0, fmt.Errorf("listing topics: %w", err)
	}
	for _, topic := range response.Topics {
		for _, info := range k.cluster.PartitionInfos(*topic.Topic) {
			if info.NumBytes > 0 {
				p := keptOf(*topic.Topic, info)
				partitions, total = append(partitions, p), total+p.bytes
			}
		}
	}
	return partitions, total, nil
}

func (k *embeddedKafka) listen(network, addr string) (net.Listener, error) {
	l, err := net.Listen(network, addr)
	if err != nil {
		return nil, err
	}
	return &guardedListener{l, k}, nil
}

// guardedListener keeps from kfake what it cannot stand: it panics at an api key it does not know, and allocates whatever
// length is announced. Such a connection ends, as a broker ends it.
type guardedListener struct {
	net.Listener
	kafka *embeddedKafka
}

func (l *guardedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &guardedConn{Conn: c, kafka: l.kafka, in: bufio.NewReaderSize(c, kafkaReadBuffered)}, nil
}

// guardedConn looks at the size and api key of each request before it is read on. Reads come from one goroutine.
type guardedConn struct {
	net.Conn
	kafka *embeddedKafka
	in    *bufio.Reader
	left  int // bytes of the request under way
}

func (c *guardedConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		head, err := c.in.Peek(6)
		if err != nil {
			return 0, err
		}
		size, key := binary.BigEndian.Uint32(head), int16(binary.BigEndian.Uint16(head[4:]))
		if size < 8 || size > kafkaFrameLimit || kmsg.RequestForKey(key) == nil {
			c.kafka.logger.Warn("embedded Kafka: connection closed", "size", size, "api", key)
			return 0, io.EOF
		}
		c.left = int(size) + 4
		c.kafka.count(int64(c.left))
	}
	n, err := c.in.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// count notes received bytes and wakes boundData now and then.
func (k *embeddedKafka) count(n int64) {
	if after := k.received.Add(n); after/kafkaCheckEvery != (after-n)/kafkaCheckEvery {
		select {
		case k.grown <- struct{}{}:
		default:
		}
	}
}

// createTopics answers the versions of CreateTopics that kafkaVersions hides, for clients that never ask which there
// are: as version 4, in the newer form.
func (k *embeddedKafka) createTopics(asked kmsg.Request) (kmsg.Response, error, bool) {
	req := asked.(*kmsg.CreateTopicsRequest)
	if req.Version <= 4 {
		return nil, nil, false
	}
	k.cluster.KeepControl()
	older := *req
	older.Version = 4
	var made *kmsg.CreateTopicsResponse
	var err error
	k.cluster.SleepControl(func() { made, err = older.RequestWith(context.Background(), k.client) })
	if err != nil {
		return nil, err, true
	}
	resp := req.ResponseKind().(*kmsg.CreateTopicsResponse)
	resp.ThrottleMillis, resp.Topics = made.ThrottleMillis, made.Topics
	for i := range resp.Topics {
		resp.Topics[i].Configs = []kmsg.CreateTopicsResponseTopicConfig{}
		resp.Topics[i].NumPartitions, resp.Topics[i].ReplicationFactor = -1, -1
	}
	return resp, nil, true
}
