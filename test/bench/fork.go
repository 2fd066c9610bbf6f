package main

import (
	"context"
	"fmt"
	"sync"

	"git.omukk.dev/wrenn/sandbox/client"
)

// fork measures how long a running sandbox takes to have children that answer.
func (b *bench) fork(ctx context.Context) error {
	src, err := b.sandbox(ctx, "base", small)
	if err != nil {
		return err
	}
	defer b.s.DeleteSandbox(context.WithoutCancel(ctx), src.ID)
	if err := b.answers(ctx, src.ID); err != nil {
		return err
	}
	for _, n := range []int{1, 8} {
		var took samples
		for range min(b.rounds, 5) {
			var children []client.Sandbox
			d, err := timed(func() (err error) {
				if children, err = b.s.ForkSandbox(ctx, src.ID, n); err != nil {
					return err
				}
				return b.allAnswer(ctx, idsOf(children))
			})
			if err != nil {
				return err
			}
			took = append(took, d)
			for _, id := range idsOf(children) {
				if err := b.s.DeleteSandbox(ctx, id); err != nil {
					return err
				}
			}
		}
		b.out.row(fmt.Sprintf("fork of a running sandbox at %d MiB into %d, until all answer an exec", small, n), took.String(), "", true)
	}
	return nil
}

func idsOf(children []client.Sandbox) []string {
	var ids []string
	for _, c := range children {
		ids = append(ids, c.ID)
	}
	return ids
}

// allAnswer waits until a command has run in every one.
func (b *bench) allAnswer(ctx context.Context, ids []string) error {
	errs := make([]error, len(ids))
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() { errs[i] = b.answers(ctx, id) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
