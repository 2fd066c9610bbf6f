package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

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
	defer e.admitted(sb)
	op := OpCreate
	if src.base == nil {
		op = OpSpawn
	}
	st := e.newStarting(sb, src, ph)
	if err := e.start(ctx, op, st, st.createSteps()); err != nil {
		return Info{}, Stats{}, errors.Join(fmt.Errorf("create sandbox %s: %w", spec.ID, err), e.unmake(st))
	}
	return sb.info(), ph.stats(), nil
}

// unmake leaves nothing of a create that failed. What could not be released
// stays as a sandbox that is being destroyed.
func (e *Engine) unmake(st *starting) error {
	switch {
	case !st.entered:
		e.forget(st.sb)
		return nil
	case st.left == nil:
		return e.removeSandbox(st.sb)
	}
	err := st.sb.settle(func(j *journal) { j.State = Stopping })
	e.tidySoon(st.sb)
	return err
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

// addSandbox takes the id for a new sandbox, with its operation begun. Nothing
// of it is on disk yet.
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
	if err := e.admit(sb, e.sharedBy(src)); err != nil {
		return nil, err
	}
	e.sandboxes[spec.ID] = sb
	return sb, nil
}

// removeSandbox removes a sandbox's directory and forgets it.
func (e *Engine) removeSandbox(sb *sandbox) error {
	if err := removeDir(sb.dir); err != nil {
		return fmt.Errorf("remove the sandbox's directory: %w", err)
	}
	e.forget(sb)
	return nil
}

// removeDir has the journal go last: a directory with files and no journal is of
// a sandbox whose journal was lost.
func removeDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, f := range entries {
		if f.Name() == journalName {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, f.Name())); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

func (e *Engine) forget(sb *sandbox) {
	e.mu.Lock()
	delete(e.sandboxes, sb.id())
	e.mu.Unlock()
	e.announce(Event{Sandbox: sb.info(), Removed: true})
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
	old := sb.journal().Manifest
	cp := e.newCapture(sb, snapshot.KindPause, "")
	if cp.m.Annotations, err = sb.journal().kept(); err != nil {
		return Info{}, Stats{}, err
	}
	e.storeUse.RLock()
	err = e.capture(ctx, OpPause, cp, cp.pauseSteps())
	e.storeUse.RUnlock()
	if err != nil {
		return Info{}, Stats{}, fmt.Errorf("pause sandbox %s: %w", id, err)
	}
	if err := e.perform(ctx, OpPause, cp.ph, e.pausedSteps(sb, old, cp.m.Memory.ID)); err != nil {
		// The state is safe, and the journal names what stayed behind.
		e.log.ErrorContext(ctx, "not everything of a paused VM could be released yet", "sandbox", id, "err", err)
		e.tidySoon(sb)
	}
	e.compactAfter(ctx, cp.m)
	return sb.info(), cp.ph.statsWith(cp.written), nil
}

// newCapture begins the description of a capture.
func (e *Engine) newCapture(sb *sandbox, kind, name string) *capturing {
	j := sb.journal()
	return &capturing{e: e, sb: sb, ph: e.newPhases(), own: e.ownMemory(), m: snapshot.Manifest{
		Name: name, Kind: kind, SandboxID: j.ID, Parent: j.Template, Generation: j.Generation + 1,
		CreatedAt: e.createdAt(name), VMM: vmmInfo(e.info, j.Run.KernelDigest, j),
		EnvdVersion: j.Run.EnvdVersion, NetworkLayout: networkLayout, Annotations: j.Annotations,
	}}
}

// pausedSteps are what remains of a pause when the journal names it.
func (e *Engine) pausedSteps(sb *sandbox, old, memory format.ID) []step {
	return append(e.releaseSteps(sb, memory),
		step{name: "delete_old", do: func(ctx context.Context) error {
			if old.IsZero() {
				return nil
			}
			return e.deleteManifest(ctx, old)
		}},
		step{name: "sweep", do: e.sweep},
	)
}

