package engine

import (
	"context"
	"errors"
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// compactor is the queue of images that are to be brought inside of the
// store's bounds, one after the other, beside everything else. Nothing of it
// is written down: the store has the plans, and each start queues all images.
type compactor struct {
	mu    sync.Mutex
	queue []format.ID
	busy  bool
}

// compactSoon queues the images of a manifest. The one goroutine ends when the
// queue is empty, or with the engine.
func (e *Engine) compactSoon(m snapshot.Manifest) {
	c := &e.compactor
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range []format.ID{m.Memory.ID, m.Disk.ID} {
		if !id.IsZero() && !slices.Contains(c.queue, id) {
			c.queue = append(c.queue, id)
		}
	}
	if c.busy || len(c.queue) == 0 || e.ctx.Err() != nil {
		return
	}
	c.busy = true
	e.wg.Go(e.compactQueue)
}

func (e *Engine) compactQueue() {
	c := &e.compactor
	for {
		c.mu.Lock()
		if len(c.queue) == 0 || e.ctx.Err() != nil {
			c.busy = false
			c.mu.Unlock()
			return
		}
		id := c.queue[0]
		c.queue = c.queue[1:]
		c.mu.Unlock()
		e.compact(e.ctx, id)
	}
}

// compacting brings one image inside of its bounds.
type compacting struct {
	e  *Engine
	id format.ID
	r  snapshot.CompactionReport
}

func (c *compacting) steps() []step {
	return []step{
		{name: "rewrite", do: func(ctx context.Context) (err error) {
			c.r, err = c.e.opts.Store.Compact(ctx, c.id)
			return err
		}},
		{name: "drop_image", do: func(ctx context.Context) error {
			if c.r.To == c.id {
				return nil
			}
			// New clones share the new image, so the old one need not be kept warm.
			return c.e.dropImage(ctx, c.id, c.r.To)
		}},
		{name: "sweep", do: func(ctx context.Context) error {
			if c.r.To == c.id {
				return nil
			}
			return c.e.sweep(ctx)
		}},
	}
}

// compact brings one image inside of its bounds. Whoever has the old one goes
// on with it. A failure is logged alone: the image is as good as before.
func (e *Engine) compact(ctx context.Context, id format.ID) {
	c := &compacting{e: e, id: id}
	err := e.perform(ctx, OpCompact, e.newPhases(), c.steps())
	if errors.Is(err, snapshot.ErrNotFound) || ctx.Err() != nil {
		return // deleted meanwhile; or the next start goes on with the plan
	}
	if err != nil {
		e.log.ErrorContext(ctx, "an image was not compacted, or what it had needed not freed", "image", id.String(), "err", err)
	}
}

// compactAfter is called with what a pause or snapshot has committed. Where
// captures come faster than images are compacted, it waits: the bound holds.
func (e *Engine) compactAfter(ctx context.Context, m snapshot.Manifest) {
	for _, id := range []format.ID{m.Memory.ID, m.Disk.ID} {
		p, err := e.opts.Store.PlanCompaction(id)
		if errors.Is(err, snapshot.ErrNotFound) {
			continue // deleted, or compacted and collected, meanwhile
		}
		if err != nil {
			e.log.ErrorContext(ctx, "cannot tell what an image is made of", "image", id.String(), "err", err)
			continue
		}
		if p.Urgent {
			e.compact(ctx, id)
		}
	}
	e.compactSoon(m)
}

// compactAll queues every image of the store: an earlier process may have
// stopped in the middle of a plan.
func (e *Engine) compactAll() {
	manifests, _ := e.opts.Store.Manifests() // damaged ones were logged
	for _, m := range manifests {
		e.compactSoon(m)
	}
}
