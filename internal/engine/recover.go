package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// recover reads the journals and makes each sandbox what it should be: a
// running VM is taken over, a half-done operation is finished if its manifest
// is committed and undone if not.
func (e *Engine) recover(ctx context.Context) error {
	root := filepath.Join(e.opts.Dir, "sandboxes")
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("list the sandboxes: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, entry := range entries {
		dir := filepath.Join(root, entry.Name())
		j, err := readJournal(dir)
		if errors.Is(err, os.ErrNotExist) {
			// Killed between making the directory and the first journal:
			// nothing was promised.
			if err := os.RemoveAll(dir); err != nil {
				return fmt.Errorf("remove a half-made sandbox: %w", err)
			}
			continue
		}
		if err != nil {
			e.log.Error("a sandbox cannot be taken over; it is left as it is", "dir", dir, "err", err)
			continue
		}
		sb := &sandbox{dir: dir, op: make(chan struct{}, 1), j: j}
		e.sandboxes[j.ID] = sb
		g.Go(func() error {
			if err := e.recoverOne(ctx, sb); err != nil {
				e.log.Error("a sandbox could not be taken over whole", "sandbox", j.ID, "err", err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	e.releaseStrangers(ctx)
	return errors.Join(e.dropSuperseded(ctx), e.sweep(ctx))
}

// dropSuperseded removes the pauses that a crash left beside the newer one of
// the same sandbox. A pause whose sandbox is not known is kept: it may be all
// that is left of it.
func (e *Engine) dropSuperseded(ctx context.Context) error {
	manifests, _ := e.opts.Store.Manifests() // damaged ones were logged
	var errs []error
	for _, m := range manifests {
		sb := e.sandboxes[m.SandboxID]
		if m.Kind != snapshot.KindPause || sb == nil {
			continue
		}
		if j := sb.journal(); j.Manifest != m.ID && j.Pending != m.ID {
			errs = append(errs, e.opts.Store.Delete(ctx, m.ID))
		}
	}
	return errors.Join(errs...)
}

// recoverOne settles one sandbox by the state that its journal names.
func (e *Engine) recoverOne(ctx context.Context, sb *sandbox) error {
	sb.op <- struct{}{}
	defer sb.end()
	j := sb.journal()
	switch j.State {
	case Paused:
		return nil
	case Failed:
		if j.Run == nil {
			return nil
		}
		return e.takeOver(ctx, sb) // the last start could not; try again
	case Starting:
		// Create never answered, so nobody knows of it.
		return errors.Join(e.endLeftover(ctx, sb), e.removeSandbox(sb))
	case Resuming:
		return errors.Join(e.endLeftover(ctx, sb),
			sb.update(func(j *journal) { j.State, j.Run = Paused, nil }))
	case Stopping:
		return e.finishDestroy(ctx, sb)
	case Pausing:
		if m, err := e.opts.Store.Manifest(j.Pending); err == nil {
			return errors.Join(e.endLeftover(ctx, sb), e.finishPause(ctx, sb, m))
		}
		return e.takeOver(ctx, sb)
	case Running:
		return e.takeOver(ctx, sb)
	default:
		return fmt.Errorf("the journal names the state %q", j.State)
	}
}

// takeOver makes a living VM ours again. It may stand still in the middle of
// a capture that was never committed, so it is let run. One that died while
// nobody watched becomes an error with what is known.
func (e *Engine) takeOver(ctx context.Context, sb *sandbox) error {
	r, err := e.adopt(ctx, sb)
	if errors.Is(err, vmm.ErrGone) {
		return errors.Join(e.endLeftover(ctx, sb), sb.update(func(j *journal) {
			j.State, j.Run, j.StartedAt = Failed, nil, nil
			j.Error = "the VM ended while the host agent was not running"
		}))
	}
	if err != nil {
		// The VM lives: it is left alone, and the next start tries again.
		return errors.Join(err, sb.update(func(j *journal) {
			j.State = Failed
			j.Error = "the VM runs but could not be taken over; restart the host agent to try again"
		}))
	}
	err = sb.update(func(j *journal) { j.State, j.Error, j.Pending = Running, "", format.ID{} })
	sb.setRun(r)
	e.watchMachine(sb, r)
	if err != nil {
		return err
	}
	cctx, cancel := context.WithTimeout(ctx, guestSyncLimit)
	defer cancel()
	// It may have stood still: set its clock. It is still the same life.
	if _, err := r.guest.confirm(cctx, r.machine.Done(), e.initRequest(sb, sb.journal().Run.Life, false), e.opts.Now); err != nil {
		e.log.Warn("the guest of a VM that was taken over does not answer yet", "sandbox", sb.id(), "err", err)
	}
	return nil
}

func (e *Engine) adopt(ctx context.Context, sb *sandbox) (_ *run, err error) {
	var c closer
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close(ctx))
		}
	}()
	j := sb.journal()
	if j.Run == nil || j.Run.VM == nil {
		return nil, fmt.Errorf("the journal names no process: %w", vmm.ErrGone)
	}
	// The disk first: a VMM that reconnects must find its server.
	_, err = e.opts.Pager.ServeDisk(ctx, connect.NewRequest(&pagerv1.ServeDiskRequest{
		SandboxId: sb.id(), ImageId: j.Run.DiskImage.String(),
		OverlayPath: sb.path(overlayName), SocketPath: sb.path(diskSocket),
	}))
	if err != nil {
		return nil, fmt.Errorf("serve the disk: %w", err)
	}
	machine, err := e.opts.Driver.Adopt(ctx, *j.Run.VM)
	if err != nil {
		return nil, err
	}
	c.push(func(context.Context) error { machine.Close(); return nil })
	if e.opts.Disks != nil {
		if err := e.opts.Disks.Adopt(ctx, sb.id(), sb.path(diskSocket)); err != nil {
			return nil, err
		}
	}
	slot, err := e.opts.Network.Adopt(ctx, sb.id(), j.Run.Slot)
	if err != nil {
		return nil, fmt.Errorf("take over the network slot: %w", err)
	}
	if j.Egress != nil {
		if err := slot.SetEgress(ctx, j.Egress); err != nil {
			return nil, err
		}
	}
	if err := machine.Continue(ctx); err != nil {
		return nil, fmt.Errorf("let the VM run: %w", err)
	}
	c.keep()
	return &run{machine: machine, slot: slot, guest: newGuest(slot, j.AccessToken), ending: make(chan struct{})}, nil
}

// endLeftover ends whatever a run left behind that has no handle of ours: the
// VM if it lives, the pager's service, the overlay, the network slot.
func (e *Engine) endLeftover(ctx context.Context, sb *sandbox) error {
	j := sb.journal()
	if j.Run == nil {
		return nil
	}
	if err := e.killLeftover(ctx, sb, j.Run); err != nil {
		return err
	}
	errs := []error{e.stopServing(ctx, sb, format.ID{})}
	slot, err := e.opts.Network.Adopt(ctx, sb.id(), j.Run.Slot)
	switch {
	case err == nil:
		err = slot.Release(ctx)
	case errors.Is(err, hostnet.ErrSlotLost): // swept since: nothing is left to give back
		err = nil
	}
	return errors.Join(append(errs, err)...)
}

func (e *Engine) killLeftover(ctx context.Context, sb *sandbox, rec *runRecord) error {
	if rec.VM == nil {
		// Killed between starting the process and writing its number down:
		// the process is found by what only it can have open.
		return killHolders(ctx, sb.dir, e.log)
	}
	p, err := vmm.AdoptProcess(rec.VM.PID, rec.VM.StartTime, rec.VM.BootID)
	if errors.Is(err, vmm.ErrGone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find a leftover VM: %w", err)
	}
	defer p.Close()
	if err := p.Kill(ctx); err != nil {
		return fmt.Errorf("kill a leftover VM: %w", err)
	}
	return nil
}

// releaseStrangers ends the pager's service for sandboxes that have no run:
// what a crash between two steps left with it.
func (e *Engine) releaseStrangers(ctx context.Context) {
	st, err := e.opts.Pager.GetStatus(ctx, connect.NewRequest(&pagerv1.GetStatusRequest{}))
	if err != nil {
		e.log.Error("cannot ask the pager whom it serves", "err", err)
		return
	}
	for _, id := range st.Msg.Sandboxes {
		if sb := e.sandboxes[id]; sb != nil && (sb.run != nil || sb.j.Run != nil) {
			continue
		}
		if _, err := os.Stat(e.sandboxDir(id)); err == nil && e.sandboxes[id] == nil {
			continue // its journal cannot be read: touch nothing of it
		}
		stranger := &sandbox{dir: e.sandboxDir(id)}
		if err := e.stopServing(ctx, stranger, format.ID{}); err != nil {
			e.log.Error("the pager keeps serving a sandbox that is gone", "sandbox", id, "err", err)
		}
	}
}
