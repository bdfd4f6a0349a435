package tracing

import (
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

// Operators' alerts name these series: what a scraper reads is what names.go says, with no suffix added or lost.
func TestScraperSeesEverySeriesByItsName(t *testing.T) {
	m := new(Metrics)
	telemetry, err := New(Config{Version: "1.2.3", APIName: func(int16) string { return "Fetch" }}, m)
	if err != nil {
		t.Fatal(err)
	}
	defer telemetry.Close()
	m.Add(SplicedBytes, 5)
	m.Set(Active, 1)
	m.Request(1)
	m.Request(9999)
	m.Error(16)
	m.Error(-1)
	m.Mistake(MistakeTLS)
	m.Stranger(StrangerToken)

	got := httptest.NewRecorder()
	telemetry.ServeHTTP(got, httptest.NewRequest("GET", "/metrics", nil))
	text := got.Body.String()
	for _, want := range []string{
		"offset_sidecar_spliced_bytes_total 5\n",
		"offset_sidecar_active 1\n",
		`offset_sidecar_requests_total{api="Fetch"} 1`,
		`offset_sidecar_requests_total{api="unknown"} 1`,
		`offset_sidecar_errors_total{error="16"} 1`,
		`offset_sidecar_errors_total{error="UNKNOWN_SERVER_ERROR"} 1`,
		`offset_sidecar_client_mistakes_total{mistake="tls"} 1`,
		`offset_sidecar_peers_refused_total{reason="token"} 1`,
		`offset_sidecar_build_info{version="1.2.3"} 1`,
		"# TYPE offset_sidecar_connections gauge",
		"# TYPE offset_sidecar_group_requests_total counter",
		"process_resident_memory_bytes",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for s := range series {
		if !strings.Contains(text, "\n"+series[s].name+" ") {
			t.Errorf("%s is not shown", series[s].name)
		}
	}
}

func TestEverySeriesIsNamedOnceAndDescribed(t *testing.T) {
	seen := map[string]bool{}
	for s, def := range series {
		if !regexp.MustCompile(`^offset_sidecar_[a-z_]+$`).MatchString(def.name) || def.help == "" {
			t.Errorf("series %d: name %q, help %q", s, def.name, def.help)
		}
		if seen[def.name] {
			t.Errorf("%s twice", def.name)
		}
		seen[def.name] = true
		if isTotal := strings.HasSuffix(def.name, "_total"); isTotal != (def.kind != gauge) {
			t.Errorf("%s: only counters end in _total", def.name)
		}
	}
}

func TestNilMetricsCountNothing(t *testing.T) {
	var m *Metrics
	m.Add(Steps, 1)
	m.Set(Active, 1)
	m.Request(1)
	m.Error(1)
	m.Mistake(MistakeHTTP)
	m.Stranger(StrangerTLS)
	if m.Strangers(StrangerTLS) != 0 || m.Value(Steps) != 0 || m.Requests(1) != 0 || m.Snapshot() != nil {
		t.Error("a nil *Metrics counts")
	}
}
