package replicate

import (
	"github.com/hashicorp/raft"
	"time"
)

func (m *membership) tmpRoles() {
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
		r := m.node.running.Load()
		if r == nil {
			continue
		}
		if _, leading := r.leadership(); !leading {
			continue
		}
		c := r.raft.GetConfiguration().Configuration()
		for _, g := range m.gossip.members() {
			if !g.alive() {
				continue
			}
			switch suffrage(c, raft.ServerID(g.ID)) {
			case "":
				_ = r.raft.AddNonvoter(raft.ServerID(g.ID), raft.ServerAddress(g.ID), 0, time.Second).Error()
			case RoleStandby:
				_ = r.raft.AddVoter(raft.ServerID(g.ID), raft.ServerAddress(g.ID), 0, time.Second).Error()
			}
		}
	}
}
