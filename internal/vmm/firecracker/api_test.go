package firecracker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker/fctest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// TestAPIOnFake and TestVMAPI run the same conversation with the fake server
// and with Firecracker, so that the fake stays like it.
func TestAPIOnFake(t *testing.T) {
	dir := t.TempDir()
	kernel := filepath.Join(dir, "vmlinux")
	if err := os.WriteFile(kernel, []byte("a kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	testAPI(t, newAPI(serveFake(t, "1.12.1"), os.Getpid(), testLimits), kernel)
}

func TestVMAPI(t *testing.T) {
	vmmtest.RequireKVM(t)
	d := New(Options{Direct: true})
	h, err := d.ready(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := newLaunch(d.o, h, vmm.HostArgs{ID: "api", Dir: t.TempDir()}, vmm.Spec{VCPUs: 1, MemoryMB: 128}, nil)
	if err != nil {
		t.Fatal(err)
	}
	m, err := l.start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Kill(context.Background()) }()
	testAPI(t, m.api, vmmtest.Vmlinux(t))
}

// serveFake serves the fake and returns its socket.
func serveFake(t *testing.T, version string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "fc.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: &fctest.Server{Version: version}}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return socket
}

var testLimits = Options{}.limits()

type step struct {
	name string
	do   func() error
	want string // in the error; empty: it works
}

func testSteps(t *testing.T, steps []step) {
	t.Helper()
	for _, s := range steps {
		err := s.do()
		if s.want == "" && err != nil || s.want != "" && (err == nil || !strings.Contains(err.Error(), s.want)) {
			t.Errorf("%s: %v, want %q", s.name, err, s.want)
		}
	}
}

func testAPI(t *testing.T, c *api, kernel string) {
	ctx := t.Context()
	v, err := c.version(ctx)
	if err != nil || v != (version{1, 12, 1}) {
		t.Errorf("version %v, %v", v, err)
	}
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	if err := os.WriteFile(state, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	testSteps(t, []step{
		{"not started", func() error { return expectState(ctx, c, "Not started") }, ""},
		{"pause before the start", func() error { return c.become(ctx, "Paused") }, "not supported before starting"},
		{"save before the start", func() error { return c.save(ctx, "Full", state, state) }, "not supported before starting"},
		{"no vCPU", func() error { return c.machineConfig(ctx, vmm.Spec{VCPUs: 0, MemoryMB: 128}) }, "status 400"},
		{"machine", func() error { return c.machineConfig(ctx, vmm.Spec{VCPUs: 2, MemoryMB: 192}) }, ""},
		{"machine asked back", func() error { return checkSpec(ctx, c, vmm.Spec{VCPUs: 2, MemoryMB: 192}) }, ""},
		{"another machine", func() error { return checkSpec(ctx, c, vmm.Spec{VCPUs: 1, MemoryMB: 192}) }, "not 1 and 192"},
		{"no kernel", func() error { return c.bootSource(ctx, "/nonexistent", "", "") }, "status 400"},
		{"no disk", func() error { return c.drive(ctx, "/nonexistent") }, "status 400"},
		{"bad address", func() error { return c.network(ctx, "tap0", "zz") }, "status 400"},
		{"unknown field", func() error { return c.put(ctx, "/machine-config", object{"vcpus": 1}) }, "unknown field"},
		{"unknown path", func() error { return c.put(ctx, "/nonsense", object{}) }, "status 400"},
		{"entropy", func() error { return c.entropy(ctx) }, ""},
		{"start without a kernel", func() error { return c.start(ctx) }, "status 400"},
		{"the field of later versions", func() error { return c.load(ctx, version{1, 13, 0}, state, "Uffd", state) }, "unknown field"},
	})
	memory := filepath.Join(dir, "memory")
	testSteps(t, []step{
		{"a kernel", func() error { return c.bootSource(ctx, kernel, "", cmdline) }, ""},
		{"start", func() error { return c.start(ctx) }, ""},
		{"running", func() error { return expectState(ctx, c, "Running") }, ""},
		{"start again", func() error { return c.start(ctx) }, "not supported after starting"},
		{"another machine now", func() error { return c.machineConfig(ctx, vmm.Spec{VCPUs: 1, MemoryMB: 128}) }, "not supported after starting"},
		{"load now", func() error { return c.load(ctx, version{1, 12, 1}, state, "Uffd", state) }, "not supported after starting"},
		{"save while it runs", func() error { return c.save(ctx, "Full", state, memory) }, "status 400"},
		{"pause", func() error { return c.become(ctx, "Paused") }, ""},
		{"pause again", func() error { return c.become(ctx, "Paused") }, ""},
		{"paused", func() error { return expectState(ctx, c, "Paused") }, ""},
		{"save where nothing can be", func() error { return c.save(ctx, "Full", "/nonexistent/s", "/nonexistent/m") }, "status 400"},
		{"save", func() error { return c.save(ctx, "Diff", state, memory) }, ""},
		{"what was saved", func() error { return checkSaved(state, memory, 192<<20) }, ""},
		{"save all", func() error { return c.save(ctx, "Full", state, memory) }, ""},
		{"continue", func() error { return c.become(ctx, "Running") }, ""},
		{"running again", func() error { return expectState(ctx, c, "Running") }, ""},
	})
}

// checkSaved looks at the files of a save.
func checkSaved(state, memory string, size int64) error {
	s, err := openRegular(state, 1, maxState)
	if err != nil {
		return err
	}
	defer s.Close()
	m, err := openRegular(memory, size, size)
	if err != nil {
		return err
	}
	return m.Close()
}

func expectState(ctx context.Context, c *api, want string) error {
	if got, err := c.state(ctx); err != nil || got != want {
		return fmt.Errorf("state %q, want %q (%v)", got, want, err)
	}
	return nil
}

func TestVersions(t *testing.T) {
	for v, want := range map[version]struct {
		ok    bool
		field string
	}{
		{1, 9, 9}: {false, ""}, {0, 25, 0}: {false, ""}, {2, 0, 0}: {false, ""},
		{1, 10, 0}: {true, "enable_diff_snapshots"}, {1, 12, 1}: {true, "enable_diff_snapshots"},
		{1, 13, 0}: {true, "track_dirty_pages"}, {1, 20, 3}: {true, "track_dirty_pages"},
	} {
		err := v.check()
		if (err == nil) != want.ok {
			t.Errorf("%s: %v", v, err)
		}
		if err != nil && (!strings.Contains(err.Error(), supported) || !strings.Contains(err.Error(), v.String())) {
			t.Errorf("%s: the error does not say what is supported: %v", v, err)
		}
		if want.ok && v.dirtyField() != want.field {
			t.Errorf("%s: field %q, want %q", v, v.dirtyField(), want.field)
		}
	}
}

// program writes a shell script in place of Firecracker.
func program(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "firecracker")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestProbeSaysWhatIsWrong: programs that are not there or not right.
func TestProbeSaysWhatIsWrong(t *testing.T) {
	for name, c := range map[string]struct{ binary, want string }{
		"missing":  {"/nonexistent/firecracker", "is not installed"},
		"old":      {program(t, "echo Firecracker v1.4.0"), "firecracker 1.4.0 is not supported: " + supported + " is"},
		"new":      {program(t, "echo Firecracker v2.0.0"), "is not supported"},
		"other":    {program(t, "echo hello"), "says no version"},
		"fails":    {program(t, "echo broken >&2; exit 3"), "broken"},
		"no state": {program(t, `case $1 in --version) echo Firecracker v1.12.1;; *) echo nothing;; esac`), "state version"},
	} {
		_, err := New(Options{Binary: c.binary, Direct: true}).Probe(t.Context())
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func fakeHost(binary string) host {
	return host{binary: binary, version: version{1, 12, 1}, info: vmm.Info{Kind: Name}}
}

// TestStartFails: programs that die or never answer leave an error with their
// last words, and no process.
func TestStartFails(t *testing.T) {
	for name, c := range map[string]struct {
		script, want string
		limit        time.Duration
	}{
		"dies":          {"echo cannot today >&2; exit 7", "cannot today", time.Minute},
		"never answers": {"exec sleep 1000", "does not answer", 300 * time.Millisecond},
	} {
		d := New(Options{Direct: true})
		l, err := newLaunch(d.o, fakeHost(program(t, c.script)), vmm.HostArgs{ID: "fails", Dir: t.TempDir()}, vmm.Spec{VCPUs: 1, MemoryMB: 128}, nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), c.limit)
		m, err := l.start(ctx)
		cancel()
		if err == nil {
			t.Errorf("%s: it started as process %d", name, m.PID())
			continue
		}
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestAnotherProcessOnTheSocketIsRefused: the socket lies where a jailed
// process may replace it.
func TestAnotherProcessOnTheSocketIsRefused(t *testing.T) {
	c := newAPI(serveFake(t, "1.12.1"), os.Getppid(), testLimits)
	if _, err := c.version(t.Context()); err == nil || !strings.Contains(err.Error(), "answers on Firecracker's socket") {
		t.Errorf("the answer of another process was taken: %v", err)
	}
}

// TestAnswersAreBounded: a server that does not answer, or nonsense.
func TestAnswersAreBounded(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := newAPI(socket, 0, testLimits)
	err = c.call(t.Context(), 50*time.Millisecond, "GET", "/version", nil, nil)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent server: %v", err)
	}
	if _, err := newAPI(serveFake(t, "nonsense"), 0, testLimits).version(t.Context()); err == nil || !strings.Contains(err.Error(), "no version") {
		t.Errorf("a version that is none: %v", err)
	}
	if _, err := newAPI(serveFake(t, "1.3.0"), 0, testLimits).version(t.Context()); err == nil || !strings.Contains(err.Error(), supported) {
		t.Errorf("an old version: %v", err)
	}
}

// TestWhatTheJailHoldsIsChecked: a jailed process may put anything in place of
// what it was to write.
func TestWhatTheJailHoldsIsChecked(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	if err := os.WriteFile(good, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := openRegular(good, 5, 5); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Symlink(good, link), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"a link": openError(link, 5, 5), "a FIFO": openError(fifo, 0, 9), "a directory": openError(dir, 0, 1<<20),
		"too short": openError(good, 6, 9), "too long": openError(good, 0, 4), "nothing": openError(dir+"/none", 0, 9),
	} {
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if _, err := openFIFO(good); err == nil {
		t.Error("a file was taken for a FIFO")
	}
}

func openError(path string, least, most int64) error {
	f, err := openRegular(path, least, most)
	if err == nil {
		f.Close()
	}
	return err
}

// TestConsoleIsBounded: what goes beyond the limit is lost, and the writer is
// not held up.
func TestConsoleIsBounded(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "console.log")
	c, err := openConsole(filepath.Join(dir, fifoName), path)
	if err != nil {
		t.Fatal(err)
	}
	go c.run()
	w, err := os.OpenFile(filepath.Join(dir, fifoName), os.O_WRONLY, 0) // blocks: all of it gets through
	if err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range logLimit/len(line) + 100 {
		if _, err := w.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	c.drain()
	if fi, err := os.Stat(path); err != nil || fi.Size() != logLimit {
		t.Errorf("the console has %d bytes, want %d (%v)", fi.Size(), logLimit, err)
	}
}

func TestReasons(t *testing.T) {
	const panicked = "[ 1.0] Kernel panic - not syncing: sysrq"
	for _, c := range []struct {
		killed          bool
		status, console string
		want            vmm.Reason
	}{
		{true, "signal: killed", "", vmm.ReasonKilled},
		{false, "exit status 0", "", vmm.ReasonReset},
		{false, "exit status 0", panicked, vmm.ReasonPanic},
		{false, "signal: killed", "", vmm.ReasonProcess},
		{false, "exit status 148", panicked, vmm.ReasonProcess},
		{false, "", "", vmm.ReasonProcess},
		{false, "", panicked, vmm.ReasonPanic},
	} {
		if got := reason(c.killed, c.status, c.console); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}