// deletePauses removes every pause of a sandbox: one that stayed would make it a
// sandbox again.
func (e *Engine) deletePauses(ctx context.Context, sb *sandbox) error {
	manifests, _ := e.opts.Store.Manifests()
	var errs []error
	if m := sb.journal().Manifest; !m.IsZero() { // it may be damaged, and not in the list
		errs = append(errs, e.deleteManifest(ctx, m))
	}
	for _, m := range manifests {
		if m.Kind == snapshot.KindPause && m.SandboxID == sb.id() {
			errs = append(errs, e.deleteManifest(ctx, m.ID))
		}
	}
	return errors.Join(errs...)
}

// deleteManifest removes a manifest that may be gone already.
func (e *Engine) deleteManifest(ctx context.Context, id format.ID) error {
	if err := e.opts.Store.Delete(ctx, id); err != nil && !errors.Is(err, snapshot.ErrNotFound) {
		return err
	}
	return nil
}

// Resume brings a paused sandbox back, every process still alive; with reboot
// it starts from the paused disk instead, and the memory is not used. One whose
// VM ended unasked goes back to its last pause. A resume that fails leaves it
// paused.
func (e *Engine) Resume(ctx context.Context, id string, reboot bool) (Info, Stats, error) {
	ctx = context.WithoutCancel(ctx)
	sb, err := e.find(id)
	if err != nil {
		return Info{}, Stats{}, err
	}
	if err := sb.begin("resume", Paused, Failed); err != nil {
		return Info{}, Stats{}, err
	}
	defer sb.end()
	if err := sb.hasPause(); err != nil {
		return Info{}, Stats{}, err
	}
	ph := e.newPhases()
	if err := e.release(ctx, sb); err != nil {
		return Info{}, Stats{}, fmt.Errorf("resume sandbox %s: clear what its last run left: %w", id, err)
	}
	e.mu.Lock()
	err = e.admit(sb, format.ID{}) // nobody else starts from a pause
	e.mu.Unlock()
	if err != nil {
		return Info{}, Stats{}, fmt.Errorf("resume sandbox %s: %w", id, err)
	}
	defer e.admitted(sb)
	e.storeUse.RLock()
	defer e.storeUse.RUnlock()
	op, src, err := e.resumeSource(sb, reboot)
	if err != nil {
		return Info{}, Stats{}, fmt.Errorf("resume sandbox %s: %w", id, err)
	}
	st := e.newStarting(sb, src, ph)
	if err := e.start(ctx, op, st, st.resumeSteps()); err != nil {
		if st.left != nil {
			e.tidySoon(sb)
		}
		return Info{}, Stats{}, errors.Join(fmt.Errorf("resume sandbox %s: %w", id, err), sb.settle(func(j *journal) {
			j.State, j.StartedAt = Paused, nil
			if st.left == nil {
				j.Run = nil
			}
		}))
	}
	return sb.info(), ph.stats(), nil
}

// hasPause tells whether there is something to resume. The token is held.
func (sb *sandbox) hasPause() error {
	switch j := sb.journal(); {
	case j.State != Failed:
		return nil
	case sb.unadopted || sb.stray:
		return fmt.Errorf("%w: cannot resume sandbox %s: its VM may still run: %s", ErrState, j.ID, j.Error)
	case j.Manifest.IsZero():
		return fmt.Errorf("%w: cannot resume sandbox %s: it was never paused, so that there is nothing to go back to; delete it", ErrState, j.ID)
	}
	return nil
}

func (e *Engine) resumeSource(sb *sandbox, reboot bool) (Op, source, error) {
	m, err := e.opts.Store.Manifest(sb.journal().Manifest)
	if err != nil {
		return "", source{}, fmt.Errorf("read its manifest: %w", err)
	}
	if reboot {
		src, err := e.rebootSource(m)
		return OpReboot, src, err
	}
	return OpResume, source{manifest: &m}, e.fits(m)
}

// Destroy removes a sandbox in any state with all it owns. One that fails can
// be said again.
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
	if err := e.finishDestroy(ctx, sb); err != nil {
		e.tidySoon(sb)
		return err
	}
	return nil
}

