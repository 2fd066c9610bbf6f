package engine_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// scenario is one operation to be cut off or made to fail at each of its steps.
type scenario struct {
	op engine.Op
	// before brings sandbox a and what else is needed into place.
	before func(w *world)
	// run does the operation. It may be done again after a crash or failure.
	run func(w *world) error
	// old and new are the states of a that a crash may leave; absent is "".
	old, new engine.State
	// keeps: a failure leaves a in the old state. Otherwise the operation
	// goes on, or can be said again.
	keeps bool
	// policy makes compaction happen.
	policy snapshot.CompactionPolicy
}

const absent = engine.State("")

func scenarios() []scenario {
	run := func(w *world) { w.create("a", "base"); w.mark("a") }
	paused := func(w *world) { run(w); w.must(w.pause("a")) }
	named := func(w *world) { run(w); w.must(w.snapshot("a", "s")) }
	// One is taken over at a time: the other one rests.
	rest := func(w *world) {
		if w.state("other") == engine.Running {
			w.must(w.pause("other"))
		}
		w.idle()
	}
	reopen := func(w *world) error { return w.open() }
	return []scenario{
		{op: engine.OpCreate, before: func(*world) {}, run: func(w *world) error { return w.tryCreate("a", "base") }, old: absent, new: engine.Running, keeps: true},
		{op: engine.OpSpawn, before: func(w *world) { named(w); w.must(w.destroy("a")) },
			run: func(w *world) error { return w.tryCreate("a", "s") }, old: absent, new: engine.Running, keeps: true},
		{op: engine.OpResume, before: paused, run: func(w *world) error { return w.resume("a", false) }, old: engine.Paused, new: engine.Running, keeps: true},
		{op: engine.OpReboot, before: paused, run: func(w *world) error { return w.resume("a", true) }, old: engine.Paused, new: engine.Running, keeps: true},
		// The second pause, which has an old one to replace.
		{op: engine.OpPause, before: func(w *world) { paused(w); w.must(w.resume("a", false)); w.mark("a") },
			run: func(w *world) error { return w.pause("a") }, old: engine.Running, new: engine.Paused, keeps: true},
		{op: engine.OpSnapshot, before: run, run: func(w *world) error { return w.snapshot("a", "t") }, old: engine.Running, new: engine.Running, keeps: true},
		{op: engine.OpSnapshotPaused, before: paused, run: func(w *world) error { return w.snapshot("a", "t") }, old: engine.Paused, new: engine.Paused, keeps: true},
		{op: engine.OpDestroy, before: func(w *world) { paused(w); w.must(w.resume("a", false)) },
			run: func(w *world) error { return w.destroy("a") }, old: engine.Running, new: absent},
		{op: engine.OpDied, before: run, run: func(w *world) error { return w.killVM("a") }, old: engine.Failed, new: engine.Failed},
		{op: engine.OpRelease, before: func(w *world) {
			paused(w)
			rest(w)
			w.crashIn(engine.OpResume, "record_vm", func() error { return w.resume("a", false) })
		},
			run: reopen, old: engine.Paused, new: engine.Paused},
		{op: engine.OpAdopt, before: func(w *world) { run(w); rest(w); w.crash() }, run: reopen, old: engine.Running, new: engine.Running},
		{op: engine.OpDeleteSnapshot, before: named, run: func(w *world) error { return w.deleteSnapshot("s") }, old: engine.Running, new: engine.Running, keeps: true},
		{op: engine.OpImport, before: run, run: func(w *world) error { return w.importBase("two") }, old: engine.Running, new: engine.Running, keeps: true},
		{op: engine.OpEgress, before: run, run: func(w *world) error { return w.setEgress("a") }, old: engine.Running, new: engine.Running, keeps: true},
		{op: engine.OpSweep, before: named, run: func(w *world) error { return w.e.Sweep(w.t.Context()) }, old: engine.Running, new: engine.Running, keeps: true},
		{op: engine.OpCompact, before: run, run: func(w *world) error { return w.pauseTimes("a", 7) }, old: engine.Running, new: engine.Paused,
			policy: snapshot.CompactionPolicy{MaxBuilds: 2}},
	}
}

