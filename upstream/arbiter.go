package upstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

// Decide gives the first proposal that was ever made under a name, by whomever: the first record of a topic of that name
// with one partition. Everybody reads the same one, so it decides. It is asked for once in a cluster's life: the topic
// is created where it is missing, and never expires.
//
// It needs the rights to describe, read, write and, once, create the topic. An error says nothing of what is decided.
func (c *Client) Decide(ctx context.Context, topic, proposal string) (string, error) {
	// A client of its own: it consumes, and gives up with ctx alone.
	kafka, err := kgo.NewClient(append(c.opts[:len(c.opts):len(c.opts)],
		kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{topic: {0: kgo.NewOffset().At(0)}}),
		kgo.RequiredAcks(kgo.AllISRAcks()), kgo.ProducerBatchCompression(kgo.NoCompression()),
	)...)
	if err != nil {
		return "", fmt.Errorf("configuring the client of the upstream: %w", err)
	}
	defer kafka.Close()
	winner, err := decide(ctx, kafka, topic, proposal)
	if err != nil {
		return "", fmt.Errorf("deciding by the topic %s of the upstream: %w", topic, err)
	}
	return winner, nil
}

func decide(ctx context.Context, kafka *kgo.Client, topic, proposal string) (string, error) {
	admin := kadm.NewClient(kafka)
	if err := createArbiter(ctx, admin, topic); err != nil {
		return "", err
	}
	var starts, ends kadm.ListedOffsets
	for { // a topic just created is not known everywhere at once
		var err error
		if starts, err = admin.ListStartOffsets(ctx, topic); err == nil {
			err = starts.Error()
		}
		if err == nil {
			if ends, err = admin.ListEndOffsets(ctx, topic); err == nil {
				err = ends.Error()
			}
		}
		if err == nil {
			break
		}
		if !kerr.IsRetriable(err) || !pause(ctx, firstPause) {
			return "", err
		}
	}
	if len(ends[topic]) != 1 {
		return "", fmt.Errorf("it has %d partitions: who came first can be told of one alone", len(ends[topic]))
	}
	if start, _ := starts.Lookup(topic, 0); start.Offset > 0 {
		return "", errors.New("its first record has been deleted, so it no longer tells who won: " +
			"if no sidecar of this cluster has any state left, delete the topic to have it decided anew")
	}
	if end, _ := ends.Lookup(topic, 0); end.Offset == 0 {
		if err := kafka.ProduceSync(ctx, &kgo.Record{Topic: topic, Value: []byte(proposal)}).FirstErr(); err != nil {
			return "", err
		}
	}
	for {
		fetches := kafka.PollRecords(ctx, 1)
		if err := fetches.Err0(); err != nil {
			return "", err
		}
		for _, record := range fetches.Records() {
			if record.Offset != 0 {
				return "", fmt.Errorf("its first record is missing: it begins with offset %d", record.Offset)
			}
			return string(record.Value), nil
		}
		if err := fetches.Err(); err != nil {
			return "", err
		}
	}
}

// createArbiter creates the topic where it is missing. Compaction or a retention time would change the decision.
func createArbiter(ctx context.Context, admin *kadm.Client, topic string) error {
	config := map[string]*string{}
	for key, value := range map[string]string{"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"} {
		config[key] = &value
	}
	created, err := admin.CreateTopic(ctx, 1, -1, config, topic)
	if err == nil {
		err = created.Err
	}
	if err == nil || errors.Is(err, kerr.TopicAlreadyExists) {
		return nil
	}
	// Who may not create it may still use one that an operator has created.
	topics, listErr := admin.ListTopics(ctx, topic)
	if listErr == nil && topics.Error() == nil && len(topics[topic].Partitions) > 0 {
		return nil
	}
	return fmt.Errorf("creating it (one partition, retention.ms and retention.bytes -1, not compacted): %w", err)
}

// pause waits, and says whether there is time left.
func pause(ctx context.Context, wait time.Duration) bool {
	select {
	case <-time.After(wait):
		return true
	case <-ctx.Done():
		return false
	}
}
