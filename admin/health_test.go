package admin_test

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/offset-sidecar/offset-sidecar/admin"
)

// serve starts both servers on ephemeral ports and gives their addresses.
func serve(t *testing.T, probe admin.Probe) (health, pages string) {
	t.Helper()
	var listeners [2]net.Listener
	for i := range listeners {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners[i] = l
	}
	s := admin.Serve(listeners[0], listeners[1], probe, slog.New(slog.DiscardHandler))
	t.Cleanup(s.Close)
	return "http://" + listeners[0].Addr().String(), "http://" + listeners[1].Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func healthy() admin.Probe {
	return admin.Probe{
		Started: func() []admin.Check { return []admin.Check{{Name: "listeners", OK: true, Decides: true}} },
		Ready:   func() []admin.Check { return []admin.Check{{Name: "listeners", OK: true, Decides: true}} },
		Alive:   func() error { return nil },
		Status:  func() any { return map[string]int{"term": 3} },
		Members: func() any { return []string{"one", "two"} },
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "up 1\n") }),
	}
}

func TestUpstreamOutageIsShownButDoesNotMakeTheSidecarUnready(t *testing.T) {
	probe := healthy()
	probe.Ready = func() []admin.Check {
		return []admin.Check{
			{Name: "listeners", OK: true, Decides: true},
			{Name: "upstream", OK: false, Detail: "connection refused"},
		}
	}
	health, _ := serve(t, probe)
	code, body := get(t, health+"/readyz")
	var got struct {
		Status string
		Checks []admin.Check
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	if code != 200 || got.Status != "ok" || len(got.Checks) != 2 || got.Checks[1].Detail != "connection refused" {
		t.Errorf("%d %s", code, body)
	}
}

func TestDecidingCheckMakesItUnready(t *testing.T) {
	probe := healthy()
	probe.Ready = func() []admin.Check { return []admin.Check{{Name: "listeners", Decides: true, Detail: "draining"}} }
	health, _ := serve(t, probe)
	if code, body := get(t, health+"/readyz"); code != 503 || !strings.Contains(body, "draining") {
		t.Errorf("%d %s", code, body)
	}
	if code, _ := get(t, health+"/startup"); code != 200 {
		t.Errorf("/startup: %d", code)
	}
	if code, body := get(t, health+"/metrics"); code != 200 || body != "up 1\n" {
		t.Errorf("/metrics: %d %s", code, body)
	}
}

func TestLivezFailsForAWedgedProcessOnly(t *testing.T) {
	probe := healthy()
	probe.Alive = func() error { return errors.New("the loop has ended") }
	health, _ := serve(t, probe)
	if code, body := get(t, health+"/livez"); code != 503 || !strings.Contains(body, "the loop has ended") {
		t.Errorf("%d %s", code, body)
	}
}

// The check that hangs is never started a second time: probes every few seconds must not pile up goroutines.
func TestLivezAnswersWhileItsCheckHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		probe, release := healthy(), make(chan struct{})
		calls := 0
		probe.Alive = func() error { calls++; <-release; return nil }
		s := admin.Serve(nil, nil, probe, slog.New(slog.DiscardHandler))
		for range 3 {
			began := time.Now()
			if check := s.CheckAlive(); check.OK || time.Since(began) != 2*time.Second {
				t.Errorf("%+v after %v", check, time.Since(began))
			}
		}
		close(release)
		synctest.Wait()
		if check := s.CheckAlive(); !check.OK || calls != 2 {
			t.Errorf("%+v after %d calls", check, calls)
		}
	})
}

func TestAdminPagesAnswerLoopbackNamesOnly(t *testing.T) {
	_, pages := serve(t, healthy())
	if code, body := get(t, pages+"/status"); code != 200 || !strings.Contains(body, `"term": 3`) {
		t.Errorf("%d %s", code, body)
	}
	if code, body := get(t, pages+"/members"); code != 200 || !strings.Contains(body, `"two"`) {
		t.Errorf("%d %s", code, body)
	}
	if code, _ := get(t, pages+"/debug/pprof/goroutine?debug=1"); code != 200 {
		t.Errorf("pprof: %d", code)
	}
	req, _ := http.NewRequest("GET", pages+"/status", nil)
	req.Host = "evil.example:19091"
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 403 {
		t.Errorf("rebound name: %d", resp.StatusCode)
	}
}
