package group

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// The error codes that the rules of groups use.
var (
	errServer               = kerr.UnknownServerError.Code
	errUnknownPartition     = kerr.UnknownTopicOrPartition.Code
	errMetadataTooLarge     = kerr.OffsetMetadataTooLarge.Code
	errIllegalGeneration    = kerr.IllegalGeneration.Code
	errInconsistentProtocol = kerr.InconsistentGroupProtocol.Code
	errInvalidGroup         = kerr.InvalidGroupID.Code
	errUnknownMember        = kerr.UnknownMemberID.Code
	errInvalidSession       = kerr.InvalidSessionTimeout.Code
	errRebalance            = kerr.RebalanceInProgress.Code
	errUnsupportedVersion   = kerr.UnsupportedVersion.Code
	errInvalidRequest       = kerr.InvalidRequest.Code
	errNonEmpty             = kerr.NonEmptyGroup.Code
	errGroupNotFound        = kerr.GroupIDNotFound.Code
	errMemberIDRequired     = kerr.MemberIDRequired.Code
	errMaxSize              = kerr.GroupMaxSizeReached.Code
	errFencedInstance       = kerr.FencedInstanceID.Code
	errSubscribed           = kerr.GroupSubscribedToTopic.Code
	errNotAvailable         = kerr.CoordinatorNotAvailable.Code
	errUnknownTopicID       = kerr.UnknownTopicID.Code
)

// ErrorResponse answers a whole request with one error, in the shape its api and version have for that (the
// getErrorResponse of Kafka's request classes).
func ErrorResponse(req kmsg.Request, code int16) kmsg.Response {
	switch req := req.(type) {
	case *kmsg.JoinGroupRequest:
		return joinError(req.Version, "", code)
	case *kmsg.SyncGroupRequest:
		return syncError(req.Version, code)
	case *kmsg.HeartbeatRequest:
		resp := req.ResponseKind().(*kmsg.HeartbeatResponse)
		resp.ErrorCode = code
		return resp
	case *kmsg.LeaveGroupRequest:
		resp := req.ResponseKind().(*kmsg.LeaveGroupResponse)
		resp.ErrorCode = code
		return resp
	case *kmsg.OffsetCommitRequest:
		return commitError(req, code)
	case *kmsg.OffsetFetchRequest:
		return fetchError(req, code)
	case *kmsg.OffsetDeleteRequest:
		resp := req.ResponseKind().(*kmsg.OffsetDeleteResponse)
		resp.ErrorCode = code
		return resp
	case *kmsg.ListGroupsRequest:
		resp := req.ResponseKind().(*kmsg.ListGroupsResponse)
		resp.ErrorCode = code
		return resp
	case *kmsg.DescribeGroupsRequest:
		resp := req.ResponseKind().(*kmsg.DescribeGroupsResponse)
		for _, id := range req.Groups {
			g := kmsg.NewDescribeGroupsResponseGroup()
			g.Group, g.ErrorCode = id, code
			resp.Groups = append(resp.Groups, g)
		}
		return resp
	case *kmsg.DeleteGroupsRequest:
		resp := req.ResponseKind().(*kmsg.DeleteGroupsResponse)
		for _, id := range req.Groups {
			resp.Groups = append(resp.Groups, kmsg.DeleteGroupsResponseGroup{Group: id, ErrorCode: code})
		}
		return resp
	default:
		return req.ResponseKind()
	}
}

func joinError(version int16, memberID string, code int16) *kmsg.JoinGroupResponse {
	resp := kmsg.NewPtrJoinGroupResponse()
	resp.Version, resp.MemberID, resp.ErrorCode = version, memberID, code
	if version < 7 { // the field is nullable from v7 on (JoinGroupResponse)
		resp.Protocol = new(string)
	}
	return resp
}

func syncError(version, code int16) *kmsg.SyncGroupResponse {
	resp := kmsg.NewPtrSyncGroupResponse()
	resp.Version, resp.ErrorCode, resp.MemberAssignment = version, code, []byte{}
	return resp
}

func commitError(req *kmsg.OffsetCommitRequest, code int16) *kmsg.OffsetCommitResponse {
	resp := req.ResponseKind().(*kmsg.OffsetCommitResponse)
	for _, t := range req.Topics {
		rt := kmsg.OffsetCommitResponseTopic{Topic: t.Topic, TopicID: t.TopicID}
		for _, p := range t.Partitions {
			rt.Partitions = append(rt.Partitions, kmsg.OffsetCommitResponseTopicPartition{Partition: p.Partition, ErrorCode: code})
		}
		resp.Topics = append(resp.Topics, rt)
	}
	return resp
}

// fetchError has a top-level error from v2 on and one for each group from v8 on; v1 has only its partitions.
func fetchError(req *kmsg.OffsetFetchRequest, code int16) *kmsg.OffsetFetchResponse {
	resp := req.ResponseKind().(*kmsg.OffsetFetchResponse)
	switch {
	case req.Version >= 8:
		for _, g := range req.Groups {
			resp.Groups = append(resp.Groups, kmsg.OffsetFetchResponseGroup{Group: g.Group, ErrorCode: code})
		}
	case req.Version >= 2:
		resp.ErrorCode = code
	default:
		for _, t := range req.Topics {
			rt := kmsg.OffsetFetchResponseTopic{Topic: t.Topic}
			for _, p := range t.Partitions {
				rt.Partitions = append(rt.Partitions, kmsg.OffsetFetchResponseTopicPartition{
					Partition: p, Offset: -1, LeaderEpoch: -1, Metadata: new(string), ErrorCode: code,
				})
			}
			resp.Topics = append(resp.Topics, rt)
		}
	}
	return resp
}
