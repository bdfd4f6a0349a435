package coordinator

import (
	"github.com/offset-sidecar/offset-sidecar/tracing"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// count notes what a reply tells its client: offsets committed, generations begun, errors.
func (c *Coordinator) count(resp kmsg.Response) {
	m := c.metrics
	switch r := resp.(type) {
	case *kmsg.OffsetCommitResponse:
		committed := int64(0)
		for _, t := range r.Topics {
			for _, p := range t.Partitions {
				if p.ErrorCode == 0 {
					committed++
				}
				m.Error(p.ErrorCode)
			}
		}
		m.Add(tracing.Commits, committed)
	case *kmsg.OffsetFetchResponse:
		m.Error(r.ErrorCode)
		for _, g := range r.Groups {
			m.Error(g.ErrorCode)
		}
	case *kmsg.JoinGroupResponse:
		m.Error(r.ErrorCode)
		if r.ErrorCode == 0 && r.MemberID == r.LeaderID { // one member of a generation leads it
			m.Add(tracing.Rebalances, 1)
		}
	case *kmsg.SyncGroupResponse:
		m.Error(r.ErrorCode)
	case *kmsg.HeartbeatResponse:
		m.Error(r.ErrorCode)
	case *kmsg.LeaveGroupResponse:
		m.Error(r.ErrorCode)
		for _, member := range r.Members {
			m.Error(member.ErrorCode)
		}
	case *kmsg.OffsetDeleteResponse:
		m.Error(r.ErrorCode)
	case *kmsg.DescribeGroupsResponse:
		for _, g := range r.Groups {
			m.Error(g.ErrorCode)
		}
	case *kmsg.DeleteGroupsResponse:
		for _, g := range r.Groups {
			m.Error(g.ErrorCode)
		}
	case *kmsg.ListGroupsResponse:
		m.Error(r.ErrorCode)
	}
}
