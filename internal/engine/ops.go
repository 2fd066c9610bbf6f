package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Defaults of a sandbox that boots.
const (
	defaultVCPUs    = 1
	defaultMemoryMB = 512
)

// CreateSpec says what to create. Zero VCPUs and MemoryMB mean the template's.
type CreateSpec struct {
	ID          string
	Template    string
	VCPUs       int
	MemoryMB    int
	Envs        map[string]string
	Annotations []byte
	// Egress nil is the default.
	Egress *Egress
}

// Create boots a base template or starts a clone of a named snapshot. The
// sandbox is running, confirmed by its guest, on return.
func (e *Engine) Create(ctx context.Context, spec CreateSpec) (Info, Stats, error) {
	ctx = context.WithoutCancel(ctx)
	if err := checkID(spec.ID); err != nil {
		return Info{}, Stats{}, err
	}
	ph := e.newPhases()
	e.storeUse.RLock()
	defer e.storeUse.RUnlock()
	if err := spec.Egress.check(); err != nil {
		return Info{}, Stats{}, err
	}
	src, err := e.sourceOf(&spec)
	if err != nil {
		return Info{}, Stats{}, err
	}
	sb, err := e.addSandbox(spec, src)
	if err != nil {
		return Info{}, Stats{}, err
	}
	defer sb.end()
	if err := e.start(ctx, sb, src, ph); err != nil {
		return Info{}, Stats{}, errors.Join(fmt.Errorf("create sandbox %s: %w", spec.ID, err), e.removeSandbox(sb))
	}
	return sb.info(), ph.stats(), nil
}

// sourceOf finds the template and fills in what it fixes.
func (e *Engine) sourceOf(spec *CreateSpec) (source, error) {
	if err := checkName(spec.Template); err != nil {
		return source{}, fmt.Errorf("template: %w", err)
	}
	e.mu.Lock()
	base, isBase := e.bases[spec.Template]
	id, known := e.names[spec.Template]
	e.mu.Unlock()
	if isBase {
		if spec.VCPUs == 0 {
			spec.VCPUs = defaultVCPUs
		}
		if spec.MemoryMB == 0 {
			spec.MemoryMB = defaultMemoryMB
		}
		return source{base: &base, fork: true}, nil
	}
	if !known {
		return source{}, fmt.Errorf("template %q: %w", spec.Template, ErrNotFound)
	}
	m, err := e.opts.Store.Manifest(id)
	if err != nil {
		return source{}, fmt.Errorf("read the manifest of %q: %w", spec.Template, err)
	}
	if spec.VCPUs != 0 && spec.VCPUs != m.VMM.VCPUs || spec.MemoryMB != 0 && spec.MemoryMB != m.VMM.MemoryMB {
		return source{}, fmt.Errorf("%w: snapshot %q fixes vcpus at %d and memory_mb at %d; leave them out or give these", ErrInvalid, spec.Template, m.VMM.VCPUs, m.VMM.MemoryMB)
	}
	if err := e.fits(m); err != nil {
		return source{}, fmt.Errorf("create from snapshot %q: %w", spec.Template, err)
	}
	spec.VCPUs, spec.MemoryMB = m.VMM.VCPUs, m.VMM.MemoryMB
	return source{manifest: &m, keepWarm: true, fork: true}, nil
}

