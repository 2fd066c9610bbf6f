package main

import (
	"context"
	"path"
	"time"

	rpc "connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

// operationFigures are what the host agent tells with each operation: bytes
// written, and the time of its parts. It reads them off the answers.
type operationFigures struct {
	bytes  *prometheus.CounterVec
	phases *prometheus.HistogramVec
}

func newOperationFigures(reg prometheus.Registerer) *operationFigures {
	f := &operationFigures{
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wrenn_host_written_bytes_total",
			Help: "Bytes that operations of the host agent wrote to the snapshot store, by what they hold.",
		}, []string{"operation", "part"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_host_phase_duration_seconds",
			Help: "Time of the parts of operations of the host agent.",
			// Parts take from microseconds to seconds.
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"operation", "phase"}),
	}
	reg.MustRegister(f.bytes, f.phases)
	return f
}

// intercept is an interceptor of calls to the host agent.
func (f *operationFigures) intercept(next rpc.UnaryFunc) rpc.UnaryFunc {
	return func(ctx context.Context, req rpc.AnyRequest) (rpc.AnyResponse, error) {
		resp, err := next(ctx, req)
		if err != nil {
			return resp, err
		}
		if r, ok := resp.Any().(interface{ GetStats() *agentv1.OpStats }); ok && r.GetStats() != nil {
			f.observe(path.Base(req.Spec().Procedure), r.GetStats())
		}
		return resp, nil
	}
}

func (f *operationFigures) observe(operation string, st *agentv1.OpStats) {
	f.bytes.WithLabelValues(operation, "memory").Add(float64(st.MemoryBytes))
	f.bytes.WithLabelValues(operation, "disk").Add(float64(st.DiskBytes))
	f.bytes.WithLabelValues(operation, "state").Add(float64(st.StateBytes))
	for phase, us := range st.PhasesUs {
		f.phases.WithLabelValues(operation, phase).Observe((time.Duration(us) * time.Microsecond).Seconds())
	}
}