// finishDestroy can be run again after a crash.
func (e *Engine) finishDestroy(ctx context.Context, sb *sandbox) error {
	if err := e.perform(ctx, OpDestroy, e.newPhases(), e.destroySteps(sb)); err != nil {
		return fmt.Errorf("destroy sandbox %s: %w", sb.id(), err)
	}
	return nil
}

func (e *Engine) destroySteps(sb *sandbox) []step {
	return slices.Concat(
		[]step{{name: "record_stopping", do: func(context.Context) error {
			return sb.updateIfRoom(func(j *journal) { j.State = Stopping })
		}}},
		e.releaseSteps(sb, format.ID{}),
		[]step{
			{name: "delete_manifest", do: func(ctx context.Context) error { return e.deletePauses(ctx, sb) }},
			{name: "remove", do: func(context.Context) error { return e.removeSandbox(sb) }},
			{name: "sweep", do: e.sweep},
		})
}

// SnapshotSpec says what to freeze.
type SnapshotSpec struct {
	Sandbox, Name string
	// Replace lets a snapshot that has the name give way when the new one is
	// durable; without it the name must be free.
	Replace bool
}

// Snapshot freezes a running or paused sandbox under a name that is free. The
// source goes back to the state it was in.
func (e *Engine) Snapshot(ctx context.Context, id, name string) (snapshot.Manifest, Stats, error) {
	return e.SnapshotAs(ctx, SnapshotSpec{Sandbox: id, Name: name})
}

// SnapshotAs is Snapshot by a spec.
func (e *Engine) SnapshotAs(ctx context.Context, s SnapshotSpec) (snapshot.Manifest, Stats, error) {
	ctx = context.WithoutCancel(ctx)
	if err := checkName(s.Name); err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	sb, err := e.find(s.Sandbox)
	if err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	if err := sb.begin("snapshot", Running, Paused); err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	defer sb.end()
	if err := e.diskFor("a snapshot"); err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	old, err := e.reserve(s.Name, s.Replace)
	if err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	m, stats, err := e.freeze(ctx, sb, s.Name)
	e.settleName(s.Name, m.ID, err == nil)
	if err != nil {
		return m, stats, fmt.Errorf("snapshot sandbox %s as %q: %w", s.Sandbox, s.Name, err)
	}
	if !old.IsZero() {
		// The new one has the name, whatever becomes of the old one: the next
		// start removes what is older of a name.
		if err := e.removeSnapshot(ctx, old); err != nil {
			e.log.Error("a snapshot whose name was given to another is not removed yet", "name", s.Name, "err", err)
		}
	}
	return m, stats, nil
}

func (e *Engine) freeze(ctx context.Context, sb *sandbox, name string) (m snapshot.Manifest, stats Stats, err error) {
	e.storeUse.RLock()
	defer e.storeUse.RUnlock()
	if sb.info().State == Paused {
		m, stats, err = e.snapshotPaused(ctx, sb, name)
	} else {
		m, stats, err = e.snapshotRunning(ctx, sb, name)
	}
	if err == nil {
		e.compactAfter(ctx, m)
	}
	return m, stats, err
}

// reserve takes a name until settleName says what became of it. Where it may be
// replaced, old is the snapshot that has it.
func (e *Engine) reserve(name string, replace bool) (old format.ID, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, isBase := e.bases[name]
	old, taken := e.names[name]
	if isBase || taken && !replace || e.reserved[name] {
		return old, fmt.Errorf("a template named %q %w; choose another name or remove it first", name, ErrExists)
	}
	e.reserved[name] = true
	return old, nil
}

// createdAt is the time of a manifest made now: of two of a name the newer one
// is later, whatever the clock does.
func (e *Engine) createdAt(name string) time.Time {
	now := e.opts.Now().UTC()
	e.mu.Lock()
	id, taken := e.names[name]
	e.mu.Unlock()
	if !taken || name == "" {
		return now
	}
	if m, err := e.opts.Store.Manifest(id); err == nil && !now.After(m.CreatedAt) {
		return m.CreatedAt.Add(time.Microsecond)
	}
	return now
}

