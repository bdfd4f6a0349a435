//go:build e2e

package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/offset-sidecar/offset-sidecar/e2e/lab"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// TestTransactions: without offsets they work, with offsets they fail at once and for that producer alone: its own
// error says so, the group it named keeps its offsets, and a bystander reads on.
func TestTransactions(t *testing.T) {
	k := kafka(t, lab.Newest, 1)
	s := sidecar(t, k)
	bystander := newBystander(t, k, s)
	for _, name := range []string{"java", "franz-go"} {
		t.Run(name, func(t *testing.T) {
			topicName := topic(t, k, "transactions-"+name, 1)
			p, err := lab.StartCommand(name, clients()[name].command(t, "transact", s.Addr(), topicName, "transacting-"+name))
			check(t, err)
			t.Cleanup(p.Kill)
			code, err := p.Wait(60 * time.Second)
			check(t, err)
			lines := p.Lines()
			if code != 0 || !slices.Contains(lines, "commit ended") || !slices.Contains(lines, "abort ended") {
				t.Fatalf("transactions without offsets failed (exit status %d):\n%s", code, p.Tail(30))
			}
			got := 0
			for _, line := range lines {
				if strings.HasPrefix(line, "got ") {
					got++
				}
			}
			if got != 10 {
				t.Errorf("a consumer of committed records got %d of 10", got)
			}
			offsets := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "offsets ") })
			// UNSUPPORTED_FOR_MESSAGE_FORMAT, in the clients' words.
			if offsets < 0 || !strings.Contains(lines[offsets], "message format version on the broker does not support the request") {
				t.Errorf("a transaction with offsets ended thus:\n%s", p.Tail(10))
			}
			if name == "java" && !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "fatal ") }) {
				t.Errorf("the error was not fatal for the producer:\n%s", p.Tail(10))
			}
			bystander.undisturbed(t)
		})
	}
	t.Run("transaction.version is 1", func(t *testing.T) {
		req := kmsg.NewPtrApiVersionsRequest()
		req.Version, req.ClientSoftwareName, req.ClientSoftwareVersion = 3, "e2e", "1"
		resp, err := dialRaw(t, s.Addr()).ask(req, 5*time.Second)
		check(t, err)
		for _, f := range resp.(*kmsg.ApiVersionsResponse).FinalizedFeatures {
			if f.Name == "transaction.version" && f.MaxVersionLevel != 1 {
				t.Errorf("transaction.version is shown as %d", f.MaxVersionLevel)
			}
		}
	})
}
