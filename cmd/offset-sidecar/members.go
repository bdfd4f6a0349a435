package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate"
)

// MembersStatus is what /members shows: the cluster as this sidecar sees it.
type MembersStatus struct {
	Summary   string         `json:"summary"`
	Cluster   string         `json:"cluster"`
	ClusterID string         `json:"cluster_id"`
	Term      uint64         `json:"term"`
	Members   []MemberStatus `json:"members"`
}

// MemberStatus is one of its sidecars. What is null only the active sidecar knows.
type MemberStatus struct {
	ID            string `json:"id"`
	Self          bool   `json:"self"`
	State         string `json:"state"`
	Role          string `json:"role"`
	Active        bool   `json:"active"`
	Lag           *int64 `json:"lag"` // entries
	InSync        *bool  `json:"in_sync"`
	LastContactMS *int64 `json:"last_contact_ms"`
	Zone          string `json:"zone"`
	Machine       string `json:"machine"`
	Version       string `json:"version"`
	Gossip        string `json:"gossip"`
	Peer          string `json:"peer"`
}

// memberStatuses brings what replicate knows into the form that is shown: voters first.
func memberStatuses(infos []replicate.MemberInfo, self string) []MemberStatus {
	all := make([]MemberStatus, 0, len(infos))
	for _, m := range infos {
		s := MemberStatus{
			ID: m.ID, Self: m.ID == self, State: m.State, Role: m.Role, Active: m.Active,
			Zone: m.Zone, Machine: m.Machine, Version: m.Version, Gossip: m.GossipAddr, Peer: m.PeerAddr,
		}
		if m.Tracked {
			lag, inSync := int64(m.Lag), m.InSync
			s.Lag, s.InSync = &lag, &inSync
			if contact := m.LastContact.Milliseconds(); m.LastContact >= 0 {
				s.LastContactMS = &contact
			}
		}
		all = append(all, s)
	}
	roles := []string{replicate.RoleVoter, replicate.RoleStandby, replicate.RoleForwarder, ""}
	slices.SortFunc(all, func(a, b MemberStatus) int {
		return cmp.Or(cmp.Compare(slices.Index(roles, a.Role), slices.Index(roles, b.Role)), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// alive says that its process runs, as far as gossip knows.
func (m *MemberStatus) alive() bool { return m.State == "alive" || m.State == "leaving" }

// gone says that it ended in order, and is shown only because gossip has not forgotten it yet.
func (m *MemberStatus) gone() bool { return m.State == "left" && m.Role != replicate.RoleVoter }

// shortID is enough of a node id to tell a cluster's sidecars apart.
func shortID(id string) string { return id[:min(8, len(id))] }

// summarize says in one sentence how the cluster is.
func summarize(members []MemberStatus, waiting string) string {
	if waiting != "" {
		return "not in a cluster yet: " + waiting
	}
	count, dead, behind := map[string]int{}, []string{}, []string{}
	alive, voters, active, tracked := 0, 0, "", false
	for _, m := range members {
		if m.gone() {
			continue
		}
		if m.alive() {
			alive++
			count[m.Role]++
		}
		if m.Role == replicate.RoleVoter {
			voters++
		}
		switch {
		case m.Role == replicate.RoleVoter && !m.alive():
			dead = append(dead, shortID(m.ID))
		case m.Role == replicate.RoleVoter && m.InSync != nil && !*m.InSync:
			behind = append(behind, shortID(m.ID))
		}
		tracked = tracked || m.InSync != nil
		if m.Active {
			active = shortID(m.ID)
			if m.Self {
				active = "this sidecar, " + active
			}
		}
	}
	parts := []string{quantity(voters, "voter")}
	switch {
	case len(dead) > 0:
		parts = append(parts, fmt.Sprintf("%d of them down (%s)", len(dead), strings.Join(dead, ", ")))
	case len(behind) > 0:
		parts = append(parts, "not in sync: "+strings.Join(behind, ", "))
	case tracked:
		parts = append(parts, "in sync")
	}
	for _, role := range []string{replicate.RoleStandby, replicate.RoleForwarder} {
		if n := count[role]; n > 0 {
			parts = append(parts, quantity(n, role))
		}
	}
	if active == "" {
		parts = append(parts, "none is active: group calls wait, data is served")
	} else {
		parts = append(parts, "active is "+active)
	}
	return strings.Join(parts, ", ") + failover(alive, voters, len(dead))
}

// failover adds what a reader of the sentence should not miss.
func failover(alive, voters, dead int) string {
	switch {
	case 2*dead >= voters && dead > 0:
		return "; a majority of the voters is needed for group calls: bring one back with its data, or see 'offset-sidecar recover'"
	case 2*(dead+1) >= voters && dead > 0:
		return "; if one more voter is lost, group calls wait"
	case alive == 2:
		return "; two sidecars have no failover: a third would take over without a pause"
	case alive <= 1:
		return "; a single sidecar has no failover"
	}
	return ""
}

func quantity(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// writeMembers prints the table of 'offset-sidecar members'.
func writeMembers(w io.Writer, s *MembersStatus) error {
	fmt.Fprintf(w, "%s\n\n", s.Summary)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tROLE\tACTIVE\tSTATE\tLAG\tIN SYNC\tLAST CONTACT\tZONE\tMACHINE\tVERSION\tPEER\tGOSSIP")
	untracked := true
	for _, m := range s.Members {
		id, active := shortID(m.ID), ""
		if m.Self {
			id += " *"
		}
		if m.Active {
			active = "yes"
		}
		lag, inSync, contact := "-", "-", "-"
		if m.Lag != nil {
			untracked = false
			lag, inSync = fmt.Sprint(*m.Lag), map[bool]string{true: "yes", false: "no"}[*m.InSync]
		}
		if m.LastContactMS != nil {
			contact = (time.Duration(*m.LastContactMS) * time.Millisecond).String()
		}
		row := []string{id, m.Role, active, m.State, lag, inSync, contact, m.Zone, m.Machine, m.Version, m.Peer, m.Gossip}
		for i := range row {
			row[i] = cmp.Or(row[i], "-")
		}
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\n* is the sidecar that was asked")
	if untracked && len(s.Members) > 1 {
		fmt.Fprintln(w, "lag, in sync and last contact are known where the active sidecar runs: ask there")
	}
	return nil
}