// addSandbox enters a new sandbox, with its operation begun.
func (e *Engine) addSandbox(spec CreateSpec, src source) (*sandbox, error) {
	sb := &sandbox{dir: e.sandboxDir(spec.ID), op: make(chan struct{}, 1)}
	sb.op <- struct{}{}
	sb.j = journal{
		Version: journalVersion, ID: spec.ID, Template: spec.Template,
		VCPUs: spec.VCPUs, MemoryMB: spec.MemoryMB, Envs: spec.Envs, Annotations: spec.Annotations,
		AccessToken: randomHex(32), MachineID: randomHex(16), Egress: spec.Egress,
		State: Starting, CreatedAt: e.opts.Now().UTC(),
	}
	if src.manifest != nil {
		sb.j.Generation = src.manifest.Generation
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sandboxes[spec.ID] != nil {
		return nil, fmt.Errorf("sandbox %q %w", spec.ID, ErrExists)
	}
	if err := e.admit(spec.MemoryMB); err != nil {
		return nil, err
	}
	if err := os.Mkdir(sb.dir, 0o711); err != nil {
		return nil, fmt.Errorf("make the sandbox's directory: %w", err)
	}
	if err := writeJournal(sb.dir, sb.j); err != nil {
		return nil, errors.Join(err, os.RemoveAll(sb.dir))
	}
	e.sandboxes[spec.ID] = sb
	return sb, nil
}

// admit refuses what the host's memory cannot hold. e.mu is held.
func (e *Engine) admit(mb int) error {
	if e.opts.MemoryLimitMB == 0 {
		return nil
	}
	used := 0
	for _, sb := range e.sandboxes {
		if s := sb.info(); s.State != Paused && s.State != Failed {
			used += s.MemoryMB
		}
	}
	if used+mb > e.opts.MemoryLimitMB {
		return fmt.Errorf("%w: the sandbox wants %d MiB, and %d of %d MiB are taken; pause or remove some", ErrNoRoom, mb, used, e.opts.MemoryLimitMB)
	}
	return nil
}

// removeSandbox forgets a sandbox and its directory.
func (e *Engine) removeSandbox(sb *sandbox) error {
	err := os.RemoveAll(sb.dir)
	e.mu.Lock()
	delete(e.sandboxes, sb.id())
	e.mu.Unlock()
	e.announce(Event{Sandbox: sb.info(), Removed: true})
	if err != nil {
		return fmt.Errorf("remove the sandbox's directory: %w", err)
	}
	return nil
}

// Pause puts the whole state on disk and ends the VM. It answers when the
// state is durable; a pause that fails leaves the sandbox running.
func (e *Engine) Pause(ctx context.Context, id string) (Info, Stats, error) {
	ctx = context.WithoutCancel(ctx)
	sb, err := e.find(id)
	if err != nil {
		return Info{}, Stats{}, err
	}
	if err := sb.begin("pause", Running); err != nil {
		return Info{}, Stats{}, err
	}
	defer sb.end()
	ph := e.newPhases()
	e.storeUse.RLock()
	c, err := e.freeze(ctx, sb, snapshot.KindPause, "", ph)
	e.storeUse.RUnlock()
	if err != nil {
		return Info{}, Stats{}, fmt.Errorf("pause sandbox %s: %w", id, err)
	}
	done := ph.part("release")
	err = e.finishPause(ctx, sb, c.manifest)
	done()
	if err != nil {
		// The state is safe; what stayed behind is the next start's to clear.
		e.log.Error("not everything of a paused VM could be released", "sandbox", id, "err", err)
	}
	e.compactAfter(ctx, c.manifest)
	return sb.info(), ph.statsWith(c.stats), nil
}

// freeze captures a running sandbox into a manifest of that kind. For a pause
// the journal says so, for a snapshot the sandbox stays running in it.
func (e *Engine) freeze(ctx context.Context, sb *sandbox, kind string, name string, ph *phases) (captured, error) {
	txn, err := e.opts.Store.Begin()
	if err != nil {
		return captured{}, fmt.Errorf("begin a manifest: %w", err)
	}
	j := sb.journal()
	r := sb.current()
	r.wholeMemory = j.Run.ChangesLost
	err = sb.update(func(j *journal) {
		j.Pending, j.Run.ChangesLost = txn.ID(), e.ownMemory() // until it is committed
		if kind == snapshot.KindPause {
			j.State = Pausing
		}
	})
	if err != nil {
		return captured{}, errors.Join(err, txn.Abort())
	}
	m := snapshot.Manifest{
		Name: name, Kind: kind, SandboxID: j.ID, Parent: j.Template, Generation: j.Generation + 1,
		CreatedAt: e.opts.Now().UTC(), VMM: vmmInfo(e.info, "", j), EnvdVersion: "", NetworkLayout: networkLayout,
		Annotations: j.Annotations,
	}
	c, err := e.capture(ctx, sb, r, txn, m, ph)
	if err != nil {
		return c, errors.Join(err, sb.update(func(j *journal) { j.State, j.Pending = Running, format.ID{} }))
	}
	return c, nil
}

// finishPause is what remains once the manifest is committed. It can be run
// again after a crash.
func (e *Engine) finishPause(ctx context.Context, sb *sandbox, m snapshot.Manifest) error {
	if err := e.endRun(ctx, sb, m.Memory.ID); err != nil {
		return err
	}
	old := sb.journal().Manifest
	err := sb.update(func(j *journal) {
		j.State, j.Manifest, j.Generation = Paused, m.ID, m.Generation
		j.Pending, j.Run, j.StartedAt, j.Error = format.ID{}, nil, nil, ""
	})
	if err != nil {
		return err
	}
	if old != (format.ID{}) && old != m.ID {
		err = e.opts.Store.Delete(ctx, old)
	}
	return errors.Join(err, e.sweep(ctx))
}

// endRun kills the VM and releases all that its run holds. While the VM
// cannot be killed everything stays, so that it can be tried again. The
// successor is as in stopServing.
func (e *Engine) endRun(ctx context.Context, sb *sandbox, successor format.ID) error {
	r := sb.current()
	if r == nil {
		return nil
	}
	r.end()
	r.watch.Wait()
	if err := r.machine.Kill(ctx); err != nil {
		return fmt.Errorf("kill the VM: %w", err)
	}
	r.guest.close() // a dead guest says nothing, not even good-bye
	// Only a dead VM may lose its page-fault server.
	err := errors.Join(e.stopServing(ctx, sb, successor), r.slot.Release(ctx))
	r.letGo()
	sb.setRun(nil)
	return err
}

// Resume brings a paused sandbox back, every process still alive; with reboot
// it starts from the paused disk instead, and the memory is not used. A resume
// that fails leaves it paused.
func (e *Engine) Resume(ctx context.Context, id string, reboot bool) (Info, Stats, error) {
	ctx = context.WithoutCancel(ctx)
	sb, err := e.find(id)
	if err != nil {
		return Info{}, Stats{}, err
	}
	if err := sb.begin("resume", Paused); err != nil {
		return Info{}, Stats{}, err
	}
	defer sb.end()
	ph := e.newPhases()
	e.mu.Lock()
	err = e.admit(sb.info().MemoryMB)
	e.mu.Unlock()
	if err != nil {
		return Info{}, Stats{}, err
	}
	e.storeUse.RLock()
	defer e.storeUse.RUnlock()
	m, err := e.opts.Store.Manifest(sb.journal().Manifest)
	if err != nil {
		return Info{}, Stats{}, fmt.Errorf("read the manifest of sandbox %s: %w", id, err)
	}
	src := source{manifest: &m}
	if reboot {
		if src, err = e.rebootSource(m); err != nil {
			return Info{}, Stats{}, fmt.Errorf("resume sandbox %s: %w", id, err)
		}
	} else if err := e.fits(m); err != nil {
		return Info{}, Stats{}, fmt.Errorf("resume sandbox %s: %w", id, err)
	}
	if err := sb.update(func(j *journal) { j.State = Resuming }); err != nil {
		return Info{}, Stats{}, err
	}
	if err := e.start(ctx, sb, src, ph); err != nil {
		return Info{}, Stats{}, errors.Join(fmt.Errorf("resume sandbox %s: %w", id, err),
			sb.update(func(j *journal) { j.State = Paused }))
	}
	return sb.info(), ph.stats(), nil
}

// Destroy removes a sandbox in any state with all it owns.
func (e *Engine) Destroy(ctx context.Context, id string) error {
	ctx = context.WithoutCancel(ctx)
	if err := checkID(id); err != nil {
		return err
	}
	sb, err := e.find(id)
	if err != nil {
		return err
	}
	if err := sb.beginDestroy(ctx); err != nil {
		return err
	}
	defer sb.end()
	if again, err := e.find(id); err != nil || again != sb {
		return fmt.Errorf("sandbox %q: %w", id, ErrNotFound)
	}
	if err := sb.update(func(j *journal) { j.State = Stopping }); err != nil {
		return err
	}
	return e.finishDestroy(ctx, sb)
}

// finishDestroy can be run again after a crash.
func (e *Engine) finishDestroy(ctx context.Context, sb *sandbox) error {
	var err error
	if sb.current() != nil {
		err = e.endRun(ctx, sb, format.ID{})
	} else {
		err = e.endLeftover(ctx, sb) // a VM that could not be taken over
	}
	if err != nil {
		return fmt.Errorf("destroy sandbox %s: %w", sb.id(), err)
	}
	if m := sb.journal().Manifest; m != (format.ID{}) {
		if err := e.opts.Store.Delete(ctx, m); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("destroy sandbox %s: %w", sb.id(), err)
		}
	}
	return errors.Join(e.removeSandbox(sb), e.sweep(ctx))
}

