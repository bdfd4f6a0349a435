package replicate

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Leadership is handed over as raft would do it: no entry is appended until the heir has all there is, and has been told
// to campaign. Raft itself refuses entries meanwhile, and with the first that it refuses the activation is over (fail),
// though the hand-over may come to nothing; and it may refuse them for good, if an heir that hangs was tried twice
// (leadershipTransfer in raft.go waits for triggerDeferErrorCh, and its flag outlives the term). Here append waits: if
// nothing comes of it whoever commits has waited for a moment, and all goes on as before.

// How long a voter may take to answer that it campaigns. One that answers later does so, too: nobody commits during the
// first, and during the second nobody else shall campaign against it.
const (
	handoverWait = 250 * time.Millisecond
	offerWait    = time.Second
)

var (
	errNoAnswer = errors.New("no answer to the offer of the lead")
	errNotTaken = errors.New("the lead was not taken in time")
)

// takeTurn waits until nobody else gives entries to raft or hands leadership over; false: the run is at its end.
func (r *replica) takeTurn() bool {
	select {
	case r.turn <- struct{}{}:
		return true
	case <-r.stop:
		return false
	}
}

// handOver hands the leadership of term to another voter within raft's election time-out, or not at all, as far as it
// knows: an heir that is slow may still take it.
func (r *replica) handOver(term uint64, heir raft.ServerID) error {
	if !r.takeTurn() {
		return errEnding
	}
	defer func() { <-r.turn }()
	late := time.Now().Add(r.retry)
	until := func(ok func() bool) error {
		for {
			switch {
			case !r.leadsIn(term):
				return ErrNotLeader
			case ok():
				return nil
			case time.Now().After(late):
				return errNotTaken
			case !r.await(time.Millisecond):
				return errEnding
			}
		}
	}
	// Raft's last index does not count what it is still writing; nothing is when all it was given is answered.
	caughtUp := func() bool { return r.unanswered.Load() == 0 && r.transport.insync.match(heir) >= r.raft.LastIndex() }
	if err := until(caughtUp); err != nil {
		return err
	}
	if err := r.transport.offerTo(heir, handoverWait); err != nil {
		return err
	}
	if err := until(func() bool { return false }); !errors.Is(err, ErrNotLeader) {
		return err
	}
	return nil
}

// giveUp hands leadership to the voter that has stored most, or, when it does not take it, forces a new term of our own.
// So it does on a full disk, too: whether another has room is makeWay's to find out.
func (r *replica) giveUp(term uint64) {
	if heirs := r.transport.heirs(); len(heirs) > 0 && !r.store.Full() {
		err := r.handOver(term, heirs[0])
		r.log.Debug("handing leadership over", "term", term, "err", err)
	}
	if r.leadsIn(term) {
		r.log.Debug("forcing a new term", "term", term)
		r.transport.campaign(r.id)
	}
}

// makeWay hands leadership to a voter whose disk has room, if a majority's has.
func (r *replica) makeWay(term uint64) {
	defer r.offering.Store(false)
	if to, found := successor(r.transport.heirs(), r.roomy); found {
		r.log.Warn("there is no room on disk: leadership is handed to a voter with room", "term", term, "node", to)
		if err := r.handOver(term, to); err != nil {
			r.log.Warn("handing leadership over", "term", term, "err", err)
		}
	} else {
		r.log.Debug("there is no room on disk, nor on those of a majority: leadership stays", "term", term)
	}
	r.await(offerEvery)
}

// successor is who may lead in the place of a leader whose disk is full: the first of the other voters that has room, if a
// majority of all has room. Else leadership would only wander from one full disk to the next, or to one whose entries nobody can store;
// while a full one leads none is begun, and what is only read is answered.
func successor(heirs []raft.ServerID, roomy func(node string) bool) (to raft.ServerID, found bool) {
	room := 0
	for _, heir := range heirs {
		if !roomy(string(heir)) {
			continue
		}
		if room++; room == 1 {
			to = heir
		}
	}
	return to, room > (len(heirs)+1)/2
}

// rolesRaft is raft as roles uses it in a term.
type rolesRaft struct {
	*raft.Raft
	replica *replica
	term    uint64
}

// LeadershipTransferToServer returns when it is over.
func (r rolesRaft) LeadershipTransferToServer(id raft.ServerID, _ raft.ServerAddress) raft.Future {
	return done{r.replica.handOver(r.term, id)}
}

// heirs are the other voters, whoever has stored most first.
func (t *transport) heirs() (heirs []raft.ServerID) {
	_, infos := t.insync.infos()
	match := map[raft.ServerID]uint64{}
	for _, i := range infos {
		match[i.ID] = i.Match
	}
	for _, s := range t.configuration().Servers {
		if s.Suffrage == raft.Voter && s.ID != t.id {
			heirs = append(heirs, s.ID)
		}
	}
	slices.SortFunc(heirs, func(a, b raft.ServerID) int {
		return cmp.Or(cmp.Compare(match[b], match[a]), cmp.Compare(a, b))
	})
	return heirs
}

// offerTo asks another voter to campaign, though it knows a leader. One that has not answered within the wait is
// given up: that it hangs is found out by its connection only, much later.
func (t *transport) offerTo(heir raft.ServerID, wait time.Duration) error {
	args := &raft.TimeoutNowRequest{RPCHeader: t.header()}
	answered := make(chan error, 1)
	t.spawn(func() {
		answered <- t.TimeoutNow(heir, raft.ServerAddress(heir), args, new(raft.TimeoutNowResponse))
	})
	late := time.NewTimer(wait)
	defer late.Stop()
	select {
	case err := <-answered:
		return err
	case <-late.C:
	case <-t.stop:
	}
	return errNoAnswer
}
