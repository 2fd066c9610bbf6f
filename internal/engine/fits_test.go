package engine_test

import (
	"errors"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/engine/enginetest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// manifestOf finds the one manifest of a kind.
func (w *world) manifestOf(kind string) snapshot.Manifest {
	w.t.Helper()
	manifests, errs := w.store.Manifests()
	for _, err := range errs {
		w.t.Error(err)
	}
	for _, m := range manifests {
		if m.Kind == kind {
			return m
		}
	}
	w.t.Fatalf("there is no manifest of kind %s", kind)
	return snapshot.Manifest{}
}

// TestManifestsNameKernelAndAgent: after a boot, after a restore, of a clone.
func TestManifestsNameKernelAndAgent(t *testing.T) {
	w := newWorld(t, snapshot.CompactionPolicy{})
	check := func(when, kind string) {
		t.Helper()
		m := w.manifestOf(kind)
		if m.VMM.KernelDigest != "one" || m.EnvdVersion != enginetest.EnvdVersion || m.NetworkLayout == "" {
			t.Errorf("%s: kernel %q, agent %q, network %q", when, m.VMM.KernelDigest, m.EnvdVersion, m.NetworkLayout)
		}
	}
	w.create("a", "base")
	w.must(w.pause("a"))
	check("a pause after a boot", snapshot.KindPause)
	w.must(w.snapshot("a", "s"))
	check("a snapshot of it", snapshot.KindSnapshot)
	w.must(w.resume("a", false))
	w.must(w.pause("a"))
	check("the pause after a resume", snapshot.KindPause)
	w.must(w.destroy("a"))
	w.create("b", "s")
	w.must(w.pause("b"))
	check("the pause of a clone", snapshot.KindPause)
}

// TestWhatDoesNotFitIsRefusedInOneSentence: a snapshot of another host, by a
// create from it and a resume, which leave things as they are.
func TestWhatDoesNotFitIsRefusedInOneSentence(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*snapshot.Manifest)
		want   string
	}{
		"network": {func(m *snapshot.Manifest) { m.NetworkLayout = "tap9" }, `its network layout is "tap9" and this host's is "tap0 `},
		"agent":   {func(m *snapshot.Manifest) { m.EnvdVersion = "7.1" }, `its guest agent is version "7.1" and this host speaks to versions 0.x`},
		"VMM":     {func(m *snapshot.Manifest) { m.VMM.Version = "2.0" }, `its VMM version is "2.0" and this host's is "1.0"`},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, snapshot.CompactionPolicy{})
			w.create("a", "base")
			w.must(w.snapshot("a", "s"))
			w.rename("s", c.change)
			w.must(w.open())
			err := w.tryCreate("b", "s")
			if !errors.Is(err, engine.ErrState) || !errors.Is(err, vmm.ErrIncompatible) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want one sentence with %s", err, c.want)
			}
			if w.state("b") != absent {
				t.Error("something is left of it")
			}
		})
	}
}

// rename writes a snapshot's manifest again, changed, in place of the old one.
func (w *world) rename(name string, change func(*snapshot.Manifest)) {
	w.t.Helper()
	m := w.manifestOf(snapshot.KindSnapshot)
	old := m.ID
	txn, err := w.store.Begin()
	w.must(err)
	path, err := w.store.StatePath(old)
	w.must(err)
	w.must(copyFile(txn, path))
	change(&m)
	m.ID, m.Name = txn.ID(), name
	w.must(txn.Commit(w.t.Context(), m))
	w.must(w.store.Delete(w.t.Context(), old))
}
