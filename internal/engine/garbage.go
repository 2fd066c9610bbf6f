package engine

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// CollectGarbage removes what no snapshot and no sandbox needs, or tells what
// it would remove. ErrState while an operation relies on images that nothing
// names yet.
func (e *Engine) CollectGarbage(ctx context.Context, dryRun bool) (snapshot.GCReport, error) {
	if !e.storeUse.TryLock() {
		return snapshot.GCReport{}, fmt.Errorf("%w: a start, pause or snapshot is under way; try again when it has ended", ErrState)
	}
	defer e.storeUse.Unlock()
	return e.collect(ctx, dryRun)
}

// sweep frees the blocks that nothing needs any more. Where a capture or a
// start is under way it is left to a later one.
func (e *Engine) sweep(ctx context.Context) error {
	if !e.storeUse.TryLock() {
		return nil
	}
	defer e.storeUse.Unlock()
	_, err := e.collect(ctx, false)
	return err
}

// collect runs GC with the images of all sandboxes as roots. The caller holds
// storeUse.
func (e *Engine) collect(ctx context.Context, dryRun bool) (snapshot.GCReport, error) {
	var roots []format.ID
	e.mu.Lock()
	for _, sb := range e.sandboxes {
		roots = append(roots, sb.journal().roots()...)
	}
	e.mu.Unlock()
	r, err := e.opts.Store.GC(ctx, roots, dryRun)
	if err != nil {
		return r, fmt.Errorf("free unused blocks: %w", err)
	}
	if dryRun {
		return r, nil
	}
	for _, id := range append(r.Images, r.Headers...) {
		err = errors.Join(err, e.dropImage(ctx, id))
	}
	return r, err
}

// dropImage has the pager forget an image that no new sandbox starts from, and
// what it learned of its starts.
func (e *Engine) dropImage(ctx context.Context, id format.ID) error {
	_, err := e.opts.Pager.DropImage(ctx, connect.NewRequest(&pagerv1.DropImageRequest{ImageId: id.String()}))
	if err != nil {
		return fmt.Errorf("have the pager forget image %s: %w", id, err)
	}
	return nil
}