func (e *Engine) settleName(name string, id format.ID, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.reserved, name)
	if ok {
		e.names[name] = id
	}
}

func (e *Engine) snapshotRunning(ctx context.Context, sb *sandbox, name string) (snapshot.Manifest, Stats, error) {
	cp := e.newCapture(sb, snapshot.KindSnapshot, name)
	if err := e.capture(ctx, OpSnapshot, cp, cp.snapshotSteps()); err != nil {
		return snapshot.Manifest{}, Stats{}, err
	}
	// The snapshot exists from here on, whatever becomes of the source.
	if err := e.perform(ctx, OpSnapshot, cp.ph, cp.goOnSteps()); err != nil {
		e.log.ErrorContext(ctx, "the source of a snapshot does not go on", "sandbox", sb.id(), "err", err)
	}
	return cp.m, cp.ph.statsWith(cp.written), nil
}

// copying gives a pause's images a second manifest; only the device state is
// copied.
type copying struct {
	e    *Engine
	sb   *sandbox
	name string

	from, m snapshot.Manifest
	txn     *snapshot.Txn
}

func (c *copying) steps() []step {
	return []step{{name: "copy_state", do: c.copyState}, {name: "commit", do: c.commit}}
}

func (e *Engine) snapshotPaused(ctx context.Context, sb *sandbox, name string) (snapshot.Manifest, Stats, error) {
	ph := e.newPhases()
	m, err := e.opts.Store.Manifest(sb.journal().Manifest)
	if err != nil {
		return m, Stats{}, fmt.Errorf("read the pause's manifest: %w", err)
	}
	txn, err := e.opts.Store.Begin()
	if err != nil {
		return m, Stats{}, fmt.Errorf("begin a manifest: %w", err)
	}
	c := &copying{e: e, sb: sb, name: name, from: m, txn: txn}
	if err := e.perform(ctx, OpSnapshotPaused, ph, c.steps()); err != nil {
		return m, Stats{}, errors.Join(err, txn.Abort(), e.deleteManifest(ctx, txn.ID()))
	}
	return c.m, ph.statsWith(Stats{StateBytes: c.m.State.Size}), nil
}

func (c *copying) copyState(context.Context) error {
	path, err := c.e.opts.Store.StatePath(c.from.ID)
	if err != nil {
		return err
	}
	return copyState(path, c.txn)
}

func (c *copying) commit(ctx context.Context) error {
	m := c.from
	m.ID, m.Name, m.Kind, m.CreatedAt = format.ID{}, c.name, snapshot.KindSnapshot, c.e.createdAt(c.name)
	m.Annotations = c.sb.journal().Annotations // not the pause's, which are a journal
	err := c.txn.Commit(ctx, m)
	if err != nil {
		return fmt.Errorf("commit the manifest: %w", err)
	}
	c.m, err = c.e.opts.Store.Manifest(c.txn.ID())
	return err
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
		e.log.ErrorContext(ctx, "a VM ended unasked", "sandbox", sb.id(), "reason", exit.Reason, "status", exit.Status, "stderr", exit.Stderr, "console", exit.Console)
	}
	if fatal := e.fatalReason(ctx, sb.id()); fatal != nil {
		reason = fatal
	}
	if err := e.perform(ctx, OpDied, e.newPhases(), e.diedSteps(sb, reason)); err != nil {
		e.log.ErrorContext(ctx, "not everything of a dead VM could be released yet", "sandbox", sb.id(), "err", err)
		e.tidySoon(sb)
	}
	e.announce(Event{Sandbox: sb.info()})
}

// diedSteps write down why first: a crash in between then only has to release.
func (e *Engine) diedSteps(sb *sandbox, reason error) []step {
	return append([]step{{name: "record_error", do: func(context.Context) error {
		// Dead it is, whether or not the disk takes the news.
		if err := sb.settle(func(j *journal) { j.State, j.Error, j.StartedAt = Failed, reason.Error(), nil }); err != nil {
			e.log.Error("the journal misses the end of a VM", "sandbox", sb.id(), "err", err)
		}
		return nil
	}}}, e.releaseSteps(sb, format.ID{})...)
}
