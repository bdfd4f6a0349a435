package proxy

import (
	"fmt"

	"github.com/offset-sidecar/offset-sidecar/proxy/wire"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// decodeRefused decodes a request that is refused. Of most a refusal shows nothing but their version: they are not
// looked into.
func decodeRefused(h wire.RequestHeader, frame []byte) (kmsg.Request, error) {
	switch h.APIKey {
	case 78, 79, 88, 91, 92, 93: // ShareFetch, ShareAcknowledge, StreamsGroupHeartbeat, (Alter|Delete)ShareGroupOffsets, StreamsGroupTopologyDescriptionUpdate
	default:
		return wire.DecodeRequest(h, frame)
	}
	req := kmsg.RequestForKey(h.APIKey)
	if req == nil || h.APIVersion > req.MaxVersion() {
		return nil, fmt.Errorf("%w: api key %d, version %d", wire.ErrVersion, h.APIKey, h.APIVersion)
	}
	req.SetVersion(h.APIVersion)
	return req, nil
}

// refusal answers the requests whose route is refuse, in the form of each.
//
// Offsets in transactions get UNSUPPORTED_FOR_MESSAGE_FORMAT, which ends the producer that sent them and nothing else:
// the Java client (TransactionManager's TxnOffsetCommitHandler by name, AddOffsetsToTxnHandler as any error it does not
// know), librdkafka (rd_kafka_txn_handle_AddOffsetsToTxn and _TxnOffsetCommit, both by name) and franz-go (failProducerID
// for what is not retriable) make it fatal, while other codes are retried or abort one transaction over and over.
// What is not advertised gets UNSUPPORTED_VERSION: group protocols, as from a Kafka that has them switched off, and
// SaslHandshake 0.
func refusal(req kmsg.Request) kmsg.Response {
	code := kerr.UnsupportedVersion.Code
	resp := req.ResponseKind()
	switch resp := resp.(type) {
	case *kmsg.SASLHandshakeResponse:
		resp.ErrorCode = code
	case *kmsg.AddOffsetsToTxnResponse:
		resp.ErrorCode = kerr.UnsupportedForMessageFormat.Code
	case *kmsg.TxnOffsetCommitResponse:
		refuseOffsets(req.(*kmsg.TxnOffsetCommitRequest), resp, kerr.UnsupportedForMessageFormat.Code)
	case *kmsg.ConsumerGroupHeartbeatResponse:
		resp.ErrorCode = code
	case *kmsg.ConsumerGroupDescribeResponse:
		for _, id := range req.(*kmsg.ConsumerGroupDescribeRequest).Groups {
			g := kmsg.NewConsumerGroupDescribeResponseGroup()
			g.Group, g.ErrorCode = id, code
			resp.Groups = append(resp.Groups, g)
		}
	case *kmsg.ShareGroupHeartbeatResponse:
		resp.ErrorCode = code
	case *kmsg.ShareGroupDescribeResponse:
		for _, id := range req.(*kmsg.ShareGroupDescribeRequest).GroupIDs {
			g := kmsg.NewShareGroupDescribeResponseGroup()
			g.GroupID, g.ErrorCode = id, code
			resp.Groups = append(resp.Groups, g)
		}
	case *kmsg.ShareFetchResponse:
		resp.ErrorCode = code
	case *kmsg.ShareAcknowledgeResponse:
		resp.ErrorCode = code
	case *kmsg.StreamsGroupHeartbeatResponse:
		resp.ErrorCode = code
	case *kmsg.StreamsGroupDescribeResponse:
		for _, id := range req.(*kmsg.StreamsGroupDescribeRequest).Groups {
			g := kmsg.NewStreamsGroupDescribeResponseGroup()
			g.Group, g.ErrorCode = id, code
			resp.Groups = append(resp.Groups, g)
		}
	case *kmsg.StreamsGroupTopologyDescriptionUpdateResponse:
		resp.ErrorCode = code
	case *kmsg.DescribeShareGroupOffsetsResponse:
		for _, asked := range req.(*kmsg.DescribeShareGroupOffsetsRequest).Groups {
			g := kmsg.NewDescribeShareGroupOffsetsResponseGroup()
			g.GroupID, g.ErrorCode = asked.GroupID, code
			resp.Groups = append(resp.Groups, g)
		}
	case *kmsg.AlterShareGroupOffsetsResponse:
		resp.ErrorCode = code
	case *kmsg.DeleteShareGroupOffsetsResponse:
		resp.ErrorCode = code
	}
	return resp
}

func refuseOffsets(req *kmsg.TxnOffsetCommitRequest, resp *kmsg.TxnOffsetCommitResponse, code int16) {
	for _, asked := range req.Topics {
		t := kmsg.NewTxnOffsetCommitResponseTopic()
		t.Topic, t.TopicID = asked.Topic, asked.TopicID
		for _, part := range asked.Partitions {
			p := kmsg.NewTxnOffsetCommitResponseTopicPartition()
			p.Partition, p.ErrorCode = part.Partition, code
			t.Partitions = append(t.Partitions, p)
		}
		resp.Topics = append(resp.Topics, t)
	}
}
