package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/urfave/cli/v2"
)

var executeFlag = &cli.BoolFlag{Name: "execute", Usage: "do it; without it nothing is changed"}

// SurvivorStatus is what recover shows of a data directory.
type SurvivorStatus struct {
	DataDir      string     `json:"data_dir"`
	NodeID       string     `json:"node_id"`
	ClusterID    string     `json:"cluster_id"`
	Recovered    uint64     `json:"recovered"` // how often before
	LastTerm     uint64     `json:"last_term"`
	LastIndex    uint64     `json:"last_index"`
	MissingSince *time.Time `json:"missing_since"` // acknowledged commits after that may be missing; null: there is no commit
	Voters       []string   `json:"voters"`
	Others       []string   `json:"others"` // with a copy, without a vote
}

func survivorStatus(s replicate.Survivor) SurvivorStatus {
	status := SurvivorStatus{
		DataDir: s.Dir, NodeID: s.NodeID, ClusterID: s.ClusterID, Recovered: s.Epoch, LastTerm: s.LastTerm, LastIndex: s.LastIndex,
		Voters: []string{}, Others: []string{},
	}
	if !s.Newest.IsZero() {
		status.MissingSince = &s.Newest
	}
	for _, server := range s.Servers {
		if server.Voter {
			status.Voters = append(status.Voters, server.ID)
		} else {
			status.Others = append(status.Others, server.ID)
		}
	}
	return status
}

// recover is the verb: it makes the data of one survivor a cluster of its own, after the others were lost for good. What
// that costs is said before anything is done.
func (p *program) recover(c *cli.Context) error {
	output := c.String("output")
	if err := oneOf(output, "table", "json"); err != nil {
		return usageError{fmt.Errorf("--output %q: %w", output, err)}
	}
	config, err := p.config(c, "run")
	if err != nil {
		return err
	}
	execute := c.Bool("execute")
	show := func(s replicate.Survivor) error {
		status := survivorStatus(s)
		if output == "json" {
			encoder := json.NewEncoder(p.stdout)
			encoder.SetIndent("", "  ")
			return encoder.Encode(status)
		}
		return writeSurvivor(p.stdout, &status, execute, time.Now())
	}
	if !execute {
		found, err := replicate.Inspect(config.DataDir)
		if err != nil {
			return fmt.Errorf("--data-dir: %w", err)
		}
		return show(found)
	}
	if err := replicate.Recover(config.DataDir, show); err != nil {
		return fmt.Errorf("--data-dir: %w", err)
	}
	if output == "table" {
		fmt.Fprintf(p.stdout, "Done. Start this sidecar; then start the others with empty data directories, and they join it.\n")
	}
	return nil
}

func writeSurvivor(w io.Writer, s *SurvivorStatus, execute bool, now time.Time) error {
	missing := "there is no commit here"
	if s.MissingSince != nil {
		missing = fmt.Sprintf("commits acknowledged after %s (%v ago) may be missing here: their consumers read again what came since",
			s.MissingSince.Format(time.RFC3339), now.Sub(*s.MissingSince).Round(time.Second))
	}
	voters := make([]string, 0, len(s.Voters))
	for _, id := range s.Voters {
		if id == s.NodeID {
			id += " (this one)"
		}
		voters = append(voters, id)
	}
	id := s.ClusterID
	if s.Recovered > 0 {
		id = strings.TrimSpace(fmt.Sprintf("%s recovered before: %d", id, s.Recovered))
	}
	if _, err := fmt.Fprintf(w, `data      %s
node      %s
cluster   %s
newest    term %d, index %d
voters    %s
may be lost: %s

`, s.DataDir, s.NodeID, id, s.LastTerm, s.LastIndex, strings.Join(voters, ", "), missing); err != nil {
		return err
	}
	if execute {
		return nil
	}
	_, err := fmt.Fprintf(w, `Nothing was changed. If a majority of the voters can still be started with their data, start them: nothing is lost then,
and nothing is to be recovered. Else run this for each data directory that is left, take the one with the highest term
and, among those, the highest index, and repeat it there with --execute: it becomes a cluster of one, with what it has.
The others must then start with empty data directories.
`)
	return err
}
