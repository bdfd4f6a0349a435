package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/offset-sidecar/offset-sidecar/admin"
	"github.com/offset-sidecar/offset-sidecar/coordinator"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// probe is what the HTTP servers ask of this sidecar.
func (s *Sidecar) probe() admin.Probe {
	return admin.Probe{
		Started: func() []admin.Check { return []admin.Check{s.checkListeners()} },
		Ready: func() []admin.Check {
			return []admin.Check{s.checkListeners(), s.checkDraining(), s.checkCoordinator(), s.checkUpstream()}
		},
		Alive:   s.coordinatorAlive,
		Status:  func() any { return s.Status() },
		Members: func() any { return s.Members() },
		Metrics: s.telemetry,
	}
}

// checkListeners is well as long as this process serves: the listeners are bound before and closed after the pages.
func (s *Sidecar) checkListeners() admin.Check {
	return admin.Check{Name: "listeners", OK: true, Decides: true, Detail: "clients connect to " + s.Addr()}
}

func (s *Sidecar) checkDraining() admin.Check {
	c := admin.Check{Name: "not draining", OK: !s.draining.Load(), Decides: true}
	if !c.OK {
		c.Detail = "the sidecar is stopping and waits for its clients to go"
	}
	return c
}

func (s *Sidecar) checkCoordinator() admin.Check {
	status := s.coordinator.Status()
	c := admin.Check{Name: "coordinator", OK: status.Active, Detail: fmt.Sprintf("active in term %d", status.Term)}
	if !c.OK {
		c.Detail = "not active: group calls wait"
	}
	return c
}

func (s *Sidecar) checkUpstream() admin.Check {
	known := s.upstream.Brokers()
	if len(known.Brokers) == 0 {
		return admin.Check{Name: "upstream", Detail: "has not been reached yet"}
	}
	return admin.Check{Name: "upstream", OK: true, Detail: fmt.Sprintf("%d brokers, last asked %v ago", len(known.Brokers), time.Since(known.At).Round(time.Second))}
}

// coordinatorAlive is the check of /livez: the coordinator's loop takes a request and gives it back. It is meant for a
// term that never is, so that the answer does not depend on who is active or on the disk. Only a restart brings back a
// loop that has ended.
func (s *Sidecar) coordinatorAlive() error {
	if err := s.coordinatorErr(); err != nil {
		return errors.New("the coordinator has stopped: " + err.Error())
	}
	taken := make(chan struct{})
	s.coordinator.Submit(&coordinator.Request{
		Body: kmsg.NewPtrHeartbeatRequest(), Done: func(kmsg.Response, error) { close(taken) },
	})
	<-taken
	return nil
}

// Status is what /status shows.
type Status struct {
	Summary       string            `json:"summary"`
	Version       string            `json:"version"`
	Cluster       string            `json:"cluster"`
	ClusterID     string            `json:"cluster_id"`
	NodeID        string            `json:"node_id"`
	Role          string            `json:"role"`
	ActiveNode    string            `json:"active_node"`
	UptimeSeconds int64             `json:"uptime_seconds"`
	DataDir       string            `json:"data_dir"`
	Active        bool              `json:"active"`
	Term          uint64            `json:"term"`
	Draining      bool              `json:"draining"`
	Listen        string            `json:"listen"`
	HTTP          string            `json:"http"`
	Admin         string            `json:"admin"`
	Gossip        string            `json:"gossip"`
	Peer          string            `json:"peer"`
	Upstream      UpstreamStatus    `json:"upstream"`
	Settings      map[string]string `json:"settings"`
	Metrics       map[string]int64  `json:"metrics"`
}

// UpstreamStatus is what is known of the upstream.
type UpstreamStatus struct {
	Seeds     []string          `json:"seeds"`
	ClusterID string            `json:"cluster_id"`
	Brokers   []BrokerStatus    `json:"brokers"`
	AskedAt   *time.Time        `json:"asked_at,omitempty"`
	Listeners map[string]string `json:"listeners"` // by node id
}

// BrokerStatus is one upstream broker.
type BrokerStatus struct {
	ID   int32  `json:"id"`
	Addr string `json:"addr"`
}

// Status describes the sidecar as it is now.
func (s *Sidecar) Status() Status {
	active, known := s.coordinator.Status(), s.upstream.Brokers()
	up := UpstreamStatus{Seeds: s.config.Upstream.Seeds, ClusterID: known.ClusterID, Brokers: []BrokerStatus{}, Listeners: map[string]string{}}
	if !known.At.IsZero() {
		up.AskedAt = &known.At
	}
	for _, b := range known.Brokers {
		up.Brokers = append(up.Brokers, BrokerStatus{b.ID, fmt.Sprintf("%s:%d", b.Host, b.Port)})
	}
	addrs := s.proxy.Addrs()
	for _, id := range slices.Sorted(maps.Keys(addrs)) {
		up.Listeners[strconv.Itoa(int(id))] = addrs[id]
	}
	settings := map[string]string{}
	for name, o := range s.config.shown() {
		settings[name] = o.value
	}
	node, members := s.node.Status(), memberStatuses(s.node.Members(), s.node.ID())
	return Status{
		Summary: summarize(members, node.Waiting), ClusterID: node.ClusterID, Role: node.Role, ActiveNode: node.Active, Gossip: cmp.Or(node.GossipAddr, "off"), Peer: cmp.Or(node.PeerAddr, "off"),
		Version: versionText(), Cluster: s.config.Cluster, NodeID: s.node.ID(), UptimeSeconds: int64(time.Since(s.opened).Seconds()),
		DataDir: s.config.DataDir, Active: active.Active, Term: active.Term, Draining: s.draining.Load(),
		Listen: s.Addr(), HTTP: addrOf(s.health), Admin: addrOf(s.pages), Upstream: up, Settings: settings, Metrics: s.metrics.Snapshot(),
	}
}

// Members describes the cluster as this sidecar sees it now.
func (s *Sidecar) Members() MembersStatus {
	node, members := s.node.Status(), memberStatuses(s.node.Members(), s.node.ID())
	return MembersStatus{Summary: summarize(members, node.Waiting), Cluster: s.config.Cluster, ClusterID: node.ClusterID, Term: node.Term, Members: members}
}

// writeStatus prints what 'offset-sidecar status' shows.
func writeStatus(w io.Writer, s *Status) error {
	active := "not active"
	if s.Active {
		active = fmt.Sprintf("active in term %d", s.Term)
	}
	if s.Draining {
		active += ", stopping"
	}
	var brokers []string
	for _, b := range s.Upstream.Brokers {
		brokers = append(brokers, fmt.Sprintf("%d at %s", b.ID, b.Addr))
	}
	known := "not reached yet"
	if s.Upstream.AskedAt != nil {
		known = fmt.Sprintf("%s, asked %v ago", strings.Join(brokers, ", "), time.Since(*s.Upstream.AskedAt).Round(time.Second))
	}
	_, err := fmt.Fprintf(w, `%s

this sidecar  %s, %s %s, up %v, version %s
cluster       %s %s
data          %s
clients at    %s
HTTP, admin   %s, %s
gossip, peer  %s, %s
upstream      %s (%s)
`, s.Summary, s.NodeID, s.Role, active, time.Duration(s.UptimeSeconds)*time.Second, s.Version, s.Cluster, s.ClusterID, cmp.Or(s.DataDir, "in memory"),
		s.Listen, s.HTTP, s.Admin, s.Gossip, s.Peer, strings.Join(s.Upstream.Seeds, ","), known)
	return err
}
