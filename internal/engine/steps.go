package engine

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Op names an operation of the engine.
type Op string

// The operations. Each is a list of steps, and runs off that list.
const (
	OpCreate         Op = "create" // boot a base template
	OpSpawn          Op = "spawn"  // a clone of a named snapshot
	OpResume         Op = "resume"
	OpReboot         Op = "reboot" // a paused disk, without its memory
	OpPause          Op = "pause"
	OpSnapshot       Op = "snapshot"        // of a running sandbox
	OpSnapshotPaused Op = "snapshot_paused" // of a paused one
	OpDestroy        Op = "destroy"
	OpDied           Op = "died"    // a VM ended unasked
	OpRelease        Op = "release" // what an ended run left
	OpAdopt          Op = "adopt"   // a running VM, by the next engine
	OpDeleteSnapshot Op = "delete_snapshot"
	OpImport         Op = "import" // a base template
	OpEgress         Op = "egress"
	OpSweep          Op = "sweep" // garbage collection
	OpCompact        Op = "compact"
)

// step is one part of an operation. A crash after any step is settled by
// recover; a step that fails is undone, or its operation can be said again.
// What a step has done must be in the journal, or be found without it, before
// the next step is taken.
type step struct {
	name string
	do   func(context.Context) error
	// beside are steps done at the same time, in place of do.
	beside []step
}

// perform takes the steps one after the other, and measures each.
func (e *Engine) perform(ctx context.Context, op Op, ph *phases, steps []step) error {
	for _, s := range steps {
		if err := e.take(ctx, op, ph, s); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) take(ctx context.Context, op Op, ph *phases, s step) error {
	if len(s.beside) > 0 {
		g, gctx := errgroup.WithContext(ctx)
		for _, b := range s.beside {
			g.Go(func() error { return e.take(gctx, op, ph, b) })
		}
		return g.Wait()
	}
	done := ph.part(s.name)
	err := s.do(ctx)
	done()
	if err == nil && e.opts.AfterStep != nil {
		if err = e.opts.AfterStep(op, s.name); err != nil {
			err = fmt.Errorf("step %s: %w", s.name, err)
		}
	}
	return err
}

// OpSteps are the steps of one operation.
type OpSteps struct {
	Op    Op       `json:"op"`
	Steps []string `json:"steps"`
	// Beside holds those of Steps that run at the same time.
	Beside []string `json:"beside,omitempty"`
}

// Steps lists every step of every operation, from the lists that the
// operations run off. ownMemory is the driver's capability of that name.
func Steps(ownMemory bool) []OpSteps {
	e := &Engine{}
	sb := &sandbox{}
	st := &starting{e: e, sb: sb, own: ownMemory}
	cp := &capturing{e: e, sb: sb, own: ownMemory}
	return []OpSteps{
		listed(OpCreate, st.createSteps()),
		listed(OpSpawn, st.createSteps()),
		listed(OpResume, st.resumeSteps()),
		listed(OpReboot, st.resumeSteps()),
		listed(OpPause, append(cp.pauseSteps(), e.pausedSteps(sb, format.ID{}, format.ID{})...)),
		listed(OpSnapshot, append(cp.snapshotSteps(), cp.goOnSteps()...)),
		listed(OpSnapshotPaused, (&copying{e: e, sb: sb}).steps()),
		listed(OpDestroy, e.destroySteps(sb)),
		listed(OpDied, e.diedSteps(sb, nil)),
		listed(OpRelease, e.releaseSteps(sb, format.ID{})),
		listed(OpAdopt, (&adopting{e: e, sb: sb}).steps()),
		listed(OpDeleteSnapshot, (&deleting{e: e}).steps()),
		listed(OpImport, (&importing{e: e}).steps()),
		listed(OpEgress, (&rewiring{e: e, sb: sb}).steps()),
		listed(OpSweep, (&sweeping{e: e}).steps()),
		listed(OpCompact, (&compacting{e: e}).steps()),
	}
}

func listed(op Op, steps []step) OpSteps {
	out := OpSteps{Op: op}
	for _, s := range steps {
		if s.do != nil {
			out.Steps = append(out.Steps, s.name)
		}
		for _, b := range s.beside {
			out.Steps = append(out.Steps, b.name)
			out.Beside = append(out.Beside, b.name)
		}
	}
	return out
}
