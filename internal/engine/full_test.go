package engine_test

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// fullFS is a disk that is full after some operations that take space, and
// stays so until room is made. What takes none goes on.
type fullFS struct {
	storage.OS
	left atomic.Int64 // operations until it is full
	hit  atomic.Bool
}

func (f *fullFS) room() error {
	if f.left.Add(-1) < 0 {
		f.hit.Store(true)
		return unix.ENOSPC
	}
	return nil
}

func (f *fullFS) fillAfter(n int64) { f.hit.Store(false); f.left.Store(n) }
func (f *fullFS) free()             { f.left.Store(1 << 60) }

func (f *fullFS) Create(name string) (storage.File, error) {
	if err := f.room(); err != nil {
		return nil, err
	}
	file, err := f.OS.Create(name)
	return fullFile{file, f}, err
}

func (f *fullFS) OpenRW(name string) (storage.File, error) {
	file, err := f.OS.OpenRW(name)
	return fullFile{file, f}, err
}

func (f *fullFS) Mkdir(name string) error {
	if err := f.room(); err != nil {
		return err
	}
	return f.OS.Mkdir(name)
}

type fullFile struct {
	storage.File
	fs *fullFS
}

func (f fullFile) Write(p []byte) (int, error) {
	if err := f.fs.room(); err != nil {
		return 0, err
	}
	return f.File.Write(p)
}

func (f fullFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fs.room(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

// TestAFullDiskAtAnyWriteLosesNothing: the disk fills at each write of the
// store in turn and stays full. Whoever runs goes on, what was committed stays,
// nothing is left over, and with room again the operation works.
func TestAFullDiskAtAnyWriteLosesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		do       func(w *world) error
		old, new engine.State
	}{
		"pause":    {func(w *world) error { return w.pause("a") }, engine.Running, engine.Paused},
		"snapshot": {func(w *world) error { return w.snapshot("a", "t") }, engine.Running, engine.Running},
	} {
		t.Run(name, func(t *testing.T) {
			for n := int64(0); ; n++ {
				disk := &fullFS{}
				disk.free()
				w := newWorldOn(t, disk, snapshot.CompactionPolicy{})
				w.create("a", "base")
				w.mark("a")
				w.must(w.pause("a"))
				w.must(w.resume("a", false))
				w.mark("a")
				w.idle()
				disk.fillAfter(n)
				err := c.do(w)
				w.idle()
				disk.free()
				if err == nil {
					if n < 5 {
						t.Errorf("it takes only %d writes", n)
					}
					w.settled(c.new)
					return // it needed no more
				}
				if !errors.Is(err, unix.ENOSPC) {
					t.Errorf("after %d writes: %v, want a full disk", n, err)
				}
				w.settled(c.old)
				w.same("a")
				w.must(c.do(w))
				w.settled(c.new)
				w.same("a")
				w.clear()
				if t.Failed() {
					return
				}
			}
		})
	}
}

// TestAJournalThatCannotBeWrittenLeavesAWayOut: the journal's disk is full from
// some step of a pause or a resume on, whatever that step is; the operation
// fails and is undone, in memory and for the next engine.
func TestAJournalThatCannotBeWrittenLeavesAWayOut(t *testing.T) {
	for _, op := range []engine.OpSteps{{Op: engine.OpPause}, {Op: engine.OpResume}, {Op: engine.OpSnapshot}} {
		for _, l := range engine.Steps(false) {
			if l.Op == op.Op {
				op.Steps = l.Steps
			}
		}
		for _, step := range op.Steps {
			t.Run(string(op.Op)+"/"+step, func(t *testing.T) {
				w := newWorld(t, snapshot.CompactionPolicy{})
				w.create("a", "base")
				w.mark("a")
				old := engine.Running
				do := func() error { return w.pause("a") }
				switch op.Op {
				case engine.OpResume:
					w.must(w.pause("a"))
					old, do = engine.Paused, func() error { return w.resume("a", false) }
				case engine.OpSnapshot:
					do = func() error { return w.snapshot("a", "t") }
				}
				// Where the journal's new copy is to be written stands something
				// that cannot be replaced.
				block := filepath.Join(w.Dir, "sandboxes", "a", "journal.json.tmp")
				w.hook(func(o engine.Op, s string) error {
					if o == op.Op && s == step {
						return os.MkdirAll(filepath.Join(block, "full"), 0o700)
					}
					return nil
				})
				err := do()
				w.hook(nil)
				if err != nil {
					if s := w.state("a"); s != old {
						t.Errorf("it is %s, was %s", s, old)
					}
				}
				w.must(os.RemoveAll(block))
				w.idle()
				state := w.state("a")
				w.settled(state)
				w.must(w.open()) // and the next engine thinks the same
				w.settled(engine.Running, engine.Paused)
				if op.Op != engine.OpPause && w.state("a") != state {
					t.Errorf("the next engine says %s, this one said %s", w.state("a"), state)
				}
				w.same("a")
				w.clear()
			})
		}
	}
}

// TestADestroyNeedsNoRoom: on a disk without a single free block, which the
// journals are on, whoever runs or is paused can be destroyed, and nothing of it
// is left.
func TestADestroyNeedsNoRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a small disk; test/e2e has the same on real VMs")
	}
	w := newWorld(t, snapshot.CompactionPolicy{})
	dir := filepath.Join(w.Dir, "sandboxes")
	w.must(unix.Mount("wrenn-test", dir, "tmpfs", 0, "size=8m,mode=711"))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	w.create("a", "base")
	w.create("paused", "base")
	w.must(w.pause("paused"))
	ballast := filepath.Join(dir, "ballast")
	fill := func() {
		t.Helper()
		f, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		w.must(err)
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"paused", "a"} {
		fill()
		if err := w.destroy(id); err != nil {
			t.Errorf("destroy %s: %v", id, err)
		}
	}
	w.must(os.Remove(ballast))
	w.idle()
	w.clear()
}
