package main

import (
	"encoding/json"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate"
)

// voters are sidecars aaaaaaaa-…, bbbbbbbb-…, …; of which the first is active and this one.
func voters(n int, change func([]replicate.MemberInfo)) []replicate.MemberInfo {
	var all []replicate.MemberInfo
	for i := range n {
		all = append(all, replicate.MemberInfo{
			ID: strings.Repeat(string(rune('a'+i)), 8) + "-rest", State: "alive", Role: replicate.RoleVoter, Active: i == 0,
			Tracked: true, InSync: true, LastContact: 30 * time.Millisecond,
		})
	}
	if change != nil {
		change(all)
	}
	return all
}

func TestTheFirstSentenceSaysHowTheClusterIs(t *testing.T) {
	for _, c := range []struct {
		members []replicate.MemberInfo
		waiting string
		want    string
	}{
		{voters(3, nil), "", "3 voters, in sync, active is this sidecar, aaaaaaaa"},
		{voters(1, nil), "", "1 voter, in sync, active is this sidecar, aaaaaaaa; a single sidecar has no failover"},
		{voters(2, func(m []replicate.MemberInfo) { m[1].Role = replicate.RoleStandby }), "",
			"1 voter, in sync, 1 standby, active is this sidecar, aaaaaaaa; two sidecars have no failover: a third would take over without a pause"},
		{voters(3, func(m []replicate.MemberInfo) { m[2].State, m[2].InSync = "failed", false }), "",
			"3 voters, 1 of them down (cccccccc), active is this sidecar, aaaaaaaa; if one more voter is lost, group calls wait"},
		{voters(5, func(m []replicate.MemberInfo) { m[2].State = "failed" }), "",
			"5 voters, 1 of them down (cccccccc), active is this sidecar, aaaaaaaa"},
		{voters(3, func(m []replicate.MemberInfo) {
			m[0].Active, m[1].State, m[2].State = false, "failed", "left"
			m[0].Tracked, m[1].Tracked, m[2].Tracked = false, false, false
		}), "", "3 voters, 2 of them down (bbbbbbbb, cccccccc), none is active: group calls wait, data is served; " +
			"a majority of the voters is needed for group calls: bring one back with its data, or see 'offset-sidecar recover'"},
		{voters(3, func(m []replicate.MemberInfo) { m[1].InSync = false }), "", "3 voters, not in sync: bbbbbbbb, active is this sidecar, aaaaaaaa"},
		{voters(6, func(m []replicate.MemberInfo) {
			for i := range m {
				m[i].Tracked, m[i].Active = false, i == 1
			}
			m[3].Role, m[4].Role, m[5].Role, m[5].State = replicate.RoleForwarder, replicate.RoleForwarder, replicate.RoleForwarder, "left"
		}), "", "3 voters, 2 forwarders, active is bbbbbbbb"},
		{nil, "1 of 3 sidecars found", "not in a cluster yet: 1 of 3 sidecars found"},
	} {
		if got := summarize(memberStatuses(c.members, "aaaaaaaa-rest"), c.waiting); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}
}

func TestMembersTable(t *testing.T) {
	infos := voters(3, func(m []replicate.MemberInfo) {
		m[0].Role, m[1].Tracked, m[2].Lag, m[2].Zone = replicate.RoleForwarder, false, 7, "z"
	})
	var out strings.Builder
	if err := writeMembers(&out, &MembersStatus{Summary: "sentence", Members: memberStatuses(infos, "cccccccc-rest")}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.SplitSeq(out.String(), "\n") {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	want := []string{
		"sentence", "",
		"ID ROLE ACTIVE STATE LAG IN SYNC LAST CONTACT ZONE MACHINE VERSION PEER GOSSIP",
		"bbbbbbbb voter - alive - - - - - - - -",
		"cccccccc * voter - alive 7 yes 30ms z - - - -",
		"aaaaaaaa forwarder yes alive 0 yes 30ms - - - - -",
		"", "* is the sidecar that was asked", "",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s", out.String())
	}
}

func TestVerbsThatLookAtASidecar(t *testing.T) {
	i := start(t, nil, ephemeral("dev")...)
	s := i.sidecar(t)
	admin := addrOf(s.pages)
	code, out, stderr := call(t, nil, "status", "--admin", admin)
	if code != 0 || !strings.HasPrefix(out, "1 voter, in sync, active is this sidecar, "+shortID(s.node.ID())) || !strings.Contains(out, s.Addr()) {
		t.Errorf("%d %s%s", code, out, stderr)
	}
	code, out, stderr = call(t, []string{"OFFSET_SIDECAR_ADMIN=" + admin}, "members")
	if code != 0 || !strings.Contains(out, shortID(s.node.ID())+" *") {
		t.Errorf("%d %s%s", code, out, stderr)
	}
	code, out, stderr = call(t, nil, "members", "--admin", admin, "-o", "json")
	var m MembersStatus
	if err := json.Unmarshal([]byte(out), &m); code != 0 || err != nil || len(m.Members) != 1 || m.Members[0].ID != s.node.ID() {
		t.Errorf("%d %v %s%s", code, err, out, stderr)
	}
	if code, _, stderr := call(t, nil, "members", "-o", "xml"); code != exitUsage || !strings.Contains(stderr, "table, json") {
		t.Errorf("%d %s", code, stderr)
	}
	if code, _, stderr := call(t, nil, "status", "--admin", "off"); code != exitUsage || !strings.Contains(stderr, "--admin") {
		t.Errorf("%d %s", code, stderr)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	if code, _, stderr := call(t, nil, "status", "--admin", free.Addr().String()); code != exitFailed || !strings.Contains(stderr, "no sidecar answers at --admin "+free.Addr().String()) {
		t.Errorf("%d %s", code, stderr)
	}
	// Health is served at --http, and so is no /status.
	if code, _, stderr := call(t, nil, "status", "--admin", addrOf(s.health)); code != exitFailed || !strings.Contains(stderr, "404") {
		t.Errorf("%d %s", code, stderr)
	}
}