// Snapshot freezes a running or paused sandbox under a name. The source goes
// back to the state it was in.
func (e *Engine) Snapshot(ctx context.Context, id, name string) (snapshot.Manifest, Stats, error) {
	ctx = context.WithoutCancel(ctx)
	if err := checkName(name); err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	sb, err := e.find(id)
	if err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	if err := sb.begin("snapshot", Running, Paused); err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	defer sb.end()
	if err := e.reserve(name); err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	ph := e.newPhases()
	e.storeUse.RLock()
	defer e.storeUse.RUnlock()
	freeze := e.snapshotRunning
	if sb.info().State == Paused {
		freeze = e.snapshotPaused
	}
	c, err := freeze(ctx, sb, name, ph)
	e.settleName(name, c.manifest.ID, err == nil)
	if err != nil {
		return c.manifest, c.stats, fmt.Errorf("snapshot sandbox %s as %q: %w", id, name, err)
	}
	e.compactAfter(ctx, c.manifest)
	return c.manifest, ph.statsWith(c.stats), nil
}

// reserve takes a name until settleName says what became of it.
func (e *Engine) reserve(name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, isBase := e.bases[name]
	_, taken := e.names[name]
	if isBase || taken || e.reserved[name] {
		return fmt.Errorf("a template named %q %w; choose another name or remove it first", name, ErrExists)
	}
	e.reserved[name] = true
	return nil
}

