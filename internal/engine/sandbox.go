package engine

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// sandbox is one sandbox of this host.
type sandbox struct {
	dir string
	// op holds one token while an operation changes the sandbox.
	op chan struct{}
	// unadopted: its VM lives and is to be taken over. Guarded by the token.
	unadopted bool
	// copied: its journal came from another directory, whose VM it names.
	copied bool
	// stray: its journal is lost and its VM runs, which cannot be taken over.
	stray bool
	// whole is the memory image that its VM maps whole, which takes RAM beside
	// its own. It counts while there is a VM. Guarded by Engine.mu.
	whole format.ID

	mu sync.Mutex
	j  journal
	// run is the live VM and all that serves it; nil when there is none.
	run *run
	// waiting says why it stands still although it runs.
	waiting string
}

// run is what a running VM holds. Where a start or a taking over failed and not
// all could be released it is what there is, and any of the three may be nil.
type run struct {
	machine vmm.Machine
	slot    Slot
	guest   *Guest
	// wholeMemory: the VMM's list of changed pages cannot be relied on for
	// the next capture. Guarded by the operation's token.
	wholeMemory bool
	// held: a capture stopped the VM and could not let it go on, mostly as its
	// writes wait for room. Guarded by the operation's token.
	held bool
	// ending is closed before we end the VM ourselves, so that its end is
	// not taken for a failure.
	ending  chan struct{}
	endOnce sync.Once
	watch   sync.WaitGroup
	telling telling
}

func (r *run) end() {
	r.endOnce.Do(func() { close(r.ending) })
	r.telling.stop()
}

// letGo drops our handles and leaves the VM running.
func (r *run) letGo() {
	r.telling.stop()
	if r.guest != nil {
		r.guest.close()
	}
	if r.machine != nil {
		r.machine.Close()
	}
}

func (sb *sandbox) info() Info {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	j := sb.j
	return Info{
		ID: j.ID, State: j.State, Template: j.Template, VCPUs: j.VCPUs, MemoryMB: j.MemoryMB,
		Error: j.Error, CreatedAt: j.CreatedAt, StartedAt: j.StartedAt, Generation: j.Generation,
		Annotations: j.Annotations, Waiting: sb.waiting,
	}
}

// update changes the journal on disk and then in memory; on an error neither
// has changed.
func (sb *sandbox) update(change func(*journal)) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	j := sb.j
	if j.Run != nil {
		r := *j.Run
		j.Run = &r
	}
	change(&j)
	if err := writeJournal(sb.dir, j); err != nil {
		return err
	}
	sb.j = j
	return nil
}

// settle is update on the way back from a failure: the change counts in
// memory even where the disk does not take it. What the disk says then, a step
// that was not finished, comes to the same at the next start.
func (sb *sandbox) settle(change func(*journal)) error {
	err := sb.update(change)
	if err != nil {
		sb.mu.Lock()
		change(&sb.j)
		sb.mu.Unlock()
	}
	return err
}

// updateIfRoom is update for a sandbox that is to be destroyed, which makes room:
// where the disk has none for the journal, the change counts in memory. After a
// crash the next engine finds what is left, which can be destroyed again.
func (sb *sandbox) updateIfRoom(change func(*journal)) error {
	err := sb.update(change)
	if !storage.NoRoom(err) {
		return err
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	change(&sb.j)
	return nil
}

// journal returns a copy.
func (sb *sandbox) journal() journal {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	j := sb.j
	if j.Run != nil {
		r := *j.Run
		j.Run = &r
	}
	return j
}

func (sb *sandbox) current() *run {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.run
}

func (sb *sandbox) setRun(r *run) {
	sb.mu.Lock()
	sb.run = r
	sb.mu.Unlock()
}

func (sb *sandbox) path(name string) string { return filepath.Join(sb.dir, name) }

// begin takes the sandbox for one operation that needs it in one of states.
// The caller ends it with sb.end.
func (sb *sandbox) begin(what string, states ...State) error {
	select {
	case sb.op <- struct{}{}:
	default:
		return fmt.Errorf("%w: cannot %s sandbox %s: another operation is under way (it is %s)", ErrState, what, sb.id(), sb.info().State)
	}
	state := sb.info().State
	if slices.Contains(states, state) {
		return nil
	}
	sb.end()
	return fmt.Errorf("%w: cannot %s sandbox %s: it is %s", ErrState, what, sb.id(), state)
}

// beginDestroy waits for the operation under way: a destroy is never refused.
func (sb *sandbox) beginDestroy(ctx context.Context) error {
	select {
	case sb.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("destroy sandbox %s: the operation before it has not ended: %w", sb.id(), ctx.Err())
	}
}

func (sb *sandbox) end() { <-sb.op }

func (sb *sandbox) id() string { return filepath.Base(sb.dir) }

// phases measures the parts of an operation.
type phases struct {
	mu    sync.Mutex
	now   func() time.Time
	start time.Time
	parts map[string]time.Duration
	log   *slog.Logger
}

func (e *Engine) newPhases() *phases {
	return &phases{now: e.opts.Now, start: e.opts.Now(), parts: map[string]time.Duration{}, log: e.log}
}

// part starts the clock of a part and returns what stops it.
func (p *phases) part(name string) func() {
	t := p.now()
	return func() {
		d := p.now().Sub(t)
		p.mu.Lock()
		p.parts[name] += d
		p.mu.Unlock()
	}
}

func (p *phases) stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log.Debug("an operation is done", "phases", p.parts)
	return Stats{Duration: p.now().Sub(p.start), Phases: p.parts}
}

// statsWith adds what was written.
func (p *phases) statsWith(written Stats) Stats {
	s := p.stats()
	s.MemoryBytes, s.DiskBytes, s.StateBytes = written.MemoryBytes, written.DiskBytes, written.StateBytes
	return s
}
