package client

import (
	"context"
	"net/http"
)

// Garbage is what no snapshot and no sandbox of a server needs any more.
type Garbage struct {
	// DryRun: it was only told, and is still there.
	DryRun bool          `json:"dry_run"`
	Bytes  int64         `json:"bytes"`
	Items  []GarbageItem `json:"items"`
}

// GarbageItem is one thing of it. Kind is "snapshot" (unfinished or half
// deleted), "image", "header" (of an image whose blocks others need) or "file"
// (temporary, beside what the ID names). The ID is the store's own.
type GarbageItem struct {
	Kind  string `json:"kind"`
	ID    string `json:"id"`
	Bytes int64  `json:"bytes"`
}

// CollectGarbage frees what nothing needs any more; with dryRun it only tells
// what it would free. The server does this by itself after deletions.
func (c *Client) CollectGarbage(ctx context.Context, dryRun bool) (*Garbage, error) {
	in := struct {
		DryRun bool `json:"dry_run"`
	}{dryRun}
	var g Garbage
	if err := c.call(once(ctx), http.MethodPost, c.url(nil, "v1", "store", "gc"), in, &g); err != nil {
		return nil, err
	}
	return &g, nil
}
