package engine_test

import (
	"errors"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// TestAVMThatDiedGoesBackToItsLastPause, whatever becomes of the first attempt;
// where there is no pause, that is said and it can be deleted.
func TestAVMThatDiedGoesBackToItsLastPause(t *testing.T) {
	t.Parallel()
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	w.mark("a")
	w.must(w.pause("a"))
	w.must(w.resume("a", false))
	paused := w.marks["a"]
	w.mark("a")
	w.must(w.killVM("a"))
	if s := w.state("a"); s != engine.Failed {
		t.Fatalf("it is %s", s)
	}
	w.marks["a"] = paused

	told := errors.New("told to fail")
	w.failOnce(engine.OpResume, "vmm", told)
	if err := w.resume("a", false); !errors.Is(err, told) {
		t.Fatal(err)
	}
	w.hook(nil)
	w.settled(engine.Paused)
	w.must(w.resume("a", false))
	w.same("a")

	w.must(w.killVM("a"))
	w.crashIn(engine.OpResume, "record_vm", func() error { return w.resume("a", false) })
	w.must(w.open())
	w.settled(engine.Paused)
	w.same("a")
	w.must(w.destroy("a"))

	w.create("never", "base")
	w.must(w.killVM("never"))
	if err := w.resume("never", false); !errors.Is(err, engine.ErrState) || !strings.Contains(err.Error(), "never paused") {
		t.Errorf("%v; want a refusal that says why", err)
	}
	if s := w.state("never"); s != engine.Failed {
		t.Errorf("then it is %s", s)
	}
	w.clear()
}
