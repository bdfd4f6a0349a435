package replicate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// leaver takes a node out of raft's configuration before it exits. It only asks, with a tag in gossip: the leader queues
// who wants to leave, has a replacement where there is one, and hands its own leadership over first (see plan).
type leaver struct {
	node     string
	members  func() []gossipMember
	announce func() error // sets the tag
	enlisted func() bool  // we are in the configuration, as far as we know
}

const leavePoll = 10 * time.Millisecond

// leave returns when the node may exit: it is out, or there is nobody left who could take its place. If ctx ends before,
// the others will notice that the node is gone, and have a voter less until then.
func (l leaver) leave(ctx context.Context) error {
	if !l.enlisted() || !l.company() {
		return nil
	}
	announced := l.announce() // an error may mean that it took long: the tag is set
	poll := time.NewTicker(leavePoll)
	defer poll.Stop()
	for l.enlisted() && l.company() {
		select {
		case <-poll.C:
		case <-ctx.Done():
			return fmt.Errorf("leaving: no leader has taken this sidecar out of the cluster: %w", errors.Join(context.Cause(ctx), announced))
		}
	}
	return nil
}

// company says whether anybody stays. If everybody goes at once, what is there is kept as it is.
func (l leaver) company() bool {
	for _, m := range l.members() {
		if m.ID != l.node && m.State == gossipAlive {
			return true
		}
	}
	return false
}
