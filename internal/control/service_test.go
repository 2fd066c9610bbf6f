package control_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

type fixture struct {
	*control.Service
	host  *controltest.Host
	store *store.DB
	clock *controltest.Clock
}

func setup(t *testing.T) *fixture {
	t.Helper()
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	f := &fixture{host: controltest.NewHost(), store: db, clock: controltest.NewClock()}
	f.Service = f.again(t)
	return f
}

// again makes a service on the same store and host, as after a restart.
func (f *fixture) again(t *testing.T) *control.Service {
	return control.New(control.Options{
		Store: f.store, Host: f.host, Clock: f.clock,
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
}

// run runs the service's loops until stop, or the end of the test.
func (f *fixture) run(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	service := f.Service
	go func() { defer close(done); _ = service.Run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func (f *fixture) create(t *testing.T, p control.CreateParams) control.Sandbox {
	t.Helper()
	sb, err := f.Create(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return sb
}

func (f *fixture) status(t *testing.T, id string, want control.Status) control.Sandbox {
	t.Helper()
	sb, err := f.store.GetSandbox(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if sb.Status != want {
		t.Fatalf("sandbox is %s (%s); want %s", sb.Status, sb.Error, want)
	}
	return sb
}

// await polls: the loops of Run tell nobody when they have done something.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for range 2500 {
		if ok() {
			return
		}
		<-tick.C
	}
	t.Fatalf("waited in vain until %s", what)
}

func code(t *testing.T, err error, want control.Code) {
	t.Helper()
	if err == nil || control.CodeOf(err) != want {
		t.Fatalf("error %v; want %s", err, want)
	}
}

func ptr(n int64) *int64 { return &n }

func TestLifeCycle(t *testing.T) {
	t.Parallel()
	f := setup(t)
	ctx := t.Context()
	sb := f.create(t, control.CreateParams{Metadata: map[string]string{"a": "b"}, TimeoutSec: 60})
	if sb.Status != control.StatusRunning || sb.VCPUs != 1 || sb.MemoryMB != 512 || sb.Template != "base" ||
		!sb.ExpiresAt.Equal(f.clock.Now().Add(time.Minute)) || sb.StartedAt.IsZero() || sb.LastActiveAt.IsZero() {
		t.Fatalf("created %+v", sb)
	}
	p, err := f.Pause(ctx, sb.ID)
	if err != nil || p.Status != control.StatusPaused || !p.ExpiresAt.IsZero() || !p.StartedAt.IsZero() {
		t.Fatalf("paused %+v, %v", p, err)
	}
	_, err = f.Exec(ctx, sb.ID, control.ExecRequest{Cmd: "echo"})
	code(t, err, control.CodeInvalidState)
	f.clock.Advance(time.Hour)
	r, err := f.Resume(ctx, sb.ID)
	if err != nil || r.Status != control.StatusRunning || !r.ExpiresAt.Equal(f.clock.Now().Add(time.Minute)) {
		t.Fatalf("resumed %+v, %v", r, err)
	}
	res, err := f.Exec(ctx, sb.ID, control.ExecRequest{Cmd: "echo", Args: []string{"hi"}})
	if err != nil || string(res.Stdout) != "hi\n" {
		t.Fatalf("exec %q, %v", res.Stdout, err)
	}
	if err := f.Delete(ctx, sb.ID); err != nil {
		t.Fatal(err)
	}
	_, err = f.Get(ctx, sb.ID)
	code(t, err, control.CodeNotFound)
	code(t, f.Delete(ctx, sb.ID), control.CodeNotFound)
	if ids := f.host.IDs(); len(ids) != 0 {
		t.Fatalf("left on the host: %v", ids)
	}
	f.status(t, sb.ID, control.StatusStopped)
}

func TestSnapshotFixesSize(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{VCPUs: ptr(2), MemoryMB: ptr(256)})
	snap, err := f.CreateSnapshot(t.Context(), sb.ID, "warm")
	if err != nil || snap.VCPUs != 2 || snap.MemoryMB != 256 || snap.Parent != "base" {
		t.Fatalf("%+v, %v", snap, err)
	}
	f.status(t, sb.ID, control.StatusRunning)
	for _, p := range []control.CreateParams{
		{Template: "warm"}, {Template: "warm", VCPUs: ptr(2)}, {Template: "warm", VCPUs: ptr(2), MemoryMB: ptr(256)},
	} {
		if c := f.create(t, p); c.VCPUs != 2 || c.MemoryMB != 256 {
			t.Errorf("%+v", c)
		}
	}
	for _, p := range []control.CreateParams{
		{Template: "warm", VCPUs: ptr(1)}, {Template: "warm", VCPUs: ptr(2), MemoryMB: ptr(512)},
	} {
		_, err := f.Create(t.Context(), p)
		code(t, err, control.CodeInvalid)
		if !strings.Contains(err.Error(), "fixes vcpus to 2 and memory_mb to 256") {
			t.Errorf("the error does not name the values: %v", err)
		}
	}
	_, err = f.CreateSnapshot(t.Context(), sb.ID, "warm")
	code(t, err, control.CodeConflict)
	_, err = f.CreateSnapshot(t.Context(), sb.ID, "base")
	code(t, err, control.CodeConflict)
	again, err := f.ReplaceSnapshot(t.Context(), sb.ID, "warm")
	if err != nil || !again.CreatedAt.After(snap.CreatedAt) {
		t.Errorf("replaced: %+v, %v; it was %+v", again, err, snap)
	}
	if got, err := f.GetSnapshot(t.Context(), "warm"); err != nil || !got.CreatedAt.Equal(again.CreatedAt) {
		t.Errorf("after it was replaced: %+v, %v", got, err)
	}
	_, err = f.ReplaceSnapshot(t.Context(), sb.ID, "base")
	code(t, err, control.CodeConflict)
	if _, err := f.CreateSnapshot(t.Context(), sb.ID, "built.123456789012"); err != nil {
		t.Fatal(err)
	}
	_, err = f.ReplaceSnapshot(t.Context(), sb.ID, "built.123456789012")
	code(t, err, control.CodeConflict)
	code(t, f.DeleteSnapshot(t.Context(), "base"), control.CodeConflict)
	if err := f.DeleteSnapshot(t.Context(), "warm"); err != nil {
		t.Fatal(err)
	}
	_, err = f.Create(t.Context(), control.CreateParams{Template: "warm"})
	code(t, err, control.CodeNotFound)
}

func TestFailuresLeaveTheStateBefore(t *testing.T) {
	t.Parallel()
	f := setup(t)
	ctx := t.Context()
	full := controltest.Err(control.CodeHostUnavailable, "the disk is full")
	f.host.Fail("create", full)
	_, err := f.Create(ctx, control.CreateParams{})
	code(t, err, control.CodeHostUnavailable)
	if n, _ := f.store.CountSandboxes(ctx); len(n) != 0 {
		t.Fatalf("a failed create left %v", n)
	}
	f.host.Fail("create", nil)

	sb := f.create(t, control.CreateParams{TimeoutSec: 60})
	f.host.Fail("pause", full)
	_, err = f.Pause(ctx, sb.ID)
	code(t, err, control.CodeHostUnavailable)
	if r := f.status(t, sb.ID, control.StatusRunning); !r.ExpiresAt.Equal(sb.ExpiresAt) {
		t.Errorf("a failed pause moved expires_at to %v", r.ExpiresAt)
	}
	f.host.Fail("pause", nil)
	if _, err := f.Pause(ctx, sb.ID); err != nil {
		t.Fatal(err)
	}
	f.host.Fail("resume", errors.New("boom"))
	_, err = f.Resume(ctx, sb.ID)
	code(t, err, control.CodeInternal)
	f.status(t, sb.ID, control.StatusPaused)
	f.host.Fail("resume", nil)
	if _, err := f.Resume(ctx, sb.ID); err != nil {
		t.Fatal(err)
	}
	f.host.Fail("destroy", errors.New("boom"))
	code(t, f.Delete(ctx, sb.ID), control.CodeInternal)
	if r := f.status(t, sb.ID, control.StatusError); r.Error == "" {
		t.Error("the error has no reason")
	}
	f.host.Fail("destroy", nil)
	if err := f.Delete(ctx, sb.ID); err != nil {
		t.Fatalf("a sandbox in error cannot be deleted: %v", err)
	}
}

// TestEveryStateCanBeDeleted puts a row in each state, as a crash could leave it.
func TestEveryStateCanBeDeleted(t *testing.T) {
	t.Parallel()
	f := setup(t)
	for _, st := range control.Statuses {
		if st == control.StatusStopped {
			continue
		}
		id := string(st)
		if err := f.store.CreateSandbox(t.Context(), control.Sandbox{ID: id, Template: "base", Status: st, CreatedAt: f.clock.Now()}); err != nil {
			t.Fatal(err)
		}
		f.host.Put(control.HostSandbox{ID: id, State: control.HostRunning})
		if err := f.Delete(t.Context(), id); err != nil {
			t.Errorf("%s: %v", st, err)
		}
	}
	if ids := f.host.IDs(); len(ids) != 0 {
		t.Errorf("left on the host: %v", ids)
	}
}

// race calls every function n times at once and gives the errors by function.
func race(n int, fs ...func() error) [][]error {
	out := make([][]error, len(fs))
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i, f := range fs {
		out[i] = make([]error, n)
		for j := range n {
			wg.Go(func() { <-start; out[i][j] = f() })
		}
	}
	close(start)
	wg.Wait()
	return out
}

func winners(t *testing.T, errs []error, allowed ...control.Code) (won int) {
	t.Helper()
next:
	for _, err := range errs {
		if err == nil {
			won++
			continue
		}
		for _, c := range allowed {
			if control.CodeOf(err) == c {
				continue next
			}
		}
		t.Errorf("a loser got %v", err)
	}
	return won
}

func TestRacesHaveOneWinner(t *testing.T) {
	t.Parallel()
	const n = 100
	t.Run("pause", func(t *testing.T) {
		f := setup(t)
		sb := f.create(t, control.CreateParams{})
		errs := race(n, func() error { _, err := f.Pause(context.Background(), sb.ID); return err })
		if w := winners(t, errs[0], control.CodeInvalidState); w != 1 {
			t.Errorf("%d winners", w)
		}
		f.status(t, sb.ID, control.StatusPaused)
		if c := f.host.Calls("pause"); c != 1 {
			t.Errorf("the host saw %d pauses", c)
		}
	})
	t.Run("pause and delete", func(t *testing.T) {
		f := setup(t)
		sb := f.create(t, control.CreateParams{})
		errs := race(n/2,
			func() error { _, err := f.Pause(context.Background(), sb.ID); return err },
			func() error { return f.Delete(context.Background(), sb.ID) })
		if w := winners(t, errs[0], control.CodeInvalidState, control.CodeNotFound); w > 1 {
			t.Errorf("%d pauses won", w)
		}
		if w := winners(t, errs[1], control.CodeInvalidState, control.CodeNotFound); w != 1 {
			t.Errorf("%d deletes won", w)
		}
		if f.host.Overlaps() != 0 || len(f.host.IDs()) != 0 {
			t.Errorf("%d overlaps, left %v", f.host.Overlaps(), f.host.IDs())
		}
	})
	t.Run("resume and exec", func(t *testing.T) {
		f := setup(t)
		sb := f.create(t, control.CreateParams{})
		if _, err := f.Pause(t.Context(), sb.ID); err != nil {
			t.Fatal(err)
		}
		errs := race(n/2,
			func() error { _, err := f.Resume(context.Background(), sb.ID); return err },
			func() error {
				_, err := f.Exec(context.Background(), sb.ID, control.ExecRequest{Cmd: "echo"})
				return err
			})
		if w := winners(t, errs[0], control.CodeInvalidState); w != 1 {
			t.Errorf("%d resumes won", w)
		}
		winners(t, errs[1], control.CodeInvalidState)
		f.status(t, sb.ID, control.StatusRunning)
	})
	t.Run("pause and exec", func(t *testing.T) {
		f := setup(t)
		sb := f.create(t, control.CreateParams{})
		errs := race(n/2,
			func() error { _, err := f.Pause(context.Background(), sb.ID); return err },
			func() error {
				// It would run for ever: only the pause ends it.
				_, err := f.Exec(context.Background(), sb.ID, control.ExecRequest{Cmd: "sleep"})
				return err
			})
		if w := winners(t, errs[0], control.CodeInvalidState); w != 1 {
			t.Errorf("%d pauses won", w)
		}
		if w := winners(t, errs[1], control.CodeInvalidState); w != 0 {
			t.Errorf("%d commands that do not end ended", w)
		}
	})
	t.Run("snapshot and pause", func(t *testing.T) {
		f := setup(t)
		sb := f.create(t, control.CreateParams{})
		errs := race(n/2,
			func() error { _, err := f.CreateSnapshot(context.Background(), sb.ID, "one"); return err },
			func() error { _, err := f.Pause(context.Background(), sb.ID); return err })
		if w := winners(t, errs[0], control.CodeInvalidState, control.CodeConflict); w > 1 {
			t.Errorf("%d snapshots won", w)
		}
		if w := winners(t, errs[1], control.CodeInvalidState); w > 1 {
			t.Errorf("%d pauses won", w)
		}
		if f.host.Overlaps() != 0 {
			t.Errorf("%d overlaps", f.host.Overlaps())
		}
	})
}

// TestClientThatGoesAwayChangesNothing ends the context in the middle.
func TestClientThatGoesAwayChangesNothing(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	release := f.host.Hold("pause")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { _, err := f.Pause(ctx, sb.ID); done <- err }()
	await(t, "the host was asked", func() bool { return f.host.Calls("pause") == 1 })
	cancel()
	release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f.status(t, sb.ID, control.StatusPaused)
}

// TestDeleteWaitsForTheOperation deletes in the middle of a pause and a create.
func TestDeleteWaitsForTheOperation(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"pause", "create"} {
		f := setup(t)
		var id string
		release := func() {}
		opDone, delDone := make(chan error, 1), make(chan error, 1)
		if op == "pause" {
			id = f.create(t, control.CreateParams{}).ID
			release = f.host.Hold(op)
			go func() { _, err := f.Pause(context.Background(), id); opDone <- err }()
		} else {
			release = f.host.Hold(op)
			go func() { _, err := f.Create(context.Background(), control.CreateParams{}); opDone <- err }()
		}
		await(t, "the host was asked", func() bool {
			list, err := f.List(t.Context(), control.SandboxFilter{})
			if err != nil || len(list) != 1 || f.host.Calls(op) != 1 {
				return false
			}
			id = list[0].ID
			return true
		})
		go func() { delDone <- f.Delete(context.Background(), id) }()
		await(t, "the delete took the state", func() bool {
			sb, err := f.store.GetSandbox(t.Context(), id)
			return err == nil && sb.Status == control.StatusStopping
		})
		release()
		code(t, <-opDone, control.CodeInvalidState)
		if err := <-delDone; err != nil {
			t.Fatal(err)
		}
		if f.host.Overlaps() != 0 || len(f.host.IDs()) != 0 {
			t.Errorf("%s: %d overlaps, left %v", op, f.host.Overlaps(), f.host.IDs())
		}
	}
}

// TestAnErrorIsRetriedFromTheLastPause, and stays one, with its reason, where
// there is none or the host refuses.
func TestAnErrorIsRetriedFromTheLastPause(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	crash := func() {
		t.Helper()
		f.host.Crash(sb.ID, "killed by signal 9")
		if _, err := f.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.status(t, sb.ID, control.StatusError)
	}
	crash()
	_, err := f.Resume(t.Context(), sb.ID)
	code(t, err, control.CodeInvalidState)
	if got, err := f.Get(t.Context(), sb.ID); err != nil || got.Status != control.StatusError || got.Error != "killed by signal 9" {
		t.Errorf("never paused: %+v, %v", got, err)
	}
	if err := f.Delete(t.Context(), sb.ID); err != nil {
		t.Fatal(err)
	}

	sb = f.create(t, control.CreateParams{TimeoutSec: 60})
	for _, move := range []func(context.Context, string) (control.Sandbox, error){f.Pause, f.Resume} {
		if _, err := move(t.Context(), sb.ID); err != nil {
			t.Fatal(err)
		}
	}
	crash()
	f.host.Fail("resume", controltest.Err(control.CodeHostUnavailable, "no room"))
	_, err = f.Resume(t.Context(), sb.ID)
	code(t, err, control.CodeHostUnavailable)
	f.status(t, sb.ID, control.StatusError)
	f.host.Fail("resume", nil)
	got, err := f.Resume(t.Context(), sb.ID)
	if err != nil || got.Status != control.StatusRunning || got.Error != "" || got.ExpiresAt.IsZero() {
		t.Errorf("%+v, %v; want it running, with a time limit and no error", got, err)
	}
}

func TestFork(t *testing.T) {
	t.Parallel()
	f := setup(t)
	src := f.create(t, control.CreateParams{Metadata: map[string]string{"a": "b"}, MemoryMB: ptr(256), TimeoutSec: 5, AutoPause: true})
	children, err := f.Fork(t.Context(), src.ID, 6)
	if err != nil || len(children) != 6 {
		t.Fatalf("%d children, %v", len(children), err)
	}
	for _, c := range children {
		if c.Err != nil || c.Sandbox.ID == src.ID || c.Sandbox.Template != "base" || c.Sandbox.MemoryMB != 256 ||
			c.Sandbox.Metadata["a"] != "b" || c.Sandbox.TimeoutSec != 5 || !c.Sandbox.AutoPause {
			t.Errorf("child %+v, %v", c.Sandbox, c.Err)
		}
	}
	f.status(t, src.ID, control.StatusRunning)
	if n := len(f.host.IDs()); n != 7 {
		t.Errorf("%d sandboxes on the host", n)
	}
	if left, _ := f.host.ListSnapshots(t.Context()); len(left) != 1 {
		t.Errorf("snapshots left: %v", left)
	}
	f.host.Fail("create", controltest.Err(control.CodeHostUnavailable, "no room"))
	_, err = f.Fork(t.Context(), src.ID, 2)
	code(t, err, control.CodeHostUnavailable)
	for _, n := range []int64{0, -1, control.MaxForks + 1} {
		_, err = f.Fork(t.Context(), src.ID, n)
		code(t, err, control.CodeInvalid)
	}
}

func TestLastActiveMovesWhenStreamEnds(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	ctx, cancel := context.WithCancel(t.Context())
	sess, err := f.ExecStream(ctx, sb.ID, control.ExecRequest{Cmd: "cat"})
	if err != nil {
		t.Fatal(err)
	}
	cancel() // The client has gone.
	f.clock.Advance(time.Minute)
	if got, _ := f.Get(t.Context(), sb.ID); !got.LastActiveAt.Equal(f.clock.Now()) {
		t.Errorf("while a command runs last_active_at is %v; want now", got.LastActiveAt)
	}
	f.clock.Advance(time.Minute)
	_ = sess.Send(control.ExecInput{CloseStdin: true})
	sess.Drain()
	sess.Close()
	ended := f.clock.Now()
	f.clock.Advance(time.Minute)
	if got, _ := f.Get(t.Context(), sb.ID); !got.LastActiveAt.Equal(ended) {
		t.Errorf("last_active_at is %v; want %v, when the command ended", got.LastActiveAt, ended)
	}
}

func TestAnnotationsAreWhatAdoptionReads(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{Metadata: map[string]string{"k": "v"}, TimeoutSec: 77, AutoPause: true})
	list, _ := f.host.ListSandboxes(t.Context())
	var note map[string]any
	if err := json.Unmarshal(list[0].Annotations, &note); err != nil || note["timeout_sec"] != 77.0 {
		t.Fatalf("annotations %s, %v", list[0].Annotations, err)
	}
	// The database is lost.
	g := setup(t)
	g.host.Put(list[0])
	if _, err := g.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := g.status(t, sb.ID, control.StatusRunning)
	if got.Metadata["k"] != "v" || got.TimeoutSec != 77 || !got.AutoPause || got.Template != "base" ||
		!got.CreatedAt.Equal(sb.CreatedAt) || !got.ExpiresAt.Equal(g.clock.Now().Add(77*time.Second)) {
		t.Errorf("adopted %+v", got)
	}
}
