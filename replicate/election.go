package replicate

import (
	"cmp"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// electionStep is how much later than the one before each voter tries, in the order of their ids: a vote takes a round
// trip and a few disk writes, and two candidates at once may have to wait for a whole time-out.
const electionStep = 75 * time.Millisecond

// elections begins an election as soon as the leader is known to be dead, instead of when it has been silent for raft's
// time-out: a process that is killed closes its connections, and its port refuses new ones, or a new process answers
// there, and leads nobody. The means is a TimeoutNow request to ourselves, so the other voters vote although they may
// still know the leader. A false alarm is safe, since it is an election like any other, and costs a few milliseconds.
type elections struct {
	id            raft.ServerID
	leader        func() raft.ServerID // "" when none is known
	term          func() uint64
	following     func() bool // we are neither leader nor candidate
	configuration func() raft.Configuration
	last          func() (index, term uint64) // of our log
	campaign      func()
	alive         func(node string) bool // as far as is known
	gone          func(node string) bool // asks at its peer port: it is certain that it leads no more
	logger        *slog.Logger

	mu      sync.Mutex
	looking map[string]bool // leaders whose death is being looked into; true: another connection has closed meanwhile
	refused uint64          // the newest term in which a refusal of ours is followed up

	stop  chan struct{}
	spawn func(func()) // begins a goroutine
}

// elections begins elections of the raft that the transport is attached to. alive may be nil: everybody is.
func (t *transport) elections(alive, gone func(node string) bool, logger *slog.Logger) *elections {
	r := t.raft.Load()
	if alive == nil {
		alive = func(string) bool { return true }
	}
	e := &elections{
		id:            t.id,
		leader:        func() raft.ServerID { _, id := r.LeaderWithID(); return id },
		term:          r.CurrentTerm,
		following:     func() bool { return r.State() == raft.Follower },
		configuration: t.configuration,
		last:          func() (uint64, uint64) { return lastEntry(r) },
		campaign:      func() { t.campaign(t.id) },
		alive:         alive, gone: gone, logger: logger,
		looking: map[string]bool{}, stop: t.stop, spawn: t.spawn,
	}
	refused := e.voteRefused
	t.refused.Store(&refused)
	return e
}

// lastEntry is the last of raft's log, or of its snapshot. Raft tells the term in its statistics alone.
func lastEntry(r *raft.Raft) (index, term uint64) {
	stats := r.Stats()
	get := func(key string) uint64 { n, _ := strconv.ParseUint(stats[key], 10, 64); return n }
	if s := get("last_snapshot_index"); s > get("last_log_index") {
		return s, get("last_snapshot_term")
	}
	return get("last_log_index"), get("last_log_term")
}

// lone makes us the leader at once if we are the only voter: there is nobody to wait for.
func (e *elections) lone() {
	if n, own := voters(e.configuration(), e.id); own && n == 1 {
		e.campaign()
	}
}

// ended takes that a raft connection that came in from a node has closed. It does not wait.
func (e *elections) ended(from string) {
	if !e.led(from) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, running := e.looking[from]; running {
		e.looking[from] = true
		return
	}
	e.looking[from] = false
	e.spawn(func() { e.look(from) })
}

// led says whether node leads us, and our vote counts.
func (e *elections) led(node string) bool {
	if e.leader() != raft.ServerID(node) || raft.ServerID(node) == e.id {
		return false
	}
	_, voter := voters(e.configuration(), e.id)
	return voter
}

// look looks into the death of a leader, once for all connections that close meanwhile, and once more for those that
// have closed since: one of them may have been cut while its process lived, the next not.
func (e *elections) look(from string) {
	for {
		term := e.term()
		if e.led(from) && e.gone(from) {
			e.logger.Info("the leader is gone", "node", from, "term", term)
			e.try(term, raft.ServerID(from), raft.ServerID(from))
		}
		e.mu.Lock()
		if !e.looking[from] {
			delete(e.looking, from)
			e.mu.Unlock()
			return
		}
		e.looking[from] = false
		e.mu.Unlock()
	}
}

// try campaigns when it is our turn among the voters but one, unless a newer term was seen before, or any leader but the
// one that is gone ("": none).
func (e *elections) try(term uint64, gone, except raft.ServerID) {
	wait := time.NewTimer(time.Duration(e.rank(except)) * electionStep)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-e.stop:
		return
	}
	if leader := e.leader(); e.following() && e.term() == term && (leader == "" || leader == gone) {
		e.campaign()
	}
}

// rank is how many live voters but one come before us in the order of ids.
func (e *elections) rank(except raft.ServerID) (rank int) {
	for _, s := range e.configuration().Servers {
		if s.Suffrage == raft.Voter && s.ID < e.id && s.ID != except && e.alive(string(s.ID)) {
			rank++
		}
	}
	return rank
}

// voteRefused takes that our raft has refused a vote. If it was to a candidate whose log lacks what ours has, one that
// had not waited for its time-out, nobody may be able to win this election: the killed leader had reached some of us
// only. Then we try ourselves, or all would wait for another time-out.
func (e *elections) voteRefused(vote *raft.RequestVoteRequest) {
	if !vote.LeadershipTransfer || e.term() != vote.Term || e.leader() != "" {
		return // for one: it has won already, and we lack what it has lacked only by what it sent us since
	}
	index, term := e.last()
	if cmp.Or(cmp.Compare(term, vote.LastLogTerm), cmp.Compare(index, vote.LastLogIndex)) <= 0 {
		return // it has its own vote, or another's, of this term
	}
	if _, voter := voters(e.configuration(), e.id); !voter {
		return
	}
	e.mu.Lock()
	again := vote.Term <= e.refused
	e.refused = max(e.refused, vote.Term)
	e.mu.Unlock()
	if !again {
		e.spawn(func() { e.try(vote.Term, "", raft.ServerID(vote.ID)) })
	}
}
