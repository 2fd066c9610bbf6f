package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
)

// ListSnapshotsOptions filters a list; zero means everything.
type ListSnapshotsOptions struct {
	// Type is SnapshotTypeBase or SnapshotTypeSnapshot.
	Type string
	// Limit is the largest number in one page; 0 means the server's.
	Limit int
	// Cursor continues after an earlier page.
	Cursor string
}

// SnapshotPage is one page of a list; an empty NextCursor marks the last one.
type SnapshotPage struct {
	Snapshots  []Snapshot `json:"snapshots"`
	NextCursor string     `json:"next_cursor,omitempty"`
}

// CreateSnapshot freezes a running or paused sandbox under a name, which must
// be free. The source goes back to the state it was in.
func (c *Client) CreateSnapshot(ctx context.Context, sandboxID, name string) (*Snapshot, error) {
	if err := checkID(sandboxID); err != nil {
		return nil, err
	}
	if err := checkName(name); err != nil {
		return nil, err
	}
	in := struct {
		SandboxID string `json:"sandbox_id"`
		Name      string `json:"name"`
	}{sandboxID, name}
	var s Snapshot
	if err := c.call(once(ctx), http.MethodPost, c.url(nil, "v1", "snapshots"), in, &s); err != nil {
		return nil, err
	}
	return &s, nil
}

// GetSnapshot returns a snapshot or base template.
func (c *Client) GetSnapshot(ctx context.Context, name string) (*Snapshot, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	var s Snapshot
	if err := c.call(ctx, http.MethodGet, c.url(nil, "v1", "snapshots", name), nil, &s); err != nil {
		return nil, err
	}
	return &s, nil
}

// ListSnapshots returns one page; Snapshots walks over all of them.
func (c *Client) ListSnapshots(ctx context.Context, o ListSnapshotsOptions) (*SnapshotPage, error) {
	q := url.Values{}
	if o.Type != "" {
		q.Set("type", o.Type)
	}
	if err := pageQuery(q, o.Limit, o.Cursor); err != nil {
		return nil, err
	}
	var page SnapshotPage
	if err := c.call(ctx, http.MethodGet, c.url(q, "v1", "snapshots"), nil, &page); err != nil {
		return nil, err
	}
	return &page, nil
}

// Snapshots yields every snapshot that matches, fetching pages as needed. An
// error is yielded once and ends the walk.
func (c *Client) Snapshots(ctx context.Context, o ListSnapshotsOptions) iter.Seq2[Snapshot, error] {
	return walk(o.Cursor, func(cursor string) ([]Snapshot, string, error) {
		o.Cursor = cursor
		page, err := c.ListSnapshots(ctx, o)
		if err != nil {
			return nil, "", err
		}
		return page.Snapshots, page.NextCursor, nil
	})
}

// DeleteSnapshot removes a name; what others were made from it stays whole.
func (c *Client) DeleteSnapshot(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, c.url(nil, "v1", "snapshots", name), nil, nil)
}
