package group

import (
	"encoding/binary"
	"slices"
)

// A client connection is a session, and its requests have ordinals. What a session's requests have yielded is a record
// of its own, in the same append as the request's records, so that a request that is sent again after a failover is
// executed once (as RIFL and raft's client sessions do it).

// sessionEntry is one session. Its value is the newest record's; the list runs from the oldest stamp to the newest.
type sessionEntry struct {
	id         Session
	value      []byte
	prev, next *sessionEntry
}

// sessionTable holds the sessions by id, and in the order of their stamps as long as sorted is set: live stamps only
// grow, but records may be applied in any order.
type sessionTable struct {
	byID        map[Session]*sessionEntry
	first, last *sessionEntry
	unsorted    bool
}

// sessionState is a session's value taken apart.
type sessionState struct {
	highest   uint64 // the highest ordinal that yielded records
	done      uint64 // bit i: ordinal highest-i yielded records
	term, seq uint64 // when it was written: its age
}

func (v sessionState) encode() []byte {
	dst := make([]byte, 0, 34)
	dst = binary.BigEndian.AppendUint16(dst, uint16(sessionVersion))
	dst = binary.BigEndian.AppendUint64(dst, v.highest)
	dst = binary.BigEndian.AppendUint64(dst, v.done)
	dst = binary.BigEndian.AppendUint64(dst, v.term)
	return binary.BigEndian.AppendUint64(dst, v.seq)
}

func decodeSession(value []byte) (v sessionState) {
	r := reader{b: value}
	if r.int16() != sessionVersion {
		return v
	}
	v.highest, v.done = uint64(r.int64()), uint64(r.int64())
	v.term, v.seq = uint64(r.int64()), uint64(r.int64())
	return v
}

// has says whether that ordinal yielded records. An ordinal more than 63 below the highest is no longer known; its
// session has no more than 64 requests under way, so it has long been answered.
func (v sessionState) has(ordinal uint64) bool {
	if ordinal == 0 || ordinal > v.highest || v.highest-ordinal > 63 {
		return false
	}
	return v.done>>(v.highest-ordinal)&1 == 1
}

func (v sessionState) with(ordinal uint64) sessionState {
	switch {
	case ordinal > v.highest:
		v.done = v.done<<min(64, ordinal-v.highest) | 1
		v.highest = ordinal
	case v.highest-ordinal <= 63:
		v.done |= 1 << (v.highest - ordinal)
	}
	return v
}

func (v sessionState) before(o sessionState) bool {
	return v.term < o.term || v.term == o.term && v.seq < o.seq
}

// swap makes value the session's newest and gives back the one before.
func (t *sessionTable) swap(id Session, value []byte) (previous []byte) {
	e := t.byID[id]
	if e == nil {
		if value == nil {
			return nil
		}
		e = &sessionEntry{id: id}
		t.byID[id] = e
	} else {
		previous = e.value
		t.unlink(e)
	}
	if value == nil {
		delete(t.byID, id)
		return previous
	}
	e.value = value
	if t.last != nil && !t.unsorted && decodeSession(value).before(decodeSession(t.last.value)) {
		t.unsorted = true
	}
	t.link(e)
	return previous
}

func (t *sessionTable) link(e *sessionEntry) {
	e.prev, e.next = t.last, nil
	if t.last == nil {
		t.first = e
	} else {
		t.last.next = e
	}
	t.last = e
}

func (t *sessionTable) unlink(e *sessionEntry) {
	if e.prev == nil {
		t.first = e.next
	} else {
		e.prev.next = e.next
	}
	if e.next == nil {
		t.last = e.prev
	} else {
		e.next.prev = e.prev
	}
}

// oldest is the session with the lowest stamp; the table must not be empty.
func (t *sessionTable) oldest() *sessionEntry {
	if t.unsorted {
		all := make([]*sessionEntry, 0, len(t.byID))
		for e := t.first; e != nil; e = e.next {
			all = append(all, e)
		}
		slices.SortStableFunc(all, func(a, b *sessionEntry) int {
			va, vb := decodeSession(a.value), decodeSession(b.value)
			switch {
			case va.before(vb):
				return -1
			case vb.before(va):
				return 1
			}
			return slices.Compare(a.id[:], b.id[:])
		})
		t.first, t.last, t.unsorted = nil, nil, false
		for _, e := range all {
			t.link(e)
		}
	}
	return t.first
}

// recall looks up what is noted of a request's session. again: this very request has yielded records before; its answer
// was lost, not its effect. overtaken: it was refused before a newer one of its session yielded records, for they are
// stepped in their order; executed now it would undo what is newer.
func (s *State) recall(c *Client) (again, overtaken bool) {
	e := s.sessions.byID[c.Session]
	if e == nil || c.Ordinal == 0 {
		return false, false
	}
	v := decodeSession(e.value)
	again = v.has(c.Ordinal)
	return again, c.Ordinal < v.highest && !again
}

// noteSession adds the session's record if the request has yielded any.
func (s *State) noteSession(c *Client) {
	if len(s.eff.Records) == 0 || c.Ordinal == 0 || s.cfg.MaxSessions < 1 {
		return
	}
	var v sessionState
	if e := s.sessions.byID[c.Session]; e != nil {
		v = decodeSession(e.value)
	} else {
		for len(s.sessions.byID) >= s.cfg.MaxSessions {
			s.put(PrivatePartition, appendSessionKey(nil, s.sessions.oldest().id), nil)
		}
	}
	v = v.with(c.Ordinal)
	s.seq++
	v.term, v.seq = s.term, s.seq
	s.put(PrivatePartition, appendSessionKey(make([]byte, 0, 18), c.Session), v.encode())
}
