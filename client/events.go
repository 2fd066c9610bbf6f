package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// SandboxEvent is one line of a sandbox's log.
type SandboxEvent struct {
	// Seq counts up from 1 within a sandbox.
	Seq int64     `json:"seq"`
	At  time.Time `json:"at"`
	// Type is the operation (create, pause, resume, snapshot, fork, delete),
	// a change of the time limit (timeout), its end (expire), or what the
	// server found out (found, adopt).
	Type string `json:"type"`
	// Status of the sandbox after it.
	Status     string `json:"status"`
	DurationMS int64  `json:"duration_ms"`
	Detail     string `json:"detail,omitempty"`
	// Error says why it failed; empty when it did not.
	Error string `json:"error,omitempty"`
	// RequestID is the X-Request-Id of the request that asked for it.
	RequestID string `json:"request_id,omitempty"`
}

// SandboxEventPage is a page of a sandbox's log, oldest first. NextCursor is always
// there: given again it continues with what has happened since.
type SandboxEventPage struct {
	Events     []SandboxEvent `json:"events"`
	NextCursor string         `json:"next_cursor"`
}

// ListEvents returns one page of a sandbox's log; it can be read for some time
// after the sandbox was deleted.
func (c *Client) ListEvents(ctx context.Context, id string, limit int, cursor string) (*SandboxEventPage, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	q := url.Values{}
	if err := pageQuery(q, limit, cursor); err != nil {
		return nil, err
	}
	var page SandboxEventPage
	if err := c.call(ctx, http.MethodGet, c.sandboxURL(q, id, "events"), nil, &page); err != nil {
		return nil, err
	}
	return &page, nil
}

// SandboxEvents yields a sandbox's log up to now. With follow it goes on, asking again
// every so often, until ctx ends or the sandbox is deleted.
func (c *Client) SandboxEvents(ctx context.Context, id string, follow time.Duration) iter.Seq2[SandboxEvent, error] {
	return func(yield func(SandboxEvent, error) bool) {
		cursor, gone := "", false
		for {
			page, err := c.ListEvents(ctx, id, 0, cursor)
			if err != nil {
				yield(SandboxEvent{}, err)
				return
			}
			for _, e := range page.Events {
				if !yield(e, nil) {
					return
				}
				gone = e.Status == StatusStopped
			}
			cursor = page.NextCursor
			if len(page.Events) > 0 {
				continue
			}
			if follow <= 0 || gone {
				return
			}
			if err := wait(ctx, follow); err != nil {
				yield(SandboxEvent{}, err)
				return
			}
		}
	}
}
