package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// compactingServer compacts whatever is read from more than two generations.
func compactingServer(t *testing.T) (*harness.Server, *syncBuffer) {
	t.Helper()
	requireHost(t)
	dir, err := os.MkdirTemp(harness.DevDir(), "e-")
	if err != nil {
		t.Fatal(err)
	}
	log := &syncBuffer{}
	s := loggedServerIn(t, dir, log, "--compact-above", "2")
	if err := makeWarm(timeout(t, 5*time.Minute), s); err != nil {
		t.Fatal(err)
	}
	return s, log
}

// generation changes a sandbox's memory and disk and takes it through a pause.
func generation(t *testing.T, s *harness.Server, id string, g int) keeperAnswer {
	t.Helper()
	ask(t, s, id, "remake")
	a := ask(t, s, id, fmt.Sprintf("set generation %d", g))
	sh(t, s, id, fmt.Sprintf(`mkdir -p /home/user/work && cd /home/user/work && head -c 2M /dev/urandom > g%d && md5sum g%d >> sums`, g%4, g%4)+
		fmt.Sprintf(` && tac sums | awk '!seen[$2]++' > new && mv new sums && [ -s sums ] # %d`, g))
	pause(t, s, id)
	return a
}

// unharmed checks memory and disk, past the guest's own cache.
func unharmed(t *testing.T, s *harness.Server, id string, want keeperAnswer) {
	t.Helper()
	if a := ask(t, s, id, "stat"); a.PID != want.PID || a.Made != want.Made || a.Value != want.Value {
		t.Errorf("%s: %+v, want %+v", id, a, want)
	}
	sh(t, s, id, "sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'; cd /home/user/work && md5sum --quiet -c sums")
}

func verified(t *testing.T, s *harness.Server) {
	t.Helper()
	if out, code := cli(t, s, "store", "verify", "--dir", s.Dir); code != 0 {
		t.Errorf("store verify: %s", out)
	}
}

// The image that a sandbox runs from is compacted, switched and swept beside
// it: it reads what it has not touched yet as if nothing had been.
func TestCompactionLeavesARunningSandboxAlone(t *testing.T) {
	s, log := compactingServer(t)
	sb := spawn(t, s).ID
	compactions := func() int { return bytes.Count(log.bytes(), []byte("image compacted")) }
	beside := 0 // a running sandbox, so many generations were compacted
	for g := 0; g < 12 && beside < 2; g++ {
		want := generation(t, s, sb, g)
		before := compactions()
		resume(t, s, sb)
		vm := s.VM(sb)
		// Not every generation leaves something to compact.
		if harness.Eventually(10*time.Second, func() bool { return compactions() > before }) {
			beside++
		}
		unharmed(t, s, sb, want)
		if now := s.VM(sb); vm == nil || now == nil || now.PID != vm.PID {
			t.Errorf("generation %d: the VM was %+v and is %+v", g, vm, now)
		}
	}
	if beside == 0 {
		t.Fatal("nothing was ever compacted beside the running sandbox")
	}
	verified(t, s)
	// The server knows what it needs; what it does not need has gone.
	if out, code := cli(t, s, "store", "gc", "--dry-run", "--dir", s.Dir); code != 0 || !strings.Contains(out, "would be freed") {
		t.Errorf("store gc --dry-run: exit code %d: %s", code, out)
	}
}

// The server dies whenever a compaction is seen under way; its plan goes on, or
// is made anew, and nobody's memory or disk is harmed.
func TestKilledInTheMiddleOfCompactions(t *testing.T) {
	s, log := compactingServer(t)
	sb := spawn(t, s).ID
	killed := 0
	for g := 0; g < 12 && killed < 3; g++ {
		done := bytes.Count(log.bytes(), []byte("image compacted"))
		want := generation(t, s, sb, g)
		seen, limit := false, time.Second
		if g >= 2 { // now there is something to compact
			limit = 30 * time.Second
		}
		harness.Eventually(limit, func() bool {
			seen = compacting(t, s)
			return seen || bytes.Count(log.bytes(), []byte("image compacted")) > done
		})
		if seen {
			s.Kill()
			killed++
			t.Logf("generation %d: killed while the image was copied", g)
			if err := s.Restart(timeout(t, 2*time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
		verified(t, s)
		resume(t, s, sb)
		unharmed(t, s, sb, want)
	}
	if killed == 0 {
		t.Fatal("no compaction was ever seen under way")
	}
	// What was cut off is done in the end.
	pause(t, s, sb)
	if !harness.Eventually(time.Minute, func() bool { return !compacting(t, s) }) {
		t.Error("a plan stays half done")
	}
	if n := bytes.Count(log.bytes(), []byte("image compacted")); n == 0 {
		t.Error("no compaction came to its end")
	}
	verified(t, s)
	resume(t, s, sb)
}

// compacting reports whether an image's plan is written and not carried out.
func compacting(t *testing.T, s *harness.Server) bool {
	t.Helper()
	plans, err := filepath.Glob(filepath.Join(s.Dir, "store", "images", "*", "compaction"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range plans {
		b, err := os.ReadFile(p)
		if err == nil && bytes.Contains(b, []byte(`"header_sha256":""`)) {
			return true
		}
	}
	return false
}
