package httpapi

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

type sandboxBody struct {
	ID           string            `json:"id"`
	Template     string            `json:"template"`
	Status       control.Status    `json:"status"`
	VCPUs        int               `json:"vcpus"`
	MemoryMB     int               `json:"memory_mb"`
	Metadata     map[string]string `json:"metadata"`
	TimeoutSec   int64             `json:"timeout_sec"`
	AutoPause    bool              `json:"auto_pause"`
	CreatedAt    time.Time         `json:"created_at,omitzero"`
	StartedAt    time.Time         `json:"started_at,omitzero"`
	LastActiveAt time.Time         `json:"last_active_at,omitzero"`
	ExpiresAt    time.Time         `json:"expires_at,omitzero"`
	Error        string            `json:"error,omitempty"`
}

func toBody(s control.Sandbox) sandboxBody {
	if s.Metadata == nil {
		s.Metadata = map[string]string{}
	}
	return sandboxBody{
		ID: s.ID, Template: s.Template, Status: s.Status, VCPUs: s.VCPUs, MemoryMB: s.MemoryMB,
		Metadata: s.Metadata, TimeoutSec: s.TimeoutSec, AutoPause: s.AutoPause,
		CreatedAt: s.CreatedAt, StartedAt: s.StartedAt, LastActiveAt: s.LastActiveAt,
		ExpiresAt: s.ExpiresAt, Error: s.Error,
	}
}

type createBody struct {
	Template   string            `json:"template"`
	VCPUs      *int64            `json:"vcpus"`
	MemoryMB   *int64            `json:"memory_mb"`
	TimeoutSec int64             `json:"timeout_sec"`
	AutoPause  bool              `json:"auto_pause"`
	Metadata   map[string]string `json:"metadata"`
	Envs       map[string]string `json:"envs"`
}

func (a *api) createSandbox(w http.ResponseWriter, r *http.Request) error {
	var b createBody
	if _, err := query(r); err != nil {
		return err
	}
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	sb, err := a.svc.Create(r.Context(), control.CreateParams{
		Template: b.Template, VCPUs: b.VCPUs, MemoryMB: b.MemoryMB, TimeoutSec: b.TimeoutSec,
		AutoPause: b.AutoPause, Metadata: b.Metadata, Envs: b.Envs,
	})
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/sandboxes/"+sb.ID)
	return reply(w, http.StatusCreated, toBody(sb))
}

const metadataPrefix = "metadata."

func (a *api) listSandboxes(w http.ResponseWriter, r *http.Request) error {
	q, err := query(r, "status", "limit", "cursor", metadataPrefix)
	if err != nil {
		return err
	}
	f := control.SandboxFilter{Metadata: map[string]string{}}
	if q.Has("status") {
		for s := range strings.SplitSeq(q.Get("status"), ",") {
			st := control.Status(s)
			if !st.Valid() {
				return control.Invalid("status", "must be some of %v, separated by commas", control.Statuses)
			}
			if !slices.Contains(f.Statuses, st) {
				f.Statuses = append(f.Statuses, st)
			}
		}
	}
	for name, v := range q {
		if key, ok := strings.CutPrefix(name, metadataPrefix); ok {
			f.Metadata[key] = v[0]
		}
	}
	limit, err := pageSize(q)
	if err != nil {
		return err
	}
	if q.Has("cursor") {
		if f.After, err = sandboxCursor(q.Get("cursor")); err != nil {
			return err
		}
	}
	f.Limit = limit + 1 // One more tells whether there is a next page.
	list, err := a.svc.List(r.Context(), f)
	if err != nil {
		return err
	}
	var next string
	if len(list) > limit {
		list = list[:limit]
		last := list[limit-1]
		next = cursorString(fmt.Sprintf("%d %s", last.CreatedAt.UnixMicro(), last.ID))
	}
	out := struct {
		Sandboxes  []sandboxBody `json:"sandboxes"`
		NextCursor string        `json:"next_cursor,omitempty"`
	}{[]sandboxBody{}, next}
	for _, s := range list {
		out.Sandboxes = append(out.Sandboxes, toBody(s))
	}
	return reply(w, http.StatusOK, out)
}

func pageSize(q url.Values) (int, error) {
	n, err := number(q, "limit", 10, control.DefaultPageSize, 1, control.MaxPageSize)
	return int(n), err
}

