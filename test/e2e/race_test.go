package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
)

// raced is one request of many at once.
type raced struct {
	what string
	err  error
}

// allAtOnce sends requests that are held back until all are ready.
func allAtOnce(ctx context.Context, requests map[string]func(context.Context, int) error, n int) []raced {
	var kinds []string
	for what := range requests {
		kinds = append(kinds, what)
	}
	out := make([]raced, n)
	ready, gone := make(chan struct{}), sync.WaitGroup{}
	for i := range out {
		out[i].what = kinds[i%len(kinds)]
		gone.Go(func() {
			<-ready
			out[i].err = requests[out[i].what](ctx, i)
		})
	}
	close(ready)
	gone.Wait()
	return out
}

// TestAHundredRequestsAtOnceOnOneSandbox: pauses, resumes, execs and snapshots
// at once, from both resting states: what is refused is refused by a clean 409,
// what is done is done whole, and the sandbox is what it was. Then deletes
// among them: one wins, and nothing is left.
func TestAHundredRequestsAtOnceOnOneSandbox(t *testing.T) {
	s := server(t)
	ctx := timeout(t, 5*time.Minute)
	id := spawn(t, s).ID
	was := ask(t, s, id, "set raced")
	prefix := fmt.Sprintf("race%x-", rand.Uint32())
	requests := map[string]func(context.Context, int) error{
		"pause":  func(ctx context.Context, _ int) error { _, err := s.PauseSandbox(ctx, id); return err },
		"resume": func(ctx context.Context, _ int) error { _, err := s.ResumeSandbox(ctx, id); return err },
		"exec": func(ctx context.Context, _ int) error {
			_, err := s.Exec(ctx, id, client.ExecRequest{Cmd: "true"})
			return err
		},
		"snapshot": func(ctx context.Context, i int) error {
			_, err := s.CreateSnapshot(ctx, id, fmt.Sprintf("%s%d", prefix, i))
			return err
		},
	}
	t.Cleanup(func() { removeSnapshots(t, s.Client, prefix) })
	for _, from := range []string{client.StatusRunning, client.StatusPaused} {
		bringTo(t, s.Client, id, from)
		won := map[string]int{}
		for _, r := range allAtOnce(ctx, requests, 100) {
			switch {
			case r.err == nil:
				won[r.what]++
			// An exec whose guest is paused under it is cut off.
			case r.what == "exec" && (client.IsInvalidState(r.err) || client.IsHostUnavailable(r.err)):
			case client.IsInvalidState(r.err), client.IsConflict(r.err):
			default:
				t.Errorf("from %s, %s: %v, want a 409", from, r.what, r.err)
			}
		}
		t.Logf("from %s, of 25 each: %v", from, won)
		if len(won) == 0 {
			t.Errorf("from %s nobody won", from)
		}
		sb, err := s.GetSandbox(ctx, id)
		if err != nil || sb.Status != client.StatusRunning && sb.Status != client.StatusPaused {
			t.Fatalf("from %s it came to %+v, %v", from, sb, err)
		}
		bringTo(t, s.Client, id, client.StatusRunning)
		if a := ask(t, s, id, "stat"); a.PID != was.PID || a.Made != was.Made || a.Value != "raced" {
			t.Errorf("from %s: %+v, was %+v", from, a, was)
		}
	}
	requests["delete"] = func(ctx context.Context, _ int) error { return s.DeleteSandbox(ctx, id) }
	deleted := 0
	for _, r := range allAtOnce(ctx, requests, 100) {
		switch {
		case r.err == nil && r.what == "delete":
			deleted++
		case r.err == nil, client.IsInvalidState(r.err), client.IsConflict(r.err), client.IsNotFound(r.err):
		case r.what == "exec" && client.IsHostUnavailable(r.err):
		default:
			t.Errorf("with deletes, %s: %v, want 409 or 404", r.what, r.err)
		}
	}
	if deleted != 1 {
		t.Errorf("%d deletes won", deleted)
	}
	if sb, err := s.GetSandbox(ctx, id); err == nil && sb.Status != client.StatusStopped {
		t.Errorf("after the delete it is %s", sb.Status)
	}
	if vm := s.VM(id); vm != nil {
		t.Errorf("its VM %d lives", vm.PID)
	}
}

// bringTo puts a sandbox that rests into a state.
func bringTo(t *testing.T, c *client.Client, id, status string) {
	t.Helper()
	ctx := timeout(t, time.Minute)
	sb, err := c.GetSandbox(ctx, id)
	if err == nil && sb.Status != status {
		if status == client.StatusPaused {
			_, err = c.PauseSandbox(ctx, id)
		} else {
			_, err = c.ResumeSandbox(ctx, id)
		}
	}
	if err != nil {
		t.Fatalf("bring %s to %s: %v", id, status, err)
	}
}

// removeSnapshots removes those whose names begin with prefix.
func removeSnapshots(t *testing.T, c *client.Client, prefix string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for i := range 100 {
		if err := c.DeleteSnapshot(ctx, fmt.Sprintf("%s%d", prefix, i)); err != nil && !client.IsNotFound(err) {
			t.Errorf("delete a snapshot: %v", err)
		}
	}
}
