package tracing

import (
	"context"
	"fmt"
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/otlptranslator"
	"go.opentelemetry.io/otel/attribute"
	prometheusexporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// Config is what the set-up needs to know and this room must not look up: names that belong to the protocol.
type Config struct {
	Version   string
	APIName   func(key int16) string  // "Fetch" for 1, "" for a key without a name
	ErrorName func(code int16) string // "NOT_COORDINATOR" for 16
	// Before is called ahead of each scrape, to set what is not counted as it happens; may be nil.
	Before func()
}

// Telemetry is OpenTelemetry, set up: a reader of [Metrics] that a Prometheus scraper asks. It has no goroutine of its
// own and registers nothing globally, so several live in one process.
type Telemetry struct {
	metrics  *Metrics
	config   Config
	provider *sdkmetric.MeterProvider
	handler  http.Handler
}

// New sets up the export of m.
func New(config Config, m *Metrics) (*Telemetry, error) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := prometheusexporter.New(
		prometheusexporter.WithRegisterer(registry),
		// The names of names.go are what a scraper sees, to the letter.
		prometheusexporter.WithTranslationStrategy(otlptranslator.NoTranslation),
		prometheusexporter.WithoutScopeInfo(),
		prometheusexporter.WithoutTargetInfo(),
	)
	if err != nil {
		return nil, fmt.Errorf("setting up metrics: %w", err)
	}
	t := &Telemetry{metrics: m, config: config}
	t.provider = sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter))
	meter := t.provider.Meter("github.com/offset-sidecar/offset-sidecar")
	if err := t.observeSeries(meter); err != nil {
		return nil, fmt.Errorf("setting up metrics: %w", err)
	}
	if err := t.observeLabelled(meter); err != nil {
		return nil, fmt.Errorf("setting up metrics: %w", err)
	}
	t.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	return t, nil
}

func (t *Telemetry) observeSeries(meter metric.Meter) error {
	for s := range Series(seriesCount) {
		def, err := series[s], error(nil)
		whole := metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(t.metrics.Value(s))
			return nil
		})
		switch def.kind {
		case counter:
			_, err = meter.Int64ObservableCounter(def.name, metric.WithDescription(def.help), whole)
		case gauge:
			_, err = meter.Int64ObservableGauge(def.name, metric.WithDescription(def.help), whole)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// observeLabelled shows the metrics that have a label; a label value that never occurred is not shown.
func (t *Telemetry) observeLabelled(meter metric.Meter) error {
	_, err := meter.Int64ObservableCounter(nameRequests, metric.WithDescription(helpRequests),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for key := range t.metrics.requests {
				if n := t.metrics.requests[key].Load(); n != 0 {
					o.Observe(n, label(labelAPI, named(t.config.APIName, key, apiKeys, "unknown")))
				}
			}
			return nil
		}))
	if err != nil {
		return err
	}
	_, err = meter.Int64ObservableCounter(nameErrors, metric.WithDescription(helpErrors),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for code := range t.metrics.errors {
				if n := t.metrics.errors[code].Load(); n != 0 {
					o.Observe(n, label(labelError, named(t.config.ErrorName, code, errorCodes, "UNKNOWN_SERVER_ERROR")))
				}
			}
			return nil
		}))
	if err != nil {
		return err
	}
	_, err = meter.Int64ObservableCounter(nameMistakes, metric.WithDescription(helpMistakes),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for k, name := range mistakes {
				o.Observe(t.metrics.mistakes[k].Load(), label(labelMistake, name))
			}
			return nil
		}))
	if err != nil {
		return err
	}
	_, err = meter.Int64ObservableCounter(nameStrangers, metric.WithDescription(helpStrangers),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for why, name := range strangers {
				o.Observe(t.metrics.refused[why].Load(), label(labelReason, name))
			}
			return nil
		}))
	if err != nil {
		return err
	}
	_, err = meter.Int64ObservableGauge(nameBuild, metric.WithDescription(helpBuild),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(1, label(labelVersion, t.config.Version))
			return nil
		}))
	return err
}

func label(name, value string) metric.MeasurementOption {
	return metric.WithAttributeSet(attribute.NewSet(attribute.String(name, value)))
}

// named gives the name of a key, the number itself where it has none, and other for the counter that others share.
func named(name func(int16) string, key, others int, other string) string {
	if key == others {
		return other
	}
	if name != nil {
		if s := name(int16(key)); s != "" {
			return s
		}
	}
	return strconv.Itoa(key)
}

// ServeHTTP answers a scraper with all metrics as Prometheus text.
func (t *Telemetry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if t.config.Before != nil {
		t.config.Before()
	}
	t.handler.ServeHTTP(w, r)
}

// Tracer gives the tracer that spans of group calls are made with. It records nothing in this version.
func (t *Telemetry) Tracer() trace.Tracer {
	return noop.NewTracerProvider().Tracer("github.com/offset-sidecar/offset-sidecar")
}

// Close ends the export.
func (t *Telemetry) Close() error { return t.provider.Shutdown(context.Background()) }
