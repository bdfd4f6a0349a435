package replicate

import (
	"cmp"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// The in-sync set's limits. A replica that falls this far behind leaves; one that has left may come back after barFirst,
// and each time after twice as long, up to barMost. Having been in sync for barMost, it is forgiven.
const (
	laggard  = time.Second
	barFirst = 10 * time.Second
	barMost  = 5 * time.Minute
	// How old an entry is need not be known better than this; so many marks reach back over twice the laggard's time.
	appendGrain = 20 * time.Millisecond
	appendMarks = 128
)

// noIndex is an index that nobody will reach.
const noIndex = uint64(math.MaxUint64)

// insync keeps the replicas whose copy is waited for besides raft's majority, as Kafka keeps a partition's in-sync
// replicas. A term begins with the leader alone. A replica, voter or standby, enters once it has acked what was the
// leader's last index when the AppendEntries before went out to it: it is then no more than a round trip behind. It
// leaves at once when its connection closes, and else when its oldest entry not acked is as old as laggard.
//
// It learns from the transport (requests sent, answers, errors) and from the log (entries appended). What it knows is
// of one term, the newest in which we sent anything or were told to begin.
type insync struct {
	configuration func() raft.Configuration          // asked when a term begins
	leadership    func() (term uint64, leading bool) // asked before somebody is taken out for being late
	logger        *slog.Logger
	lease         time.Duration // raft's: its leader steps down when no majority has answered for so long
	advanced      chan struct{} // has one value if stored has risen since it was last taken

	mu       sync.Mutex
	term     uint64
	over     bool                   // that term is over: nobody enters
	members  map[raft.ServerID]bool // of the newest configuration; nil: not known
	replicas map[raft.ServerID]*replicaProgress
	present  int    // replicas in sync
	last     uint64 // our last index
	told     uint64 // what stored was when that was last told, or a replica entered
	appends  []appendMark
	timer    *time.Timer // check is due; nil: not armed
	stopped  bool
}

// appendMark: the entries from first on, up to the next mark's, were appended within appendGrain from at on.
type appendMark struct {
	first uint64
	at    time.Time
}

// replicaProgress is one other replica's.
type replicaProgress struct {
	match    uint64 // it has stored everything up to here
	sentLast uint64 // our last index when the newest AppendEntries went out; noIndex: none did
	in       bool
	since    time.Time     // it is in sync since
	bar      time.Duration // how long it was barred when it last left
	barred   time.Time     // until
	contact  time.Time     // it last answered in this process's time as leader
	steady   time.Time     // and has done so since, never later than a lease after the answer before
}

// replicaInfo is what is known of a replica.
type replicaInfo struct {
	ID      raft.ServerID
	Match   uint64 // it may be past our own last index: entries go ahead of our own write
	InSync  bool
	Contact time.Time // zero: never
	// Steady is for how long it has answered as a lease asks of a voter.
	Steady time.Duration
}

func newInsync(configuration func() raft.Configuration, leadership func() (uint64, bool)) *insync {
	return &insync{
		configuration: configuration, leadership: leadership, logger: slog.New(slog.DiscardHandler), advanced: make(chan struct{}, 1),
		replicas: map[raft.ServerID]*replicaProgress{},
	}
}

// begin makes a term the current one, with the leader alone in sync, unless it is already: raft sends before it tells.
func (s *insync) begin(term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if term > s.term {
		s.roll(term)
	}
}

// roll begins a term.
func (s *insync) roll(term uint64) {
	s.term, s.over, s.present, s.told = term, false, 0, 0
	s.members = nil
	if c := s.configuration(); len(c.Servers) > 0 {
		s.setMembers(c)
	}
	for id, r := range s.replicas {
		s.replicas[id] = &replicaProgress{sentLast: noIndex, bar: r.bar, barred: r.barred, contact: r.contact, steady: r.steady}
	}
}

// end says that a term is over: nothing advances any more.
func (s *insync) end(term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = s.over || term >= s.term
}

// stop ends the timer.
func (s *insync) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	if s.timer != nil {
		s.timer.Stop()
	}
}

// stored gives the current term and the index up to which every in-sync replica, ourselves among them, has stored it.
// It falls back when a replica enters that has not everything yet; what was stored remains so.
func (s *insync) stored() (term, index uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.term, s.lowest()
}

// has says whether every in-sync replica has stored our log up to index.
func (s *insync) has(index uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lowest() >= index
}

func (s *insync) lowest() uint64 {
	low := s.last
	for _, r := range s.replicas {
		if r.in {
			low = min(low, r.match)
		}
	}
	return low
}

// changed tells that stored may have risen.
func (s *insync) changed() {
	if low := s.lowest(); low > s.told && !s.over {
		s.told = low
		select {
		case s.advanced <- struct{}{}:
		default:
		}
	}
}

// appended takes that entries were written to our log, by ourselves as the leader or as a follower.
func (s *insync) appended(first, last uint64, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = last
	n := len(s.appends)
	for n > 0 && s.appends[n-1].first >= first {
		n-- // cut off: a conflict with a newer leader's log
	}
	s.appends = s.appends[:n]
	if n == 0 || now.Sub(s.appends[n-1].at) >= appendGrain {
		if n == appendMarks {
			s.appends = s.appends[:copy(s.appends, s.appends[1:])]
		}
		s.appends = append(s.appends, appendMark{first: first, at: now})
	}
	if s.present > 0 && s.timer == nil {
		s.arm(laggard + appendGrain)
	}
}

