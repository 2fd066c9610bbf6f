package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// warmServer is a server of the test's own with the snapshot warm.
func warmServer(t *testing.T, args ...string) *harness.Server {
	t.Helper()
	s := ownServer(t, args...)
	if err := makeWarm(timeout(t, 5*time.Minute), s); err != nil {
		t.Fatal(err)
	}
	return s
}

// restart starts the server again. The first exec after it says that it serves
// must succeed: a server that serves has taken over what ran. How long that
// takes is for the benchmark to say.
func restart(t *testing.T, s *harness.Server, id string) {
	t.Helper()
	if err := s.Restart(timeout(t, 2*time.Minute)); err != nil {
		t.Fatalf("restart: %v", err)
	}
	if _, err := s.Exec(timeout(t, time.Minute), id, client.ExecRequest{Cmd: "true"}); err != nil {
		t.Errorf("the first exec in %s after the server serves again: %v", id, err)
	}
}

// herd is a set of sandboxes and what their keepers said before the crashes.
type herd struct {
	s      *harness.Server
	was    map[string]keeperAnswer
	paused string
	aside  string // paused too, and the test's own affair
}

// check asks every running member whether it is still what it was.
func (h herd) check(t *testing.T) {
	t.Helper()
	for id, want := range h.was {
		sb, err := h.s.GetSandbox(t.Context(), id)
		if err != nil {
			t.Errorf("get %s: %v", id, err)
			continue
		}
		status := client.StatusRunning
		if id == h.paused {
			status = client.StatusPaused
		}
		if sb.Status != status {
			t.Errorf("%s is %s (%s), want %s", id, sb.Status, sb.Error, status)
		} else if id != h.paused {
			h.same(t, id, want)
		}
	}
}

func (h herd) same(t *testing.T, id string, want keeperAnswer) {
	t.Helper()
	if a := ask(t, h.s, id, "stat"); a.PID != want.PID || a.Made != want.Made || a.Value != id {
		t.Errorf("%s: %+v, was %+v", id, a, want)
	}
}

func TestCrashesLoseNoSandbox(t *testing.T) {
	s := warmServer(t)
	running, paused := spawn(t, s).ID, spawn(t, s).ID
	booted := create(t, s, client.CreateSandboxRequest{Metadata: map[string]string{"kind": "booted"}}).ID
	if err := startKeeper(timeout(t, time.Minute), s, booted, 8); err != nil {
		t.Fatal(err)
	}
	h := herd{s: s, was: map[string]keeperAnswer{}, paused: paused}
	for _, id := range []string{running, paused, booted} {
		ask(t, s, id, "remake")
		h.was[id] = ask(t, s, id, "set "+id)
	}
	pause(t, s, paused)
	vm := s.VM(running).PID
	sameVM := func(t *testing.T) {
		t.Helper()
		if now := s.VM(running); now == nil || now.PID != vm {
			t.Errorf("the VM's process was %d and is %+v", vm, now)
		}
	}

	t.Run("the server", func(t *testing.T) {
		counting := startCounting(t, s, running)
		s.Kill()
		restart(t, s, running)
		counting.goesOn(t, s, running)
		sameVM(t)
		h.check(t)
	})
	t.Run("the pager, in the middle of work", func(t *testing.T) {
		killPagerAtWork(t, s)
		h.check(t)
	})
	t.Run("the server and the pager", func(t *testing.T) {
		p := s.Pager()
		s.Kill()
		p.Kill()
		restart(t, s, running)
		sameVM(t)
		h.check(t)
	})
	t.Run("a planned end", func(t *testing.T) {
		if err := s.Stop(); err != nil {
			t.Errorf("end: %v", err)
		}
		sameVM(t) // SIGTERM leaves sandboxes running
		restart(t, s, running)
		h.check(t)
	})
	t.Run("the database lost", func(t *testing.T) {
		loseDatabase(t, s)
		if !harness.Eventually(time.Minute, func() bool {
			page, err := s.ListSandboxes(t.Context(), client.ListSandboxesOptions{})
			return err == nil && len(page.Sandboxes) >= 3
		}) {
			t.Fatal("the sandboxes are not found again")
		}
		h.check(t)
		sb, err := s.GetSandbox(t.Context(), booted)
		if err != nil || sb.Metadata["kind"] != "booted" || sb.Template != "base" {
			t.Errorf("found again as %+v, %v", sb, err)
		}
		if _, err := s.GetSnapshot(t.Context(), warm); err != nil {
			t.Errorf("the snapshot: %v", err)
		}
		spawn(t, s)
	})
	t.Run("the journal of a pause lost", func(t *testing.T) {
		s.Kill()
		if err := os.RemoveAll(filepath.Join(s.Dir, "sandboxes", paused)); err != nil {
			t.Fatal(err)
		}
		restart(t, s, running)
		h.check(t)
	})
	t.Run("a VM", func(t *testing.T) {
		killVM(t, s)
		h.check(t)
	})
	// After all that the paused one comes back whole.
	resume(t, s, paused)
	h.same(t, paused, h.was[paused])
}

