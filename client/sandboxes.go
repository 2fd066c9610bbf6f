package client

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// CreateSandboxRequest says what to create. Zero fields are left to the server.
type CreateSandboxRequest struct {
	// Template is the name of a base or a snapshot; empty means base.
	Template string `json:"template,omitempty"`
	// VCPUs and MemoryMB (MiB) are fixed by a snapshot: left out or equal.
	VCPUs    int `json:"vcpus,omitempty"`
	MemoryMB int `json:"memory_mb,omitempty"`
	// TimeoutSec limits the run, in seconds from its start.
	TimeoutSec int `json:"timeout_sec,omitempty"`
	// AutoPause pauses at the limit instead of destroying.
	AutoPause bool `json:"auto_pause,omitempty"`
	// Metadata is the caller's own, for finding the sandbox again.
	Metadata map[string]string `json:"metadata,omitempty"`
	// Envs are set for every process in the sandbox.
	Envs map[string]string `json:"envs,omitempty"`
}

// ListSandboxesOptions filters a list; zero means everything.
type ListSandboxesOptions struct {
	// Status holds some of the Status constants; empty means all but stopped.
	Status []string
	// Metadata must all be present with these values.
	Metadata map[string]string
	// Limit is the largest number in one page; 0 means the server's.
	Limit int
	// Cursor continues after an earlier page.
	Cursor string
}

// SandboxPage is one page of a list; an empty NextCursor marks the last one.
type SandboxPage struct {
	Sandboxes  []Sandbox `json:"sandboxes"`
	NextCursor string    `json:"next_cursor,omitempty"`
}

// CreateSandbox creates a sandbox from a template.
func (c *Client) CreateSandbox(ctx context.Context, req CreateSandboxRequest) (*Sandbox, error) {
	if req.Template != "" {
		if err := checkTemplate(req.Template); err != nil {
			return nil, err
		}
	}
	return c.sandboxCall(once(ctx), http.MethodPost, c.url(nil, "v1", "sandboxes"), req)
}

// GetSandbox returns a sandbox.
func (c *Client) GetSandbox(ctx context.Context, id string) (*Sandbox, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	return c.sandboxCall(ctx, http.MethodGet, c.sandboxURL(nil, id), nil)
}

// ListSandboxes returns one page; Sandboxes walks over all of them.
func (c *Client) ListSandboxes(ctx context.Context, o ListSandboxesOptions) (*SandboxPage, error) {
	q := url.Values{}
	if len(o.Status) > 0 {
		q.Set("status", strings.Join(o.Status, ","))
	}
	for k, v := range o.Metadata {
		q.Set("metadata."+k, v)
	}
	if err := pageQuery(q, o.Limit, o.Cursor); err != nil {
		return nil, err
	}
	var page SandboxPage
	if err := c.call(ctx, http.MethodGet, c.url(q, "v1", "sandboxes"), nil, &page); err != nil {
		return nil, err
	}
	return &page, nil
}

// Sandboxes yields every sandbox that matches, fetching pages as needed. An
// error is yielded once and ends the walk.
func (c *Client) Sandboxes(ctx context.Context, o ListSandboxesOptions) iter.Seq2[Sandbox, error] {
	return walk(o.Cursor, func(cursor string) ([]Sandbox, string, error) {
		o.Cursor = cursor
		page, err := c.ListSandboxes(ctx, o)
		if err != nil {
			return nil, "", err
		}
		return page.Sandboxes, page.NextCursor, nil
	})
}

// DeleteSandbox destroys a sandbox in any state, with all it owns.
func (c *Client) DeleteSandbox(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, c.sandboxURL(nil, id), nil, nil)
}

// PauseSandbox writes the sandbox's whole state to disk and frees its memory
// and CPU. It returns when the state is durable; a pause that fails leaves the
// sandbox running.
func (c *Client) PauseSandbox(ctx context.Context, id string) (*Sandbox, error) {
	return c.sandboxAction(ctx, id, "pause", nil)
}

// ResumeSandbox brings a paused sandbox back; one that fails leaves it paused.
func (c *Client) ResumeSandbox(ctx context.Context, id string) (*Sandbox, error) {
	return c.sandboxAction(ctx, id, "resume", nil)
}

