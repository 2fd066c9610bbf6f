package httpapi

import (
	"context"
	"net/http"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const (
	// probeTimeout bounds how long a health check waits.
	probeTimeout = 3 * time.Second
	// readyFor is how long one answer of /readyz stands: anybody may ask, and
	// asking must not become work for the database.
	readyFor = time.Second
)

// health asks a fixed list of checks, side by side.
type health struct {
	checks []control.Check
	keep   time.Duration

	mu   sync.Mutex // held while asking: who comes meanwhile gets that answer
	at   time.Time
	last healthBody
	errs []error
}

type healthBody struct {
	// Status is ok or unavailable.
	Status string        `json:"status"`
	Checks []checkResult `json:"checks"`
	// Error has the form of every error of the API, of the first check that
	// failed.
	Error *healthError `json:"error,omitempty"`
}

type healthError struct {
	Code    control.Code `json:"code"`
	Message string       `json:"message"`
}

type checkResult struct {
	Name string `json:"name"`
	// Status is ok or failed.
	Status  string `json:"status"`
	Message string `json:"message,omitempty"`
}

func newHealth(checks []control.Check, keep time.Duration) *health {
	return &health{checks: checks, keep: keep}
}

// ask gives the present answer, and what only the log may have.
func (h *health) ask(ctx context.Context) (healthBody, []error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.keep > 0 && !h.at.IsZero() && time.Since(h.at) < h.keep {
		return h.last, h.errs
	}
	// It is the next one's answer too, who may be more patient than this one.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTimeout)
	defer cancel()
	errs := make([]error, len(h.checks))
	var wg sync.WaitGroup
	for i, c := range h.checks {
		wg.Go(func() { errs[i] = c.Do(ctx) })
	}
	wg.Wait()
	body := healthBody{Status: "ok"}
	for i, c := range h.checks {
		r := checkResult{Name: c.Name, Status: "ok"}
		if errs[i] != nil {
			_, r.Message = public(errs[i])
			r.Status, body.Status = "failed", "unavailable"
			if body.Error == nil {
				body.Error = &healthError{control.CodeHostUnavailable, c.Name + ": " + r.Message}
			}
		}
		body.Checks = append(body.Checks, r)
	}
	h.at, h.last, h.errs = time.Now(), body, errs
	return body, errs
}

func (a *api) health(h *health) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, errs := h.ask(r.Context())
		status := http.StatusOK
		if body.Error != nil {
			status = http.StatusServiceUnavailable
			w.Header().Set("Retry-After", "1")
		}
		for i, err := range errs {
			if err != nil {
				a.log.WarnContext(r.Context(), "health check failed", "request_id", requestIDOf(r), "path", r.URL.Path, "check", h.checks[i].Name, "err", err)
			}
		}
		_ = reply(w, status, body)
	}
}
