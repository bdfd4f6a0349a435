package replicate

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// bereaved is a directory with records whose cluster has two more voters, which are gone. The last entry was stored
// and never committed.
func bereaved(t *testing.T) (dir string, want map[string]string) {
	t.Helper()
	dir = t.TempDir()
	h := openHarness(t, testConfig(dir))
	h.active()
	for i := range 50 {
		h.commit(record(int32(i%5), fmt.Sprint("k", i%20), fmt.Sprint(i)))
	}
	want = h.latest()
	id := h.n.ID()
	h.close()
	s, err := store.Open(store.Options{Dir: dir, Fsync: true})
	if err != nil {
		t.Fatal(err)
	}
	var c raft.Configuration
	for _, name := range []string{id, "gone-1", "gone-2"} {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(name), Address: raft.ServerAddress(name)})
	}
	c.Servers = append(c.Servers, raft.Server{Suffrage: raft.Nonvoter, ID: "standby", Address: "standby"})
	index, term, err := s.ForceMembership(c, map[string][]byte{clusterIDKey: []byte("the-cluster")})
	if err == nil {
		e := Entry{Term: term, Sequence: 1, Records: []Record{record(0, "k0", "unknown outcome")}}
		err = s.RaftLog().StoreLog(&raft.Log{Index: index + 1, Term: term, Data: e.encode(), AppendedAt: time.Unix(1800000000, 0)})
	}
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	want["0/k0"] = "unknown outcome"
	return dir, want
}

func TestASurvivorIsInspectedAndBecomesAClusterOfOne(t *testing.T) {
	dir, want := bereaved(t)
	for range 2 { // to look changes nothing
		found, err := Inspect(dir)
		if err != nil {
			t.Fatal(err)
		}
		voters := slices.DeleteFunc(slices.Clone(found.Servers), func(s SurvivorServer) bool { return !s.Voter })
		if found.ClusterID != "the-cluster" || found.Epoch != 0 || len(found.Servers) != 4 || len(voters) != 3 || found.Servers[0].ID != found.NodeID ||
			found.LastTerm < 2 || found.LastIndex < 52 || found.Applied == 0 || found.Newest.Unix() != 1800000000 || found.ConfigurationIndex != found.LastIndex-1 {
			t.Fatalf("%+v", found)
		}
	}
	no := errors.New("no")
	before, _ := Inspect(dir)
	if err := Recover(dir, func(Survivor) error { return no }); !errors.Is(err, no) {
		t.Fatal(err)
	}
	if after, err := Inspect(dir); err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Fatalf("%+v %v", after, err)
	}
	if err := Recover(dir, func(s Survivor) error {
		if fmt.Sprint(s) != fmt.Sprint(before) {
			t.Errorf("%+v", s)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	found, err := Inspect(dir)
	if err != nil || found.Epoch != 1 || len(found.Servers) != 1 || found.Servers[0].ID != found.NodeID || !found.Newer(&before) || before.Newer(&found) {
		t.Fatalf("%+v %v", found, err)
	}
	h := openHarness(t, testConfig(dir))
	h.active()
	if got := h.latest(); !maps.Equal(got, want) {
		t.Fatalf("%v, want %v", got, want)
	}
	h.commit(record(0, "k", "v"))
	h.close()
}

func TestWhatIsNoSurvivorIsRefused(t *testing.T) {
	dir := t.TempDir()
	for _, err := range []error{Recover(dir, func(Survivor) error { return nil }), func() error { _, err := Inspect(dir); return err }()} {
		if err == nil || !strings.Contains(err.Error(), "is not a data directory") {
			t.Fatal(err)
		}
	}
	s, err := store.Open(store.Options{Dir: dir, Fsync: true})
	if err != nil {
		t.Fatal(err)
	}
	var locked *store.LockedError
	if _, err := Inspect(dir); !errors.As(err, &locked) {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Recover(dir, func(Survivor) error { return nil }); err == nil || !strings.Contains(err.Error(), "choose another survivor") {
		t.Fatal(err)
	}
}
