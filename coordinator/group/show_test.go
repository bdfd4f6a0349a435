package group

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// write tells what a Step or Tick has yielded.
func (s *scripted) write(out *strings.Builder, e Effects) {
	for _, r := range e.Records {
		fmt.Fprintf(out, "  + %s\n", s.showRecord(r))
	}
	names := s.answered(e)
	for i, r := range e.Replies {
		fence := ""
		if r.Fence {
			fence = " (fence)"
		}
		fmt.Fprintf(out, "%s: %s%s\n", names[i], showResponse(r.Response), fence)
	}
}

func (s *scripted) showRecord(r Record) string {
	k, ok := parseKey(r.Key)
	if !ok {
		return fmt.Sprintf("unknown %x", r.Key)
	}
	name := map[int16]string{keyOffset: "offset", keyGroup: "group", keyRound: "round", keySession: "session", keySeen: "seen", keyDeparted: "departed"}[k.kind]
	switch k.kind {
	case keySession:
		name += " " + strings.TrimRight(string(k.session[:]), "\x00")
	case keyOffset:
		name += fmt.Sprintf(" %s %s/%d", k.group, k.topic, k.partition)
	default:
		name += " " + string(k.group)
	}
	if r.Value == nil {
		return name + " tombstone"
	}
	switch k.kind {
	case keyOffset:
		return name + " " + s.showOffset(r.Value)
	case keyGroup:
		c, _ := decodeGroup(r.Value)
		return name + " " + showGroup(c)
	case keyRound:
		c, _ := decodeRound(r.Value)
		return name + " " + showGroup(c)
	case keyDeparted:
		generation, departed, _ := decodeDeparted(r.Value)
		name += fmt.Sprintf(" generation=%d seats", generation)
		for i := range 8 * len(departed) {
			if departed.has(i) {
				name += fmt.Sprintf(" %d", i)
			}
		}
		return name
	case keySession:
		v := decodeSession(r.Value)
		return fmt.Sprintf("%s highest %d done %b stamp %d.%d", name, v.highest, v.done, v.term, v.seq)
	default:
		g := group{seenValue: r.Value}
		return fmt.Sprintf("%s at %s", name, s.at(g.seenRecord()))
	}
}

// at gives a time since the script's beginning.
func (s *scripted) at(ms int64) string {
	return duration(int32(ms - s.start.UnixMilli())).String()
}

func (s *scripted) showOffset(value []byte) string {
	c, _ := decodeOffset(value)
	text := fmt.Sprintf("%d@%d %q at %s", c.offset, c.leaderEpoch, abbreviate(string(c.metadata)), s.at(c.committed))
	if c.topicID == [16]byte{} {
		text += " without id"
	} else if c.topicID[15] != 1 {
		text += fmt.Sprintf(" id %d", c.topicID[15])
	}
	if c.topicID != [16]byte{} && c.confirmed == 0 {
		text += " unconfirmed"
	}
	if c.expires != -1 {
		text += " expires " + s.at(c.expires)
	}
	return text
}

func abbreviate(s string) string {
	if len(s) > 20 {
		return fmt.Sprintf("%s…(%d)", s[:8], len(s))
	}
	return s
}

func showGroup(c *classic) string {
	text := fmt.Sprintf("%s generation=%d", c.state, c.generation)
	if c.protocolType != nil {
		text += " type=" + show(c.protocolType)
	}
	if c.protocol != nil {
		text += " protocol=" + show(c.protocol)
	}
	if c.leader != "" {
		text += " leader=" + c.leader
	}
	for _, m := range c.members {
		text += " [" + m.id
		if m.instance != nil {
			text += " instance=" + show(m.instance)
		}
		for _, p := range m.protocols {
			text += fmt.Sprintf(" %s:%s", p.name, showBytes(p.metadata))
		}
		if c.state == stable {
			text += " -> " + showBytes(m.assignment)
		}
		text += "]"
	}
	return text
}

func showBytes(b []byte) string {
	var m kmsg.ConsumerMemberMetadata
	if len(b) > 4 && b[0] == 0 {
		if err := m.ReadFrom(b); err == nil {
			return "sub(" + strings.Join(m.Topics, ",") + ")"
		}
	}
	if text := string(b); strconv.Quote(text) == `"`+text+`"` {
		return abbreviate(text)
	}
	return fmt.Sprintf("0x%x", b)
}

