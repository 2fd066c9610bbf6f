package e2bapi

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const (
	// SampleEvery is how often running sandboxes are measured.
	SampleEvery = 10 * time.Second
	// keepSamples bounds the history of one sandbox: six hours.
	keepSamples = 6 * 360
	// sampleAtOnce bounds the guests that are asked at the same time, and
	// sampleWait each of them: some that are silent must not keep the rest.
	sampleAtOnce = 16
	sampleWait   = 5 * time.Second
)

// History measures running sandboxes at intervals and remembers the figures in
// memory, as long as the sandbox exists and the server runs.
type History struct {
	svc *control.Service
	mu  sync.Mutex
	m   map[string][]sample
}

// NewHistory makes an empty one; it measures while Run runs.
func NewHistory(s *control.Service) *History {
	return &History{svc: s, m: map[string][]sample{}}
}

// sample is one measurement.
type sample struct {
	Timestamp     time.Time `json:"timestamp"`
	TimestampUnix int64     `json:"timestampUnix"`
	CPUCount      uint32    `json:"cpuCount"`
	CPUUsedPct    float64   `json:"cpuUsedPct"`
	MemUsed       uint64    `json:"memUsed"`
	MemTotal      uint64    `json:"memTotal"`
	MemCache      uint64    `json:"memCache"`
	DiskUsed      uint64    `json:"diskUsed"`
	DiskTotal     uint64    `json:"diskTotal"`
}

// Run measures at every tick until ctx ends.
func (h *History) Run(ctx context.Context, tick <-chan time.Time) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
			h.Sample(ctx)
		}
	}
}

// Sample measures all sandboxes that run, once.
func (h *History) Sample(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, SampleEvery)
	defer cancel()
	rows, err := h.svc.List(ctx, control.SandboxFilter{})
	if err != nil {
		return // the next one may do
	}
	exist := map[string]bool{}
	var wg sync.WaitGroup
	slots := make(chan struct{}, sampleAtOnce)
	for _, sb := range rows {
		exist[sb.ID] = true
		if sb.Status != control.StatusRunning {
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, sampleWait)
			defer cancel()
			if m, err := h.svc.Metrics(ctx, sb.ID); err == nil {
				h.add(sb.ID, m)
			}
		})
	}
	wg.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	for id := range h.m {
		if !exist[id] {
			delete(h.m, id)
		}
	}
}

func (h *History) add(id string, m control.Metrics) {
	at := time.Now().UTC() // a guest's own clock may say anything
	s := sample{
		Timestamp: at, TimestampUnix: at.Unix(), CPUCount: m.CPUCount, CPUUsedPct: m.CPUUsedPct,
		MemUsed: m.MemUsed, MemTotal: m.MemTotal, MemCache: m.MemCache, DiskUsed: m.DiskUsed, DiskTotal: m.DiskTotal,
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	list := h.m[id]
	if len(list) >= keepSamples {
		list = append(list[:0], list[len(list)-keepSamples+1:]...)
	}
	h.m[id] = append(list, s)
}

// between gives the samples from start to end; zero times are open.
func (h *History) between(id string, start, end time.Time) []sample {
	out := []sample{}
	if h == nil {
		return out
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.m[id] {
		if (start.IsZero() || !s.Timestamp.Before(start)) && (end.IsZero() || s.Timestamp.Before(end)) {
			out = append(out, s)
		}
	}
	return out
}

func queryTime(r *http.Request, name string) (time.Time, error) {
	s := r.URL.Query().Get(name)
	if s == "" {
		return time.Time{}, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > 1<<40 {
		return time.Time{}, control.Invalid(name, "must be seconds since 1970")
	}
	return time.Unix(n, 0), nil
}

func (a *api) metrics(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	start, err := queryTime(r, "start")
	if err != nil {
		return err
	}
	end, err := queryTime(r, "end")
	if err != nil {
		return err
	}
	if !end.IsZero() {
		end = end.Add(time.Second) // the whole of the last second
	}
	if !start.IsZero() && !end.IsZero() && end.Before(start) {
		return control.Invalid("end", "must not be before start")
	}
	if _, err := a.svc.Get(r.Context(), id); err != nil {
		return err
	}
	reply(w, http.StatusOK, a.History.between(id, start, end))
	return nil
}

// metricsOfMany gives the newest figures of several sandboxes.
func (a *api) metricsOfMany(w http.ResponseWriter, r *http.Request) error {
	ids := strings.Split(r.URL.Query().Get("sandbox_ids"), ",")
	if len(ids) > maxLimit {
		return control.Invalid("sandbox_ids", "must have at most %d entries", maxLimit)
	}
	out := map[string]sample{}
	for _, id := range ids {
		if list := a.History.between(id, time.Time{}, time.Time{}); len(list) > 0 {
			out[id] = list[len(list)-1]
		}
	}
	reply(w, http.StatusOK, map[string]any{"sandboxes": out})
	return nil
}
