//go:build e2e

package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// raw is one connection on which requests are asked one after another, without any client's cleverness.
type raw struct {
	net.Conn
	next int32
}

func dialRaw(t *testing.T, addr string) *raw {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 2*time.Second)
	check(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return &raw{Conn: c}
}

// ask sends a request in the version that is set in it and reads its reply, which must come in time.
func (r *raw) ask(req kmsg.Request, within time.Duration) (kmsg.Response, error) {
	if err := r.send(req, within); err != nil {
		return nil, err
	}
	return r.receive(req, r.next)
}

// send sends a request; its reply and those of the requests before it must all come in time.
func (r *raw) send(req kmsg.Request, within time.Duration) error {
	r.next++
	frame := kmsg.NewRequestFormatter(kmsg.FormatterClientID("e2e")).AppendRequest(nil, req, r.next)
	_ = r.SetDeadline(time.Now().Add(within))
	_, err := r.Write(frame)
	return err
}

// receive reads the next reply, which must be that of the n-th request.
func (r *raw) receive(req kmsg.Request, n int32) (kmsg.Response, error) {
	body, err := r.reply()
	if err != nil {
		return nil, err
	}
	if id := int32(binary.BigEndian.Uint32(body)); id != n {
		return nil, fmt.Errorf("correlation id %d came for %d", id, n)
	}
	body = body[4:]
	resp := req.ResponseKind()
	if resp.IsFlexible() && resp.Key() != int16(kmsg.ApiVersions) {
		if len(body) == 0 || body[0] != 0 {
			return nil, errors.New("the reply's header has tags")
		}
		body = body[1:]
	}
	return resp, resp.ReadFrom(body)
}

// reply reads one frame without its size.
func (r *raw) reply() ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n < 4 || n > 1<<20 {
		return nil, fmt.Errorf("a reply of %d bytes", n)
	}
	body := make([]byte, n)
	_, err := io.ReadFull(r, body)
	return body, err
}

