package control_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
)

func TestTimeLimitDeletes(t *testing.T) {
	t.Parallel()
	f := setup(t)
	f.run(t)
	sb := f.create(t, control.CreateParams{TimeoutSec: 100})
	f.clock.WaitTimer(100 * time.Second)
	f.clock.Advance(99 * time.Second)
	f.clock.WaitTimer(time.Second)
	f.status(t, sb.ID, control.StatusRunning)
	f.clock.Advance(time.Second)
	await(t, "it is stopped", func() bool {
		s, err := f.store.GetSandbox(t.Context(), sb.ID)
		return err == nil && s.Status == control.StatusStopped
	})
	if len(f.host.IDs()) != 0 {
		t.Error("it is still on the host")
	}
}

func TestTimeLimitPauses(t *testing.T) {
	t.Parallel()
	f := setup(t)
	f.run(t)
	sb := f.create(t, control.CreateParams{TimeoutSec: 100, AutoPause: true})
	f.clock.WaitTimer(100 * time.Second)
	// Extended at the last moment, then shortened.
	f.clock.Advance(99 * time.Second)
	if _, err := f.SetTimeout(t.Context(), sb.ID, 500); err != nil {
		t.Fatal(err)
	}
	f.clock.WaitTimer(500 * time.Second)
	f.clock.Advance(10 * time.Second)
	f.status(t, sb.ID, control.StatusRunning)
	if _, err := f.SetTimeout(t.Context(), sb.ID, 2); err != nil {
		t.Fatal(err)
	}
	f.clock.WaitTimer(2 * time.Second)
	f.host.Fail("pause", controltest.Err(control.CodeHostUnavailable, "the disk is full"))
	f.clock.Advance(2 * time.Second)
	// The host refuses: it goes on running and is tried again.
	await(t, "a pause was tried", func() bool { return f.host.Calls("pause") == 1 })
	f.clock.WaitTimer(30 * time.Second)
	await(t, "it runs again", func() bool {
		s, _ := f.store.GetSandbox(t.Context(), sb.ID)
		return s.Status == control.StatusRunning
	})
	f.host.Fail("pause", nil)
	// The row runs again a moment before the next try is set, so time goes on
	// while we look.
	await(t, "it is paused", func() bool {
		f.clock.Advance(time.Second)
		s, _ := f.store.GetSandbox(t.Context(), sb.ID)
		return s.Status == control.StatusPaused
	})
}

func TestTimeLimitSurvivesRestart(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{TimeoutSec: 100, AutoPause: true})
	none := f.create(t, control.CreateParams{})
	f.Service = f.again(t)
	f.run(t)
	f.clock.WaitTimer(100 * time.Second)
	f.clock.Advance(100 * time.Second)
	await(t, "it is paused", func() bool {
		s, _ := f.store.GetSandbox(t.Context(), sb.ID)
		return s.Status == control.StatusPaused
	})
	f.status(t, none.ID, control.StatusRunning)
}

// A create that a crash cut off before the host had anything leaves nothing:
// nobody was told of the sandbox.
func TestReconcileForgetsALostCreate(t *testing.T) {
	t.Parallel()
	f := setup(t)
	row := control.Sandbox{ID: "a1", Template: "base", Status: control.StatusPending, VCPUs: 1, MemoryMB: 128, CreatedAt: f.clock.Now(), ChangedAt: f.clock.Now(), Version: 1}
	if err := f.store.CreateSandbox(t.Context(), row); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := f.store.GetSandbox(t.Context(), "a1"); !errors.Is(err, control.ErrNotFound) {
		t.Errorf("the row is %+v, %v", got, err)
	}
}

// TestReconcile goes through what a host may say of a row in each state after a
// restart in the middle of anything.
func TestReconcile(t *testing.T) {
	t.Parallel()
	absent := control.HostState(99)
	for _, c := range []struct {
		name string
		row  control.Status
		host control.HostState
		want control.Status
	}{
		{"create was finished", control.StatusPending, control.HostRunning, control.StatusRunning},
		{"create goes on", control.StatusPending, control.HostMoving, control.StatusPending},
		{"runs", control.StatusRunning, control.HostRunning, control.StatusRunning},
		{"was paused behind our back", control.StatusRunning, control.HostPaused, control.StatusPaused},
		{"died", control.StatusRunning, control.HostError, control.StatusError},
		{"vanished", control.StatusRunning, absent, control.StatusError},
		{"pause was finished", control.StatusPausing, control.HostPaused, control.StatusPaused},
		{"pause was undone", control.StatusPausing, control.HostRunning, control.StatusRunning},
		{"paused", control.StatusPaused, control.HostPaused, control.StatusPaused},
		{"paused state lost", control.StatusPaused, absent, control.StatusError},
		{"resume was finished", control.StatusResuming, control.HostRunning, control.StatusRunning},
		{"resume was undone", control.StatusResuming, control.HostPaused, control.StatusPaused},
		{"delete is finished", control.StatusStopping, control.HostRunning, control.StatusStopped},
		{"delete was finished", control.StatusStopping, absent, control.StatusStopped},
		{"deleted stays deleted", control.StatusStopped, control.HostRunning, control.StatusStopped},
		{"lost comes back", control.StatusError, control.HostPaused, control.StatusPaused},
		{"error stays", control.StatusError, absent, control.StatusError},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := setup(t)
			row := control.Sandbox{ID: "a1", Template: "base", Status: c.row, VCPUs: 1, MemoryMB: 128, CreatedAt: f.clock.Now(), ChangedAt: f.clock.Now()}
			if err := f.store.CreateSandbox(t.Context(), row); err != nil {
				t.Fatal(err)
			}
			if c.host != absent {
				f.host.Put(control.HostSandbox{ID: "a1", State: c.host, Error: "it broke"})
			}
			if _, err := f.Reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := f.status(t, "a1", c.want)
			if c.want == control.StatusError && c.row != control.StatusError && got.Error == "" {
				t.Error("the error has no reason")
			}
			if c.want == control.StatusStopped && len(f.host.IDs()) != 0 {
				t.Error("a deleted sandbox is still on the host")
			}
			// A second look finds nothing to do.
			if _, err := f.Reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
			if again := f.status(t, "a1", c.want); again.Version != got.Version {
				t.Errorf("a second look changed the row: version %d, then %d", got.Version, again.Version)
			}
		})
	}
}

