package coordinator

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// fenced ends the oldest fence under way.
func (h *hand) fenced(err error) {
	h.t.Helper()
	done := h.underWay()
	if len(done) == 0 {
		h.t.Fatal("no fence is under way")
	}
	h.mu.Lock()
	h.fences = h.fences[1:]
	h.mu.Unlock()
	done[0](err)
	synctest.Wait()
}

// underWay are the fences that have begun and not ended.
func (h *hand) underWay() []func(error) {
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fences
}

// noFence checks that none is under way.
func (h *hand) noFence() {
	h.t.Helper()
	if len(h.underWay()) > 0 {
		h.t.Error("a fence is under way")
	}
}

func TestAHeartbeatNeedsAFenceOfTheLastElectionTimeout(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		heartbeat := joined(t, s, h)
		time.Sleep(time.Second)
		h.hold = true
		first := s.submit(heartbeat)
		first.is(t, "parked")
		time.Sleep(100 * time.Millisecond)
		h.fenced(nil)
		first.is(t, "NONE")
		time.Sleep(399 * time.Millisecond) // what counts is when the fence began
		s.submit(heartbeat).is(t, "NONE")
		h.noFence()
		time.Sleep(time.Millisecond)
		late := s.submit(heartbeat)
		late.is(t, "parked")
		h.fenced(nil)
		late.is(t, "NONE")
	})
}

// An error sends a client into a rebalance, or makes it join anew: only who is active now may give it.
func TestAHeartbeatThatFailsNeedsAFenceOfItsOwn(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		heartbeat := joined(t, s, h)
		s.submit(heartbeat).is(t, "NONE")
		h.hold = true
		stranger := *heartbeat
		stranger.MemberID = "nobody"
		failed := s.submit(&stranger)
		failed.is(t, "parked")
		h.fenced(nil)
		failed.is(t, "UNKNOWN_MEMBER_ID")
	})
}

func TestAFenceOfTheTermBeforeIsNone(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		heartbeat := joined(t, s, h)
		s.submit(heartbeat).is(t, "NONE")
		h.event(replicate.Event{Kind: replicate.Inactive, Term: 1})
		h.event(replicate.Event{Kind: replicate.Active, Term: 2})
		h.hold = true
		s.submit(heartbeat).is(t, "parked")
		h.fenced(nil)
	})
}

func TestAFenceThatFailsIsTriedAgainWhileTheTermGoesOn(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		h.hold = true
		s := newSession(c, 1)
		first := s.submit(fetch())
		h.fenced(errors.New("no majority answers"))
		second := s.submit(fetch())
		h.noFence() // not at once
		time.Sleep(fenceRetry)
		first.is(t, "parked")
		h.fenced(nil)
		first.is(t, "-1")
		second.is(t, "-1")
		h.noFence()
		if len(h.resignations()) != 0 {
			t.Errorf("resigned %v", h.resignations())
		}
	})
}

func TestAFenceThatFailsForLongAnswersInTime(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		h.hold = true
		s := newSession(c, 1)
		heartbeat := kmsg.NewPtrHeartbeatRequest()
		heartbeat.Version, heartbeat.Group = 3, "g"
		fetched, beat := s.submit(fetch()), s.submit(heartbeat)
		for range 99 {
			h.fenced(errors.New("no majority answers"))
			time.Sleep(fenceRetry)
		}
		fetched.is(t, "parked")
		time.Sleep(fenceRetry)
		fetched.is(t, "NOT_COORDINATOR")
		beat.is(t, "COORDINATOR_NOT_AVAILABLE")
		h.fenced(errors.New("no majority answers"))
		time.Sleep(time.Minute)
		h.noFence() // nobody waits
		s.submit(fetch())
		h.fenced(nil)
	})
}

func TestAFenceThatSaysTheTermIsOverEndsTheActivation(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		h.hold = true
		fetched := newSession(c, 1).submit(fetch())
		h.fenced(replicate.ErrNotLeader)
		fetched.is(t, ErrInactive.Error())
		if c.Status().Active {
			t.Error("still active")
		}
	})
}