// appendedAt is when an entry was appended at the earliest; long ago if that is no longer known.
func (s *insync) appendedAt(index uint64) time.Time {
	for _, m := range slices.Backward(s.appends) {
		if m.first <= index {
			return m.at
		}
	}
	return time.Time{}
}

// sending takes that an AppendEntries of term, not a heartbeat, goes out while last is our last index. It gives what
// that was when the one before went out, noIndex if there was none.
func (s *insync) sending(id raft.ServerID, term, last uint64) (previous uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if term > s.term {
		s.roll(term)
	}
	if term < s.term {
		return noIndex
	}
	r := s.replicas[id]
	if r == nil {
		r = &replicaProgress{sentLast: noIndex}
		s.replicas[id] = r
	}
	previous, r.sentLast = r.sentLast, last
	return previous
}

// acked takes that a replica has accepted a request of term, and so has stored everything up to index; 0: the request
// did not say. previous is what sending gave for it.
func (s *insync) acked(id raft.ServerID, term, index, previous uint64, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.replicas[id]
	if term != s.term || r == nil {
		return
	}
	if now.Sub(r.contact) > s.lease {
		r.steady = now
	}
	r.contact = now
	if index == 0 {
		return
	}
	r.match = max(r.match, index)
	if r.in {
		s.changed()
		return
	}
	// noIndex as previous is never reached.
	if r.match >= previous && !s.over && (s.members == nil || s.members[id]) && !now.Before(r.barred) {
		r.in, r.since = true, now
		s.present++
		s.told = s.lowest()
		s.logger.Info("replica is in sync", "node", id, "term", s.term)
		if s.timer == nil && r.match < s.last {
			s.arm(laggard + appendGrain)
		}
	}
}

// closed takes that a connection to a replica, used in term, has closed.
func (s *insync) closed(id raft.ServerID, term uint64, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if term == s.term && !s.over {
		s.leave(id, now, "its connection has closed")
	}
}

// leaving takes that a replica has announced its exit.
func (s *insync) leaving(id raft.ServerID, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leave(id, now, "it is about to stop")
}

// configured takes a configuration that was appended to the log: only its members can be in sync.
func (s *insync) configured(c raft.Configuration, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setMembers(c)
	for id := range s.replicas {
		if !s.members[id] {
			s.leave(id, now, "it is not a member any more")
			delete(s.replicas, id)
		}
	}
}

func (s *insync) setMembers(c raft.Configuration) {
	s.members = make(map[raft.ServerID]bool, len(c.Servers))
	for _, m := range c.Servers {
		s.members[m.ID] = true
	}
}

// leave takes a replica out, if it is in, and bars it for a while.
func (s *insync) leave(id raft.ServerID, now time.Time, why string) {
	r := s.replicas[id]
	if r == nil || !r.in {
		return
	}
	if now.Sub(r.since) >= barMost {
		r.bar = 0
	}
	r.bar = min(max(2*r.bar, barFirst), barMost)
	r.in, r.barred = false, now.Add(r.bar)
	s.present--
	s.logger.Info("replica is no longer in sync", "node", id, "term", s.term, "reason", why, "back_after", r.bar)
	s.changed()
}

// check takes out whoever is too far behind, and gives when it must be called again; zero: not before the next append.
func (s *insync) check(now time.Time) (next time.Time) {
	for id, r := range s.replicas {
		if !r.in || r.match >= s.last || s.over {
			continue
		}
		due := s.appendedAt(r.match + 1).Add(laggard + appendGrain)
		if !now.Before(due) {
			s.leave(id, now, "it has not stored an entry for too long")
		} else if next.IsZero() || due.Before(next) {
			next = due
		}
	}
	return next
}

// arm has check called.
func (s *insync) arm(in time.Duration) {
	if !s.stopped {
		s.timer = time.AfterFunc(in, s.tick)
	}
}

func (s *insync) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = nil
	if term, leading := s.leadership(); !leading || term != s.term {
		s.over = true // whoever is to end the term may be slow to see it, and nobody is late any more
	}
	now := time.Now()
	if next := s.check(now); !next.IsZero() {
		s.arm(next.Sub(now))
	}
}

// lag is how many of our entries, up to last, it lacks.
func (i replicaInfo) lag(last uint64) uint64 { return last - min(last, i.Match) }

// match is how far a replica has stored our log; 0: nobody knows.
func (s *insync) match(id raft.ServerID) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.replicas[id]; r != nil {
		return r.match
	}
	return 0
}

// infos gives what is known of the other replicas, by id, with our own last index.
func (s *insync) infos() (last uint64, infos []replicaInfo) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, r := range s.replicas {
		infos = append(infos, replicaInfo{ID: id, Match: r.match, InSync: r.in && !s.over, Contact: r.contact, Steady: r.contact.Sub(r.steady)})
	}
	slices.SortFunc(infos, func(a, b replicaInfo) int { return cmp.Compare(a.ID, b.ID) })
	return s.last, infos
}