// groupCalls lives a simple group's life on one connection: each call must succeed within 3 s.
func groupCalls(r *raw, group, topic string) error {
	ask := func(req kmsg.Request, version int16, code func(kmsg.Response) int16) (kmsg.Response, error) {
		req.SetVersion(version)
		resp, err := r.ask(req, 3*time.Second)
		if err == nil {
			err = kerr.ErrorForCode(code(resp))
		}
		if err != nil {
			return resp, fmt.Errorf("%s v%d: %w", kmsg.NameForKey(req.Key()), version, err)
		}
		return resp, nil
	}
	if _, err := ask(kmsg.NewPtrApiVersionsRequest(), 0, func(r kmsg.Response) int16 { return r.(*kmsg.ApiVersionsResponse).ErrorCode }); err != nil {
		return err
	}
	find := kmsg.NewPtrFindCoordinatorRequest()
	find.CoordinatorKey = group
	if _, err := ask(find, 2, func(r kmsg.Response) int16 { return r.(*kmsg.FindCoordinatorResponse).ErrorCode }); err != nil {
		return err
	}
	join := kmsg.NewPtrJoinGroupRequest()
	join.Group, join.ProtocolType, join.SessionTimeoutMillis, join.RebalanceTimeoutMillis = group, "consumer", 10000, 10000
	protocol := kmsg.NewJoinGroupRequestProtocol()
	protocol.Name = "range"
	join.Protocols = append(join.Protocols, protocol)
	joinCode := func(r kmsg.Response) int16 { return r.(*kmsg.JoinGroupResponse).ErrorCode }
	resp, err := ask(join, 5, joinCode)
	if !errors.Is(err, kerr.MemberIDRequired) {
		return fmt.Errorf("a first JoinGroup v5 was answered with %v", err)
	}
	join.MemberID = resp.(*kmsg.JoinGroupResponse).MemberID
	if resp, err = ask(join, 5, joinCode); err != nil {
		return err
	}
	generation := resp.(*kmsg.JoinGroupResponse).Generation
	sync := kmsg.NewPtrSyncGroupRequest()
	sync.Group, sync.Generation, sync.MemberID = group, generation, join.MemberID
	assignment := kmsg.NewSyncGroupRequestGroupAssignment()
	assignment.MemberID, assignment.MemberAssignment = join.MemberID, []byte("mine")
	sync.GroupAssignment = append(sync.GroupAssignment, assignment)
	if resp, err = ask(sync, 3, func(r kmsg.Response) int16 { return r.(*kmsg.SyncGroupResponse).ErrorCode }); err != nil {
		return err
	}
	if got := string(resp.(*kmsg.SyncGroupResponse).MemberAssignment); got != "mine" {
		return fmt.Errorf("SyncGroup gave the assignment %q", got)
	}
	heartbeat := kmsg.NewPtrHeartbeatRequest()
	heartbeat.Group, heartbeat.Generation, heartbeat.MemberID = group, generation, join.MemberID
	if _, err = ask(heartbeat, 3, func(r kmsg.Response) int16 { return r.(*kmsg.HeartbeatResponse).ErrorCode }); err != nil {
		return err
	}
	commit := kmsg.NewPtrOffsetCommitRequest()
	commit.Group, commit.Generation, commit.MemberID = group, generation, join.MemberID
	ct := kmsg.NewOffsetCommitRequestTopic()
	ct.Topic = topic
	cp := kmsg.NewOffsetCommitRequestTopicPartition()
	cp.Offset = 42
	ct.Partitions = append(ct.Partitions, cp)
	commit.Topics = append(commit.Topics, ct)
	if _, err = ask(commit, 7, func(r kmsg.Response) int16 { return r.(*kmsg.OffsetCommitResponse).Topics[0].Partitions[0].ErrorCode }); err != nil {
		return err
	}
	fetch := kmsg.NewPtrOffsetFetchRequest()
	fetch.Group = group
	if resp, err = ask(fetch, 5, func(r kmsg.Response) int16 { return r.(*kmsg.OffsetFetchResponse).ErrorCode }); err != nil {
		return err
	}
	if ts := resp.(*kmsg.OffsetFetchResponse).Topics; len(ts) != 1 || len(ts[0].Partitions) != 1 || ts[0].Partitions[0].Offset != 42 {
		return fmt.Errorf("OffsetFetch gave %+v", ts)
	}
	if _, err = ask(kmsg.NewPtrListGroupsRequest(), 4, func(r kmsg.Response) int16 { return r.(*kmsg.ListGroupsResponse).ErrorCode }); err != nil {
		return err
	}
	describe := kmsg.NewPtrDescribeGroupsRequest()
	describe.Groups = []string{group}
	if resp, err = ask(describe, 4, func(r kmsg.Response) int16 { return r.(*kmsg.DescribeGroupsResponse).Groups[0].ErrorCode }); err != nil {
		return err
	}
	if state := resp.(*kmsg.DescribeGroupsResponse).Groups[0].State; state != "Stable" {
		return fmt.Errorf("DescribeGroups gave the state %s", state)
	}
	leave := kmsg.NewPtrLeaveGroupRequest()
	leave.Group, leave.MemberID = group, join.MemberID
	if _, err = ask(leave, 2, func(r kmsg.Response) int16 { return r.(*kmsg.LeaveGroupResponse).ErrorCode }); err != nil {
		return err
	}
	drop := kmsg.NewPtrOffsetDeleteRequest()
	drop.Group = group
	dt := kmsg.NewOffsetDeleteRequestTopic()
	dt.Topic = topic
	dt.Partitions = append(dt.Partitions, kmsg.NewOffsetDeleteRequestTopicPartition())
	drop.Topics = append(drop.Topics, dt)
	if _, err = ask(drop, 0, func(r kmsg.Response) int16 { return r.(*kmsg.OffsetDeleteResponse).ErrorCode }); err != nil {
		return err
	}
	remove := kmsg.NewPtrDeleteGroupsRequest()
	remove.Groups = []string{group}
	if _, err = ask(remove, 1, func(r kmsg.Response) int16 { return r.(*kmsg.DeleteGroupsResponse).Groups[0].ErrorCode }); errors.Is(err, kerr.GroupIDNotFound) {
		return nil // an empty group may go with its last offset
	}
	return err
}

// metadata asks for brokers and a topic.
func (r *raw) metadata(topic string) (*kmsg.MetadataResponse, error) {
	req := kmsg.NewPtrMetadataRequest()
	req.Version = 8
	req.Topics = []kmsg.MetadataRequestTopic{}
	if topic != "" {
		mt := kmsg.NewMetadataRequestTopic()
		mt.Topic = &topic
		req.Topics = append(req.Topics, mt)
	}
	resp, err := r.ask(req, 5*time.Second)
	if err != nil {
		return nil, err
	}
	return resp.(*kmsg.MetadataResponse), nil
}

// askMetadata is metadata on a connection of its own, closed again: an open one would keep a sidecar from ending.
func askMetadata(addr, topic string) (*kmsg.MetadataResponse, error) {
	c, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	return (&raw{Conn: c}).metadata(topic)
}

// isNetwork says whether the connection has broken, or no answer came: whatever else is wrong the sidecar has said so.
func isNetwork(err error) bool {
	var op net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &op)
}
