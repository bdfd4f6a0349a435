package proxy

import (
	"fmt"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// The texts and codes are those of Kafka 4.3 (oracle: find-group, find-batch, find-kinds, find-share).
func TestCoordinatorOfAGroupIsAnsweredAsKafkaDoes(t *testing.T) {
	placed := func(group string) (int32, string, int32, bool) { return int32(len(group)), "127.0.0.1", 19093, true }
	nowhere := func(string) (int32, string, int32, bool) { return 7, "unused", 7, false }
	const invalid = "This most likely occurs because of a request being malformed by the client library or the message was sent to an incompatible broker. See the broker logs for more details."
	for _, c := range []struct {
		version int16
		kind    int8
		keys    []string
		place   func(string) (int32, string, int32, bool)
		want    string // node host port error message, one for each key
	}{
		{0, 0, []string{"g"}, placed, `1 "127.0.0.1" 19093 NONE "NONE"`},
		{1, 0, []string{"g"}, placed, `1 "127.0.0.1" 19093 NONE "NONE"`},
		{3, 0, []string{""}, placed, `0 "127.0.0.1" 19093 NONE "NONE"`},
		{4, 0, []string{"g"}, placed, `g: 1 "127.0.0.1" 19093 NONE ""`},
		{6, 0, []string{"a", "", "a"}, placed, `a: 1 "127.0.0.1" 19093 NONE ""; : 0 "127.0.0.1" 19093 NONE ""; a: 1 "127.0.0.1" 19093 NONE ""`},
		{6, 0, nil, placed, ``},
		{1, 0, []string{"g"}, nowhere, `-1 "" -1 COORDINATOR_NOT_AVAILABLE "The coordinator is not available."`},
		{4, 0, []string{"g"}, nowhere, `g: -1 "" -1 COORDINATOR_NOT_AVAILABLE ""`},
		{1, 2, []string{"g"}, placed, `-1 "" -1 INVALID_REQUEST "` + invalid + `"`},
		{3, 3, []string{"g"}, placed, `-1 "" -1 INVALID_REQUEST "` + invalid + `"`},
		{3, -1, []string{"g"}, placed, `-1 "" -1 INVALID_REQUEST "` + invalid + `"`},
		{4, 2, []string{"g"}, placed, `g: -1 "" -1 INVALID_REQUEST ""`},
		{6, 2, []string{"a:b:c"}, placed, `a:b:c: -1 "" -1 INVALID_REQUEST ""`},
		{6, 3, []string{"g", "h"}, placed, `g: -1 "" -1 INVALID_REQUEST "` + invalid + `"; h: -1 "" -1 INVALID_REQUEST "` + invalid + `"`},
	} {
		req := kmsg.NewPtrFindCoordinatorRequest()
		req.Version, req.CoordinatorType = c.version, c.kind
		if c.version < 4 {
			req.CoordinatorKey = c.keys[0]
		} else {
			req.CoordinatorKeys = c.keys
		}
		if findsTransaction(req) {
			t.Errorf("kind %d is forwarded", c.kind)
		}
		resp := findGroup(req, c.place)
		code := func(code int16) string {
			if err := kerr.TypedErrorForCode(code); err != nil {
				return err.Message
			}
			return "NONE"
		}
		var got string
		if c.version < 4 {
			got = fmt.Sprintf("%d %q %d %s %q", resp.NodeID, resp.Host, resp.Port, code(resp.ErrorCode), *resp.ErrorMessage)
		}
		for i, f := range resp.Coordinators {
			if i > 0 {
				got += "; "
			}
			got += fmt.Sprintf("%s: %d %q %d %s %q", f.Key, f.NodeID, f.Host, f.Port, code(f.ErrorCode), *f.ErrorMessage)
		}
		if got != c.want || resp.Version != c.version {
			t.Errorf("version %d, kind %d, keys %q:\n%s, want\n%s", c.version, c.kind, c.keys, got, c.want)
		}
	}
}

func TestCoordinatorOfATransactionIsForwarded(t *testing.T) {
	req := kmsg.NewPtrFindCoordinatorRequest()
	req.CoordinatorType = 1
	if !findsTransaction(req) {
		t.Error("a transaction's coordinator is the upstream's")
	}
}
