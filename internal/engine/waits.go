package engine

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
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
		err = fmt.Errorf("%w on the host's disk: writes of the sandbox wait for some; free some space and try again", ErrNoRoom)
	}
	return err
}

// goOn lets the VM run, with writes that wait for room again.
func (cp *capturing) goOn(ctx context.Context) error {
	// A pager that does not answer has died, and the next one has them wait.
	if _, err := cp.e.yieldDisk(ctx, cp.sb, false); err != nil {
		cp.e.log.ErrorContext(ctx, "a disk's writes may not wait for room", "sandbox", cp.sb.id(), "err", err)
	}
	return cp.r.machine.Continue(ctx)
}
