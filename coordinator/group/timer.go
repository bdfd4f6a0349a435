package group

import (
	"container/heap"
	"time"
)

type timerKind uint8

const (
	sessionTimer timerKind = iota // a member's session, or the patience of a new member's parked join
	pendingTimer                  // a member id that was handed out and not used yet (KIP-394)
	joinTimer                     // the join phase of a rebalance
	syncTimer                     // the sync phase
	sweepTimer                    // expiry of offsets and groups
)

// timer is one deadline. Heartbeats move theirs all the time, nearly always forward, so a timer that moves later stays
// where it is in the heap and is put right when it comes up: a heartbeat costs no work in the heap.
type timer struct {
	kind timerKind
	g    *group
	m    *member
	p    *pendingMember

	at     time.Time
	full   time.Duration // what it was armed with
	queued bool
	key    time.Time // the time it has in the heap, never later than at
	order  uint64    // of arming: timers of one instant fire in that order
	index  int
}

type timers struct {
	heap  []*timer
	order uint64
}

func (t *timers) arm(x *timer, now time.Time, d time.Duration) {
	t.order++
	x.at, x.full, x.order = now.Add(max(0, d)), d, t.order
	switch {
	case !x.queued:
		x.key = x.at
		heap.Push(t, x)
	case x.at.Before(x.key):
		x.key = x.at
		heap.Fix(t, x.index)
	}
}

func (t *timers) cancel(x *timer) {
	if x.queued {
		heap.Remove(t, x.index)
	}
}

// next is the timer that fires first, nil if none is armed.
func (t *timers) next() *timer {
	for len(t.heap) > 0 {
		x := t.heap[0]
		if !x.at.After(x.key) {
			return x
		}
		x.key = x.at
		heap.Fix(t, 0)
	}
	return nil
}

// due takes the next timer out if its time has come, and it was armed no later than the one with the order last.
func (t *timers) due(now time.Time, last uint64) *timer {
	x := t.next()
	if x == nil || x.at.After(now) || x.order > last {
		return nil
	}
	heap.Pop(t)
	return x
}

// rearm gives every timer its full time again.
func (t *timers) rearm(now time.Time) {
	for _, x := range t.heap {
		x.at = now.Add(x.full)
		x.key = x.at
	}
	heap.Init(t)
}

// Len, Less, Swap, Push and Pop are container/heap's.

func (t *timers) Len() int { return len(t.heap) }

func (t *timers) Less(i, j int) bool {
	a, b := t.heap[i], t.heap[j]
	if a.key.Equal(b.key) {
		return a.order < b.order
	}
	return a.key.Before(b.key)
}

func (t *timers) Swap(i, j int) {
	t.heap[i], t.heap[j] = t.heap[j], t.heap[i]
	t.heap[i].index, t.heap[j].index = i, j
}

func (t *timers) Push(x any) {
	tm := x.(*timer)
	tm.index, tm.queued = len(t.heap), true
	t.heap = append(t.heap, tm)
}

func (t *timers) Pop() any {
	last := len(t.heap) - 1
	tm := t.heap[last]
	t.heap[last] = nil
	t.heap = t.heap[:last]
	tm.queued = false
	return tm
}