func showResponse(resp kmsg.Response) string {
	switch r := resp.(type) {
	case *kmsg.JoinGroupResponse:
		text := fmt.Sprintf("%s member=%s", errName(r.ErrorCode), r.MemberID)
		if r.ErrorCode != 0 {
			return text
		}
		text += fmt.Sprintf(" generation=%d protocol=%s leader=%s", r.Generation, show(r.Protocol), r.LeaderID)
		if r.SkipAssignment {
			text += " skip"
		}
		for _, m := range r.Members {
			text += fmt.Sprintf(" [%s %s]", m.MemberID, showBytes(m.ProtocolMetadata))
		}
		return text
	case *kmsg.SyncGroupResponse:
		if r.ErrorCode != 0 {
			return errName(r.ErrorCode)
		}
		return fmt.Sprintf("NONE %s/%s assignment=%s", show(r.ProtocolType), show(r.Protocol), showBytes(r.MemberAssignment))
	case *kmsg.HeartbeatResponse:
		return errName(r.ErrorCode)
	case *kmsg.LeaveGroupResponse:
		text := errName(r.ErrorCode)
		for _, m := range r.Members {
			text += fmt.Sprintf(" [%s@%s %s]", m.MemberID, show(m.InstanceID), errName(m.ErrorCode))
		}
		return text
	case *kmsg.OffsetCommitResponse:
		var parts []string
		for _, t := range r.Topics {
			for _, p := range t.Partitions {
				parts = append(parts, fmt.Sprintf("%s/%d %s", nameOf(t.Topic, t.TopicID), p.Partition, errName(p.ErrorCode)))
			}
		}
		return strings.Join(parts, ", ")
	case *kmsg.OffsetFetchResponse:
		return showFetched(r)
	case *kmsg.OffsetDeleteResponse:
		parts := []string{errName(r.ErrorCode)}
		for _, t := range r.Topics {
			for _, p := range t.Partitions {
				parts = append(parts, fmt.Sprintf("%s/%d %s", t.Topic, p.Partition, errName(p.ErrorCode)))
			}
		}
		return strings.Join(parts, ", ")
	case *kmsg.ListGroupsResponse:
		text := errName(r.ErrorCode)
		for _, g := range r.Groups {
			text += fmt.Sprintf(" [%s %q %s %s]", g.Group, g.ProtocolType, g.GroupState, g.GroupType)
		}
		return text
	case *kmsg.DescribeGroupsResponse:
		return showDescribed(r)
	case *kmsg.DeleteGroupsResponse:
		var parts []string
		for _, g := range r.Groups {
			parts = append(parts, g.Group+" "+errName(g.ErrorCode))
		}
		return strings.Join(parts, ", ")
	}
	return fmt.Sprintf("%T", resp)
}

func nameOf(name string, id [16]byte) string {
	if name == "" {
		return "id:" + strings.TrimRight(string(id[:15]), "\x00")
	}
	return name
}

func showFetched(r *kmsg.OffsetFetchResponse) string {
	var groups []string
	one := func(topic string, p, epoch int32, offset int64, metadata *string, code int16) string {
		text := fmt.Sprintf("%s/%d %d@%d", topic, p, offset, epoch)
		if *metadata != "" {
			text += " " + abbreviate(*metadata)
		}
		if code != 0 {
			text += " " + errName(code)
		}
		return text
	}
	var parts []string
	for _, t := range r.Topics {
		for _, p := range t.Partitions {
			parts = append(parts, one(t.Topic, p.Partition, p.LeaderEpoch, p.Offset, p.Metadata, p.ErrorCode))
		}
	}
	if len(r.Groups) == 0 {
		return fmt.Sprintf("%s {%s}", errName(r.ErrorCode), strings.Join(parts, ", "))
	}
	for _, g := range r.Groups {
		parts = nil
		for _, t := range g.Topics {
			for _, p := range t.Partitions {
				parts = append(parts, one(nameOf(t.Topic, t.TopicID), p.Partition, p.LeaderEpoch, p.Offset, p.Metadata, p.ErrorCode))
			}
		}
		groups = append(groups, fmt.Sprintf("%s %s {%s}", g.Group, errName(g.ErrorCode), strings.Join(parts, ", ")))
	}
	return strings.Join(groups, " ")
}

func showDescribed(r *kmsg.DescribeGroupsResponse) string {
	var groups []string
	for _, g := range r.Groups {
		text := fmt.Sprintf("%s %s %s type=%q protocol=%q", g.Group, errName(g.ErrorCode), g.State, g.ProtocolType, g.Protocol)
		if g.AuthorizedOperations != -2147483648 {
			text += fmt.Sprintf(" operations=%d", g.AuthorizedOperations)
		}
		for _, m := range g.Members {
			text += fmt.Sprintf(" [%s %s %s%s %q -> %q]", m.MemberID, show(m.InstanceID), m.ClientID, m.ClientHost, showBytes(m.ProtocolMetadata), showBytes(m.MemberAssignment))
		}
		groups = append(groups, text)
	}
	return strings.Join(groups, "; ")
}

// dump tells the whole state.
func (s *scripted) dump(out *strings.Builder) {
	for _, id := range s.state.sortedGroups() {
		g := s.state.groups[id]
		c := g.view()
		fmt.Fprintf(out, "%s: %s", id, showGroup(c))
		var pending []string
		for p := range c.pending {
			pending = append(pending, p)
		}
		slices.Sort(pending)
		for _, p := range pending {
			fmt.Fprintf(out, " pending=%s", p)
		}
		for _, m := range c.members {
			if m.join.call != 0 || m.sync.call != 0 {
				fmt.Fprintf(out, " parked=%s", m.id)
			}
		}
		out.WriteString("\n")
		for t, p := range g.allOffsets() {
			fmt.Fprintf(out, "  %s/%d %s\n", t.name(), p.partition, s.showOffset(p.value))
		}
	}
	for _, id := range slices.SortedFunc(maps.Keys(s.state.sessions.byID), func(a, b Session) int { return slices.Compare(a[:], b[:]) }) {
		e := s.state.sessions.byID[id]
		v := decodeSession(e.value)
		fmt.Fprintf(out, "session %s highest %d done %b stamp %d.%d\n", strings.TrimRight(string(e.id[:]), "\x00"), v.highest, v.done, v.term, v.seq)
	}
}