// TestReconcileNeverKillsTheUnknown: whatever the host has and the database
// does not is taken over.
func TestReconcileNeverKillsTheUnknown(t *testing.T) {
	t.Parallel()
	f := setup(t)
	f.host.Put(control.HostSandbox{ID: "run", State: control.HostRunning, Template: "base", VCPUs: 1, MemoryMB: 128, Annotations: []byte("not JSON")})
	f.host.Put(control.HostSandbox{ID: "paused", State: control.HostPaused, Template: "base", VCPUs: 1, MemoryMB: 128})
	f.host.Put(control.HostSandbox{ID: "dead", State: control.HostError, Error: "killed by signal 9"})
	f.host.Put(control.HostSandbox{ID: "moving", State: control.HostMoving})
	again, err := f.Reconcile(t.Context())
	if err != nil || !again {
		t.Fatalf("again %v, %v", again, err)
	}
	f.status(t, "run", control.StatusRunning)
	f.status(t, "paused", control.StatusPaused)
	if s := f.status(t, "dead", control.StatusError); s.Error != "killed by signal 9" {
		t.Errorf("reason %q", s.Error)
	}
	if f.host.Calls("destroy") != 0 || len(f.host.IDs()) != 4 {
		t.Errorf("%d destroys, left %v", f.host.Calls("destroy"), f.host.IDs())
	}
	if _, err := f.Resume(t.Context(), "paused"); err != nil {
		t.Error(err)
	}
}

func TestHostsReportsAreHeard(t *testing.T) {
	t.Parallel()
	f := setup(t)
	f.run(t)
	sb := f.create(t, control.CreateParams{})
	await(t, "the service watches", func() bool { return f.Ready(t.Context()) == nil && f.host.Calls("watch") > 0 })
	f.host.Crash(sb.ID, "out of memory")
	await(t, "the row says so", func() bool {
		s, _ := f.store.GetSandbox(t.Context(), sb.ID)
		return s.Status == control.StatusError && s.Error == "out of memory"
	})
	if err := f.Delete(t.Context(), sb.ID); err != nil {
		t.Fatal(err)
	}
}

// TestUncertainOutcome: the host does the pause but its answer is lost.
func TestUncertainOutcome(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	f.host.Fail("pause", &control.Error{Code: control.CodeHostUnavailable, Message: "the connection broke", Uncertain: true})
	_, err := f.Pause(t.Context(), sb.ID)
	code(t, err, control.CodeHostUnavailable)
	f.status(t, sb.ID, control.StatusPausing)
	if err := f.host.DestroySandbox(t.Context(), sb.ID); err != nil {
		t.Fatal(err)
	}
	f.host.Put(control.HostSandbox{ID: sb.ID, State: control.HostPaused})
	if _, err := f.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.status(t, sb.ID, control.StatusPaused)
}

// TestDeleteWhileHostIsDown: accepted, and done when the host is back.
func TestDeleteWhileHostIsDown(t *testing.T) {
	t.Parallel()
	f := setup(t)
	f.run(t)
	sb := f.create(t, control.CreateParams{})
	f.host.SetDown(true)
	code(t, f.Delete(t.Context(), sb.ID), control.CodeHostUnavailable)
	f.status(t, sb.ID, control.StatusStopping)
	code(t, f.Healthy(t.Context()), control.CodeHostUnavailable)
	f.host.SetDown(false)
	await(t, "it is removed", func() bool {
		f.clock.Advance(time.Second)
		s, _ := f.store.GetSandbox(t.Context(), sb.ID)
		return s.Status == control.StatusStopped
	})
}

func TestReconcileLeavesOperationsAlone(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	release := f.host.Hold("pause")
	done := make(chan error, 1)
	go func() { _, err := f.Pause(context.Background(), sb.ID); done <- err }()
	await(t, "the host was asked", func() bool { return f.host.Calls("pause") == 1 })
	// The host's list still says running.
	if again, err := f.Reconcile(t.Context()); err != nil || !again {
		t.Fatalf("again %v, %v", again, err)
	}
	f.status(t, sb.ID, control.StatusPausing)
	release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f.status(t, sb.ID, control.StatusPaused)
}

func TestTemplatesFollowTheHost(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	if _, err := f.CreateSnapshot(t.Context(), sb.ID, "kept"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.host.CreateSnapshot(t.Context(), sb.ID, "unknown", false); err != nil {
		t.Fatal(err)
	}
	if err := f.store.CreateTemplate(t.Context(), control.Template{Name: "gone", Type: control.TemplateSnapshot}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	list, err := f.ListSnapshots(t.Context(), control.TemplateFilter{})
	if err != nil || len(list) != 3 || list[0].Name != "base" || list[1].Name != "kept" || list[2].Name != "unknown" {
		t.Errorf("%+v, %v", list, err)
	}
}
