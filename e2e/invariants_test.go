//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// generations is what the members of one group were told, all of them.
type generations struct {
	mu      sync.Mutex
	leaders map[int32]string            // of each generation
	members map[int32]string            // as the leader was told
	owned   map[int32]map[string]string // partition to its owner
	wrong   []string
	errors  map[string]int
	rounds  int
}

func (g *generations) note(wrong bool, format string, args ...any) {
	if wrong {
		g.wrong = append(g.wrong, fmt.Sprintf(format, args...))
	}
}

// joined notes the answer to a JoinGroup.
func (g *generations) joined(r *kmsg.JoinGroupResponse) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rounds++
	leader, known := g.leaders[r.Generation]
	g.note(known && leader != r.LeaderID, "generation %d has the leaders %s and %s", r.Generation, leader, r.LeaderID)
	g.leaders[r.Generation] = r.LeaderID
	if r.MemberID != r.LeaderID {
		return
	}
	var ids []string
	for _, m := range r.Members {
		ids = append(ids, m.MemberID)
	}
	slices.Sort(ids)
	now := strings.Join(ids, " ")
	before, known := g.members[r.Generation]
	g.note(known && before != now, "generation %d was issued with the members %s and with %s", r.Generation, before, now)
	g.members[r.Generation] = now
}

// assigned notes the answer to a SyncGroup.
func (g *generations) assigned(generation int32, member string, partitions string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.owned[generation] == nil {
		g.owned[generation] = map[string]string{}
	}
	for _, p := range strings.Fields(partitions) {
		owner, known := g.owned[generation][p]
		g.note(known && owner != member, "in generation %d partition %s is owned by %s and %s", generation, p, owner, member)
		g.owned[generation][p] = member
	}
}

func (g *generations) fails(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.errors[err.Error()]++
}

// protocolMember is a member of the classic protocol that joins, is given some of eight partitions, and heartbeats.
type protocolMember struct {
	g     *generations
	group string
	at    func() string
	stop  <-chan struct{}
	id    string
}

func (m *protocolMember) stopped() bool {
	select {
	case <-m.stop:
		return true
	default:
		return false
	}
}

func (m *protocolMember) run() {
	for !m.stopped() {
		c, err := net.DialTimeout("tcp", m.at(), time.Second)
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		err = m.live(&raw{Conn: c})
		_ = c.Close()
		if err != nil && !isNetwork(err) {
			m.g.fails(err)
		}
	}
}

// live joins and heartbeats until the connection breaks, or a real error comes.
func (m *protocolMember) live(r *raw) error {
	for !m.stopped() {
		generation, err := m.join(r)
		if errors.Is(err, kerr.UnknownMemberID) {
			m.id = ""
		}
		if rejoin(err) {
			continue
		}
		if err != nil {
			return err
		}
		for !m.stopped() {
			time.Sleep(20 * time.Millisecond)
			req := kmsg.NewPtrHeartbeatRequest()
			req.Version, req.Group, req.Generation, req.MemberID = 3, m.group, generation, m.id
			resp, err := r.ask(req, commitWait)
			if err == nil {
				err = kerr.ErrorForCode(resp.(*kmsg.HeartbeatResponse).ErrorCode)
			}
			if errors.Is(err, kerr.UnknownMemberID) {
				m.id = ""
			}
			if rejoin(err) {
				break
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// rejoin says whether an answer only asks a member to join again.
func rejoin(err error) bool {
	return errors.Is(err, kerr.RebalanceInProgress) || errors.Is(err, kerr.IllegalGeneration) || errors.Is(err, kerr.UnknownMemberID) ||
		errors.Is(err, kerr.MemberIDRequired)
}

func (m *protocolMember) join(r *raw) (int32, error) {
	req := kmsg.NewPtrJoinGroupRequest()
	req.Version, req.Group, req.ProtocolType, req.MemberID = 5, m.group, "consumer", m.id
	req.SessionTimeoutMillis, req.RebalanceTimeoutMillis = 10000, 10000
	protocol := kmsg.NewJoinGroupRequestProtocol()
	protocol.Name = "range"
	req.Protocols = append(req.Protocols, protocol)
	answer, err := r.ask(req, 30*time.Second)
	if err != nil {
		return 0, err
	}
	joined := answer.(*kmsg.JoinGroupResponse)
	if joined.MemberID != "" {
		m.id = joined.MemberID
	}
	if err := kerr.ErrorForCode(joined.ErrorCode); err != nil {
		return 0, err
	}
	m.g.joined(joined)
	sync := kmsg.NewPtrSyncGroupRequest()
	sync.Version, sync.Group, sync.Generation, sync.MemberID = 3, m.group, joined.Generation, m.id
	if joined.LeaderID == m.id {
		shares := map[string][]string{}
		for p := range 8 {
			to := joined.Members[p%len(joined.Members)].MemberID
			shares[to] = append(shares[to], fmt.Sprint(p))
		}
		for id, share := range shares {
			a := kmsg.NewSyncGroupRequestGroupAssignment()
			a.MemberID, a.MemberAssignment = id, []byte(strings.Join(share, " "))
			sync.GroupAssignment = append(sync.GroupAssignment, a)
		}
	}
	answer, err = r.ask(sync, 30*time.Second)
	if err != nil {
		return 0, err
	}
	synced := answer.(*kmsg.SyncGroupResponse)
	if err := kerr.ErrorForCode(synced.ErrorCode); err != nil {
		return 0, err
	}
	m.g.assigned(joined.Generation, m.id, string(synced.MemberAssignment))
	return joined.Generation, nil
}

// TestGroupInvariantsUnderKills: members join, are told what they own and come back while the active sidecar is killed in
// the midst of their rebalances: no generation is issued twice, and in none has a partition two owners.
func TestGroupInvariantsUnderKills(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	g := &generations{leaders: map[int32]string{}, members: map[int32]string{}, owned: map[int32]map[string]string{}, errors: map[string]int{}}
	end := make(chan struct{})
	var running sync.WaitGroup
	stop := sync.OnceFunc(func() { close(end); running.Wait() })
	t.Cleanup(stop)
	for i := range 5 {
		m := &protocolMember{g: g, group: "invariants", stop: end, at: c.Sidecars[i%3].Addr}
		running.Go(m.run)
	}
	churn := make(chan struct{}) // ends the newest of those who come and go
	for range kills(5) {
		check(t, c.Settled(60*time.Second, 3))
		victim := active(t, c)
		g.mu.Lock()
		from := g.rounds
		g.mu.Unlock()
		close(churn)
		churn = make(chan struct{})
		guest := &protocolMember{g: g, group: "invariants", stop: churn, at: others(c, victim)[0].Addr}
		go guest.run() // its coming is a rebalance, in the midst of which the sidecar is killed
		check(t, lab.Eventually(30*time.Second, func() error {
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.rounds == from {
				return errors.New("no rebalance has begun")
			}
			return nil
		}))
		victim.Kill()
		check(t, victim.Up())
		check(t, lab.Eventually(40*time.Second, func() error {
			groups, err := admin(t, addrs(c)).DescribeGroups(within(t, 10*time.Second), "invariants")
			if err == nil && groups["invariants"].State != "Stable" {
				err = fmt.Errorf("the group is %s", groups["invariants"].State)
			}
			return err
		}))
	}
	close(churn)
	stop()
	for _, wrong := range g.wrong {
		t.Error(wrong)
	}
	for what, times := range g.errors {
		t.Errorf("members were told %d times: %s", times, what)
	}
	t.Logf("%d generations", len(g.leaders))
}
