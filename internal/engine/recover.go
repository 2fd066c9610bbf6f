package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
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
	manifests, _ := e.opts.Store.Manifests() // damaged ones were logged
	newest := newestPauses(manifests)
	for _, entry := range entries {
		if err := e.load(ctx, filepath.Join(root, entry.Name()), newest); err != nil {
			return err
		}
	}
	for id, m := range newest { // of those that have not even a directory
		if _, err := os.Stat(e.sandboxDir(id)); !errors.Is(err, os.ErrNotExist) || checkID(id) != nil {
			continue
		}
		if err := e.enterLost(ctx, id, os.ErrNotExist, &m); err != nil {
			e.log.ErrorContext(ctx, "a pause cannot be made a sandbox again; it is left as it is", "sandbox", id, "err", err)
		}
	}
	e.mu.Lock()
	all := slices.Collect(maps.Values(e.sandboxes))
	e.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(16) // they mostly wait for others
	for _, sb := range all {
		g.Go(func() error {
			if err := e.recoverOne(ctx, sb); err != nil {
				e.log.ErrorContext(ctx, "a sandbox could not be taken over whole", "sandbox", sb.id(), "err", err)
				e.tidySoon(sb)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	e.releaseStrangers(ctx)
	var errs []error
	for _, sb := range all {
		errs = append(errs, e.goToNewest(sb, newest))
	}
	return errors.Join(append(errs, e.dropSuperseded(ctx, manifests), e.sweep(ctx))...)
}

// load enters the sandbox whose directory it is.
func (e *Engine) load(ctx context.Context, dir string, newest map[string]snapshot.Manifest) error {
	id := filepath.Base(dir)
	j, err := readJournal(dir)
	pause, paused := newest[id]
	switch {
	case err == nil:
	case checkID(id) != nil, errors.Is(err, errNewerJournal), !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errDamagedJournal):
		e.log.ErrorContext(ctx, "a sandbox cannot be taken over; it is left as it is", "dir", dir, "err", err)
		return nil
	case !paused && halfMade(dir):
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove a half-made sandbox: %w", err)
		}
		return nil
	default:
		p := &pause
		if !paused {
			p = nil
		}
		if err := e.enterLost(ctx, id, err, p); err != nil {
			e.log.ErrorContext(ctx, "a sandbox whose journal is lost is left as it is", "sandbox", id, "err", err)
		}
		return nil
	}
	sb := &sandbox{dir: dir, op: make(chan struct{}, 1), j: j}
	if j.Run != nil && j.Run.WholeImage {
		sb.whole = j.Run.MemoryImage
	}
	if j.Run != nil && vmElsewhere(dir, j.Run.VM) {
		e.log.WarnContext(ctx, "a sandbox ran when this copy of its directory was made; its VM is the original's", "sandbox", j.ID)
		sb.copied, sb.j.Run.VM = true, nil
	}
	e.mu.Lock()
	e.sandboxes[j.ID] = sb
	e.mu.Unlock()
	return nil
}

// recoverOne settles one sandbox by the state that its journal names.
func (e *Engine) recoverOne(ctx context.Context, sb *sandbox) error {
	sb.op <- struct{}{}
	defer sb.end()
	j := sb.journal()
	switch j.State {
	case Paused:
		return e.release(ctx, sb) // where a pause was cut off after its commit
	case Failed:
		if j.Run == nil {
			return nil
		}
		return e.takeOver(ctx, sb) // the last start could not; try again
	case Starting:
		// Create never answered, so nobody knows of it.
		return e.undoCreate(ctx, sb)
	case Resuming:
		return errors.Join(sb.settle(func(j *journal) { j.State = Paused }), e.release(ctx, sb))
	case Stopping:
		return e.finishDestroy(ctx, sb)
	case Pausing:
		if m, err := e.opts.Store.Manifest(j.Pending); err == nil {
			cp := &capturing{e: e, sb: sb, m: m}
			if err := cp.recordPaused(ctx); err != nil {
				return err
			}
			return e.release(ctx, sb)
		}
		return e.takeOver(ctx, sb)
	case Running:
		return e.takeOver(ctx, sb)
	default:
		return fmt.Errorf("the journal names the state %q", j.State)
	}
}

// undoCreate leaves nothing of a create that was cut off.
func (e *Engine) undoCreate(ctx context.Context, sb *sandbox) error {
	if err := e.release(ctx, sb); err != nil {
		return err
	}
	return e.removeSandbox(sb)
}

// takeOver makes a living VM ours again. One that died while nobody watched
// becomes an error with what is known.
func (e *Engine) takeOver(ctx context.Context, sb *sandbox) error {
	ad := &adopting{e: e, sb: sb}
	if r := sb.current(); r != nil { // of an attempt before
		ad.machine, ad.slot = r.machine, r.slot
	}
	err := e.perform(ctx, OpAdopt, e.newPhases(), ad.steps())
	if err == nil {
		ad.own()
		return nil
	}
	if ad.machine != nil || ad.slot != nil {
		sb.setRun(ad.run(nil)) // for who clears it, or tries again
	}
	sb.unadopted = !errors.Is(err, vmm.ErrGone) && vmLives(sb.journal().Run)
	if !sb.unadopted {
		return errors.Join(sb.settle(func(j *journal) {
			j.State, j.StartedAt = Failed, nil
			j.Error = "the VM ended while the host agent was not running"
			if sb.copied {
				j.Error = "it ran when this copy of the state directory was made; a running VM is not part of a copy"
			}
		}), e.release(ctx, sb))
	}
	// The VM lives: it is left alone, and tried again.
	return errors.Join(err, sb.settle(func(j *journal) {
		j.State = Failed
		j.Error = "the VM runs but could not be taken over; it is being tried again"
	}))
}

// vmLives tells whether the process that a record names is there. One that
// cannot be asked for is taken to be.
func vmLives(rec *runRecord) bool {
	if rec == nil || rec.VM == nil {
		return false
	}
	p, err := vmm.AdoptProcess(rec.VM.PID, rec.VM.StartTime, rec.VM.BootID)
	if err == nil {
		p.Close()
	}
	return !errors.Is(err, vmm.ErrGone)
}

// adopting takes a running VM over. It may stand still in the middle of a
// capture that was never committed, so it is let run.
type adopting struct {
	e  *Engine
	sb *sandbox

	machine vmm.Machine
	slot    Slot
}

func (ad *adopting) run(g *Guest) *run {
	return &run{machine: ad.machine, slot: ad.slot, guest: g, ending: make(chan struct{})}
}

func (ad *adopting) steps() []step {
	return []step{
		// The disk first: a VMM that reconnects must find its server.
		{name: "serve_disk", do: ad.serveDisk},
		{name: "adopt_vm", do: ad.adoptVM},
		{name: "adopt_network", do: ad.adoptNetwork},
		{name: "vm_continue", do: ad.letRun},
		{name: "record_running", do: ad.recordRunning},
	}
}

func (ad *adopting) serveDisk(ctx context.Context) error {
	rec := ad.sb.journal().Run
	if rec == nil || rec.VM == nil {
		return fmt.Errorf("the journal names no process: %w", vmm.ErrGone)
	}
	_, err := ad.e.opts.Pager.ServeDisk(ctx, connect.NewRequest(&pagerv1.ServeDiskRequest{
		SandboxId: ad.sb.id(), ImageId: rec.DiskImage.String(),
		OverlayPath: ad.sb.path(overlayName), SocketPath: ad.sb.path(diskSocket),
	}))
	return wrap("serve the disk", err)
}

func (ad *adopting) adoptVM(ctx context.Context) error {
	if ad.machine != nil {
		ad.machine.Close()
		ad.machine = nil
	}
	machine, err := ad.e.opts.Driver.Adopt(ctx, *ad.sb.journal().Run.VM)
	if err != nil {
		return err
	}
	ad.machine = machine
	if ad.e.opts.Disks == nil {
		return nil
	}
	return ad.e.opts.Disks.Adopt(ctx, ad.sb.id(), ad.sb.path(diskSocket))
}

func (ad *adopting) adoptNetwork(ctx context.Context) error {
	j := ad.sb.journal()
	if ad.slot == nil {
		slot, err := ad.e.opts.Network.Adopt(ctx, ad.sb.id(), j.Run.Slot)
		if err != nil {
			return fmt.Errorf("take over the network slot: %w", err)
		}
		ad.slot = slot
	}
	if j.Egress != nil {
		return ad.slot.SetEgress(ctx, j.Egress)
	}
	return nil
}

func (ad *adopting) letRun(ctx context.Context) error {
	return wrap("let the VM run", ad.machine.Continue(ctx))
}

func (ad *adopting) recordRunning(ctx context.Context) error {
	sb := ad.sb
	if j := sb.journal(); j.State != Running || j.Error != "" || !j.Pending.IsZero() {
		return sb.update(func(j *journal) {
			// An older program did not write that the VM stood still.
			j.Run.ClockBehind = j.Run.ClockBehind || !j.Pending.IsZero()
			j.State, j.Error, j.Pending = Running, "", format.ID{}
		})
	}
	return nil
}

// own gives the sandbox its run.
func (ad *adopting) own() {
	r := ad.run(newGuest(ad.slot, ad.sb.journal().AccessToken))
	ad.sb.setRun(r)
	ad.sb.unadopted = false
	ad.e.watchMachine(ad.sb, r)
	if ad.sb.journal().Run.ClockBehind {
		ad.e.setClockSoon(ad.sb, r)
	}
}

// releaseStrangers ends the pager's service for sandboxes that have no run, and
// takes their block devices away: what a crash between two steps left.
func (e *Engine) releaseStrangers(ctx context.Context) {
	served := e.servedByPager(ctx)
	if e.opts.Disks != nil {
		owners, err := e.opts.Disks.Owners()
		if err != nil {
			e.log.ErrorContext(ctx, "cannot ask the kernel whose block devices there are", "err", err)
		}
		served = append(served, owners...)
	}
	for _, id := range served {
		if checkID(id) != nil {
			continue // nothing that we named
		}
		sb, unknown := e.find(id)
		if unknown == nil && (sb.current() != nil || sb.journal().Run != nil || sb.stray) {
			continue
		}
		if _, err := os.Stat(e.sandboxDir(id)); err == nil && unknown != nil {
			continue // its journal cannot be read: touch nothing of it
		}
		stranger := &sandbox{dir: e.sandboxDir(id)}
		if err := e.stopServing(ctx, stranger); err != nil {
			e.log.ErrorContext(ctx, "something is still held for a sandbox that is gone", "sandbox", id, "err", err)
		}
	}
}

func (e *Engine) servedByPager(ctx context.Context) []string {
	st, err := e.opts.Pager.GetStatus(ctx, connect.NewRequest(&pagerv1.GetStatusRequest{}))
	if err != nil {
		e.log.ErrorContext(ctx, "cannot ask the pager whom it serves", "err", err)
		return nil
	}
	return st.Msg.Sandboxes
}
