package tracing

import "sync/atomic"

// apiKeys is one more than the largest api key counted by itself; unknown keys share a counter.
const apiKeys = 100

// errorCodes is one more than the largest error code counted by itself; others share a counter.
const errorCodes = 150

// padded keeps two hot counters off one cache line.
type padded struct {
	atomic.Int64
	_ [56]byte
}

// Metrics are a sidecar's counters and gauges. The zero value counts; a nil *Metrics counts nothing. All methods may be
// called from any goroutine.
type Metrics struct {
	series   [seriesCount]padded
	requests [apiKeys + 1]atomic.Int64
	errors   [errorCodes + 1]atomic.Int64
	mistakes [mistakeCount]atomic.Int64
	refused  [strangerCount]atomic.Int64
}

// Add moves a counter or gauge by n.
func (m *Metrics) Add(s Series, n int64) {
	if m != nil {
		m.series[s].Add(n)
	}
}

// Set puts a gauge to v.
func (m *Metrics) Set(s Series, v int64) {
	if m != nil {
		m.series[s].Store(v)
	}
}

// Value reads a series; 0 on nil.
func (m *Metrics) Value(s Series) int64 {
	if m == nil {
		return 0
	}
	return m.series[s].Load()
}

// Request counts a request read from a client.
func (m *Metrics) Request(apiKey int16) {
	if m == nil {
		return
	}
	if apiKey < 0 || apiKey >= apiKeys {
		apiKey = apiKeys
	}
	m.requests[apiKey].Add(1)
}

// Requests gives how many requests with this api key were read; unknown keys share one figure.
func (m *Metrics) Requests(apiKey int16) int64 {
	if m == nil {
		return 0
	}
	if apiKey < 0 || apiKey >= apiKeys {
		apiKey = apiKeys
	}
	return m.requests[apiKey].Load()
}

// Error counts a Kafka error in a group reply; 0 is none.
func (m *Metrics) Error(code int16) {
	if m == nil || code == 0 {
		return
	}
	if code < 0 || code >= errorCodes { // -1 is UNKNOWN_SERVER_ERROR
		code = errorCodes
	}
	m.errors[code].Add(1)
}

// Mistake counts a client connection closed for what was sent on it.
func (m *Metrics) Mistake(k Mistake) {
	if m != nil && k < mistakeCount {
		m.mistakes[k].Add(1)
	}
}

// Stranger counts a connection to the peer port that was closed before anything was exchanged.
func (m *Metrics) Stranger(why Stranger) {
	if m != nil && why < strangerCount {
		m.refused[why].Add(1)
	}
}

// Strangers gives how many connections to the peer port were closed for that reason.
func (m *Metrics) Strangers(why Stranger) int64 {
	if m == nil || why >= strangerCount {
		return 0
	}
	return m.refused[why].Load()
}

// Snapshot gives every series by its exported name, as /metrics shows it.
func (m *Metrics) Snapshot() map[string]int64 {
	if m == nil {
		return nil
	}
	all := make(map[string]int64, seriesCount)
	for s := range series {
		all[series[s].name] = m.series[s].Load()
	}
	return all
}
