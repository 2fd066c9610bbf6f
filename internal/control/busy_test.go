package control_test

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// deed is something under way in a sandbox; end lets it end and returns then.
type deed func(t *testing.T, f *fixture, id string) (end func())

// deeds are all the ways to be busy that the host knows of.
var deeds = map[string]deed{
	"a command": func(t *testing.T, f *fixture, id string) func() {
		release := f.host.Hold("exec")
		done := make(chan struct{})
		calls := f.host.Calls("exec")
		go func() {
			defer close(done)
			_, _ = f.Exec(context.WithoutCancel(t.Context()), id, control.ExecRequest{Cmd: "echo"})
		}()
		await(t, "the command has begun", func() bool { return f.host.Calls("exec") > calls })
		return func() { release(); <-done }
	},
	"a command whose client has gone": func(t *testing.T, f *fixture, id string) func() {
		ctx, cancel := context.WithCancel(t.Context())
		x, err := f.ExecStream(ctx, id, control.ExecRequest{Cmd: "cat"})
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		return func() { _ = x.Send(control.ExecInput{CloseStdin: true}); x.Drain(); x.Close() }
	},
	"a stream": func(t *testing.T, f *fixture, id string) func() { return streamOf(t, f, id, nil) },
	"a terminal": func(t *testing.T, f *fixture, id string) func() {
		return streamOf(t, f, id, &control.PtySize{Cols: 80, Rows: 24})
	},
	"an upload": func(t *testing.T, f *fixture, id string) func() {
		r, w := io.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = f.WriteFile(context.WithoutCancel(t.Context()), id, control.FileRef{Path: "/f"}, 0, r)
		}()
		if _, err := w.Write([]byte("begun")); err != nil {
			t.Fatal(err)
		}
		return func() { w.Close(); <-done }
	},
	"a download": func(t *testing.T, f *fixture, id string) func() {
		if _, err := f.WriteFile(t.Context(), id, control.FileRef{Path: "/g"}, 0, strings.NewReader("x")); err != nil {
			t.Fatal(err)
		}
		_, r, err := f.ReadFile(t.Context(), id, control.FileRef{Path: "/g"})
		if err != nil {
			t.Fatal(err)
		}
		return func() { r.Close() }
	},
	// Whatever comes by the E2B SDKs, commands in the background included, and
	// by published ports.
	"traffic": func(_ *testing.T, f *fixture, id string) func() { return f.Active(id) },
}

func streamOf(t *testing.T, f *fixture, id string, pty *control.PtySize) func() {
	x, err := f.ExecStream(t.Context(), id, control.ExecRequest{Cmd: "cat", Pty: pty})
	if err != nil {
		t.Fatal(err)
	}
	return func() { _ = x.Send(control.ExecInput{CloseStdin: true}); x.Drain(); x.Close() }
}

// TestASandboxThatExecutesIsNotIdle: while anything is under way it was active
// now, and afterwards when the last of it ended.
func TestASandboxThatExecutesIsNotIdle(t *testing.T) {
	t.Parallel()
	for name, begin := range deeds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := setup(t)
			id := f.create(t, control.CreateParams{}).ID
			active := func() time.Duration {
				t.Helper()
				sb, err := f.Get(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				list, err := f.List(t.Context(), control.SandboxFilter{})
				if err != nil || len(list) != 1 || !list[0].LastActiveAt.Equal(sb.LastActiveAt) {
					t.Errorf("the list says %+v, %v; alone it is %v", list, err, sb.LastActiveAt)
				}
				return f.clock.Now().Sub(sb.LastActiveAt)
			}
			f.clock.Advance(time.Hour)
			if d := active(); d != time.Hour {
				t.Fatalf("idle for an hour, it was active %v ago", d)
			}
			end := begin(t, f, id)
			for range 3 {
				f.clock.Advance(time.Hour)
				if d := active(); d != 0 {
					t.Errorf("while it is under way it was active %v ago", d)
				}
			}
			another := f.Active(id)
			end()
			f.clock.Advance(time.Hour)
			if d := active(); d != 0 {
				t.Errorf("while something else is under way it was active %v ago", d)
			}
			another()
			f.clock.Advance(time.Minute)
			if d := active(); d != time.Minute {
				t.Errorf("a minute after its end it was active %v ago", d)
			}
		})
	}
}

// TestALimitActsAtItsMomentWhateverRuns: being busy moves no limit. An automatic
// pause takes what runs along, and what waited for it is told.
func TestALimitActsAtItsMomentWhateverRuns(t *testing.T) {
	t.Parallel()
	for name, begin := range deeds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := setup(t)
			f.run(t)
			id := f.create(t, control.CreateParams{TimeoutSec: 100, AutoPause: true}).ID
			f.clock.WaitTimer(100 * time.Second)
			end := begin(t, f, id)
			f.clock.Advance(99 * time.Second)
			f.clock.WaitTimer(time.Second)
			f.status(t, id, control.StatusRunning)
			f.clock.Advance(time.Second)
			await(t, "it is paused", func() bool {
				sb, err := f.store.GetSandbox(t.Context(), id)
				return err == nil && sb.Status == control.StatusPaused
			})
			end()
			// The row says so a moment before the operation has ended.
			await(t, "it is resumed", func() bool {
				sb, err := f.Resume(t.Context(), id)
				return err == nil && sb.Status == control.StatusRunning
			})
		})
	}
}
