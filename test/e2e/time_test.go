package e2e

import (
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

func TestTimeLimitsActWithinASecond(t *testing.T) {
	s := server(t)
	var wg sync.WaitGroup
	for _, autoPause := range []bool{false, true} {
		wg.Go(func() {
			// A busy machine may be late once, and its test may be late to see it.
			var late []time.Duration
			for range 4 {
				d := expire(t, s, autoPause)
				if d < -100*time.Millisecond {
					t.Errorf("auto_pause %v: it acts %v before its moment", autoPause, -d)
				}
				if d <= time.Second {
					return
				}
				late = append(late, d)
			}
			t.Errorf("auto_pause %v: it acts %v after its moment", autoPause, late)
		})
	}
	wg.Wait()
}

// expire has a sandbox reach its time limit, and says how long after that the
// limit was seen to act.
func expire(t *testing.T, s *harness.Server, autoPause bool) time.Duration {
	const limit = 3
	ctx := timeout(t, 5*time.Minute)
	sb, err := s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: warm, TimeoutSec: limit, AutoPause: autoPause})
	if err != nil {
		t.Error(err)
		return 0
	}
	defer remove(t, s, sb.ID)
	moment := sb.ExpiresAt
	if d := moment.Sub(sb.StartedAt); d < (limit-1)*time.Second || d > (limit+1)*time.Second {
		t.Errorf("a limit of %d s begins at %v and ends at %v", limit, sb.StartedAt, moment)
	}
	first := sb.Status
	if !harness.Eventually(time.Minute, func() bool {
		now, err := s.GetSandbox(ctx, sb.ID)
		if client.IsNotFound(err) {
			first = "gone"
		} else if err == nil {
			first = now.Status
		}
		return first != client.StatusRunning
	}) {
		t.Errorf("auto_pause %v: still running", autoPause)
	}
	late := time.Since(moment)
	if !harness.Eventually(time.Minute, func() bool {
		now, err := s.GetSandbox(ctx, sb.ID)
		if autoPause {
			return err == nil && now.Status == client.StatusPaused
		}
		return client.IsNotFound(err)
	}) {
		t.Errorf("auto_pause %v: it stays in %s", autoPause, first)
	}
	return late
}

func TestATimeLimitCanBeMovedAndTakenAway(t *testing.T) {
	s := server(t)
	sb := create(t, s, client.CreateSandboxRequest{Template: warm, TimeoutSec: 8})
	now, err := s.SetTimeout(t.Context(), sb.ID, time.Hour)
	if err != nil || time.Until(now.ExpiresAt) < 59*time.Minute {
		t.Fatalf("moved: %+v, %v", now, err)
	}
	now, err = s.SetTimeout(t.Context(), sb.ID, 0)
	if err != nil || !now.ExpiresAt.IsZero() {
		t.Fatalf("taken away: %+v, %v", now, err)
	}
	// The promise is that nothing happens at the old moment.
	time.Sleep(time.Until(sb.ExpiresAt) + 1200*time.Millisecond)
	if out := sh(t, s, sb.ID, "echo alive"); out != "alive" {
		t.Errorf("it says %q", out)
	}
}

func TestBaseBootsWithBothCoresSaturated(t *testing.T) {
	s := server(t)
	stop := saturate()
	defer stop()
	for i := range 3 {
		began := time.Now()
		sb, err := s.CreateSandbox(timeout(t, 3*time.Minute), client.CreateSandboxRequest{})
		if err != nil {
			t.Fatalf("boot %d: %v", i+1, err)
		}
		t.Logf("boot %d of 3 took %v", i+1, time.Since(began).Round(time.Millisecond))
		if out := sh(t, s, sb.ID, "uname -s"); out != "Linux" {
			t.Errorf("boot %d: %q", i+1, out)
		}
		remove(t, s, sb.ID)
	}
}
