package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	loadClients = 50
	loadFor     = 20 * time.Second
	// loadTool is built from a module of its own, so that a load generator is
	// no dependency of the product.
	loadTool = "test/tools/vegeta"
)

// target is one request in vegeta's JSON form.
type target struct {
	Method string              `json:"method"`
	URL    string              `json:"url"`
	Header map[string][]string `json:"header"`
	Body   string              `json:"body,omitempty"`
}

// load measures the API under 50 clients, each of which asks again as soon as it
// is answered, while sandboxes are paused and resumed all the time. One request
// in ten writes to the database.
func (b *bench) load(ctx context.Context) error {
	ids, done, err := b.herd(ctx, "bench-load", 4)
	if err != nil {
		return err
	}
	defer done()
	tool, err := exec.CommandContext(ctx, "go", "-C", loadTool, "tool", "-n", "vegeta").Output()
	if err != nil {
		return fmt.Errorf("build the load generator: %w", err)
	}
	targets, err := b.targets(ids)
	if err != nil {
		return err
	}
	// The first two are paused and resumed.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	moved, errs := make([]int, 2), make([]error, 2)
	for i, id := range ids[:2] {
		wg.Go(func() { moved[i], errs[i] = b.move(ctx, id, stop) })
	}
	r, err := attack(ctx, strings.TrimSpace(string(tool)), targets)
	close(stop)
	wg.Wait()
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	b.out.row(fmt.Sprintf("API under %d clients while sandboxes pause and resume", loadClients),
		fmt.Sprintf("p50 %v, p99 %v; %.0f requests/s, %.2f %% answered 2xx; %d pauses and resumes meanwhile",
			r.Latencies.P50.Round(100*time.Microsecond), r.Latencies.P99.Round(100*time.Microsecond), r.Throughput, 100*r.Success, moved[0]+moved[1]),
		"every request answered", r.Success == 1)
	return nil
}

// targets are the requests in the mix in which they are made.
func (b *bench) targets(ids []string) ([]byte, error) {
	key, err := os.ReadFile(filepath.Join(b.s.Dir, "api-key"))
	if err != nil {
		return nil, err
	}
	header := map[string][]string{"X-Api-Key": {strings.TrimSpace(string(key))}, "Content-Type": {"application/json"}}
	var out bytes.Buffer
	add := func(method, path, body string) {
		err = errors.Join(err, json.NewEncoder(&out).Encode(target{method, b.s.URL + path, header, base64.StdEncoding.EncodeToString([]byte(body))}))
	}
	for i := range 5 {
		add("GET", "/v1/sandboxes/"+ids[i%len(ids)], "")
	}
	for range 2 {
		add("GET", "/v1/sandboxes?limit=20", "")
	}
	add("GET", "/v1/snapshots", "")
	add("GET", "/v1/sandboxes/"+ids[2]+"/events", "")
	add("POST", "/v1/sandboxes/"+ids[3]+"/timeout", `{"timeout_sec":3600}`)
	return out.Bytes(), err
}

// move pauses and resumes a sandbox until it is told to stop, and counts.
func (b *bench) move(ctx context.Context, id string, stop <-chan struct{}) (n int, err error) {
	for {
		select {
		case <-stop:
			return n, nil
		default:
		}
		if _, err := b.s.PauseSandbox(ctx, id); err != nil {
			return n, err
		}
		if _, err := b.s.ResumeSandbox(ctx, id); err != nil {
			return n, err
		}
		n += 2
	}
}

// attackResult is what is used of vegeta's report.
type attackResult struct {
	Latencies struct {
		P50 time.Duration `json:"50th"`
		P99 time.Duration `json:"99th"`
	} `json:"latencies"`
	Throughput float64 `json:"throughput"`
	Success    float64 `json:"success"`
}

// attack runs the load generator as a process of its own.
func attack(ctx context.Context, tool string, targets []byte) (r attackResult, err error) {
	dir, err := os.MkdirTemp("", "wrenn-bench-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	results := filepath.Join(dir, "results")
	cmd := exec.CommandContext(ctx, tool, "attack", "-format=json", "-rate=0", "-workers="+fmt.Sprint(loadClients),
		"-max-workers="+fmt.Sprint(loadClients), "-duration="+loadFor.String(), "-output="+results)
	cmd.Stdin = bytes.NewReader(targets)
	if out, err := cmd.CombinedOutput(); err != nil {
		return r, fmt.Errorf("vegeta attack: %w: %s", err, out)
	}
	report, err := exec.CommandContext(ctx, tool, "report", "-type=json", results).Output()
	if err != nil {
		return r, fmt.Errorf("vegeta report: %w", err)
	}
	if err := json.Unmarshal(report, &r); err != nil {
		return r, fmt.Errorf("vegeta's report: %w", err)
	}
	return r, nil
}

// herd makes n clones of one snapshot and returns how to remove all of it.
func (b *bench) herd(ctx context.Context, name string, n int) (ids []string, done func(), err error) {
	done = func() {
		for _, id := range ids {
			_ = b.s.DeleteSandbox(ctx, id) // the server's end removes what is left
		}
		_ = b.s.DeleteSnapshot(ctx, name)
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	sb, err := b.sandbox(ctx, "base", small)
	if err != nil {
		return nil, done, err
	}
	ids = append(ids, sb.ID)
	if err := b.answers(ctx, sb.ID); err != nil {
		return nil, done, err
	}
	if _, err := b.s.CreateSnapshot(ctx, sb.ID, name); err != nil {
		return nil, done, err
	}
	for len(ids) < n {
		c, err := b.sandbox(ctx, name, 0)
		if err != nil {
			return nil, done, err
		}
		ids = append(ids, c.ID)
	}
	return ids, done, nil
}

// adopt measures how long after a kill -9 of the server a new one has taken over
// what runs: from the start of its process until a command has run in one, and in
// each. How long the same commands take where nothing has crashed is measured in
// turn: where guests are emulated, that is most of it.
func (b *bench) adopt(ctx context.Context) error {
	for _, n := range []int{1, 20} {
		ids, done, err := b.herd(ctx, "bench-adopt", n)
		if err != nil {
			return err
		}
		var undisturbed, serves, first, all samples
		for range min(b.rounds, 5) {
			d, err := timed(func() error { return b.eachAnswers(ctx, ids) })
			if err != nil {
				return err
			}
			undisturbed = append(undisturbed, d)
			b.s.Kill()
			began := time.Now()
			if err := b.s.Restart(ctx); err != nil {
				return err
			}
			serves = append(serves, time.Since(began))
			if err := b.answers(ctx, ids[0]); err != nil {
				return err
			}
			first = append(first, time.Since(began))
			if err := b.eachAnswers(ctx, ids); err != nil {
				return err
			}
			all = append(all, time.Since(began))
		}
		b.out.row(fmt.Sprintf("kill -9 of the server with %d running, from the new one's start", n),
			fmt.Sprintf("serves after %s; an exec has run in one after %s, in each after %s; without a crash one in each takes %s",
				serves, first, all, undisturbed), "", true)
		done()
	}
	return nil
}

// eachAnswers runs a command in every sandbox, four at a time.
func (b *bench) eachAnswers(ctx context.Context, ids []string) error {
	slots := make(chan struct{}, 4)
	errs := make([]error, len(ids))
	var wg sync.WaitGroup
	for i, id := range ids {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			errs[i] = b.answers(ctx, id)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
