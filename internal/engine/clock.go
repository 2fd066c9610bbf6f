package engine

import (
	"context"
	"errors"
	"sync"
	"time"
)

// The clock of a guest whose VM stood still is behind by that time. After a
// snapshot the guest is told the time before anything else is done. Where nobody
// may wait for it, as at the start of an engine that takes over many guests, it
// is told beside everything else; the journal says of whom that is due.

// clocksAtOnce bounds how many guests are told beside everything else: that
// costs them processor time, which those who wait for an answer want too.
const clocksAtOnce = 4

// telling is what tells a guest the time beside everything else. The zero value
// is none.
type telling struct {
	mu     sync.Mutex
	cancel context.CancelFunc
	done   chan struct{}
}

// stop returns when nobody tells the guest the time any more.
func (t *telling) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cancel != nil {
		t.cancel()
		<-t.done
		t.cancel = nil
	}
}

// setClock is for a guest that stood still. It is the same individual in the
// same life, so nothing else changes.
func (e *Engine) setClock(ctx context.Context, sb *sandbox, r *run) {
	if err := e.tellTime(ctx, sb, r); err != nil {
		e.log.WarnContext(ctx, "a guest that stood still does not answer yet; its clock is behind until it does", "sandbox", sb.id(), "err", err)
		e.setClockSoon(sb, r)
	}
}

// setClockSoon is setClock beside everything else. It ends with the run, and
// before the VM is stopped for a capture: what follows that tells the time.
func (e *Engine) setClockSoon(sb *sandbox, r *run) {
	r.telling.stop()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ctx.Err() != nil {
		return // the next engine finds it in the journal
	}
	ctx, cancel := context.WithTimeout(e.ctx, restoreLimit)
	done := make(chan struct{})
	r.telling.mu.Lock()
	r.telling.cancel, r.telling.done = cancel, done
	r.telling.mu.Unlock()
	e.wg.Go(func() {
		defer close(done)
		defer cancel()
		if err := e.tellUntilDone(ctx, sb, r); err != nil && !errors.Is(context.Cause(ctx), context.Canceled) {
			e.log.WarnContext(ctx, "a guest that stood still does not answer; its clock is behind", "sandbox", sb.id(), "err", err)
		}
	})
}

// tellUntilDone gives way to other guests between two attempts.
func (e *Engine) tellUntilDone(ctx context.Context, sb *sandbox, r *run) error {
	for {
		select {
		case e.clocks <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		err := e.tellTime(ctx, sb, r)
		<-e.clocks
		var refused *refusedError
		if err == nil || errors.As(err, &refused) {
			return err
		}
		t := time.NewTimer(e.opts.RetryAfter)
		select {
		case <-t.C:
		case <-r.machine.Done():
			t.Stop()
			return nil // what becomes of it is not about its clock
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

// tellTime asks the guest once to set its clock.
func (e *Engine) tellTime(ctx context.Context, sb *sandbox, r *run) error {
	ctx, cancel := context.WithTimeout(ctx, guestSyncLimit)
	defer cancel()
	_, err := r.guest.confirm(ctx, r.machine.Done(), e.initRequest(sb, sb.journal().Run.Life, false), e.opts.Now)
	if err == nil {
		sb.clockIsRight(r)
	}
	return err
}

// clockIsRight takes back, for the next write of the journal, that the guest is
// to be told the time. One that is told in vain after a crash is not worth a
// write.
func (sb *sandbox) clockIsRight(r *run) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.run != r || sb.j.Run == nil {
		return
	}
	rec := *sb.j.Run
	rec.ClockBehind = false
	sb.j.Run = &rec
}
