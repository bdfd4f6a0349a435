package replicate

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// hurried is for a busy machine all the same: a member is failed after five probes at the earliest.
var hurried = gossipTiming{
	firstJoin: 20 * time.Millisecond, lastJoin: 200 * time.Millisecond, rejoin: 300 * time.Millisecond, lostRejoin: 300 * time.Millisecond,
	gather: time.Millisecond, probe: 200 * time.Millisecond,
}

// unprobed finds no failure by itself.
func unprobed() gossipTiming {
	t := hurried
	t.probe = time.Hour
	return t
}

func gossipConfig(join ...string) ClusterConfig {
	return ClusterConfig{Name: "test", Gossip: "127.0.0.1:0", Join: join}
}

func startGossip(t *testing.T, c ClusterConfig, node string, timing gossipTiming, hooks gossipHooks) *gossip {
	t.Helper()
	g, err := openGossipWith(c, node, "127.0.0.1:1"+node, nil, slog.New(slog.DiscardHandler), timing, hooks)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// awaitGossip waits until the view satisfies done.
func awaitGossip(t *testing.T, g *gossip, what string, done func(map[string]gossipMember) bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		changed := g.changed()
		view := map[string]gossipMember{}
		for _, m := range g.members() {
			view[m.ID] = m
		}
		if done(view) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s waits for %s, has %v", g.node, what, g.members())
		}
	}
}