// killPagerAtWork kills the pager three times while a fresh clone, whose
// memory is still being fetched, reads and writes its disk past its cache.
func killPagerAtWork(t *testing.T, s *harness.Server) {
	t.Helper()
	fresh := spawn(t, s).ID
	ctx := timeout(t, 2*time.Minute)
	var wg sync.WaitGroup
	errs := make([]error, 3)
	for i, line := range []string{
		`cd /home/user && for i in 1 2 3; do head -c 8M /dev/urandom > w; sync; md5sum w > w.sum
			sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'; md5sum --quiet -c w.sum || exit 1; done`,
		"sudo find /usr/lib/python3* -type f -print0 | sudo xargs -0 cat | md5sum",
	} {
		wg.Go(func() { _, errs[i] = s.Sh(ctx, fresh, line) })
	}
	wg.Go(func() { _, errs[2] = askKeeper(ctx, s, fresh, "stat") })
	for range 3 {
		p := s.Pager()
		if p == nil {
			t.Fatal("no pager runs")
		}
		p.Kill()
		if !harness.Eventually(time.Minute, func() bool { n := s.Pager(); return n != nil && n.PID != p.PID }) {
			t.Fatal("no new pager comes up")
		}
		time.Sleep(700 * time.Millisecond) // the work goes on: the promise is about any moment
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
}

// counting is a command that counts on, and what it was heard to say last.
type counting struct{ pid, said int }

// startCounting starts the command and hears a part of what it says.
func startCounting(t *testing.T, s *harness.Server, id string) *counting {
	t.Helper()
	st, err := s.ExecStream(timeout(t, time.Minute), id, client.ExecRequest{
		Cmd: "sh", Args: []string{"-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	c := &counting{}
	c.hear(t, st, 3)
	return c
}

// hear takes in some outputs and checks that the numbers only grow.
func (c *counting) hear(t *testing.T, st *client.Stream, n int) {
	t.Helper()
	for n > 0 {
		ev, err := st.Recv()
		if err != nil {
			t.Fatalf("after %d: %v", c.said, err)
		}
		switch ev.Type {
		case client.EventStart:
			c.pid = ev.PID
		case client.EventStdout:
			for _, f := range strings.Fields(string(ev.Data)) {
				if now, err := strconv.Atoi(f); err != nil || now <= c.said {
					t.Fatalf("it says %q after %d", f, c.said)
				} else {
					c.said = now
				}
			}
			n--
		default:
			t.Fatalf("after %d: %+v", c.said, ev)
		}
	}
}

// goesOn picks the output up again and ends the command.
func (c *counting) goesOn(t *testing.T, s *harness.Server, id string) {
	t.Helper()
	st, err := s.AttachStream(timeout(t, time.Minute), id, c.pid)
	if err != nil {
		t.Fatalf("pick the output up again: %v", err)
	}
	defer st.Close()
	c.hear(t, st, 3)
	if err := st.Stop(); err != nil {
		t.Errorf("stop what was picked up: %v", err)
	}
	for {
		ev, err := st.Recv()
		if err != nil {
			t.Fatalf("no end of what was stopped: %v", err)
		}
		if ev.Type == client.EventExit {
			return
		}
	}
}

func loseDatabase(t *testing.T, s *harness.Server) {
	t.Helper()
	s.Kill()
	files, _ := filepath.Glob(filepath.Join(s.Dir, "wrenn.db*"))
	if len(files) == 0 {
		t.Fatal("there is no database")
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Restart(timeout(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
}

func killVM(t *testing.T, s *harness.Server) {
	t.Helper()
	victim := spawn(t, s)
	was := ask(t, s, victim.ID, "set before the pause")
	pause(t, s, victim.ID)
	resume(t, s, victim.ID)
	ask(t, s, victim.ID, "set after it")
	s.VM(victim.ID).Kill()
	var sb *client.Sandbox
	if !harness.Eventually(time.Minute, func() bool {
		sb, _ = s.GetSandbox(t.Context(), victim.ID)
		return sb != nil && sb.Status == client.StatusError
	}) {
		t.Errorf("after its VM was killed the sandbox is %+v", sb)
	}
	if sb == nil || !strings.Contains(sb.Error, "killed") {
		t.Errorf("the reason given is %+v", sb)
	}
	if _, err := s.Exec(t.Context(), victim.ID, client.ExecRequest{Cmd: "true"}); !client.IsInvalidState(err) {
		t.Errorf("exec: %v, want invalid_state", err)
	}
	resume(t, s, victim.ID) // from its last pause
	if a := ask(t, s, victim.ID, "stat"); a.PID != was.PID || a.Made != was.Made || a.Value != "before the pause" {
		t.Errorf("brought back: %+v, was %+v", a, was)
	}
	if err := s.DeleteSandbox(timeout(t, time.Minute), victim.ID); err != nil {
		t.Errorf("delete: %v", err)
	}
}

// operation is what a crash falls into.
type operation struct {
	name string
	do   func(ctx context.Context, i int) error
	span time.Duration // about as long as it takes
}

func TestCrashesInTheMiddleOfOperationsStrandNothing(t *testing.T) {
	s := warmServer(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	a, b := spawn(t, s).ID, spawn(t, s).ID
	h := herd{s: s, was: map[string]keeperAnswer{}, paused: b}
	for _, id := range []string{a, b} {
		h.was[id] = ask(t, s, id, "set "+id)
	}
	pause(t, s, b)
	another := func(ctx context.Context) (*client.Sandbox, error) {
		return s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: warm})
	}
	operations := []operation{
		{"pause", func(ctx context.Context, _ int) error { _, err := s.PauseSandbox(ctx, a); return err }, 250 * time.Millisecond},
		{"resume", func(ctx context.Context, _ int) error { _, err := s.ResumeSandbox(ctx, b); return err }, 600 * time.Millisecond},
		{"create", func(ctx context.Context, _ int) error { _, err := another(ctx); return err }, 600 * time.Millisecond},
		{"snapshot", func(ctx context.Context, i int) error {
			_, err := s.CreateSnapshot(ctx, a, fmt.Sprintf("crash%d", i))
			return err
		}, 250 * time.Millisecond},
		{"delete", func(ctx context.Context, _ int) error {
			sb, err := another(ctx)
			if err == nil {
				err = s.DeleteSandbox(ctx, sb.ID)
			}
			return err
		}, 900 * time.Millisecond},
	}
	for i := range 10 {
		op := operations[i%len(operations)]
		wait := time.Duration(rnd.Int64N(int64(op.span)))
		ended := beside(func() error { return op.do(context.Background(), i) })
		time.Sleep(wait) // the moment of the crash
		s.Kill()
		when := fmt.Sprintf("crash %d, %v into %s (which said: %v)", i, wait, op.name, <-ended)
		if err := s.Restart(timeout(t, time.Minute)); err != nil {
			t.Fatalf("%s: restart: %v", when, err)
		}
		h.settled(t, when, a)
	}
}

// beside runs f beside the caller.
func beside(f func() error) <-chan error {
	c := make(chan error, 1)
	go func() { c <- f() }()
	return c
}

// settled checks that every sandbox comes to rest in running or paused and
// works, puts a and the paused one back into their states, removes the others,
// and looks for what nobody owns.
func (h herd) settled(t *testing.T, when, a string) {
	t.Helper()
	ctx := timeout(t, 2*time.Minute)
	var all []client.Sandbox
	if !harness.Eventually(time.Minute, func() bool {
		page, err := h.s.ListSandboxes(ctx, client.ListSandboxesOptions{})
		if err != nil {
			return false
		}
		all = page.Sandboxes
		for _, sb := range all {
			if sb.Status != client.StatusRunning && sb.Status != client.StatusPaused {
				return false
			}
		}
		return true
	}) {
		t.Fatalf("%s: some do not come to rest: %+v", when, all)
	}
	found := 0
	for _, sb := range all {
		if sb.ID == h.aside {
			continue
		}
		if sb.Status == client.StatusPaused && sb.ID != h.paused {
			resume(t, h.s, sb.ID)
			sb.Status = client.StatusRunning
		}
		want, ours := h.was[sb.ID]
		switch {
		case sb.Status != client.StatusRunning:
		case !ours: // made by what was cut off, perhaps without a keeper
			sh(t, h.s, sb.ID, "true")
		default:
			if got := ask(t, h.s, sb.ID, "stat"); got.PID != want.PID || got.Made != want.Made || got.Value != sb.ID {
				t.Errorf("%s: %s says %+v, was %+v", when, sb.ID, got, want)
			}
		}
		switch {
		case !ours:
			if err := h.s.DeleteSandbox(ctx, sb.ID); err != nil {
				t.Errorf("%s: delete %s: %v", when, sb.ID, err)
			}
			continue
		case sb.ID == h.paused && sb.Status == client.StatusRunning:
			pause(t, h.s, sb.ID)
		}
		found++
	}
	if found != len(h.was) {
		t.Fatalf("%s: of %d sandboxes there are %d: %+v", when, len(h.was), found, all)
	}
	h.noStrangers(t, when, a)
}

// noStrangers looks for what nobody owns while only a runs.
func (h herd) noStrangers(t *testing.T, when, a string) {
	t.Helper()
	vms := 0
	for _, p := range harness.ProcessesOf(filepath.Join(h.s.Dir, "sandboxes")) {
		vms++
		if !strings.Contains(p.Cmdline, "/"+a+"/") {
			t.Errorf("%s: the VM %d is nobody's: %.300s", when, p.PID, readable(p))
		}
	}
	if vms != 1 {
		t.Errorf("%s: %d VMs run, want 1", when, vms)
	}
	dirs := slices.DeleteFunc(names(t, filepath.Join(h.s.Dir, "sandboxes")), func(id string) bool { return id == h.aside })
	if len(dirs) != len(h.was) {
		t.Errorf("%s: directories of sandboxes: %v", when, dirs)
	}
	if records := names(t, filepath.Join(h.s.Dir, "run", "pager")); len(records) != 1 {
		t.Errorf("%s: the pager serves %v, want only %s", when, records, a)
	}
}

func readable(p harness.Process) string { return strings.ReplaceAll(p.Cmdline, "\x00", " ") }

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestASecondServerOnTheSameStateIsRefused(t *testing.T) {
	s := server(t)
	cmd := exec.CommandContext(timeout(t, time.Minute), filepath.Join(harness.Bin(), "wrenn"), "up", "--dir", s.Dir, "--listen", "127.0.0.1:0")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), s.Dir) {
		t.Errorf("a second server: %v: %s", err, out)
	}
	if err := s.Health(t.Context()); err != nil {
		t.Errorf("the first one: %v", err)
	}
}

func TestOnExitPausesOrDestroysAsTold(t *testing.T) {
	s := warmServer(t, "--on-exit", "pause")
	sb := spawn(t, s)
	was := ask(t, s, sb.ID, "set before the end")
	nothingRuns := func() {
		t.Helper()
		if err := s.Stop(); err != nil {
			t.Fatalf("end: %v", err)
		}
		for _, p := range harness.ProcessesOf(s.Dir) {
			t.Errorf("left: %d %.200s", p.PID, readable(p))
		}
	}
	nothingRuns()
	s.SetArgs("--on-exit", "destroy")
	if err := s.Restart(timeout(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if !harness.Eventually(time.Minute, func() bool {
		now, err := s.GetSandbox(t.Context(), sb.ID)
		return err == nil && now.Status == client.StatusPaused
	}) {
		t.Fatal("after the restart the sandbox is not paused")
	}
	resume(t, s, sb.ID)
	if a := ask(t, s, sb.ID, "stat"); a.PID != was.PID || a.Value != "before the end" {
		t.Errorf("after the restart: %+v, was %+v", a, was)
	}
	nothingRuns()
	if left := names(t, filepath.Join(s.Dir, "sandboxes")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
