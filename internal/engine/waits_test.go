package engine_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// TestAStopDoesNotWaitForRoom: while a capture has the VM stopped, writes that
// find no room fail and are the VMM's; whatever becomes of the capture, they
// wait again when the guest goes on.
func TestAStopDoesNotWaitForRoom(t *testing.T) {
	for _, l := range engine.Steps(false) {
		if l.Op != engine.OpPause && l.Op != engine.OpSnapshot {
			continue
		}
		for _, step := range l.Steps {
			w := newWorld(t, snapshot.CompactionPolicy{})
			w.create("a", "base")
			w.mark("a")
			told := errors.New("told to fail")
			w.hook(func(op engine.Op, s string) error {
				if op != l.Op {
					return nil
				}
				stopped := slices.Index(l.Steps, s) >= slices.Index(l.Steps, "vm_stop") && !strings.HasPrefix(s, "release") && s != "vm_continue" && s != "guest_clock"
				if y := w.Pager.Yields("a"); y != stopped && slices.Index(l.Steps, s) <= slices.Index(l.Steps, "commit") {
					t.Errorf("%s/%s: its writes yield: %v", l.Op, s, y)
				}
				if s == step {
					return told
				}
				return nil
			})
			var err error
			if l.Op == engine.OpPause {
				err = w.pause("a")
			} else {
				err = w.snapshot("a", "s")
			}
			w.hook(nil)
			w.idle()
			if err != nil && !errors.Is(err, told) {
				t.Error(err)
			}
			if w.state("a") == engine.Running && w.Pager.Yields("a") {
				t.Errorf("%s/%s failed: the guest goes on and its writes fail where there is no room", l.Op, step)
			}
			w.same("a")
		}
	}
}

// TestWhoWaitsForRoomIsTold to those who watch, when it begins and when it ends.
func TestWhoWaitsForRoomIsTold(t *testing.T) {
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	w.create("b", "base")
	_, events := w.e.Watch(t.Context())
	next := func() engine.Info { return (<-events).Sandbox }
	w.Pager.SetWaits("a", 1700000000000)
	if i := next(); i.ID != "a" || !strings.Contains(i.Waiting, "2023-11-14T22:13:20Z") || i.State != engine.Running {
		t.Errorf("%+v", i)
	}
	w.Pager.SetWaits("a", 0)
	if i := next(); i.ID != "a" || i.Waiting != "" {
		t.Errorf("%+v", i)
	}
}