func (e *Engine) settleName(name string, id format.ID, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.reserved, name)
	if ok {
		e.names[name] = id
	}
}

func (e *Engine) snapshotRunning(ctx context.Context, sb *sandbox, name string, ph *phases) (captured, error) {
	c, err := e.freeze(ctx, sb, snapshot.KindSnapshot, name, ph)
	if err != nil {
		return c, err
	}
	// The snapshot exists from here on, whatever becomes of the source.
	err = sb.update(func(j *journal) {
		j.Pending, j.Generation = format.ID{}, c.manifest.Generation
		j.Run.LastMemory, j.Run.LastDisk, j.Run.ChangesLost = c.manifest.Memory.ID, c.manifest.Disk.ID, false
	})
	if err != nil {
		e.log.Error("the journal misses a snapshot; the next capture writes more than it must", "sandbox", sb.id(), "err", err)
	}
	defer ph.part("continue")()
	r := sb.current()
	if err := r.machine.Continue(ctx); err != nil {
		e.log.Error("the source of a snapshot does not go on", "sandbox", sb.id(), "err", err)
		return c, nil
	}
	// The guest stood still meanwhile: set its clock. It is the same
	// individual in the same life, so nothing else changes.
	cctx, cancel := context.WithTimeout(ctx, guestSyncLimit)
	defer cancel()
	if _, err := r.guest.confirm(cctx, r.machine.Done(), e.initRequest(sb, sb.journal().Run.Life, false), e.opts.Now); err != nil {
		e.log.Warn("the clock of a snapshot's source may be behind", "sandbox", sb.id(), "err", err)
	}
	return c, nil
}

// snapshotPaused gives a pause's images a second manifest; only the device
// state is copied.
func (e *Engine) snapshotPaused(ctx context.Context, sb *sandbox, name string, ph *phases) (c captured, err error) {
	defer ph.part("commit")()
	m, err := e.opts.Store.Manifest(sb.journal().Manifest)
	if err != nil {
		return c, fmt.Errorf("read the pause's manifest: %w", err)
	}
	txn, err := e.opts.Store.Begin()
	if err != nil {
		return c, fmt.Errorf("begin a manifest: %w", err)
	}
	defer func() { err = errors.Join(err, txn.Abort()) }() // does nothing after the commit
	path, err := e.opts.Store.StatePath(m.ID)
	if err == nil {
		err = copyState(path, txn)
	}
	if err != nil {
		return c, err
	}
	m.ID, m.Name, m.Kind, m.CreatedAt = format.ID{}, name, snapshot.KindSnapshot, e.opts.Now().UTC()
	if err := txn.Commit(ctx, m); err != nil {
		return c, fmt.Errorf("commit the manifest: %w", err)
	}
	c.manifest, err = e.opts.Store.Manifest(txn.ID())
	c.stats.StateBytes = m.State.Size
	return c, err
}

func copyState(path string, txn *snapshot.Txn) error {
	in, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open the device state: %w", err)
	}
	defer in.Close()
	out, err := txn.StateFile()
	if err != nil {
		return fmt.Errorf("create the device state: %w", err)
	}
	if _, err := io.Copy(out, in); err != nil {
		return fmt.Errorf("copy the device state: %w", err)
	}
	return nil
}

// machineDied enters the end of a VM that nobody asked for.
func (e *Engine) machineDied(sb *sandbox, r *run) {
	ctx := context.Background()
	sb.op <- struct{}{}
	defer sb.end()
	if sb.current() != r {
		return // an operation ended the run meanwhile
	}
	reason := r.machine.Err()
	var exit *vmm.ExitError
	if errors.As(reason, &exit) {
		e.log.Error("a VM ended unasked", "sandbox", sb.id(), "reason", exit.Reason, "status", exit.Status, "stderr", exit.Stderr, "console", exit.Console)
	}
	if fatal := e.fatalReason(ctx, sb.id()); fatal != nil {
		reason = fatal
	}
	err := errors.Join(
		e.endRun(ctx, sb, format.ID{}),
		sb.update(func(j *journal) { j.State, j.Error, j.Run, j.StartedAt = Failed, reason.Error(), nil, nil }),
	)
	if err != nil {
		e.log.Error("not everything of a dead VM could be released", "sandbox", sb.id(), "err", err)
	}
	e.announce(Event{Sandbox: sb.info()})
}