// forEveryStep runs f for every step that the engine lists, and fails for an
// operation that has no scenario.
func forEveryStep(t *testing.T, f func(t *testing.T, s scenario, op engine.OpSteps, step string)) {
	all := scenarios()
	for _, op := range engine.Steps(false) {
		i := slices.IndexFunc(all, func(s scenario) bool { return s.op == op.Op })
		if i < 0 {
			t.Errorf("the operation %s has no scenario here", op.Op)
			continue
		}
		for _, step := range op.Steps {
			t.Run(fmt.Sprintf("%s/%s", op.Op, step), func(t *testing.T) { f(t, all[i], op, step) })
		}
	}
}

// TestEveryStepIsPassed: the lists are what the operations really do.
func TestEveryStepIsPassed(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(string(s.op), func(t *testing.T) {
			w := newWorld(t, s.policy)
			s.before(w)
			var mu sync.Mutex
			var passed []string
			w.hook(func(op engine.Op, step string) error {
				mu.Lock()
				defer mu.Unlock()
				if op == s.op && !slices.Contains(passed, step) {
					passed = append(passed, step)
				}
				return nil
			})
			w.must(s.run(w))
			w.idle()
			mu.Lock()
			defer mu.Unlock()
			for _, op := range engine.Steps(false) {
				if op.Op != s.op {
					continue
				}
				want, got := slices.Sorted(slices.Values(op.Steps)), slices.Sorted(slices.Values(passed))
				if !slices.Equal(want, got) {
					t.Errorf("listed %v, passed %v", op.Steps, passed)
				}
			}
		})
	}
}

// TestACrashAfterEveryStepStrandsNothing abandons the engine after each step
// of each operation, and opens another one on what is there.
func TestACrashAfterEveryStepStrandsNothing(t *testing.T) {
	t.Parallel()
	forEveryStep(t, func(t *testing.T, s scenario, op engine.OpSteps, step string) {
		w := newWorld(t, s.policy)
		w.create("other", "base")
		w.mark("other")
		s.before(w)
		w.crashIn(s.op, step, func() error { return s.run(w) })
		w.must(w.open())
		w.settled(s.old, s.new)
		// It can be done now, or was done.
		if err := s.run(w); err != nil && !already(err) {
			t.Errorf("again: %v", err)
		}
		w.idle()
		w.settled(s.old, s.new)
		if s.op == engine.OpReboot {
			w.remember("a")
		}
		w.same("a")
		w.same("other")
		w.clear()
	})
}

// TestAFailureOfEveryStepIsUndone makes each step of each operation fail when
// it has done its work, which is the worst moment.
func TestAFailureOfEveryStepIsUndone(t *testing.T) {
	t.Parallel()
	forEveryStep(t, func(t *testing.T, s scenario, op engine.OpSteps, step string) {
		w := newWorld(t, s.policy)
		w.create("other", "base")
		w.mark("other")
		s.before(w)
		told := errors.New("told to fail")
		w.failOnce(s.op, step, told)
		err := s.run(w)
		w.idle()
		switch {
		case err != nil && !errors.Is(err, told):
			t.Errorf("%v, want what the step said", err)
		case err != nil && s.keeps:
			w.settled(s.old)
		case err != nil: // destroy
			w.settled(s.old, s.new, engine.Stopping)
		default:
			w.settled(s.new)
		}
		w.hook(nil)
		w.same("other")
		if err := s.run(w); err != nil && !already(err) {
			t.Errorf("again: %v", err)
		}
		w.idle()
		w.settled(s.new)
		if s.op == engine.OpReboot {
			w.remember("a")
		}
		w.same("a")
		w.clear()
	})
}

// already says that an operation had been done.
func already(err error) bool {
	return errors.Is(err, engine.ErrExists) || errors.Is(err, engine.ErrNotFound) || errors.Is(err, engine.ErrState) || errors.Is(err, vmm.ErrGone)
}
