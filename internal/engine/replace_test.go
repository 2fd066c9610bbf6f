package engine_test

import (
	"context"
	"fmt"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

func (w *world) replace(id, name string) error {
	_, _, err := w.e.SnapshotAs(w.t.Context(), engine.SnapshotSpec{Sandbox: id, Name: name, Replace: true})
	return err
}

// oneSnapshot checks that one snapshot has the name, that a sandbox can be made
// of it, and that its memory has one of the marks.
func (w *world) oneSnapshot(name string, marks ...uint64) {
	w.t.Helper()
	manifests, errs := w.store.Manifests()
	n := 0
	for _, m := range manifests {
		if m.Name == name && m.Kind == snapshot.KindSnapshot {
			n++
		}
	}
	if n != 1 || len(errs) > 0 {
		w.t.Errorf("%d snapshots are called %s: %v", n, name, errs)
	}
	w.must(w.tryCreate("child", name))
	defer func() { w.must(w.destroy("child")) }()
	w.marks["child"] = 0
	for _, m := range marks {
		w.marks["child"] = m
		var got [8]byte
		w.must(w.ReadMemory("child", got[:], markOffset))
		if le(got) == m {
			w.same("child")
			delete(w.marks, "child")
			return
		}
	}
	w.t.Errorf("a sandbox of %s has none of the marks %v", name, marks)
	delete(w.marks, "child")
}

func le(b [8]byte) (n uint64) {
	for i, x := range b {
		n |= uint64(x) << (8 * i)
	}
	return n
}

// A snapshot that takes another's name stands for it once it is durable; what
// was made from the old one goes on.
func TestASnapshotTakesTheNameOfAnother(t *testing.T) {
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	w.mark("a")
	old := w.marks["a"]
	w.must(w.replace("a", "s"))
	w.create("kept", "s")
	w.marks["kept"] = old
	for range 3 {
		w.mark("a")
		w.must(w.replace("a", "s"))
	}
	w.idle()
	w.oneSnapshot("s", w.marks["a"])
	w.same("kept")
	w.must(w.pause("kept"))
	w.must(w.pause("a"))
	w.must(w.replace("kept", "s")) // of one that is paused
	w.idle()
	w.oneSnapshot("s", old)
	w.same("a")
	if err := w.snapshot("a", "s"); !already(err) {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := w.replace("a", "base"); err == nil {
		t.Error("a base gave way")
	}
	w.nothingLeaked()
}

// TestACrashWhileASnapshotIsReplacedLeavesOne: the old one or the new one, after
// each step of making the one and removing the other.
func TestACrashWhileASnapshotIsReplacedLeavesOne(t *testing.T) {
	t.Parallel()
	for _, op := range engine.Steps(false) {
		if op.Op != engine.OpSnapshot && op.Op != engine.OpSnapshotPaused && op.Op != engine.OpDeleteSnapshot {
			continue
		}
		for _, step := range op.Steps {
			t.Run(fmt.Sprintf("%s/%s", op.Op, step), func(t *testing.T) {
				w := newWorld(t, snapshot.CompactionPolicy{})
				w.create("a", "base")
				w.mark("a")
				old := w.marks["a"]
				w.must(w.snapshot("a", "s"))
				w.mark("a")
				if op.Op == engine.OpSnapshotPaused {
					w.must(w.pause("a"))
				}
				w.crashIn(op.Op, step, func() error { return w.replace("a", "s") })
				w.must(w.open())
				w.oneSnapshot("s", old, w.marks["a"])
				w.must(w.replace("a", "s"))
				w.idle()
				w.oneSnapshot("s", w.marks["a"])
				w.same("a")
				w.must(w.e.Sweep(context.Background()))
				w.nothingLeaked()
			})
		}
	}
}
