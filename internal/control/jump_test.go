package control_test

import (
	"fmt"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const day = 24 * time.Hour

// TestAWallClockThatJumpsMovesNoLimit: forward and back by a day, before and
// after a limit is moved, with looks at the host in between: each acts at its
// moment by the clock that does not jump, neither early nor never.
func TestAWallClockThatJumpsMovesNoLimit(t *testing.T) {
	t.Parallel()
	for _, jump := range []time.Duration{day, -day, 40 * time.Second, -40 * time.Second} {
		for _, autoPause := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v auto_pause %v", jump, autoPause), func(t *testing.T) {
				t.Parallel()
				f := setup(t)
				f.run(t)
				left := f.create(t, control.CreateParams{TimeoutSec: 100, AutoPause: autoPause}).ID
				f.clock.WaitTimer(100 * time.Second)
				none := f.create(t, control.CreateParams{}).ID
				look := func() {
					t.Helper()
					if _, err := f.Reconcile(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				acted := func(id string, at time.Duration) {
					t.Helper()
					f.clock.Advance(at - time.Second)
					f.clock.WaitTimer(time.Second)
					f.status(t, id, control.StatusRunning)
					f.clock.Advance(time.Second)
					want := control.StatusStopped
					if autoPause {
						want = control.StatusPaused
					}
					await(t, "the limit acts", func() bool {
						sb, err := f.store.GetSandbox(t.Context(), id)
						return err == nil && sb.Status == want
					})
				}
				f.clock.Advance(10 * time.Second)
				f.clock.Jump(jump)
				look()
				f.clock.WaitTimer(90 * time.Second)
				f.status(t, left, control.StatusRunning)
				// One that begins after the jump, and one that is moved after it.
				begun := f.create(t, control.CreateParams{TimeoutSec: 300, AutoPause: autoPause}).ID
				moved := f.create(t, control.CreateParams{TimeoutSec: 50, AutoPause: autoPause}).ID
				f.clock.WaitTimer(50 * time.Second)
				f.clock.Jump(jump)
				if _, err := f.SetTimeout(t.Context(), moved, 200); err != nil {
					t.Fatal(err)
				}
				look()
				acted(left, 90*time.Second)
				acted(moved, 110*time.Second)
				acted(begun, 100*time.Second)
				look()
				f.status(t, none, control.StatusRunning)
			})
		}
	}
}

// TestConnectOnlyLengthensARunWhateverTheWallClockSays.
func TestConnectOnlyLengthensARunWhateverTheWallClockSays(t *testing.T) {
	t.Parallel()
	for _, jump := range []time.Duration{day, -day} {
		f := setup(t)
		f.run(t)
		sb := f.create(t, control.CreateParams{TimeoutSec: 1000, AutoPause: true})
		f.clock.WaitTimer(1000 * time.Second)
		f.clock.Jump(jump)
		connect := func(sec int64) {
			t.Helper()
			if _, _, err := f.Connect(t.Context(), sb.ID, control.ConnectParams{TimeoutSec: sec}); err != nil {
				t.Fatal(err)
			}
		}
		connect(300)
		f.clock.WaitTimer(1000 * time.Second) // not shortened
		connect(2000)
		f.clock.WaitTimer(2000 * time.Second) // lengthened
	}
}

// TestAJumpAcrossARestartCountsByTheWallClock, as docs/operations.md says: what is
// stored is a moment, and it is all that the next process has.
func TestAJumpAcrossARestartCountsByTheWallClock(t *testing.T) {
	t.Parallel()
	f := setup(t)
	ahead := f.create(t, control.CreateParams{TimeoutSec: 100, AutoPause: true}).ID
	f.clock.Jump(-50 * time.Second)
	f.Service = f.again(t)
	f.run(t)
	f.clock.WaitTimer(150 * time.Second)
	f.clock.Advance(150 * time.Second)
	await(t, "it is paused", func() bool {
		sb, err := f.store.GetSandbox(t.Context(), ahead)
		return err == nil && sb.Status == control.StatusPaused
	})
}
