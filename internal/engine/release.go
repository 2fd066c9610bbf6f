package engine

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// releaseSteps end the VM of a sandbox and give back all that its run holds,
// with a handle of ours or without one. They can be taken again, from the
// first, until the journal names no run any more. The successor is the memory
// image that it was paused to, or zero.
func (e *Engine) releaseSteps(sb *sandbox, successor format.ID) []step {
	return []step{
		{name: "vm_kill", do: func(ctx context.Context) error { return e.endVM(ctx, sb) }},
		// Only a dead VM may lose its page-fault server and its disk.
		{name: "release_memory", do: func(ctx context.Context) error { return e.releaseMemory(ctx, sb, successor) }},
		{name: "release_disk", do: func(ctx context.Context) error { return e.releaseDisk(ctx, sb) }},
		{name: "release_network", do: func(ctx context.Context) error { return e.releaseSlot(ctx, sb) }},
		{name: "record_released", do: func(context.Context) error {
			if r := sb.current(); r != nil {
				r.letGo()
				sb.setRun(nil)
			}
			update := sb.update
			if sb.info().State == Stopping {
				update = sb.updateIfRoom
			}
			return update(func(j *journal) { j.Run = nil })
		}},
	}
}

// release clears what an ended run left.
func (e *Engine) release(ctx context.Context, sb *sandbox) error {
	if sb.current() == nil && sb.journal().Run == nil {
		return nil
	}
	return e.perform(ctx, OpRelease, e.newPhases(), e.releaseSteps(sb, format.ID{}))
}

func (e *Engine) endVM(ctx context.Context, sb *sandbox) error {
	if e.ownMemory() {
		// Its process may be in the kernel's hands until its writes are answered.
		// One without a disk says so, and need not be told.
		if _, err := e.yieldDisk(ctx, sb, true); err != nil && connect.CodeOf(err) != connect.CodeNotFound {
			return err
		}
	}
	r := sb.current()
	if r == nil || r.machine == nil {
		rec := sb.journal().Run
		if rec == nil && sb.stray {
			rec = &runRecord{} // it is to be found by its directory
		}
		if rec == nil {
			return nil
		}
		if err := e.killLeftover(ctx, sb, rec); err != nil {
			return err
		}
		return removeJail(sb.dir)
	}
	r.end()
	r.watch.Wait()
	if err := r.machine.Kill(ctx); err != nil {
		return fmt.Errorf("kill the VM: %w", err)
	}
	if r.guest != nil {
		r.guest.close() // a dead guest says nothing, not even good-bye
	}
	return nil
}

func (e *Engine) killLeftover(ctx context.Context, sb *sandbox, rec *runRecord) error {
	if rec.VM == nil {
		// Killed between starting the process and writing its number down:
		// the process is found by what only it can have open.
		return vmm.KillHolders(sb.dir, e.log)
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

func (e *Engine) releaseMemory(ctx context.Context, sb *sandbox, successor format.ID) error {
	req := &pagerv1.ReleaseMemoryRequest{SandboxId: sb.id(), SuccessorImageId: optionalID(successor)}
	_, err := e.opts.Pager.ReleaseMemory(ctx, connect.NewRequest(req))
	return wrap("release the memory", err)
}

// releaseDisk ends the disk's service and removes the overlay.
func (e *Engine) releaseDisk(ctx context.Context, sb *sandbox) error {
	if e.opts.Disks != nil { // the device before its server
		if err := e.opts.Disks.Detach(ctx, sb.id()); err != nil {
			return err
		}
	}
	if _, err := e.opts.Pager.StopDisk(ctx, connect.NewRequest(&pagerv1.StopDiskRequest{SandboxId: sb.id()})); err != nil {
		return fmt.Errorf("stop the disk: %w", err)
	}
	return block.RemoveOverlay(storage.OS{}, sb.path(overlayName))
}

// stopServing ends the pager's service and removes the overlay. The VM must
// be dead.
func (e *Engine) stopServing(ctx context.Context, sb *sandbox) error {
	return errors.Join(e.releaseMemory(ctx, sb, format.ID{}), e.releaseDisk(ctx, sb))
}

func (e *Engine) releaseSlot(ctx context.Context, sb *sandbox) error {
	if r := sb.current(); r != nil && r.slot != nil {
		return r.slot.Release(ctx)
	}
	rec := sb.journal().Run
	if rec == nil {
		return nil
	}
	slot, err := e.opts.Network.Adopt(ctx, sb.id(), rec.Slot)
	if errors.Is(err, hostnet.ErrSlotLost) {
		return nil // swept since: nothing is left to give back
	}
	if err != nil {
		return fmt.Errorf("find the network slot: %w", err)
	}
	return slot.Release(ctx)
}