func sandboxCursor(s string) (control.Cursor, error) {
	text, err := parseCursor(s)
	if err != nil {
		return control.Cursor{}, err
	}
	at, id, _ := strings.Cut(text, " ")
	us, err := strconv.ParseInt(at, 10, 64)
	if err != nil || control.ValidateID("cursor", id) != nil {
		return control.Cursor{}, badCursor
	}
	return control.Cursor{CreatedAt: time.UnixMicro(us), ID: id}, nil
}

func (a *api) getSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := a.plain(w, r)
	if err != nil {
		return err
	}
	sb, err := a.svc.Get(r.Context(), id)
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, toBody(sb))
}

// plain checks a request that has nothing but its path.
func (a *api) plain(w http.ResponseWriter, r *http.Request) (string, error) {
	id, err := pathID(r)
	if err != nil {
		return "", err
	}
	if _, err := query(r); err != nil {
		return "", err
	}
	if r.Method == http.MethodPost {
		return id, noBody(w, r)
	}
	return id, nil
}

func (a *api) deleteSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := a.plain(w, r)
	if err != nil {
		return err
	}
	if err := a.svc.Delete(r.Context(), id); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) pauseSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := a.plain(w, r)
	if err != nil {
		return err
	}
	sb, err := a.svc.Pause(r.Context(), id)
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, toBody(sb))
}

func (a *api) resumeSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := a.plain(w, r)
	if err != nil {
		return err
	}
	sb, err := a.svc.Resume(r.Context(), id)
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, toBody(sb))
}

// withBody checks a request of a path and a JSON body.
func (a *api) withBody(w http.ResponseWriter, r *http.Request, dst any) (string, error) {
	id, err := pathID(r)
	if err != nil {
		return "", err
	}
	if _, err := query(r); err != nil {
		return "", err
	}
	return id, readJSON(w, r, dst)
}

func (a *api) setTimeout(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		TimeoutSec *int64 `json:"timeout_sec"`
	}
	id, err := a.withBody(w, r, &b)
	if err != nil {
		return err
	}
	if b.TimeoutSec == nil {
		return control.Invalid("timeout_sec", "is required: seconds from now, or 0 for no limit")
	}
	sb, err := a.svc.SetTimeout(r.Context(), id, *b.TimeoutSec)
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, toBody(sb))
}

type forkError struct {
	Index   int          `json:"index"`
	Code    control.Code `json:"code"`
	Message string       `json:"message"`
}

func (a *api) forkSandbox(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		Count *int64 `json:"count"`
	}
	id, err := a.withBody(w, r, &b)
	if err != nil {
		return err
	}
	if b.Count == nil {
		return control.Invalid("count", "is required: how many sandboxes to make, 1 to %d", control.MaxForks)
	}
	children, err := a.svc.Fork(r.Context(), id, *b.Count)
	if err != nil {
		return err
	}
	out := struct {
		Sandboxes []sandboxBody `json:"sandboxes"`
		Errors    []forkError   `json:"errors,omitempty"`
	}{Sandboxes: []sandboxBody{}}
	for i, c := range children {
		if c.Err != nil {
			a.log.WarnContext(r.Context(), "fork child", "request_id", requestIDOf(r), "source", id, "index", i, "err", c.Err)
			code, message := public(c.Err)
			out.Errors = append(out.Errors, forkError{i, code, message})
			continue
		}
		out.Sandboxes = append(out.Sandboxes, toBody(c.Sandbox))
	}
	return reply(w, http.StatusCreated, out)
}

func (a *api) sandboxMetrics(w http.ResponseWriter, r *http.Request) error {
	id, err := a.plain(w, r)
	if err != nil {
		return err
	}
	m, err := a.svc.Metrics(r.Context(), id)
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, struct {
		At            time.Time `json:"at,omitzero"`
		CPUCount      uint32    `json:"cpu_count"`
		CPUUsedPct    float64   `json:"cpu_used_pct"`
		MemTotal      uint64    `json:"mem_total"`
		MemUsed       uint64    `json:"mem_used"`
		MemCache      uint64    `json:"mem_cache"`
		DiskTotal     uint64    `json:"disk_total"`
		DiskUsed      uint64    `json:"disk_used"`
		PrivateMemory uint64    `json:"private_memory_bytes"`
		Faults        uint64    `json:"faults"`
	}{m.At, m.CPUCount, m.CPUUsedPct, m.MemTotal, m.MemUsed, m.MemCache, m.DiskTotal, m.DiskUsed, m.PrivateMemory, m.Faults})
}
