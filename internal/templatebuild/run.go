package templatebuild

import (
	"context"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/oci"
)

// stepError is a failure with the step it belongs to.
type stepError struct {
	step string
	err  error
}

func (e *stepError) Error() string { return e.err.Error() }
func (e *stepError) Unwrap() error { return e.err }

// build runs a build to its end and writes down how that was.
func (b *Builder) build(ctx context.Context, x Build, s Spec, log *buildLog) {
	limit, cancel := context.WithTimeoutCause(ctx, b.opt.Limit, fmt.Errorf("the build took longer than %v", b.opt.Limit))
	defer cancel()
	err := b.run(limit, x, s, log)
	if err != nil && limit.Err() != nil {
		err = &stepError{stepOf(err), context.Cause(limit)}
	}
	// Clearing away goes on when the build was cancelled.
	end, cancelEnd := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancelEnd()
	b.removeSandboxes(end, x.ID)
	x.EndedAt, x.Status = b.opt.Now(), Ready
	if err != nil {
		x.Status, x.Step, x.Reason = Failed, stepOf(err), b.reason(x, err)
		log.say("error", "Build failed: %s", x.Reason)
		b.removeSnapshot(end, x.Snapshot)
	} else {
		log.say("info", "Build finished: %s", x.Snapshot)
	}
	x.Log = log.all()
	if err := b.opt.Store.FinishBuild(end, x); err != nil {
		b.log.Error("write the end of a build; it will be found failed at the next start", "build", x.ID, "err", err)
		return
	}
	b.prune(end, x.Template)
}

func stepOf(err error) string {
	if e, ok := errors.AsType[*stepError](err); ok {
		return e.step
	}
	return ""
}

// reason gives a failure's words for the caller; what is only ours to know goes
// into the log.
func (b *Builder) reason(x Build, err error) string {
	e, ok := errors.AsType[*control.Error](err)
	if ok && e.Code == control.CodeInternal {
		b.log.Error("a build failed", "build", x.ID, "template", x.Template, "err", err)
		return "an internal error; the server's log has the details"
	}
	if ok {
		return e.Message
	}
	return err.Error()
}

// run does a build's work: a sandbox, the steps, the start command, a snapshot.
func (b *Builder) run(ctx context.Context, x Build, s Spec, log *buildLog) error {
	log.setStep("base")
	from, err := s.source()
	if err != nil {
		return &stepError{"base", err}
	}
	var im *oci.Image
	if from.image != nil {
		log.say("info", "Pulling %s", from.image)
		if im, err = b.resolve(ctx, from); err != nil {
			return &stepError{"base", err}
		}
		from.template = control.DefaultTemplate
		log.say("info", "FROM %s (%d layers, %d MiB)", im.Name, im.Layers(), im.Size>>20)
	} else {
		log.say("info", "FROM %s", from.template)
	}
	p := control.CreateParams{Template: from.template, Metadata: map[string]string{buildKey: x.ID},
		TimeoutSec: b.sandboxLimit()}
	if x.VCPUs != 0 {
		p.VCPUs = &x.VCPUs
	}
	if x.MemoryMB != 0 {
		p.MemoryMB = &x.MemoryMB
	}
	sb, err := b.opt.Sandboxes.Create(ctx, p)
	if err != nil {
		return &stepError{"base", err}
	}
	// A guest that does not answer must not keep a cancelled build: with its
	// sandbox every call into it ends.
	defer context.AfterFunc(ctx, func() { b.removeSandboxes(context.WithoutCancel(ctx), x.ID) })()
	w := &worker{b: b, id: sb.ID, template: x.Template, log: log}
	if im != nil {
		err = w.takeImage(ctx, im)
	} else {
		err = w.loadDefaults(ctx)
	}
	if err != nil {
		return &stepError{"base", err}
	}
	for i, st := range s.Steps {
		n := fmt.Sprint(i + 1)
		log.setStep(n)
		if err := w.step(ctx, st); err != nil {
			return &stepError{n, err}
		}
	}
	log.setStep("finalize")
	if err := w.finalize(ctx, s, x.Snapshot); err != nil {
		return &stepError{"finalize", err}
	}
	return nil
}

// sandboxLimit is the time limit of a build's sandbox, in seconds.
func (b *Builder) sandboxLimit() int64 { return int64(b.opt.Limit/time.Second) + 60 }

// finalize starts the template's own process, waits until it is ready, and
// freezes the sandbox with it.
func (w *worker) finalize(ctx context.Context, s Spec, snapshot string) error {
	var started *startCommand
	if s.StartCmd != "" {
		w.log.say("info", "START %s", s.StartCmd)
		var err error
		if started, err = w.start(ctx, s.StartCmd); err != nil {
			return err
		}
		defer started.leave()
	}
	if s.ReadyCmd != "" {
		w.log.say("info", "READY %s", s.ReadyCmd)
		if err := w.waitReady(ctx, s.ReadyCmd, started); err != nil {
			return err
		}
	}
	if err := started.failure(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := w.b.opt.Sandboxes.CreateSnapshot(ctx, w.id, snapshot)
	return err
}
