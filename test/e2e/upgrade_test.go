package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// ticker writes to an open, unlinked file a hundred times a second, reads back
// what it wrote, and keeps the longest time that it stood still. A line in the
// FIFO asks for it, and starts it anew.
const ticker = `import os, threading, time
f = open("/tmp/ticks", "w+b"); os.unlink("/tmp/ticks")
state = {"gap": 0.0, "ticks": 0, "bad": 0}
def tick():
    last = time.monotonic()
    while True:
        time.sleep(0.01)
        n = state["ticks"]
        f.seek(n % 4096 * 8); f.write(n.to_bytes(8, "big")); f.flush()
        if n % 100 == 0: os.fsync(f.fileno())
        f.seek(n % 4096 * 8)
        if f.read(8) != n.to_bytes(8, "big"): state["bad"] += 1
        now = time.monotonic()
        state["gap"] = max(state["gap"], now - last); last = now
        state["ticks"] = n + 1
threading.Thread(target=tick, daemon=True).start()
os.mkfifo("/tmp/ask.new"); os.mkfifo("/tmp/answer"); os.rename("/tmp/ask.new", "/tmp/ask")
while True:
    open("/tmp/ask").read()
    with open("/tmp/answer", "w") as a: a.write(f'{os.getpid()} {state["ticks"]} {state["bad"]} {state["gap"]:.3f}')
    state["gap"] = 0.0
`

// ticks is what the ticker says.
type ticks struct {
	pid, ticks, bad int
	gap             time.Duration
}

func askTicker(t *testing.T, s *harness.Server, id string) ticks {
	t.Helper()
	f := strings.Fields(sh(t, s, id, "echo > /tmp/ask; cat /tmp/answer"))
	if len(f) != 4 {
		t.Fatalf("the ticker says %q", f)
	}
	var out ticks
	for i, into := range []*int{&out.pid, &out.ticks, &out.bad} {
		n, err := strconv.Atoi(f[i])
		if err != nil {
			t.Fatalf("the ticker says %q", f)
		}
		*into = n
	}
	gap, err := strconv.ParseFloat(f[3], 64)
	if err != nil {
		t.Fatalf("the ticker says %q", f)
	}
	out.gap = time.Duration(gap * float64(time.Second))
	return out
}

// otherVersion builds the program as another version.
func otherVersion(t *testing.T, version string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	build := exec.CommandContext(timeout(t, 5*time.Minute), "go", "build", "-trimpath",
		"-ldflags", "-X main.buildVersion="+version, "-o", filepath.Join(dir, "wrenn"), "./cmd/wrenn")
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build another version: %v\n%s", err, out)
	}
	// The same guest agent: the base template stays as it is.
	envd, err := filepath.Abs(filepath.Join(harness.Bin(), "envd"))
	if err == nil {
		err = os.Symlink(envd, filepath.Join(dir, "envd"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestAnUpgradeIsAShortStall ends the server with SIGTERM and starts another
// version, which replaces the pager too.
func TestAnUpgradeIsAShortStall(t *testing.T) {
	s := warmServer(t)
	next := otherVersion(t, "next")
	id := spawn(t, s).ID
	was := ask(t, s, id, "set before the upgrade")
	put(t, s, id, "/tmp/ticker.py", ticker)
	sh(t, s, id, "setsid python3 /tmp/ticker.py >/tmp/ticker.log 2>&1 </dev/null & while [ ! -p /tmp/ask ]; do sleep 0.1; done")
	// A busy machine may hold the guest up once; an upgrade that does it does so
	// every time.
	var gaps []time.Duration
	for _, bin := range []string{next, harness.Bin(), next} {
		gap := upgrade(t, s, id, bin)
		if gap <= 2*time.Second {
			gaps = nil
			break
		}
		gaps = append(gaps, gap)
	}
	if len(gaps) > 0 {
		t.Errorf("the guest stood still for %v", gaps)
	}
	if a := ask(t, s, id, "stat"); a.PID != was.PID || a.Value != "before the upgrade" || a.Counter <= was.Counter {
		t.Errorf("the keeper says %+v, was %+v", a, was)
	}
	pause(t, s, id)
	resume(t, s, id)
	if a := ask(t, s, id, "stat"); a.PID != was.PID {
		t.Errorf("after a pause under the next version: %+v, was %+v", a, was)
	}
}

// upgrade ends the server and starts the version that lies in bin, and returns
// how long the guest stood still.
func upgrade(t *testing.T, s *harness.Server, id, bin string) time.Duration {
	t.Helper()
	vm, pager := s.VM(id).PID, s.Pager().PID
	before := askTicker(t, s, id)
	usual := askTicker(t, s, id) // what the machine's load alone costs, and from now on anew
	if err := s.Stop(); err != nil {
		t.Fatalf("end: %v", err)
	}
	t.Setenv("WRENN_BIN", bin)
	began := time.Now()
	restart(t, s, id)
	took := time.Since(began)
	after := askTicker(t, s, id)
	t.Logf("first exec %v after the start; the guest stood still for at most %v (%v before)", took, after.gap, usual.gap)
	if p := s.Pager(); p == nil || p.PID == pager || !strings.Contains(p.Cmdline, bin) {
		t.Errorf("the pager is %+v, was %d; want the next version's", p, pager)
	}
	if now := s.VM(id); now == nil || now.PID != vm {
		t.Errorf("the VM's process was %d and is %+v", vm, now)
	}
	if after.pid != before.pid || after.ticks <= before.ticks || after.bad != 0 {
		t.Errorf("the ticker says %+v, said %+v", after, before)
	}
	return after.gap
}

func put(t *testing.T, s *harness.Server, id, path, content string) {
	t.Helper()
	if err := s.PutFile(timeout(t, time.Minute), id, path, strings.NewReader(content), client.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}
