package proxy

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Kinds of coordinator, as FindCoordinator asks for them (FindCoordinatorRequest.CoordinatorType).
const (
	coordinatorOfTransaction = 1
	coordinatorOfShareGroup  = 2
)

// findsTransaction says that a FindCoordinator request must be forwarded: transactions are the upstream's. A request
// asks for one kind only, so none is partly ours.
func findsTransaction(req *kmsg.FindCoordinatorRequest) bool {
	return req.CoordinatorType == coordinatorOfTransaction
}

// findGroup answers a FindCoordinator request of every other kind. place names the node that the group's partition of
// __consumer_offsets lies on and our address for it; not ok while no broker is known. Any group has a coordinator, one
// named "" too.
func findGroup(req *kmsg.FindCoordinatorRequest, place func(group string) (nodeID int32, host string, port int32, ok bool)) *kmsg.FindCoordinatorResponse {
	resp := req.ResponseKind().(*kmsg.FindCoordinatorResponse)
	one := func(key string) kmsg.FindCoordinatorResponseCoordinator {
		c := kmsg.NewFindCoordinatorResponseCoordinator()
		c.Key, c.NodeID, c.Port = key, -1, -1
		var err *kerr.Error
		switch req.CoordinatorType {
		case 0:
			var ok bool
			if c.NodeID, c.Host, c.Port, ok = place(key); !ok {
				c.NodeID, c.Host, c.Port, err = -1, "", -1, kerr.CoordinatorNotAvailable
			}
		default:
			// Share groups are not served. To Kafka a share partition's key is also invalid below version 6, and any
			// kind that it does not know makes the whole request invalid.
			err = kerr.InvalidRequest
		}
		// Below version 4 the message is that of the error, even of none; from 4 on it is empty unless the request as a
		// whole has failed.
		text := ""
		if err != nil {
			c.ErrorCode = err.Code
		}
		switch {
		case req.Version < 4 && err == nil:
			text = "NONE"
		case req.Version < 4 || err == kerr.InvalidRequest && req.CoordinatorType != coordinatorOfShareGroup:
			text = kafkaMessage(err)
		}
		c.ErrorMessage = &text
		return c
	}
	if req.Version >= 4 {
		for _, key := range req.CoordinatorKeys {
			resp.Coordinators = append(resp.Coordinators, one(key))
		}
		return resp
	}
	c := one(req.CoordinatorKey)
	resp.NodeID, resp.Host, resp.Port = c.NodeID, c.Host, c.Port
	resp.ErrorCode, resp.ErrorMessage = c.ErrorCode, c.ErrorMessage
	return resp
}

// kafkaMessage is the text that Kafka's Errors has for the two errors that FindCoordinator gives.
func kafkaMessage(err *kerr.Error) string {
	if err == kerr.CoordinatorNotAvailable {
		return "The coordinator is not available."
	}
	return "This most likely occurs because of a request being malformed by the client library or the message was sent to an incompatible broker. See the broker logs for more details."
}
