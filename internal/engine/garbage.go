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
	sw := &sweeping{e: e, dryRun: dryRun}
	err := e.perform(ctx, OpSweep, e.newPhases(), sw.steps())
	return sw.r, err
}

type sweeping struct {
	e      *Engine
	dryRun bool
	roots  []format.ID
	r      snapshot.GCReport
}

func (sw *sweeping) steps() []step {
	return []step{
		{name: "roots", do: sw.findRoots},
		{name: "collect", do: func(ctx context.Context) (err error) {
			sw.r, err = sw.e.opts.Store.GC(ctx, sw.roots, sw.dryRun)
			return wrap("free unused blocks", err)
		}},
		{name: "drop_images", do: sw.dropImages},
	}
}

func (sw *sweeping) findRoots(context.Context) error {
	sw.e.mu.Lock()
	defer sw.e.mu.Unlock()
	for _, sb := range sw.e.sandboxes {
		sw.roots = append(sw.roots, sb.journal().roots()...)
	}
	return nil
}

func (sw *sweeping) dropImages(ctx context.Context) error {
	if sw.dryRun {
		return nil
	}
	var errs []error
	for _, id := range append(sw.r.Images, sw.r.Headers...) {
		errs = append(errs, sw.e.dropImage(ctx, id, format.ID{}))
	}
	return errors.Join(errs...)
}

// dropImage has the pager forget an image that no new sandbox starts from, and
// give what it learned of its starts to the successor, unless that is zero.
func (e *Engine) dropImage(ctx context.Context, id, successor format.ID) error {
	req := &pagerv1.DropImageRequest{ImageId: id.String(), SuccessorImageId: optionalID(successor)}
	if _, err := e.opts.Pager.DropImage(ctx, connect.NewRequest(req)); err != nil {
		return fmt.Errorf("have the pager forget image %s: %w", id, err)
	}
	return nil
}

func optionalID(id format.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}
