package coordinator

import (
	"errors"

	"github.com/offset-sidecar/offset-sidecar/coordinator/group"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// ErrInactive: the request was not executed, or the activation that was to answer it has ended. It may be submitted
// again, in its session's order, once this sidecar or another is active.
var ErrInactive = errors.New("coordinator is not active")

// Request is one decoded group or offset request of a client.
type Request struct {
	Body   kmsg.Request
	Client group.Client
	// Term is the activation the request is meant for (Status.Term when it was submitted); in any other it is answered
	// ErrInactive, so that nothing newer of a session is executed before what has to be resent.
	Term uint64
	// Done is called once, from the coordinator's loop: it must not block. The error is nil or ErrInactive.
	Done func(kmsg.Response, error)
}

// Status says whether this sidecar's coordinator answers, and in which term.
type Status struct {
	Active  bool
	Term    uint64
	Changed <-chan struct{} // closed when this Status no longer holds
}

// Topics is where the coordinator learns of the upstream's topics.
type Topics interface {
	group.Topics
	// Refresh asks the upstream for these topics and calls done once, from any goroutine: with nil when the table now
	// holds the upstream's answer, with an error when the upstream could not be asked in time.
	Refresh(names []string, ids [][16]byte, done func(error))
}
