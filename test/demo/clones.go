package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
)

const cloneCount = 3

// spawn starts the clones at once.
func (d *demo) spawn(ctx context.Context) error {
	d.clones = make([]string, cloneCount)
	errs := make([]error, cloneCount)
	each := make([]time.Duration, cloneCount)
	t := time.Now()
	var wg sync.WaitGroup
	for i := range cloneCount {
		wg.Go(func() {
			sb, err := d.s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: "warm-python"})
			if err != nil {
				errs[i] = fmt.Errorf("spawn clone %d: %w", i+1, err)
				return
			}
			d.clones[i] = sb.ID
			_, errs[i] = d.s.Exec(ctx, sb.ID, client.ExecRequest{Cmd: "/bin/true"})
			each[i] = time.Since(t)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.t.say(row{fmt.Sprintf("spawn %d sandboxes from it at once", cloneCount), time.Since(t), -1, -1, "each has run a command"})
	for i, took := range each {
		d.t.say(row{fmt.Sprintf("  clone %d, until it has run a command", i+1), took, -1, d.private(ctx, d.clones[i]), d.clones[i]})
	}
	return nil
}

// compare proves that each clone is the frozen process, and an individual.
func (d *demo) compare(ctx context.Context) error {
	t := time.Now()
	seen := map[string]string{}
	for _, id := range append([]string{d.source}, d.clones...) {
		answer, err := d.query(ctx, id, "summary")
		if err != nil {
			return err
		}
		if answer != d.answer {
			return fmt.Errorf("clone %s answers %q, the frozen process %q", id, answer, d.answer)
		}
		own, err := d.s.Sh(ctx, id, "hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid")
		if err != nil {
			return err
		}
		random, err := d.query(ctx, id, "random")
		if err != nil {
			return err
		}
		facts := append(strings.Fields(own), random)
		if len(facts) != 4 {
			return fmt.Errorf("sandbox %s told %d facts of itself: %q", id, len(facts), facts)
		}
		for n, name := range []string{"hostname", "machine-id", "kernel random number", "random number of its Python process"} {
			if other, taken := seen[facts[n]]; taken {
				return fmt.Errorf("%s and %s have the same %s: %s", id, other, name, facts[n])
			}
			seen[facts[n]] = id
		}
	}
	d.t.say(row{"compare the source and its clones", time.Since(t), -1, -1, "same memory; own hostname, machine-id and random numbers"})
	return nil
}
