package replicate

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// A whole node in a bubble: nothing of it is left running after Close, or the bubble would say so.
func TestANodeLeavesNothingBehind(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		synctest.Test(t, func(t *testing.T) {
			h := openHarness(t, testConfig(dir))
			h.active()
			for i := range 20 {
				h.commit(record(int32(i%3), "k", fmt.Sprint(i)))
			}
			h.n.Resign(h.term)
			h.active()
			h.commit(record(0, "k", "end"))
			time.Sleep(time.Minute) // flushes, watermarks, trims
			h.close()
		})
	}
}

func TestAQuietLeaderStaysWhatItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHarness(t, testConfig(""))
		h.active()
		time.Sleep(time.Hour)
		synctest.Wait()
		select {
		case e := <-h.n.Events():
			t.Fatalf("%+v", e)
		default:
		}
		h.commit(record(0, "k", "v"))
		h.close()
	})
}

// Raft's log is cut by bytes, not only by the number of entries, and what was cut off is not needed to start.
func TestRaftsLogIsCutByBytes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := testConfig(dir)
	c.Fsync = false
	h := openHarness(t, c)
	h.active()
	noise := make([]byte, EntryBytes-100) // which does not become smaller
	_, _ = rand.Read(noise)
	value := string(noise)
	size := func() (first uint64, bytes int64) {
		first, _ = h.n.store.RaftLog().FirstIndex()
		_, bytes = h.n.store.RaftLog().Size()
		return first, bytes
	}
	for i := range 3 * logBytes / EntryBytes {
		h.commit(record(int32(i%50), fmt.Sprint(i%100), value))
	}
	late := time.Now().Add(time.Minute)
	for first, bytes := size(); first == 1 || bytes > logBytes; first, bytes = size() {
		if time.Now().After(late) {
			t.Fatalf("raft's log holds %d bytes from %d on", bytes, first)
		}
		time.Sleep(10 * time.Millisecond)
	}
	want := h.latest()
	h.close()
	h = openHarness(t, c)
	h.active()
	if got := h.latest(); !maps.Equal(got, want) {
		t.Fatalf("%d keys, want %d", len(got), len(want))
	}
	h.commit(record(0, "more", "1"))
}

func TestAnEntryOfAnUnknownVersionEndsTheNode(t *testing.T) {
	dir := t.TempDir()
	h := openHarness(t, testConfig(dir))
	h.active()
	h.commit(record(0, "a", "1"))
	h.n.running.Load().raft.Apply([]byte{entryCompressed + 1, 1, 2, 3}, 0)
	for range 2 { // it is not skipped at the next start either
		for range h.n.Events() {
		}
		if err := h.n.Err(); err == nil || !strings.Contains(err.Error(), "run the version that wrote it") {
			t.Fatal(err)
		}
		h.close()
		h = openHarness(t, testConfig(dir))
	}
}

// bareReplica is a raft member made of this package's fsm and store, without a Node.
type bareReplica struct {
	*testing.T
	store  *store.Store
	raft   *raft.Raft
	inner  *raft.InmemTransport
	resets int
}

func openReplica(t *testing.T, dir string, bootstrap bool) *bareReplica {
	t.Helper()
	s, err := store.Open(store.Options{Dir: dir, Fsync: true})
	if err != nil {
		t.Fatal(err)
	}
	r := &bareReplica{T: t, store: s}
	id := raft.ServerID(s.ID())
	_, r.inner = raft.NewInmemTransport(raft.ServerAddress(id))
	if bootstrap {
		if err := s.Bootstrap(raft.Configuration{Servers: []raft.Server{{ID: id, Address: raft.ServerAddress(id)}}}); err != nil {
			t.Fatal(err)
		}
	}
	f := &fsm{store: s, fatal: func(err error) { t.Error(err) }, send: func(e Event) bool {
		if e.Kind == Reset {
			r.resets++
		}
		return true
	}}
	f.resume()
	rc := raftConfig(Config{RaftTimeout: 500 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)}, id)
	rc.TrailingLogs = 3
	r.raft, err = raft.NewRaft(rc, f, s.RaftLog(), s.Stable(), s.Snapshots(), newTransport(r.inner))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *bareReplica) close() {
	r.Helper()
	if err := errors.Join(r.raft.Shutdown().Error(), r.store.Close()); err != nil {
		r.Error(err)
	}
}

func (r *bareReplica) await(what string, ok func() bool) {
	r.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.Fatalf("%s: not within 20 s", what)
		}
	}
}

func (r *bareReplica) latest() map[string]string {
	m := map[string]string{}
	if err := r.store.Latest(func(rec Record) error {
		m[fmt.Sprintf("%d/%s", rec.Partition, rec.Key)] = string(rec.Value)
		return nil
	}); err != nil {
		r.Fatal(err)
	}
	return m
}

// A newcomer whose leader has cut its log gets a snapshot, then the log; and it can be stopped and started with it.
func TestANewcomerGetsASnapshotThroughRaft(t *testing.T) {
	a := openReplica(t, t.TempDir(), true)
	defer a.close()
	a.await("leadership", func() bool { return a.raft.State() == raft.Leader })
	sequence := uint64(0)
	commit := func(key string) {
		t.Helper()
		sequence++
		e := Entry{Term: a.raft.CurrentTerm(), Sequence: sequence, Records: []Record{record(int32(sequence%5), key, fmt.Sprint(sequence)), record(-1, key, "private")}}
		if err := a.raft.Apply(e.encode(), 0).Error(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		commit(fmt.Sprint("key", i%70))
	}
	if err := a.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	if first, _ := a.store.RaftLog().FirstIndex(); first < 250 {
		t.Fatalf("the leader's log still begins at %d", first)
	}
	dir := t.TempDir()
	b := openReplica(t, dir, false)
	a.inner.Connect(b.inner.LocalAddr(), b.inner)
	b.inner.Connect(a.inner.LocalAddr(), a.inner)
	if err := a.raft.AddNonvoter(raft.ServerID(b.store.ID()), b.inner.LocalAddr(), 0, 0).Error(); err != nil {
		t.Fatal(err)
	}
	same := func() bool {
		x, y := a.store.State(), b.store.State()
		return x.Index == y.Index && x.NextSequence == y.NextSequence && maps.Equal(x.Next, y.Next) && maps.Equal(a.latest(), b.latest())
	}
	b.await("the snapshot", same)
	for range 20 {
		commit("later")
	}
	b.await("the log", same)
	installed := b.store.State().Installed
	if b.resets != 1 || installed == 0 {
		t.Fatalf("%d resets; installed %d", b.resets, installed)
	}
	a.inner.Disconnect(b.inner.LocalAddr())
	b.close()

	commit("while it was away")
	b = openReplica(t, dir, false)
	defer b.close()
	a.inner.Connect(b.inner.LocalAddr(), b.inner)
	b.inner.Connect(a.inner.LocalAddr(), a.inner)
	b.await("what it missed", same)
	if b.resets != 0 {
		t.Fatal("it needed a whole snapshot again")
	}
}
