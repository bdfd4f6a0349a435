package replicate

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// fenceCheck is how often waiting fences are failed if we do not lead any more, should nobody tell.
const fenceCheck = 100 * time.Millisecond

// fences are proofs that we led after they were asked for: a majority of the voters of the newest configuration has
// answered, as followers of our term, requests whose sending began after the fence did. raft.VerifyLeader is no such
// proof: it counts answers to older requests, and those of non-voters. Nor is its lease: see raftConfig.
//
// "After" is told by a clock that counts fences: a fence moves it, a request notes it when its sending begins.
type fences struct {
	id            raft.ServerID
	leadership    func() (term uint64, leading bool)
	configuration func() raft.Configuration // the newest, committed or not
	hung          func() bool               // our own log write hangs
	kick          func(term uint64)         // has requests sent at once

	clock atomic.Uint64 // the mark of the newest fence
	count atomic.Int64  // of waiting; raised before the clock moves

	mu      sync.Mutex
	ended   uint64 // the newest term that is known to be over
	term    uint64 // of answered
	newest  map[raft.ServerID]uint64
	waiting []fence // by mark
	armed   bool    // check will be called
}

type fence struct {
	term, mark uint64
	done       func(error)
}

// fence calls done once: with nil when it is certain that we led in term after the call, and else, at the latest when
// we lead no more, with ErrNotLeader. With one voter it does so before it returns. It never waits for the in-sync set.
func (f *fences) fence(term uint64, done func(error)) {
	if now, leading := f.leadership(); !leading || now != term {
		done(ErrNotLeader)
		return
	}
	if f.lone() {
		f.finish([]fence{{term: term, done: done}}) // nobody else can have been elected
		return
	}
	if !f.wait(term, done) {
		done(ErrNotLeader)
		return
	}
	f.kick(term)
}

// lone says whether we are the only voter.
func (f *fences) lone() bool {
	voters, own := voters(f.configuration(), f.id)
	return own && voters == 1
}

// voters counts those of a configuration, and says whether id is one.
func voters(c raft.Configuration, id raft.ServerID) (n int, member bool) {
	for _, s := range c.Servers {
		if s.Suffrage == raft.Voter {
			n++
			member = member || s.ID == id
		}
	}
	return n, member
}

// wait makes a fence wait, unless its term is known to be over.
func (f *fences) wait(term uint64, done func(error)) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if term <= f.ended {
		return false
	}
	f.count.Add(1)
	f.waiting = append(f.waiting, fence{term: term, mark: f.clock.Add(1), done: done})
	if !f.armed {
		f.armed = true
		time.AfterFunc(fenceCheck, f.check)
	}
	return true
}

// want says whether a fence waits that a request with this stamp is too old for.
func (f *fences) want(stamp uint64) bool { return f.count.Load() > 0 && f.clock.Load() > stamp }

// acked: a replica has answered, as our follower in term, a request whose sending began at stamp.
func (f *fences) acked(id raft.ServerID, term, stamp uint64) {
	// A request newer than a fence has seen its clock, and so do we see its count: what is passed over here is of no use.
	if f.count.Load() == 0 {
		return
	}
	f.mu.Lock()
	complete := f.note(id, term, stamp)
	f.mu.Unlock()
	f.finish(complete)
}

// note takes an answer, and gives the fences that are complete by it.
func (f *fences) note(id raft.ServerID, term, stamp uint64) []fence {
	if term < f.term {
		return nil
	}
	if term > f.term || f.newest == nil {
		f.term, f.newest = term, map[raft.ServerID]uint64{}
	}
	if stamp <= f.newest[id] {
		return nil
	}
	f.newest[id] = stamp
	c := f.configuration()
	n, _ := voters(c, "")
	return f.take(func(w *fence) bool {
		return w.term == term && f.answers(c, w.mark) > n/2
	})
}

// answers counts the voters that have answered requests sent after mark. We ourselves do, if we are one: the term is
// checked at the end, and ours never goes back.
func (f *fences) answers(c raft.Configuration, mark uint64) (n int) {
	for _, s := range c.Servers {
		if s.Suffrage == raft.Voter && (s.ID == f.id || f.newest[s.ID] >= mark) {
			n++
		}
	}
	return n
}

// take removes and gives the waiting fences for which which holds.
func (f *fences) take(which func(*fence) bool) (taken []fence) {
	kept := f.waiting[:0]
	for i := range f.waiting {
		if which(&f.waiting[i]) {
			taken = append(taken, f.waiting[i])
		} else {
			kept = append(kept, f.waiting[i])
		}
	}
	clear(f.waiting[len(kept):])
	f.waiting = kept
	f.count.Add(-int64(len(taken)))
	return taken
}

// finish tells of fences for which a majority has answered; called without locks.
func (f *fences) finish(complete []fence) {
	if len(complete) == 0 {
		return
	}
	term, leading := f.leadership()
	for _, w := range complete {
		if leading && term == w.term {
			w.done(nil)
		} else {
			w.done(ErrNotLeader)
		}
	}
}

// over fails all fences of term and before, now and later: we do not lead in it any more.
func (f *fences) over(term uint64) {
	f.mu.Lock()
	f.ended = max(f.ended, term)
	failed := f.take(func(w *fence) bool { return w.term <= term })
	f.mu.Unlock()
	for _, w := range failed {
		w.done(ErrNotLeader)
	}
}

// check fails fences that nobody else will: raft steps down by its lease when no majority answers, and where our own
// log write hangs another is being elected.
func (f *fences) check() {
	term, leading := f.leadership()
	hung := f.hung()
	f.mu.Lock()
	failed := f.take(func(w *fence) bool { return hung || !leading || w.term != term })
	if f.armed = len(f.waiting) > 0; f.armed {
		time.AfterFunc(fenceCheck, f.check)
	}
	f.mu.Unlock()
	for _, w := range failed {
		w.done(ErrNotLeader)
	}
}
