package engine_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/engine/enginetest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// patience bounds what must come to pass; it is no measure.
const patience = 2 * time.Minute

// world is a host and the engine that is open on it at present.
type world struct {
	*enginetest.Host
	t     *testing.T
	e     *engine.Engine
	store *snapshot.Store

	mu    sync.Mutex
	after func(op engine.Op, step string) error
	// parked is for ever, as the dead are.
	parked chan struct{}
	// dead tells what uses the present engine that it was abandoned.
	dead *atomic.Bool

	marks map[string]uint64 // what each guest was told to keep
}

// errDead ends an operation of the test's that would go on with a dead engine.
var errDead = errors.New("the engine was abandoned")

func newWorld(t *testing.T, policy snapshot.CompactionPolicy) *world {
	return newWorldOn(t, nil, policy)
}

func newWorldOn(t *testing.T, fs storage.FS, policy snapshot.CompactionPolicy) *world {
	w := &world{Host: enginetest.New(t), t: t, parked: make(chan struct{}), marks: map[string]uint64{}}
	w.Policy, w.FS = policy, fs
	w.must(w.open())
	t.Cleanup(func() {
		if w.e != nil && !w.dead.Load() {
			w.e.Close()
		}
		w.store.Close()
	})
	return w
}

// open makes the next engine.
func (w *world) open() error {
	if w.e != nil {
		w.idle()
		w.crash()
	}
	store := w.OpenStore()
	o := w.Options(store)
	w.e, o.AfterStep = nil, w.afterStep
	if os.Getenv("ENGINE_LOG") != "" {
		o.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	w.store = store
	w.dead = &atomic.Bool{}
	e, err := engine.New(w.t.Context(), o)
	if err != nil {
		return err
	}
	w.Network.Sweep(e.Slots())
	w.e = e
	return w.importBase("one")
}

// crash abandons the engine.
func (w *world) crash() {
	w.hook(nil)
	w.dead.Store(true)
	if w.e != nil {
		w.e.Abandon()
	}
	w.store.Close()
	w.Network.Restart()
	w.e = nil
}

func (w *world) afterStep(op engine.Op, step string) error {
	w.mu.Lock()
	f := w.after
	w.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(op, step)
}

func (w *world) hook(f func(op engine.Op, step string) error) {
	w.mu.Lock()
	w.after = f
	w.mu.Unlock()
}

func (w *world) failOnce(op engine.Op, step string, err error) {
	var once sync.Once
	w.hook(func(o engine.Op, s string) (out error) {
		if o == op && s == step {
			once.Do(func() { out = err })
		}
		return out
	})
}

// crashIn begins an operation and abandons the engine when it has done a step.
// Whatever runs beside that step is parked at its own end.
func (w *world) crashIn(op engine.Op, step string, run func() error) {
	w.t.Helper()
	if w.e != nil {
		w.idle() // compaction is cut off only where it is the operation
	}
	var beside []string
	for _, l := range engine.Steps(false) {
		if l.Op == op && slices.Contains(l.Beside, step) {
			beside = l.Beside
		}
	}
	quiet, died := make(chan struct{}), w.dead
	seen := map[string]bool{}
	w.hook(func(o engine.Op, s string) error {
		w.mu.Lock()
		switch {
		case o == op && s == step:
			died.Store(true)
		case !died.Load() && !(o == op && slices.Contains(beside, s)):
			w.mu.Unlock()
			return nil
		}
		seen[s] = true
		missing := slices.ContainsFunc(beside, func(b string) bool { return !seen[b] })
		die := died.Load()
		if die && !missing {
			select {
			case <-quiet:
			default:
				close(quiet)
			}
		}
		w.mu.Unlock()
		if die {
			<-w.parked
		}
		return nil
	})
	ended := make(chan error, 1)
	go func() { ended <- run() }()
	select {
	case <-quiet:
	case err := <-ended:
		w.t.Fatalf("%s ended (%v) before the step %s", op, err, step)
	case <-time.After(patience):
		w.t.Fatalf("%s does not come to the step %s", op, step)
	}
	w.crash()
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) tryCreate(id, template string) error {
	spec := engine.CreateSpec{ID: id, Template: template}
	if template == "base" {
		spec.MemoryMB = vmm.MinMemoryMB
	}
	_, _, err := w.e.Create(w.t.Context(), spec)
	return err
}

func (w *world) create(id, template string) {
	w.t.Helper()
	w.must(w.tryCreate(id, template))
}

func (w *world) pause(id string) error {
	_, _, err := w.e.Pause(w.t.Context(), id)
	return err
}

func (w *world) resume(id string, reboot bool) error {
	_, _, err := w.e.Resume(w.t.Context(), id, reboot)
	return err
}

// remember puts the mark into the new memory of a guest that was rebooted: its
// disk is what is kept.
func (w *world) remember(id string) {
	if w.state(id) == engine.Running {
		w.must(w.WriteMemory(id, binary.LittleEndian.AppendUint64(nil, w.marks[id]), markOffset))
	}
}

func (w *world) snapshot(id, name string) error {
	_, _, err := w.e.Snapshot(w.t.Context(), id, name)
	return err
}

func (w *world) destroy(id string) error {
	err := w.e.Destroy(w.t.Context(), id)
	return err
}

func (w *world) deleteSnapshot(name string) error { return w.e.DeleteSnapshot(w.t.Context(), name) }

func (w *world) importBase(digest string) error {
	return w.e.ImportBase(w.t.Context(), w.BaseFiles(digest), nil)
}

func (w *world) setEgress(id string) error {
	return w.e.SetEgress(w.t.Context(), id, &engine.Egress{DenyInternet: true, Headers: egress.Rules{"a.example": {"X-Key": "secret"}}})
}

// pauseTimes makes generations, enough for compaction to have work. It keeps to
// the engine that it began with.
func (w *world) pauseTimes(id string, n int) error {
	e, dead := w.e, w.dead
	for range n {
		if i, err := e.Get(id); err == nil && i.State == engine.Paused {
			if _, _, err := e.Resume(w.t.Context(), id, false); err != nil {
				return err
			}
		}
		if err := w.markErr(id); err != nil {
			return err
		}
		if _, _, err := e.Pause(w.t.Context(), id); err != nil {
			return err
		}
		// One thing at a time: what is cut off is the compaction alone.
		w.until("compaction ends", func() bool { return e.Idle() || dead.Load() })
		if dead.Load() {
			return errDead
		}
	}
	return nil
}

// killVM ends a VM from outside and waits for what the engine makes of it.
func (w *world) killVM(id string) error {
	e, dead := w.e, w.dead
	if err := w.Driver.End(id, vmm.ReasonProcess); err != nil {
		return fmt.Errorf("%w: %w", vmm.ErrGone, err)
	}
	w.until("the end of the VM is noticed", func() bool {
		i, err := e.Get(id)
		return err == nil && i.State == engine.Failed && e.Idle() || dead.Load()
	})
	return nil
}

func (w *world) until(what string, f func() bool) {
	w.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	end := time.After(patience)
	for !f() {
		select {
		case <-tick.C:
		case <-end:
			w.t.Fatalf("it does not come to pass that %s", what)
		}
	}
}

// idle waits for what the engine does by itself.
func (w *world) idle() {
	w.t.Helper()
	w.until("the engine is idle", w.e.Idle)
}

func (w *world) state(id string) engine.State {
	i, err := w.e.Get(id)
	if err != nil {
		return absent
	}
	return i.State
}

// The guest's mark: a number in its memory and at the head of its disk's
// second block.
const (
	markOffset = 64 << 10
	markBlock  = format.BlockSize
)

// mark makes a guest keep a new number.
func (w *world) mark(id string) {
	w.t.Helper()
	w.must(w.markErr(id))
}

func (w *world) markErr(id string) error {
	n := w.marks[id] + uint64(len(id)) + 1
	w.marks[id] = n
	b := binary.LittleEndian.AppendUint64(nil, n)
	if err := w.WriteMemory(id, b, markOffset); err != nil {
		return err
	}
	return w.Pager.WriteDisk(id, append(b, make([]byte, format.BlockSize-8)...), markBlock)
}

// same checks that a guest that was told to keep a number has it, in memory
// and on disk, and that it goes on. A paused one is brought back for it.
func (w *world) same(id string) {
	w.t.Helper()
	want, marked := w.marks[id]
	if !marked || w.state(id) == absent || w.state(id) == engine.Failed {
		return
	}
	if w.state(id) == engine.Paused {
		w.must(w.resume(id, false))
	}
	var b [8]byte
	w.must(w.ReadMemory(id, b[:], markOffset))
	if got := binary.LittleEndian.Uint64(b[:]); got != want {
		w.t.Errorf("%s has %d in memory, was told %d", id, got, want)
	}
	block, err := w.Pager.Block(id, markBlock)
	w.must(err)
	if got := binary.LittleEndian.Uint64(block); got != want {
		w.t.Errorf("%s has %d on its disk, was told %d", id, got, want)
	}
	before := w.ticks(id)
	w.until(id+" goes on", func() bool { return w.ticks(id) > before })
}

func (w *world) ticks(id string) uint64 {
	var b [8]byte
	w.must(w.ReadMemory(id, b[:], vmmtest.CounterOffset))
	return binary.LittleEndian.Uint64(b[:])
}

// settled checks that a is in one of states, and that the host holds what the
// sandboxes need and nothing else.
func (w *world) settled(states ...engine.State) {
	w.t.Helper()
	w.idle()
	if s := w.state("a"); !slices.Contains(states, s) {
		i, _ := w.e.Get("a")
		w.t.Fatalf("a is %q (%s), want one of %q", s, i.Error, states)
	}
	w.nothingLeaked()
}

// nothingLeaked compares the host with the list of sandboxes.
func (w *world) nothingLeaked() {
	w.t.Helper()
	var live, all []string
	for _, i := range w.e.List() {
		all = append(all, i.ID)
		if i.State == engine.Running || i.State == engine.Failed && strings.Contains(i.Error, "could not be taken over") || i.State == engine.Stopping {
			live = append(live, i.ID)
		}
	}
	// What is being removed may have given back some of it.
	var vms, slots, running []string
	for _, m := range w.Driver.Machines() {
		vms = append(vms, m.ID)
		if m.Running {
			running = append(running, m.ID)
		}
	}
	for _, id := range w.Network.Held() {
		slots = append(slots, id)
	}
	stopping := w.state("a") == engine.Stopping
	for what, got := range map[string][]string{
		"VMs": vms, "VMs that run": running, "network slots": slots, "served by the pager": w.Pager.Serves(), "overlays": w.overlays(),
	} {
		slices.Sort(got)
		want := slices.Clone(live)
		if stopping {
			got = slices.DeleteFunc(got, func(id string) bool { return id == "a" })
			want = slices.DeleteFunc(want, func(id string) bool { return id == "a" })
		}
		if !slices.Equal(got, want) {
			w.t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	if dirs := w.dirs("sandboxes"); !slices.Equal(dirs, all) {
		w.t.Errorf("directories of sandboxes: %v, want %v", dirs, all)
	}
	w.storeIsClean()
}

// storeIsClean checks that what the store has, after a sweep, is needed.
func (w *world) storeIsClean() {
	w.t.Helper()
	w.must(w.e.Sweep(context.Background()))
	named := map[string]bool{}
	list, err := w.e.Templates()
	w.must(err)
	for _, m := range list {
		named[m.ID.String()] = true
	}
	manifests, errs := w.store.Manifests()
	for _, err := range errs {
		w.t.Error(err)
	}
	pauses := map[string]int{}
	for _, m := range manifests {
		if m.Kind == snapshot.KindPause {
			pauses[m.SandboxID]++
			if w.state(m.SandboxID) == absent {
				w.t.Errorf("a pause of %s is left, which is gone", m.SandboxID)
			}
		} else if !named[m.ID.String()] {
			w.t.Errorf("the %s %q is in the store and not listed", m.Kind, m.Name)
		}
	}
	for id, n := range pauses {
		if n > 1 {
			w.t.Errorf("%s has %d pauses", id, n)
		}
	}
	if dirs := w.dirs("store/snapshots"); len(dirs) != len(manifests) {
		w.t.Errorf("%d snapshots in the store, %d are whole", len(dirs), len(manifests))
	}
	if problems, err := w.store.Verify(context.Background(), nil); err != nil || len(problems) > 0 {
		w.t.Errorf("verify: %v, %v", problems, err)
	}
}

func (w *world) dirs(path string) []string {
	entries, err := os.ReadDir(filepath.Join(w.Dir, path))
	w.must(err)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func (w *world) overlays() []string {
	files, _ := filepath.Glob(filepath.Join(w.Dir, "sandboxes", "*", "overlay*"))
	var out []string
	for _, f := range files {
		out = append(out, filepath.Base(filepath.Dir(f)))
	}
	return out
}

// clear removes all there is; nothing may remain of it.
func (w *world) clear() {
	w.t.Helper()
	for _, i := range w.e.List() {
		w.must(w.destroy(i.ID))
	}
	list, err := w.e.Templates()
	w.must(err)
	for _, m := range list {
		if m.Kind == snapshot.KindSnapshot {
			w.must(w.deleteSnapshot(m.Name))
		}
	}
	w.nothingLeaked()
	if images := w.dirs("store/images"); len(images) != 1 {
		w.t.Errorf("%d images are left, want the base's alone", len(images))
	}
	if !bytes.Equal([]byte(strings.Join(w.Wrong(), "\n")), nil) {
		w.t.Errorf("done what must not be: %v", w.Wrong())
	}
}

// copyFile fills the state of a transaction.
func copyFile(txn *snapshot.Txn, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	f, err := txn.StateFile()
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return err
}
