// Package tracing is where the sidecar is watched from: every metric name once, the counters behind them, and the
// set-up of OpenTelemetry that shows them as Prometheus text.
//
// The counters are plain atomics, since the data path touches them for every frame; OpenTelemetry reads them when
// somebody asks for /metrics. Everything here may be called on a nil *Metrics, which counts nothing, so that rooms and
// their tests need no second path for "not measured".
//
// Spans come with a later version; [Telemetry.Tracer] is the seam they will use and gives a tracer that does nothing.
// This room imports no other room of ours.
package tracing
