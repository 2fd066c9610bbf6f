package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// A guest whose disk finds no room on the host's disk stands still with its
// writes, until there is some; the pager sees to that by itself, whether or not
// an engine runs. The engine tells of it, and sees to it that a VM that is to be
// stopped does not wait for room too.

// waitsEvery is how often the pager is asked who waits.
const waitsEvery = time.Second

// watchWaits tells of guests that wait for room, until the engine ends.
func (e *Engine) watchWaits() {
	tick := time.NewTicker(waitsEvery) // the pager calls nobody
	defer tick.Stop()
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-tick.C:
			e.lookForWaits(e.ctx)
		}
	}
}

func (e *Engine) lookForWaits(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	st, err := e.opts.Pager.GetStatus(ctx, connect.NewRequest(&pagerv1.GetStatusRequest{}))
	if err != nil {
		return // it is being replaced; who hangs is told by /readyz
	}
	why := map[string]string{}
	for _, w := range st.Msg.Waits {
		since := time.UnixMilli(w.SinceUnixMs).UTC().Format(time.RFC3339)
		why[w.SandboxId] = "since " + since + " its writes wait for room on the host's disk; they go on by themselves when there is some"
	}
	e.mu.Lock()
	var changed []*sandbox
	for id, sb := range e.sandboxes {
		if sb.setWaiting(why[id]) {
			changed = append(changed, sb)
		}
	}
	e.mu.Unlock()
	for _, sb := range changed {
		i := sb.info()
		if i.Waiting != "" {
			e.log.WarnContext(ctx, "a sandbox stands still", "sandbox", i.ID, "reason", i.Waiting)
		} else {
			e.log.InfoContext(ctx, "a sandbox that stood still goes on", "sandbox", i.ID)
		}
		e.announce(Event{Sandbox: i})
	}
}

func (sb *sandbox) setWaiting(why string) (changed bool) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	changed = sb.waiting != why
	sb.waiting = why
	return changed
}

// yieldDisk has writes that find no room fail, or wait again. It tells whether
// any wait.
func (e *Engine) yieldDisk(ctx context.Context, sb *sandbox, yield bool) (waiting bool, err error) {
	r, err := e.opts.Pager.YieldDisk(ctx, connect.NewRequest(&pagerv1.YieldDiskRequest{SandboxId: sb.id(), Yield: yield}))
	if err != nil {
		return false, fmt.Errorf("tell the disk's server of a stop: %w", err)
	}
	return r.Msg.Waiting, nil
}

// beforeStop keeps a VM that is to be stopped from waiting for room. QEMU takes
// writes that found none along, into the device state, and asks again when it
// goes on; Firecracker would tell its guest of an error.
func (cp *capturing) beforeStop(ctx context.Context) error {
	waiting, err := cp.e.yieldDisk(ctx, cp.sb, !cp.own)
	if err == nil && waiting && cp.own {
		err = errWaits
	}
	return err
}

var errWaits = fmt.Errorf("%w on the host's disk: writes of the sandbox wait for some; free some space and try again", ErrNoRoom)

// roomEvery is how often the pager is asked while a VM that answers nothing as
// long as its writes wait is being stopped.
const roomEvery = 250 * time.Millisecond

// withRoom does f, which speaks to the VMM, and gives it up when the VMM cannot
// answer: one that keeps its memory to itself writes what its guest wrote before
// it stops, and those writes may wait for room.
func (cp *capturing) withRoom(ctx context.Context, f func(context.Context) error) error {
	if !cp.own {
		return f(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		tick := time.NewTicker(roomEvery) // the pager calls nobody
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if waiting, err := cp.e.yieldDisk(ctx, cp.sb, false); err == nil && waiting {
					cancel(errWaits)
				}
			}
		}
	})
	err := f(ctx)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = fmt.Errorf("%w (%w)", cause, err)
	}
	cancel(nil)
	watch.Wait()
	return err
}

// goOn lets the VM run, with writes that wait for room again. One that cannot be
// told so yet is told as soon as its writes have found room.
func (cp *capturing) goOn(ctx context.Context) error {
	waiting, err := cp.e.yieldDisk(ctx, cp.sb, false)
	if err != nil {
		// A pager that does not answer has died, and the next one has them wait.
		cp.e.log.ErrorContext(ctx, "a disk's writes may not wait for room", "sandbox", cp.sb.id(), "err", err)
	}
	if !cp.stopped {
		return nil
	}
	if !waiting || !cp.own {
		if err = cp.r.machine.Continue(ctx); err == nil || errors.Is(err, vmm.ErrGone) {
			return err
		}
	}
	cp.r.held = true
	cp.e.tidySoon(cp.sb)
	return err // none where its writes wait, which was told already
}

// goOnWithRoom lets a VM run that a capture left stopped. The operation's token
// is held.
func (e *Engine) goOnWithRoom(ctx context.Context, sb *sandbox) error {
	r := sb.current()
	if r == nil || !r.held {
		return nil
	}
	waiting, err := e.yieldDisk(ctx, sb, false)
	if err != nil {
		return err
	}
	if waiting {
		return errWaits
	}
	if err := r.machine.Continue(ctx); err != nil {
		return fmt.Errorf("let the VM go on: %w", err)
	}
	r.held = false
	e.setClock(ctx, sb, r)
	return nil
}
