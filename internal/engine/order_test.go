package engine_test

import (
	"slices"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// What is known of a sandbox's starts outlives a pause, which makes another
// image, and compactions, which make another one of that.
func TestWhatStartsNeedOutlivesPausesAndCompactions(t *testing.T) {
	w := newWorld(t, snapshot.CompactionPolicy{MaxBuilds: 2})
	w.create("a", "base")
	var compactions atomic.Int32
	w.hook(func(op engine.Op, step string) error {
		if op == engine.OpCompact && step == "drop_image" {
			compactions.Add(1)
		}
		return nil
	})
	for n := range int64(6) {
		if n > 0 {
			w.must(w.resume("a", false))
		}
		w.must(w.WriteMemory("a", []byte{byte(n + 1)}, 1<<20+n<<16))
		w.must(w.pause("a"))
		w.idle()
		all, _ := w.store.Manifests()
		m := all[slices.IndexFunc(all, func(m snapshot.Manifest) bool { return m.Kind == snapshot.KindPause })]
		// The first life began with no image.
		if n > 0 && !w.Pager.KnowsOrder(m.Memory.ID) {
			t.Errorf("after pause %d nothing is known of starts from image %v", n+1, m.Memory.ID)
		}
	}
	if compactions.Load() == 0 {
		t.Error("nothing was compacted")
	}
}

// A VMM that maps the shared image is read ahead for while it starts; nobody
// needs to say that it runs.
func TestNobodySaysThatAVMOfSharedMemoryRuns(t *testing.T) {
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	w.must(w.pause("a"))
	w.must(w.resume("a", false))
	w.must(w.snapshot("a", "s"))
	w.create("b", "s")
	w.must(w.open()) // the calls of the engine before this one are over
	if ids := w.Pager.ReadsAhead(); len(ids) != 0 {
		t.Errorf("it was said of %v", ids)
	}
}
