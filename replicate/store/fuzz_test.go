package store

import (
	"bytes"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Whatever is found on disk or comes from a peer, a decoder gives a value or an error.
func FuzzDecoders(f *testing.F) {
	at := time.UnixMilli(1700000000000)
	b := block{partition: 3, time: at.UnixMilli()}
	s := Stored{Record: rec(3, "key", "value"), Offset: 70, Index: 9, Position: 2, Time: at}
	b.add(&s)
	key, value := b.encode()
	f.Add(key, value)
	key = appendLatestKey(nil, 3, []byte("key"))
	f.Add(key, encodeLatest(key, &s))
	state := State{Index: 5, Term: 2, Next: map[int32]int64{3: 71}, Configuration: []byte("c")}
	f.Add(appliedKey, seal(appliedKey, state.encode()))
	f.Add(raftLogKey(7), encodeLog(&raft.Log{Index: 7, Term: 1, Data: []byte("data"), AppendedAt: at}))
	f.Fuzz(func(t *testing.T, key, value []byte) {
		if len(key) < 10 {
			return
		}
		if len(value) >= 4 { // a right checksum, so that what lies behind is reached
			value = seal(key, bytes.Clone(value[:len(value)-4]))
		}
		_ = decodeBlock(key, value, func(r *Stored) bool {
			if len(r.Key) > len(value) || len(r.Value) > len(value) {
				t.Fatal("a record larger than its block")
			}
			return true
		})
		_, _, _ = decodeLatest(key, value)
		var l raft.Log
		_ = decodeLog(key, value, &l)
		if body, ok := unseal(key, value); ok {
			if state, err := decodeState(body); err == nil {
				if _, err := decodeState(state.encode()); err != nil {
					t.Fatal(err)
				}
			}
		}
		for r := bytes.NewReader(value); ; {
			payload, err := readFrame(r)
			if err != nil {
				break
			}
			if len(payload) > len(value) {
				t.Fatal("a frame larger than its stream")
			}
		}
	})
}
