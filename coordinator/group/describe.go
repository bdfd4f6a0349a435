package group

import (
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// groupOperations are all operations on a group, as a broker without an authorizer gives them: read, delete,
// describe, describe and alter configs.
const groupOperations = 1<<3 | 1<<6 | 1<<8 | 1<<10 | 1<<11

// listGroups is GroupMetadataManager.listGroups.
func (s *State) listGroups(in *Input, req *kmsg.ListGroupsRequest) {
	resp := req.ResponseKind().(*kmsg.ListGroupsResponse)
	wanted := func(filter []string, value string, trim bool) bool {
		return len(filter) == 0 || slices.ContainsFunc(filter, func(f string) bool {
			if trim {
				f = strings.TrimSpace(f)
			}
			return strings.EqualFold(f, value)
		})
	}
	for _, id := range s.sortedGroups() {
		g := s.groups[id]
		if !g.exists() {
			continue
		}
		c := g.view()
		if wanted(req.StatesFilter, c.state.String(), true) && wanted(req.TypesFilter, "classic", false) {
			resp.Groups = append(resp.Groups, kmsg.ListGroupsResponseGroup{
				Group: id, ProtocolType: c.typeName(), GroupState: c.state.String(), GroupType: "classic",
			})
		}
	}
	s.reply(in.Call, resp)
}

// describeGroups is GroupMetadataManager.describeGroups. A group that is not there is Dead, and an error only from v6
// on (KIP-1043).
func (s *State) describeGroups(in *Input, req *kmsg.DescribeGroupsRequest) {
	resp := req.ResponseKind().(*kmsg.DescribeGroupsResponse)
	type described struct {
		group kmsg.DescribeGroupsResponseGroup
		size  int
	}
	room, already := maxResponse, map[string]described{}
	for _, id := range req.Groups {
		d, again := already[id]
		if !again {
			d.group = s.describeGroup(id, req)
			d.size = describedSize(&d.group)
			already[id] = d
		}
		if d.size > room {
			d.group, d.size = kmsg.NewDescribeGroupsResponseGroup(), 0
			d.group.Group, d.group.ErrorCode = id, errServer
		}
		room -= d.size
		resp.Groups = append(resp.Groups, d.group)
	}
	s.reply(in.Call, resp)
}

func (s *State) describeGroup(id string, req *kmsg.DescribeGroupsRequest) kmsg.DescribeGroupsResponseGroup {
	d := kmsg.NewDescribeGroupsResponseGroup()
	d.Group, d.State = id, "Dead"
	if g := s.find(id); g != nil {
		describe(&d, g.view())
	} else if req.Version >= 6 {
		message := "Group " + id + " not found."
		d.ErrorCode, d.ErrorMessage = errGroupNotFound, &message
	}
	if req.Version >= 3 && req.IncludeAuthorizedOperations && d.ErrorCode == 0 {
		d.AuthorizedOperations = groupOperations
	}
	return d
}

// describedSize is roughly what the group takes in a response.
func describedSize(d *kmsg.DescribeGroupsResponseGroup) int {
	n := 64 + len(d.Group)
	for i := range d.Members {
		m := &d.Members[i]
		n += 32 + len(m.MemberID) + len(m.ClientID) + len(m.ClientHost) + len(m.ProtocolMetadata) + len(m.MemberAssignment)
		if m.InstanceID != nil {
			n += len(*m.InstanceID)
		}
	}
	return n
}

func describe(d *kmsg.DescribeGroupsResponseGroup, c *classic) {
	d.State, d.ProtocolType = c.state.String(), c.typeName()
	if c.state == stable {
		d.Protocol = c.protocolName()
	}
	for _, m := range c.members {
		dm := kmsg.DescribeGroupsResponseGroupMember{
			MemberID: m.id, InstanceID: m.instance, ClientID: m.clientID, ClientHost: m.clientHost,
			ProtocolMetadata: []byte{}, MemberAssignment: m.assignment,
		}
		if dm.MemberAssignment == nil {
			dm.MemberAssignment = []byte{}
		}
		if c.state == stable {
			dm.ProtocolMetadata = m.metadata(c.protocolName())
		}
		d.Members = append(d.Members, dm)
	}
}

// deleteGroups is GroupCoordinatorShard.deleteGroups: only Empty groups go, with their offsets.
func (s *State) deleteGroups(in *Input, req *kmsg.DeleteGroupsRequest) {
	resp := req.ResponseKind().(*kmsg.DeleteGroupsResponse)
	seen := map[string]bool{}
	for _, id := range req.Groups {
		if seen[id] {
			continue
		}
		seen[id] = true
		code, g := int16(0), s.find(id)
		switch {
		case g == nil:
			if !s.again {
				code = errGroupNotFound
			}
		case s.again && len(req.Groups) == 1:
			// It was deleted; this is another group of its name. Of several, one that has members was refused then, as
			// far as can be told.
		case g.view().state != empty:
			code = errNonEmpty
		case !s.again:
			s.deleteGroup(g)
		}
		d := kmsg.DeleteGroupsResponseGroup{Group: id, ErrorCode: code}
		if code != 0 && req.Version >= 3 {
			message := kerr.ErrorForCode(code).Error()
			d.ErrorMessage = &message
		}
		resp.Groups = append(resp.Groups, d)
	}
	s.noteSession(&in.Client)
	s.reply(in.Call, resp)
}

// deleteGroup yields the tombstones of an Empty group and of all its offsets.
func (s *State) deleteGroup(g *group) {
	for !g.offsets.empty() {
		t := &g.offsets.head[0]
		s.put(g.partition, appendOffsetKey(nil, g.id, t.name(), t.list.head[0].partition), nil)
	}
	s.deleteGroupItself(g)
}

// deleteGroupItself yields the tombstones of what hangs on the group as a whole.
func (s *State) deleteGroupItself(g *group) {
	if g.live != nil {
		s.cancelTimers(g.live)
		g.live = nil
	}
	s.forgetDepartures(g) // first: another group of this name may get to the same generation
	if g.meta != nil {
		s.put(g.partition, groupKey(keyGroup, g.id), nil)
	}
	if g.round != nil {
		s.put(PrivatePartition, groupKey(keyRound, g.id), nil)
	}
	if g.seenValue != nil {
		s.put(PrivatePartition, groupKey(keySeen, g.id), nil)
	}
	s.dropIfGone(g)
}
