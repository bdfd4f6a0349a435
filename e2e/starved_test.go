//go:build e2e

package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
)

// TestStarvedSidecarsKeepTheirLeader: each with a tenth of a core, no election is called while clients commit and groups
// live, for a minute, or an hour in the long form.
func TestStarvedSidecarsKeepTheirLeader(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	c := sidecars(t, k, 3, 3)
	groups := calmGroups(t, k, c.Sidecars, "franz-go")
	for i, s := range c.Sidecars {
		g, err := lab.NewStarved(fmt.Sprint(i), 100)
		check(t, err)
		t.Cleanup(func() { s.Kill(); g.Remove() })
		check(t, g.Take(s.Process))
		defer func() {
			if n, err := g.Throttled(); err == nil {
				t.Logf("sidecar %d had to wait %d times", i, n)
			}
		}()
	}
	all := pulses(t, topic(t, k, "starved", 1), c.Sidecars...)
	leader := active(t, c)
	before, err := leader.Members()
	check(t, err)
	length := time.Minute
	if long {
		length = time.Hour
	}
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Second) {
		if now, err := leader.Members(); err == nil && now.Term != before.Term { // a page may be late: that is no election
			break
		}
	}
	after, err := leader.Members()
	check(t, err)
	if after.Term != before.Term {
		t.Errorf("the term went from %d to %d", before.Term, after.Term)
	}
	pause := undisturbed(t, 20*time.Second, all...)
	t.Logf("slowest commit: %s", pause)
	kept(t, c, all...)
	undisturbedGroups(t, groups)
}
