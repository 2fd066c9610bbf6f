package main

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"git.omukk.dev/wrenn/sandbox/client"
)

// fork measures how long a running sandbox takes to have children that answer,
// against a snapshot of it and as many creates by hand, in turn.
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
		var forked, byHand samples
		for range min(b.rounds, 5) {
			for into, fork := range map[*samples]func(context.Context, string, int) ([]string, error){&forked: b.forkOf, &byHand: b.copiesOf} {
				var ids []string
				d, err := timed(func() (err error) {
					if ids, err = fork(ctx, src.ID, n); err != nil {
						return err
					}
					return b.allAnswer(ctx, ids)
				})
				if err != nil {
					return err
				}
				*into = append(*into, d)
				for _, id := range ids {
					if err := b.s.DeleteSandbox(ctx, id); err != nil {
						return err
					}
				}
			}
		}
		ratio := float64(forked.median()) / float64(byHand.median())
		b.out.row(fmt.Sprintf("fork of a running sandbox at %d MiB into %d, until all answer an exec", small, n),
			fmt.Sprintf("%s; %.2f× a snapshot and as many creates by hand (%s)", forked, ratio, byHand), "", true)
	}
	return nil
}

func (b *bench) forkOf(ctx context.Context, id string, n int) ([]string, error) {
	children, err := b.s.ForkSandbox(ctx, id, n)
	return idsOf(children), err
}

// copiesOf is what fork does, by hand: four creates at once.
func (b *bench) copiesOf(ctx context.Context, id string, n int) ([]string, error) {
	const name = "bench-by-hand"
	if _, err := b.s.CreateSnapshot(ctx, id, name); err != nil {
		return nil, err
	}
	ids, errs := make([]string, n), make([]error, n)
	slots := make(chan struct{}, 4)
	var wg sync.WaitGroup
	for i := range ids {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			sb, err := b.sandbox(ctx, name, 0)
			if errs[i] = err; err == nil {
				ids[i] = sb.ID
			}
		})
	}
	wg.Wait()
	return ids, errors.Join(append(errs, b.s.DeleteSnapshot(ctx, name))...)
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