// SetTimeout limits the sandbox's run to d from now, in whole seconds; 0 takes
// the limit away.
func (c *Client) SetTimeout(ctx context.Context, id string, d time.Duration) (*Sandbox, error) {
	if d < 0 || d%time.Second != 0 {
		return nil, invalid("timeout %v: must be whole seconds and not negative", d)
	}
	in := struct {
		TimeoutSec int64 `json:"timeout_sec"`
	}{int64(d / time.Second)}
	return c.sandboxAction(ctx, id, "timeout", in)
}

// ForkSandbox starts count new sandboxes in the present state of this one,
// each a new individual; the source goes on. Where only some could be started
// it returns these and an error that joins an *Error for each of the others.
func (c *Client) ForkSandbox(ctx context.Context, id string, count int) ([]Sandbox, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	if count < 1 {
		return nil, invalid("count %d: must be at least 1", count)
	}
	in := struct {
		Count int `json:"count"`
	}{count}
	var out struct {
		Sandboxes []Sandbox `json:"sandboxes"`
		Errors    []struct {
			Index   int    `json:"index"`
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if err := c.call(once(ctx), http.MethodPost, c.sandboxURL(nil, id, "fork"), in, &out); err != nil {
		return nil, err
	}
	var errs []error
	for _, e := range out.Errors {
		errs = append(errs, fmt.Errorf("fork %d of %d: %w", e.Index+1, count, &Error{Code: e.Code, Message: e.Message}))
	}
	return out.Sandboxes, errors.Join(errs...)
}

// Metrics are a running sandbox's figures at one moment.
type Metrics struct {
	At       time.Time `json:"at,omitzero"`
	CPUCount int       `json:"cpu_count"`
	// CPUUsedPct is in percent of one CPU: up to 100 times CPUCount.
	CPUUsedPct float64 `json:"cpu_used_pct"`
	// Sizes in bytes.
	MemTotal  uint64 `json:"mem_total"`
	MemUsed   uint64 `json:"mem_used"`
	MemCache  uint64 `json:"mem_cache"`
	DiskTotal uint64 `json:"disk_total"`
	DiskUsed  uint64 `json:"disk_used"`
	// PrivateMemoryBytes is what only this sandbox owns of the host's memory.
	PrivateMemoryBytes uint64 `json:"private_memory_bytes"`
	// Faults counts the guest memory pages that were fetched for it.
	Faults uint64 `json:"faults"`
}

// GetMetrics reads the figures of a running sandbox.
func (c *Client) GetMetrics(ctx context.Context, id string) (*Metrics, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	var m Metrics
	if err := c.call(ctx, http.MethodGet, c.sandboxURL(nil, id, "metrics"), nil, &m); err != nil {
		return nil, err
	}
	return &m, nil
}

func (c *Client) sandboxURL(q url.Values, id string, elem ...string) string {
	return c.url(q, append([]string{"v1", "sandboxes", id}, elem...)...)
}

func (c *Client) sandboxAction(ctx context.Context, id, action string, in any) (*Sandbox, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	return c.sandboxCall(ctx, http.MethodPost, c.sandboxURL(nil, id, action), in)
}

func (c *Client) sandboxCall(ctx context.Context, method, url string, in any) (*Sandbox, error) {
	var sb Sandbox
	if err := c.call(ctx, method, url, in, &sb); err != nil {
		return nil, err
	}
	return &sb, nil
}

func pageQuery(q url.Values, limit int, cursor string) error {
	if limit < 0 {
		return invalid("limit %d: must not be negative", limit)
	}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	if cursor != "" {
		q.Set("cursor", cursor)
	}
	return nil
}

// walk yields the items of all pages. A server that repeats a cursor would
// keep a caller for ever, so that is an error.
func walk[T any](cursor string, page func(cursor string) ([]T, string, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		for cursor := cursor; ; {
			items, next, err := page(cursor)
			if err != nil {
				yield(zero, err)
				return
			}
			for _, it := range items {
				if !yield(it, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			if next == cursor {
				yield(zero, &Error{Code: CodeInternal, Message: "the server repeated a list's cursor"})
				return
			}
			cursor = next
		}
	}
}
