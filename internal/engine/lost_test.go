package engine_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// TestAPauseWithoutItsJournalIsASandboxAgain: what is left of a journal is
// nothing, garbage, or an older one, of whatever state; the newest pause counts.
func TestAPauseWithoutItsJournalIsASandboxAgain(t *testing.T) {
	journal := func(w *world) string { return filepath.Join(w.Dir, "sandboxes", "a", "journal.json") }
	read := func(w *world) []byte {
		b, err := os.ReadFile(journal(w))
		w.must(err)
		return b
	}
	type harm func(w *world)
	for name, c := range map[string]struct {
		// first runs after the first pause, with a running again; its harm comes
		// after the second pause and the crash.
		first func(w *world) harm
	}{
		"its directory is lost": {func(*world) harm {
			return func(w *world) { w.must(os.RemoveAll(filepath.Dir(journal(w)))) }
		}},
		"it is lost": {func(*world) harm {
			return func(w *world) { w.must(os.Remove(journal(w))) }
		}},
		"it is cut off": {func(*world) harm {
			return func(w *world) { w.must(os.Truncate(journal(w), 100)) }
		}},
		"it is empty": {func(*world) harm {
			return func(w *world) { w.must(os.Truncate(journal(w), 0)) }
		}},
		"it is from the run before": {func(w *world) harm {
			old := read(w)
			return func(w *world) { w.must(os.WriteFile(journal(w), old, 0o600)) }
		}},
		"it is from the pause before": {func(w *world) harm {
			w.must(w.pause("a"))
			old := read(w)
			w.must(w.resume("a", false))
			return func(w *world) { w.must(os.WriteFile(journal(w), old, 0o600)) }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, snapshot.CompactionPolicy{})
			w.create("other", "base")
			w.mark("other")
			_, _, err := w.e.Create(t.Context(), engine.CreateSpec{
				ID: "a", Template: "base", MemoryMB: vmm.MinMemoryMB, Annotations: []byte(`{"k":"v"}`), Egress: &engine.Egress{DenyInternet: true},
			})
			w.must(err)
			w.must(w.pause("a"))
			w.must(w.resume("a", false))
			harm := c.first(w)
			w.mark("a")
			w.must(w.pause("a"))
			before, err := w.e.Get("a")
			w.must(err)
			token, err := w.e.AccessToken("a")
			w.must(err)
			w.idle()
			w.crash()
			harm(w)
			w.must(w.open())
			w.settled(engine.Paused)
			got, err := w.e.Get("a")
			w.must(err)
			if got.Generation != before.Generation || got.Template != "base" || got.MemoryMB != before.MemoryMB || string(got.Annotations) != `{"k":"v"}` || !got.CreatedAt.Equal(before.CreatedAt) || got.Error != "" {
				t.Errorf("found again as %+v, was %+v", got, before)
			}
			if again, _ := w.e.AccessToken("a"); again != token {
				t.Error("its token is another one")
			}
			w.same("a") // resumes it
			for index, id := range w.Network.Held() {
				if e := w.Network.Egress(index); id == "a" && (e == nil || !e.DenyInternet) {
					t.Errorf("it may reach %+v", e)
				}
			}
			w.same("other")
			w.must(w.open()) // and that lasts
			w.settled(engine.Running)
			w.clear()
		})
	}
}

// TestALostJournalOfARunKillsNothing: the VM cannot be taken over, and is left
// alone; with it gone the last pause counts; there is always a way out.
func TestALostJournalOfARunKillsNothing(t *testing.T) {
	setup := func(t *testing.T, pause bool) *world {
		w := newWorld(t, snapshot.CompactionPolicy{})
		w.create("a", "base")
		w.mark("a")
		if pause {
			w.must(w.pause("a"))
			w.must(w.resume("a", false))
		}
		// A process has no name yet for a moment after it was started.
		vm, _ := w.VM("a")
		w.until("its program runs", func() bool {
			cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", vm.PID))
			return err == nil && len(cmdline) > 0
		})
		w.crash()
		w.must(os.Remove(filepath.Join(w.Dir, "sandboxes", "a", "journal.json")))
		return w
	}
	for _, paused := range []bool{true, false} {
		w := setup(t, paused)
		w.must(w.open())
		i, err := w.e.Get("a")
		w.must(err)
		if _, lives := w.VM("a"); !lives || i.State != engine.Failed || !strings.Contains(i.Error, "runs (process") {
			t.Fatalf("its VM lives: %v; it is %+v", lives, i)
		}
		w.must(w.e.Sweep(t.Context()))
		w.must(w.destroy("a"))
		if _, lives := w.VM("a"); lives {
			t.Error("destroyed, its VM lives")
		}
		w.clear()

		w = setup(t, paused)
		w.must(w.open())
		w.must(w.Driver.End("a", vmm.ReasonProcess))
		w.must(w.open())
		if !paused {
			w.settled(engine.Failed)
			w.clear()
			continue
		}
		w.settled(engine.Paused)
		w.same("a")
		w.clear()
	}
}

// TestWhatIsDestroyedStaysSo: no older pause makes it a sandbox again.
func TestWhatIsDestroyedStaysSo(t *testing.T) {
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	w.must(w.pause("a"))
	// A pause that could not be removed when a newer one came.
	pauses := w.pausesOf("a")
	kept := filepath.Join(t.TempDir(), "kept")
	w.must(os.CopyFS(kept, os.DirFS(filepath.Join(w.Dir, "store/snapshots", pauses[0]))))
	w.must(w.resume("a", false))
	w.must(w.pause("a"))
	w.must(os.CopyFS(filepath.Join(w.Dir, "store/snapshots", pauses[0]), os.DirFS(kept)))
	if n := len(w.pausesOf("a")); n != 2 {
		t.Fatalf("there are %d pauses, want 2", n)
	}
	w.must(w.destroy("a"))
	if left := w.pausesOf("a"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	w.must(w.open())
	w.settled(absent)
}

// TestASnapshotOfAPauseKeepsNoJournal: it is made for others.
func TestASnapshotOfAPauseKeepsNoJournal(t *testing.T) {
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	w.must(w.pause("a"))
	w.must(w.snapshot("a", "s"))
	token, err := w.e.AccessToken("a")
	w.must(err)
	manifests, _ := w.store.Manifests()
	for _, m := range manifests {
		if has := strings.Contains(string(m.Annotations), token); has != (m.Kind == snapshot.KindPause) {
			t.Errorf("the token is in the %s %q: %v", m.Kind, m.Name, has)
		}
	}
	w.clear()
}

func (w *world) pausesOf(id string) []string {
	manifests, _ := w.store.Manifests()
	var out []string
	for _, m := range manifests {
		if m.Kind == snapshot.KindPause && m.SandboxID == id {
			out = append(out, m.ID.String())
		}
	}
	return out
}
