package engine

import (
	"context"
	"errors"
	"slices"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// retryMost bounds the pause between two attempts to tidy up, and waitsEvery the
// one of a guest that stands still until then.
const retryMost = time.Minute

// tidySoon has what an operation could not release tried again, beside
// everything else, until it is done or the engine ends. The next engine finds
// it in the journal.
func (e *Engine) tidySoon(sb *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.tidying[sb] || e.ctx.Err() != nil {
		return
	}
	e.tidying[sb] = true
	e.wg.Go(func() {
		e.tidyUntilDone(sb)
		e.mu.Lock()
		delete(e.tidying, sb)
		e.mu.Unlock()
	})
}

func (e *Engine) tidyUntilDone(sb *sandbox) {
	most := retryMost
	for wait := e.opts.RetryAfter; ; wait = min(2*wait, most) {
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-e.ctx.Done():
			t.Stop()
			return
		}
		select {
		case sb.op <- struct{}{}:
		case <-e.ctx.Done():
			return
		}
		err := e.tidy(context.WithoutCancel(e.ctx), sb)
		sb.end()
		if err == nil {
			return
		}
		if most = retryMost; errors.Is(err, errWaits) { // told by who watches for it
			most = waitsEvery
			continue
		}
		e.log.Error("what an operation left cannot be cleared yet", "sandbox", sb.id(), "err", err)
	}
}

// tidy brings to an end what the state of a sandbox says is to be done. The
// operation's token is held.
func (e *Engine) tidy(ctx context.Context, sb *sandbox) error {
	if again, err := e.find(sb.id()); err != nil || again != sb {
		return nil // gone meanwhile
	}
	switch sb.info().State {
	case Running:
		return e.goOnWithRoom(ctx, sb)
	case Stopping:
		return e.finishDestroy(ctx, sb)
	case Starting:
		return e.undoCreate(ctx, sb)
	case Paused, Failed:
		if sb.unadopted {
			err := e.takeOver(ctx, sb)
			e.announce(Event{Sandbox: sb.info()})
			return err
		}
		manifests, _ := e.opts.Store.Manifests() // damaged ones were logged
		mine := slices.DeleteFunc(manifests, func(m snapshot.Manifest) bool { return m.SandboxID != sb.id() })
		if err := e.release(ctx, sb); err != nil {
			return err
		}
		return errors.Join(e.goToNewest(sb, newestPauses(mine)), e.dropSuperseded(ctx, mine), e.sweep(ctx))
	}
	return nil
}

// dropSuperseded removes those of the pauses that a newer one of the same
// sandbox has taken the place of. A pause whose sandbox is not known is kept: it
// may be all that is left of it. So is one that the journal of a sandbox without
// a run never heard of.
func (e *Engine) dropSuperseded(ctx context.Context, manifests []snapshot.Manifest) error {
	var errs []error
	for _, m := range manifests {
		sb, err := e.find(m.SandboxID)
		if m.Kind != snapshot.KindPause || err != nil {
			continue
		}
		j := sb.journal()
		if older(j, m) && (sb.current() == nil || sb.stray) {
			continue
		}
		if m.ID != j.Manifest && m.ID != j.Pending {
			errs = append(errs, e.deleteManifest(ctx, m.ID))
		}
	}
	return errors.Join(errs...)
}
