package engine

import (
	"context"
	"errors"
)

// closer releases what an operation acquired, last acquired first. It is the
// one way back from a half-done start: each step that acquires something
// pushes its release at once.
type closer struct {
	steps []func(context.Context) error
}

func (c *closer) push(release func(context.Context) error) {
	c.steps = append(c.steps, release)
}

// close runs every release, whatever the others return. The context is
// detached: a caller that went away must not leave things behind.
func (c *closer) close(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for i := len(c.steps) - 1; i >= 0; i-- {
		errs = append(errs, c.steps[i](ctx))
	}
	c.steps = nil
	return errors.Join(errs...)
}

// keep hands what was acquired to a longer-lived owner.
func (c *closer) keep() { c.steps = nil }