func aliveNodes(view map[string]gossipMember) string {
	var ids []string
	for id, m := range view {
		if m.State == gossipAlive {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return strings.Join(ids, " ")
}

func awaitAlive(t *testing.T, want string, all ...*gossip) {
	t.Helper()
	for _, g := range all {
		awaitGossip(t, g, want, func(view map[string]gossipMember) bool { return aliveNodes(view) == want })
	}
}

func TestSidecarsFindEachOtherThroughOneAddress(t *testing.T) {
	c := gossipConfig()
	c.Zone, c.Machine, c.Version, c.BootstrapExpect = "z1", "m1", "v1", 3
	a := startGossip(t, c, "a", hurried, gossipHooks{})
	b := startGossip(t, gossipConfig(a.addr()), "b", hurried, gossipHooks{})
	d := startGossip(t, gossipConfig(a.addr(), "127.0.0.1:1"), "d", hurried, gossipHooks{})
	awaitAlive(t, "a b d", a, b, d)
	for _, g := range []*gossip{a, b, d} {
		for _, node := range []string{"a", "b", "d"} {
			if addr, known := g.resolve(node); !known || addr != "127.0.0.1:1"+node {
				t.Errorf("%s resolves %s to %q, %v", g.node, node, addr, known)
			}
		}
	}
	if addr, known := a.resolve("nobody"); known {
		t.Errorf("nobody is known at %q", addr)
	}
	awaitGossip(t, d, "the tags of a", func(view map[string]gossipMember) bool {
		tags := view["a"].Tags
		return tags[tagZone] == "z1" && tags[tagMachine] == "m1" && tags[tagVersion] == "v1" && tags[tagExpect] == "3"
	})
	if err := b.setTags(map[string]string{tagRole: "voter", tagClusterID: "one"}); err != nil {
		t.Fatal(err)
	}
	awaitGossip(t, a, "new tags of b", func(view map[string]gossipMember) bool {
		return view["b"].Tags[tagRole] == "voter" && view["b"].PeerAddr == "127.0.0.1:1b"
	})
}

// One name, several records, our own among them; at first there is none, and later they change.
func TestNamesAreLookedUpAgainAndAgain(t *testing.T) {
	a := startGossip(t, gossipConfig(), "a", hurried, gossipHooks{})
	_, port, _ := net.SplitHostPort(a.addr())
	var asked atomic.Int32
	lookup := func(_ context.Context, host string) ([]string, error) {
		if host != "sidecars.test" {
			return nil, fmt.Errorf("unexpected lookup of %s", host)
		}
		switch asked.Add(1) {
		case 1:
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		case 2:
			return []string{"127.0.0.9"}, nil
		}
		return []string{"127.0.0.9", "127.0.0.2", "127.0.0.1"}, nil
	}
	c := ClusterConfig{Name: "test", Gossip: "127.0.0.2:" + port, Join: []string{"sidecars.test:" + port}}
	b := startGossip(t, c, "b", hurried, gossipHooks{lookup: lookup})
	awaitAlive(t, "a b", a, b)
	if n := asked.Load(); n < 3 {
		t.Errorf("%d lookups", n)
	}
}

func TestAnotherNameOrKeyIsKeptOutAndCounted(t *testing.T) {
	key, other := []byte("0123456789abcdef"), []byte("fedcba9876543210")
	secured := func(name string, keys ...[]byte) ClusterConfig {
		c := gossipConfig()
		c.Name, c.Security.Keyring = name, keys
		return c
	}
	var refused atomic.Int32
	a := startGossip(t, secured("orders", key, other), "a", hurried, gossipHooks{stranger: func() { refused.Add(1) }})
	for i, c := range []ClusterConfig{secured("payments", key), secured("orders"), secured("orders", []byte("another key of 1"))} {
		c.Join = []string{a.addr()}
		before := refused.Load()
		b := startGossip(t, c, fmt.Sprint("b", i), hurried, gossipHooks{})
		deadline := time.Now().Add(time.Minute)
		for refused.Load() == before || b.whyAlone() == "" {
			if time.Now().After(deadline) {
				t.Fatalf("%d: refused %d, b says %q", i, refused.Load(), b.whyAlone())
			}
			time.Sleep(5 * time.Millisecond)
		}
		if len(a.members()) != 1 || len(b.members()) != 1 {
			t.Errorf("%d: %v and %v", i, a.members(), b.members())
		}
	}
	c := secured("orders", other, key) // the keys are being rotated
	c.Join = []string{a.addr()}
	awaitAlive(t, "a d", a, startGossip(t, c, "d", hurried, gossipHooks{}))
}

func TestAJoinTokenIsAGossipKey(t *testing.T) {
	tokened := func(token string, join ...string) ClusterConfig {
		c := gossipConfig(join...)
		c.Security.Token = token
		return c
	}
	a := startGossip(t, tokened("secret"), "a", hurried, gossipHooks{})
	awaitAlive(t, "a b", a, startGossip(t, tokened("secret", a.addr()), "b", hurried, gossipHooks{}))
	stranger := startGossip(t, tokened("guess", a.addr()), "c", hurried, gossipHooks{})
	for stranger.whyAlone() == "" {
		time.Sleep(5 * time.Millisecond)
	}
	if len(stranger.members()) != 1 {
		t.Error(stranger.members())
	}
}

func TestWithoutSecurityGossipStaysOnLoopback(t *testing.T) {
	c := gossipConfig()
	c.Advertise = "192.0.2.1"
	_, err := openGossip(c, "a", "192.0.2.1:7947", nil, slog.New(slog.DiscardHandler), gossipHooks{})
	if err == nil || !strings.Contains(err.Error(), "open to everybody") {
		t.Fatal(err)
	}
	c.Security.Insecure = true
	g, err := openGossip(c, "a", "192.0.2.1:7947", nil, slog.New(slog.DiscardHandler), gossipHooks{})
	if err != nil {
		t.Fatal(err)
	}
	if host, _, _ := net.SplitHostPort(g.addr()); host != "192.0.2.1" {
		t.Error(g.addr())
	}
	if err := g.close(); err != nil {
		t.Error(err)
	}
}

func TestMembersOfAnotherClusterIDAreNotMerged(t *testing.T) {
	var refused atomic.Int32
	a := startGossip(t, gossipConfig(), "a", hurried, gossipHooks{stranger: func() { refused.Add(1) }})
	if err := a.setTags(map[string]string{tagClusterID: "one"}); err != nil {
		t.Fatal(err)
	}
	tags := func() map[string]string { return map[string]string{tagClusterID: "two"} }
	b, err := openGossipWith(gossipConfig(a.addr()), "b", "127.0.0.1:1b", tags, slog.New(slog.DiscardHandler), hurried, gossipHooks{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	fresh := startGossip(t, gossipConfig(a.addr()), "c", hurried, gossipHooks{})
	awaitAlive(t, "a c", a)
	deadline := time.Now().Add(time.Minute)
	for refused.Load() == 0 {
		if time.Now().After(deadline) {
			t.Fatal("nothing was refused")
		}
		time.Sleep(5 * time.Millisecond)
	}
	// Whoever joined without an id and then says that it is another cluster's is dropped, too.
	if err := fresh.setTags(map[string]string{tagClusterID: "two"}); err != nil {
		t.Fatal(err)
	}
	awaitAlive(t, "b c", b)
	for _, m := range a.members() {
		if m.ID == "b" {
			t.Error("b was merged")
		}
	}
}

// No failure is detected here, so the old address looks alive all the time.
func TestARestartWithANewAddressIsResolvedAtOnce(t *testing.T) {
	a := startGossip(t, gossipConfig(), "a", unprobed(), gossipHooks{})
	b := startGossip(t, gossipConfig(a.addr()), "b", unprobed(), gossipHooks{})
	awaitAlive(t, "a b", a, b)
	was := b.addr()
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	again, err := openGossipWith(gossipConfig(a.addr()), "b", "127.0.0.1:2", nil, slog.New(slog.DiscardHandler), unprobed(), gossipHooks{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	awaitGossip(t, a, "b's new address", func(view map[string]gossipMember) bool {
		addr, known := a.resolve("b")
		return known && addr == "127.0.0.1:2" && view["b"].GossipAddr == again.addr() && len(view) == 2
	})
	if was == again.addr() {
		t.Error("the port was the same")
	}
	awaitAlive(t, "a b", again)
}

func TestALeaverIsToldFromAFailure(t *testing.T) {
	t.Parallel()
	a := startGossip(t, gossipConfig(), "a", hurried, gossipHooks{})
	b := startGossip(t, gossipConfig(a.addr()), "b", hurried, gossipHooks{})
	c := startGossip(t, gossipConfig(a.addr()), "c", hurried, gossipHooks{})
	awaitAlive(t, "a b c", a, b, c)
	state := func(node string, want gossipState) func(map[string]gossipMember) bool {
		return func(view map[string]gossipMember) bool { return view[node].State == want }
	}
	if err := b.setTags(map[string]string{tagLeaving: "1"}); err != nil {
		t.Fatal(err)
	}
	awaitGossip(t, a, "b leaving", state("b", gossipLeaving))
	if err := b.leave(); err != nil {
		t.Fatal(err)
	}
	awaitGossip(t, a, "b left", state("b", gossipLeft))
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	awaitGossip(t, a, "c failed", state("c", gossipFailed))
	if addr, known := a.resolve("c"); !known || addr != "127.0.0.1:1c" {
		t.Errorf("a failed member is resolved to %q, %v", addr, known)
	}
}

// cut lets each of gs reach only the others of gs, until heal.
func cut(gs ...*gossip) (heal func()) {
	var healed atomic.Bool
	for _, from := range gs {
		unreachable := func(addr string) bool {
			return !healed.Load() && !slices.ContainsFunc(gs, func(to *gossip) bool { return to.addr() == addr })
		}
		from.transport.cut.Store(&unreachable)
	}
	return func() { healed.Store(true) }
}

func TestHalvesThatWereCutApartFindEachOtherAgain(t *testing.T) {
	t.Parallel()
	a := startGossip(t, gossipConfig(), "a", hurried, gossipHooks{})
	b := startGossip(t, gossipConfig(a.addr()), "b", hurried, gossipHooks{})
	c := startGossip(t, gossipConfig(a.addr()), "c", hurried, gossipHooks{})
	awaitAlive(t, "a b c", a, b, c)
	healA, healB := cut(a, b), cut(c)
	awaitAlive(t, "a b", a, b)
	awaitAlive(t, "c", c)
	healA()
	healB()
	awaitAlive(t, "a b c", a, b, c)
}

// Neither half has ever heard of the other; only one name of --join leads across, once it resolves.
func TestHalvesThatStartedApartFindEachOther(t *testing.T) {
	var bridge atomic.Bool
	lookup := func(_ context.Context, host string) ([]string, error) {
		if !bridge.Load() {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}
		return []string{"127.0.0.1"}, nil
	}
	a := startGossip(t, gossipConfig(), "a", hurried, gossipHooks{})
	b := startGossip(t, gossipConfig(a.addr()), "b", hurried, gossipHooks{})
	c := startGossip(t, gossipConfig(), "c", hurried, gossipHooks{})
	_, port, _ := net.SplitHostPort(a.addr())
	d := startGossip(t, gossipConfig(c.addr(), "a.test:"+port), "d", hurried, gossipHooks{lookup: lookup})
	awaitAlive(t, "a b", a, b)
	awaitAlive(t, "c d", c, d)
	bridge.Store(true)
	awaitAlive(t, "a b c d", a, b, c, d)
}

func TestAddressesOfThePastAreTriedWhileAlone(t *testing.T) {
	var noted atomic.Pointer[[]string]
	hooks := gossipHooks{
		recall: func() []string {
			if n := noted.Load(); n != nil {
				return *n
			}
			return nil
		},
		remember: func(addresses []string) { noted.Store(&addresses) },
	}
	a := startGossip(t, gossipConfig(), "a", unprobed(), hooks) // the founder: it has no --join
	b := startGossip(t, gossipConfig(a.addr()), "b", unprobed(), gossipHooks{})
	awaitAlive(t, "a b", a, b)
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	if n := noted.Load(); n == nil || !slices.Equal(*n, []string{b.addr()}) {
		t.Fatalf("noted %v, b is at %s", n, b.addr())
	}
	again := startGossip(t, gossipConfig(), "a", unprobed(), hooks)
	awaitAlive(t, "a b", again, b)
}

func TestTagsThatDoNotFitAreRefused(t *testing.T) {
	g := startGossip(t, gossipConfig(), "a", hurried, gossipHooks{})
	if err := g.setTags(map[string]string{tagRole: strings.Repeat("x", 512)}); err == nil {
		t.Error("accepted")
	}
	c := gossipConfig()
	c.Zone = strings.Repeat("x", 512)
	if g, err := openGossip(c, "b", "", nil, slog.New(slog.DiscardHandler), gossipHooks{}); err == nil {
		t.Error("opened", g.close())
	}
	for _, bad := range []ClusterConfig{{Gossip: "127.0.0.1"}, {Gossip: "127.0.0.1:x"}, {Gossip: "127.0.0.1:0", Name: strings.Repeat("x", 256)},
		{Gossip: "127.0.0.1:0", Security: Security{Keyring: [][]byte{[]byte("short")}}}} {
		if g, err := openGossip(bad, "b", "", nil, slog.New(slog.DiscardHandler), gossipHooks{}); err == nil {
			t.Errorf("%+v was opened: %v", bad, g.close())
		}
	}
}

type lineWriter func(line string)

func (w lineWriter) Write(line []byte) (int, error) {
	w(string(line))
	return len(line), nil
}

func TestTwoProcessesWithOneIdentityAreReported(t *testing.T) {
	reported := make(chan struct{}, 1)
	logger := slog.New(slog.NewTextHandler(lineWriter(func(line string) {
		if strings.Contains(line, "another process uses this sidecar's identity") {
			reported <- struct{}{}
		}
	}), nil))
	first, err := openGossipWith(gossipConfig(), "a", "127.0.0.1:1", nil, logger, hurried, gossipHooks{})
	if err != nil {
		t.Fatal(err)
	}
	defer first.close()
	second := startGossip(t, gossipConfig(first.addr()), "a", hurried, gossipHooks{})
	b := startGossip(t, gossipConfig(first.addr()), "b", hurried, gossipHooks{})
	awaitGossip(t, b, "the newer of both", func(view map[string]gossipMember) bool { return view["a"].Name == second.name })
	awaitAlive(t, "a b", first, second)
	select {
	case <-reported:
	case <-time.After(time.Minute):
		t.Error("nobody was told")
	}
}

func TestTheStoreKeepsTheOthersAddresses(t *testing.T) {
	s, err := store.Open(store.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	hooks := storedHooks(s.Local(), nil, slog.New(slog.DiscardHandler))
	if got := hooks.recall(); len(got) != 0 {
		t.Error(got)
	}
	want := []string{"127.0.0.1:1", "[::1]:2"}
	hooks.remember(want)
	hooks.remember(want)
	if got := storedHooks(s.Local(), nil, nil).recall(); !slices.Equal(got, want) {
		t.Error(got)
	}
}
