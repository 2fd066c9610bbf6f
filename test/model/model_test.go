package model

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// defaultSteps are some minutes on two cores without KVM.
const defaultSteps = 100

// TestModel does random operations under random faults. WRENN_MODEL_SEED and
// WRENN_MODEL_STEPS repeat a run; WRENN_SOAK makes it last so long instead.
func TestModel(t *testing.T) {
	w := newWorld(t)
	steps := number(t, "WRENN_MODEL_STEPS", defaultSteps)
	w.note("seed %d", w.seed)
	w.begin()
	until, soak := soakEnd(t)
	for n := uint64(1); soak && time.Now().Before(until) || !soak && n <= steps; n++ {
		w.tally.steps++
		w.step(rand.New(rand.NewPCG(w.seed, n)))
	}
	w.end()
	t.Logf("seed %d: %v", w.seed, w.tally)
}

// step does one operation, in one of five cases under a fault.
func (w *world) step(r *rand.Rand) {
	if r.IntN(5) == 0 {
		f := w.drawFault(r)
		_, d := w.draw(r)
		w.struck(r, f, d)
		return
	}
	_, d := w.draw(r)
	w.calm(d)
	if w.tally.steps%20 == 0 {
		w.verify()
	}
}

func soakEnd(t *testing.T) (time.Time, bool) {
	t.Helper()
	v := os.Getenv("WRENN_SOAK")
	if v == "" {
		return time.Time{}, false
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		t.Fatalf("WRENN_SOAK=%q: want a duration such as 30m", v)
	}
	return time.Now().Add(d), true
}

// requireHost skips where sandboxes cannot run at all.
func requireHost(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the server makes network namespaces and serves page faults")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU (make setup):", err)
	}
	if _, err := os.Stat(filepath.Join(harness.Bin(), "wrenn")); err != nil {
		t.Skip("needs the programs (make build):", err)
	}
	if err := os.MkdirAll(harness.DevDir(), 0o700); err != nil {
		t.Fatal(err)
	}
}

// newServer starts a server on a small disk of its own; at the end of the test
// nothing of it may be left.
func newServer(t *testing.T) *harness.Server {
	t.Helper()
	requireHost(t)
	dir, release, err := harness.SmallDisk(diskMiB)
	if err != nil {
		t.Fatal(err)
	}
	log := &lockedBuffer{}
	ctx, cancel := within(15 * time.Minute)
	defer cancel()
	s, err := harness.Start(ctx, harness.Options{
		Dir: dir, Output: log,
		Args: []string{"--network-prefix", prefix, "--network-pool", "2", "--rate-limit", "-1", "--on-exit", "destroy"},
	})
	t.Cleanup(func() {
		if s != nil && s.Client != nil && t.Failed() {
			_ = s.Stop() // the verdict is there already
		}
		if t.Failed() {
			t.Logf("the server's log:\n%s", log.tail(32<<10))
			b, _ := os.ReadFile(filepath.Join(dir, "run", "pager.log"))
			t.Logf("the pager's log:\n%s", b[max(0, len(b)-8<<10):])
		}
		s.Wipe()
		if err := release(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatalf("start the server: %v", err)
	}
	return s
}

// newWorld starts a server and an oracle.
func newWorld(t *testing.T) *world {
	t.Helper()
	return &world{
		t: t, s: newServer(t), seed: number(t, "WRENN_MODEL_SEED", rand.Uint64N(1e9)),
		tally: tally{injected: map[string]int{}, survived: map[string]int{}},
	}
}

// begin boots the one sandbox that all others come from, and freezes it.
func (w *world) begin() {
	w.t.Helper()
	ctx, cancel := within(5 * time.Minute)
	defer cancel()
	sb, err := w.s.CreateSandbox(ctx, client.CreateSandboxRequest{MemoryMB: 256, AutoPause: true})
	if err != nil {
		w.t.Fatalf("boot base: %v", err)
	}
	if err := startLedger(ctx, w.s, sb.ID, ledgerBlocks); err != nil {
		w.t.Fatal(err)
	}
	a, err := askLedger(ctx, w.s, sb.ID, question{"check"})
	if err != nil {
		w.t.Fatal(err)
	}
	w.born = a.Born
	w.adopt(*sb, newHolding(ledgerBlocks))
	d := drawSnapshot(w, rand.New(rand.NewPCG(w.seed, 0)))
	w.calm(d)
}

// end brings everything back to life, looks into it, removes it, and looks at
// what is left of the host.
func (w *world) end() {
	w.t.Helper()
	w.verify()
	ctx, cancel := within(10 * time.Minute)
	defer cancel()
	for len(w.boxes) > 0 {
		b := w.boxes[0]
		if !b.running {
			if _, err := w.s.ResumeSandbox(ctx, b.id); err != nil {
				w.fail("at the end: resume %s: %v", b.label, err)
			}
			w.check(b)
		}
		if err := w.s.DeleteSandbox(ctx, b.id); err != nil {
			w.fail("at the end: delete %s: %v", b.label, err)
		}
		w.remove(b)
	}
	for _, s := range w.snaps {
		sb, err := w.s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: s.name})
		if err != nil {
			w.fail("at the end: spawn from %s: %v", s.name, err)
		}
		w.check(w.adopt(*sb, s.holds))
		if err := errors.Join(w.s.DeleteSandbox(ctx, sb.ID), w.s.DeleteSnapshot(ctx, s.name)); err != nil {
			w.fail("at the end: delete %s: %v", s.name, err)
		}
	}
	w.boxes, w.snaps = nil, nil
	w.verify()
	cleanHost(w.t, w.s)
}

// cleanHost ends a server that has nothing any more and looks for what is left:
// the base template's disk is one manifest and one image.
func cleanHost(t *testing.T, s *harness.Server) {
	t.Helper()
	for dir, want := range map[string]int{"sandboxes": 0, "store/snapshots": 1, "store/images": 1, "run/pager": 0} {
		entries, err := os.ReadDir(filepath.Join(s.Dir, dir))
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) != want {
			t.Errorf("left in %s: %v, want %d", dir, entries, want)
		}
	}
	if err := s.Stop(); err != nil {
		t.Errorf("the server's end: %v", err)
	}
	var left []string
	if !harness.Eventually(2*time.Minute, func() bool {
		var err error
		if left, err = harness.Leftovers(s.Dir, prefix); err != nil {
			t.Fatal(err)
		}
		return len(left) == 0
	}) {
		t.Errorf("left on the host: %q", left)
	}
}

// lockedBuffer takes a server's output while the test reads it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

var _ io.Writer = (*lockedBuffer)(nil)

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) tail(n int) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.b.Bytes()
	return string(p[max(0, len(p)-n):])
}
