package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// aheadBytes is what the pager counts about reading ahead of cold starts.
type aheadBytes struct{ read, used, wasted, missed float64 }

// prefetch measures how well the order of a resume foretells the next one's: a
// sandbox is paused, resumed and asked again and again, each time until the
// pager has judged what it read ahead.
func (b *bench) prefetch(ctx context.Context) error {
	sb, err := b.sandbox(ctx, "base", small)
	if err != nil {
		return err
	}
	if err := b.answers(ctx, sb.ID); err != nil {
		return err
	}
	first, err := b.ahead(ctx)
	if err != nil {
		return err
	}
	last := first
	for i := range b.rounds + 1 {
		if _, err := b.s.PauseSandbox(ctx, sb.ID); err != nil {
			return err
		}
		if _, err := b.s.ResumeSandbox(ctx, sb.ID); err != nil {
			return err
		}
		if err := b.answers(ctx, sb.ID); err != nil {
			return err
		}
		if i == 0 { // there was no order yet
			continue
		}
		if last, err = b.judged(ctx, last); err != nil {
			return err
		}
	}
	d := aheadBytes{last.read - first.read, last.used - first.used, last.wasted - first.wasted, last.missed - first.missed}
	of := fmt.Sprintf(" (n=%d)", b.rounds)
	b.out.row(fmt.Sprintf("precision of reading ahead at %d MiB: used of what was read", small), fmt.Sprintf("%.0f %%%s", 100*d.used/d.read, of), "", true)
	b.out.row("recall: read ahead of what was needed", fmt.Sprintf("%.0f %%%s", 100*d.used/(d.used+d.missed), of), "", true)
	b.out.row("read ahead and not used, for a resume", fmt.Sprintf("%.1f of %.1f MiB%s", d.wasted/float64(b.rounds)/(1<<20), d.read/float64(b.rounds)/(1<<20), of), "", true)
	return b.s.DeleteSandbox(ctx, sb.ID)
}

// judged waits until the pager has counted another start.
func (b *bench) judged(ctx context.Context, before aheadBytes) (now aheadBytes, err error) {
	ok := harness.Eventually(time.Minute, func() bool {
		now, err = b.ahead(ctx)
		return err != nil || now.read > before.read
	})
	if err == nil && !ok {
		err = errors.New("the pager has not judged a resume within a minute")
	}
	return now, err
}

// ahead reads the figures from /metrics.
func (b *bench) ahead(ctx context.Context) (got aheadBytes, err error) {
	req, err := http.NewRequestWithContext(ctx, "GET", b.s.URL+"/metrics", nil)
	if err != nil {
		return got, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return got, fmt.Errorf("read metrics: %w", err)
	}
	defer resp.Body.Close()
	into := map[string]*float64{"read": &got.read, "used": &got.used, "wasted": &got.wasted, "missed": &got.missed}
	found := 0
	sc := bufio.NewScanner(resp.Body)
	for sc.Scan() {
		name, value, _ := strings.Cut(sc.Text(), " ")
		name, isOne := strings.CutPrefix(name, "wrenn_pager_prefetch_")
		to := into[strings.TrimSuffix(name, "_bytes_total")]
		if !isOne || to == nil {
			continue
		}
		if *to, err = strconv.ParseFloat(value, 64); err != nil {
			return got, fmt.Errorf("metric %q: %w", sc.Text(), err)
		}
		found++
	}
	if err := sc.Err(); err != nil {
		return got, fmt.Errorf("read metrics: %w", err)
	}
	if found != len(into) {
		return got, fmt.Errorf("/metrics has %d of %d figures of reading ahead", found, len(into))
	}
	return got, nil
}
