package httpapi

import (
	"context"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// Metrics are the figures of one server. ObserveOperation fits
// control.Options.Observe.
type Metrics struct {
	reg        *prometheus.Registry
	requests   *prometheus.HistogramVec
	operations *prometheus.HistogramVec
}

// NewMetrics makes a set that nothing else shares.
func NewMetrics() *Metrics {
	buckets := []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}
	m := &Metrics{
		reg: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_http_request_duration_seconds", Buckets: buckets,
			Help: "Time from a request's headers to the end of its answer, streams included.",
		}, []string{"route", "method", "status"}),
		operations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_operation_duration_seconds", Buckets: buckets,
			Help: "Time of operations on sandboxes and snapshots; code is ok or the error's.",
		}, []string{"operation", "code"}),
	}
	m.reg.MustRegister(m.requests, m.operations,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Registerer takes further figures, of the engine for example.
func (m *Metrics) Registerer() prometheus.Registerer { return m.reg }

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) { m.reg.Describe(ch) }

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) { m.reg.Collect(ch) }

// ObserveOperation counts one operation.
func (m *Metrics) ObserveOperation(op string, took time.Duration, err error) {
	code := "ok"
	if err != nil {
		code = string(control.CodeOf(err))
	}
	m.operations.WithLabelValues(op, code).Observe(took.Seconds())
}

func (m *Metrics) request(route, method string, status int, took time.Duration) {
	switch {
	case route == "":
		route = "none"
	case status == 405:
		method = "other" // The method is the caller's invention.
	}
	if route == "none" || route == "/v1/*" {
		method = "other"
	}
	m.requests.WithLabelValues(route, method, strconv.Itoa(status)).Observe(took.Seconds())
}

// sandboxGauge reads the number of sandboxes when it is asked.
type sandboxGauge struct{ svc *control.Service }

var sandboxesDesc = prometheus.NewDesc("wrenn_sandboxes", "Sandboxes by status; stopped ones are history.", []string{"status"}, nil)

func (g *sandboxGauge) Describe(ch chan<- *prometheus.Desc) { ch <- sandboxesDesc }

func (g *sandboxGauge) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	counts, err := g.svc.Count(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(sandboxesDesc, err)
		return
	}
	for _, st := range control.Statuses {
		ch <- prometheus.MustNewConstMetric(sandboxesDesc, prometheus.GaugeValue, float64(counts[st]), string(st))
	}
}
