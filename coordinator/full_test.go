package coordinator

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// While there is no room on disk, whatever might write is refused at once with an error that clients retry; what does not
// is answered, nobody's session expires, and once there is room all goes on by itself.
func TestAFullDiskRefusesWhatWritesAndNothingElse(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		heartbeat := joined(t, s, h)
		commit := func(offset int64) kmsg.Request {
			r := commit("orders", offset).(*kmsg.OffsetCommitRequest)
			r.Generation, r.MemberID = heartbeat.Generation, heartbeat.MemberID
			return r
		}
		sync := kmsg.NewPtrSyncGroupRequest() // sent again: the group is stable
		sync.Version, sync.Group, sync.Generation, sync.MemberID = 3, "g", heartbeat.Generation, heartbeat.MemberID
		kept := s.submit(commit(7))
		first := s.ordinal
		h.applied(h.mustTake())
		kept.is(t, "NONE")
		h.full.Store(true)
		time.Sleep(time.Second)
		quiet := func() {
			t.Helper()
			if e, offered := h.take(); offered {
				t.Errorf("an entry of %d records was offered", len(e.Records))
			}
		}
		for range 3 {
			s.submit(commit(8)).is(t, "COORDINATOR_NOT_AVAILABLE")
			s.submit(fetch()).is(t, "7")
			s.submit(heartbeat).is(t, "NONE")
			s.submit(sync).is(t, "NONE")
			s.resubmit(commit(7), first).is(t, "NONE")
			newSession(c, 2).submit(join()).is(t, "COORDINATOR_NOT_AVAILABLE generation -1")
			quiet()
			time.Sleep(9 * time.Second)
		}
		time.Sleep(time.Minute) // no heartbeat for so long
		quiet()
		h.full.Store(false)
		time.Sleep(2 * time.Second)
		quiet()
		if now := c.Status(); !now.Active || now.Term != 1 || len(h.resignations()) > 0 {
			t.Errorf("%+v", now)
		}
		s.submit(heartbeat).is(t, "NONE")
		taken := s.submit(commit(9))
		h.applied(h.mustTake())
		taken.is(t, "NONE")
		s.submit(fetch()).is(t, "9")
		time.Sleep(11 * time.Second) // and sessions expire again
		h.applied(h.mustTake())
		s.submit(heartbeat).is(t, "UNKNOWN_MEMBER_ID")
		synctest.Wait()
	})
}

// A disk that hovers at its limit is full: what is refused does not change from one request to the next.
func TestADiskAtItsLimitIsFull(t *testing.T) {
	bubble(t, &onlyOrders{}, func(c *Coordinator, h *hand) {
		s := newSession(c, 1)
		for range 20 {
			h.full.Store(true)
			time.Sleep(100 * time.Millisecond)
			s.submit(commit("orders", 7)).is(t, "COORDINATOR_NOT_AVAILABLE")
			h.full.Store(false)
			time.Sleep(fullFor - 10*time.Millisecond)
			s.submit(commit("orders", 8)).is(t, "COORDINATOR_NOT_AVAILABLE")
		}
		time.Sleep(10 * time.Millisecond)
		taken := s.submit(commit("orders", 9))
		h.applied(h.mustTake())
		taken.is(t, "NONE")
		// What an earlier activation has found is old.
		h.full.Store(true)
		time.Sleep(10 * time.Millisecond)
		s.submit(commit("orders", 10)).is(t, "COORDINATOR_NOT_AVAILABLE")
		h.event(replicate.Event{Kind: replicate.Inactive, Term: 1})
		h.full.Store(false)
		h.event(replicate.Event{Kind: replicate.Active, Term: 2})
		taken = s.submit(commit("orders", 11))
		h.applied(h.mustTake())
		taken.is(t, "NONE")
	})
}
