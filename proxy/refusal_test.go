package proxy

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Every refused key has an answer that carries an error, in each version that can be decoded.
func TestRefusedRequestsGetAnErrorOfTheirOwnForm(t *testing.T) {
	for key, r := range routes {
		if r.action != refuse {
			continue
		}
		want := int16(35)
		if key == 25 || key == 28 {
			want = 43
		}
		for version := int16(0); version <= kmsg.RequestForKey(key).MaxVersion(); version++ {
			resp := refusal(asking(key, version))
			if resp.Key() != key || resp.GetVersion() != version {
				t.Fatalf("api key %d, version %d: answered as %d, %d", key, version, resp.Key(), resp.GetVersion())
			}
			again := kmsg.ResponseForKey(key)
			again.SetVersion(version)
			if err := again.ReadFrom(resp.AppendTo(nil)); err != nil {
				t.Fatalf("api key %d, version %d: %v", key, version, err)
			}
			if text := fmt.Sprintf("%+v", again); !bytes.Contains([]byte(text), fmt.Appendf(nil, "ErrorCode:%d ", want)) {
				t.Errorf("%s version %d: no error %d in %s", kmsg.NameForKey(key), version, want, text)
			}
		}
	}
}

// asking makes a request of that key about one group.
func asking(key, version int16) kmsg.Request {
	req := kmsg.RequestForKey(key)
	req.SetVersion(version)
	switch req := req.(type) {
	case *kmsg.ConsumerGroupDescribeRequest:
		req.Groups = []string{"g"}
	case *kmsg.ShareGroupDescribeRequest:
		req.GroupIDs = []string{"g"}
	case *kmsg.StreamsGroupDescribeRequest:
		req.Groups = []string{"g"}
	case *kmsg.DescribeShareGroupOffsetsRequest:
		req.Groups = append(req.Groups, kmsg.NewDescribeShareGroupOffsetsRequestGroup())
	case *kmsg.TxnOffsetCommitRequest:
		t := kmsg.NewTxnOffsetCommitRequestTopic()
		t.Topic = "t"
		t.Partitions = append(t.Partitions, kmsg.NewTxnOffsetCommitRequestTopicPartition())
		req.Topics = append(req.Topics, t)
	}
	return req
}

func TestEachPartitionOfATransactionsOffsetsIsRefused(t *testing.T) {
	req := asking(28, 5).(*kmsg.TxnOffsetCommitRequest)
	req.Topics[0].Partitions = append(req.Topics[0].Partitions, req.Topics[0].Partitions[0])
	req.Topics[0].Partitions[1].Partition = 4
	resp := refusal(req).(*kmsg.TxnOffsetCommitResponse)
	if len(resp.Topics) != 1 || resp.Topics[0].Topic != "t" || len(resp.Topics[0].Partitions) != 2 || resp.Topics[0].Partitions[1].Partition != 4 {
		t.Errorf("%+v", resp)
	}
}
