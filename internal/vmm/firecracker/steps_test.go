package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker/fctest"
)

func TestMain(m *testing.M) {
	fctest.Main()
	os.Exit(m.Run())
}

// failing is a driver on the fake program, and what its machines are started
// from. The host is as if it had been probed: nothing here needs KVM.
type failing struct {
	*Driver
	program *fctest.Program
	dir     string
}

func newFailing(t *testing.T) failing {
	t.Helper()
	f := failing{New(Options{Direct: true}), fctest.NewProgram(t), t.TempDir()}
	h := fakeHost(f.program.Path)
	f.host = &h
	for _, name := range []string{"vmlinux", "pages.sock"} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

var failSpec = vmm.Spec{VCPUs: 1, MemoryMB: 128}

func (f failing) boot(ctx context.Context) (vmm.Machine, error) {
	return f.Boot(ctx, vmm.BootArgs{
		HostArgs: vmm.HostArgs{ID: "fails", Dir: f.dir}, Spec: failSpec, Kernel: filepath.Join(f.dir, "vmlinux"),
	})
}

func (f failing) restore(ctx context.Context) (vmm.Machine, error) {
	return f.Restore(ctx, vmm.RestoreArgs{
		HostArgs: vmm.HostArgs{ID: "fails", Dir: f.dir, MemorySocket: filepath.Join(f.dir, "pages.sock")},
		State:    vmm.State{Spec: failSpec, Info: f.host.info, File: filepath.Join(f.dir, "state")},
	})
}

// failures are the ways to fail, and what is then said of it.
var failures = map[string]string{fctest.Die: fctest.LastWords, fctest.Hang: "no answer", fctest.Refuse: "told to refuse"}

// patient is a context of the test. Where there is no answer to come it ends
// when the call that gets none has been made.
func (f failing) patient(t *testing.T, kind string) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	if kind == fctest.Hang {
		go func() {
			for f.program.Pending() && ctx.Err() == nil {
				time.Sleep(time.Millisecond) // a process of its own, without an event
			}
			cancel()
		}()
	}
	return ctx
}

// eachFailure runs a subtest for each step and each way to fail in it.
func eachFailure(t *testing.T, steps []string, f func(t *testing.T, step, kind, want string)) {
	for _, step := range steps {
		for kind, want := range failures {
			t.Run(strings.ReplaceAll(step, "/", "")+" "+kind, func(t *testing.T) { f(t, step, kind, want) })
		}
	}
}

// TestFailureInAnyStepOfAStartLeavesNothing: a Firecracker that dies, refuses
// or never answers, in each call of a boot and a restore: its last words or
// which call it was, no process, and the next start in the same place works.
func TestFailureInAnyStepOfAStartLeavesNothing(t *testing.T) {
	good := newFailing(t)
	m, err := good.boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var state bytes.Buffer
	memory, err := m.(vmm.MemorySaver).Save(t.Context(), &state, true)
	if err != nil {
		t.Fatal(err)
	}
	memory.Close()
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	try := func(start func(failing, context.Context) (vmm.Machine, error)) func(*testing.T, string, string, string) {
		return func(t *testing.T, step, kind, want string) {
			f := newFailing(t)
			if err := os.WriteFile(filepath.Join(f.dir, "state"), state.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			f.program.Fail(t, step, kind)
			m, err := start(f, f.patient(t, kind))
			if err == nil {
				t.Fatalf("it started as process %d", m.PID())
			}
			if kind == fctest.Hang && step == "GET /version" {
				want = "does not answer"
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error is %q, want %q in it", err, want)
			}
			if f.program.Pending() {
				t.Errorf("the step was never reached: %v", f.program.Calls(t))
			}
			if left := f.program.Living(t); len(left) != 0 {
				t.Errorf("processes %v are left", left)
			}
			m, err = start(f, t.Context())
			if err != nil {
				t.Fatalf("the next start: %v", err)
			}
			if err := m.Kill(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	t.Run("boot", func(t *testing.T) {
		eachFailure(t, []string{"GET /version", "PUT /machine-config", "PUT /boot-source", "PUT /entropy", "PUT /actions"}, try(failing.boot))
	})
	t.Run("restore", func(t *testing.T) {
		eachFailure(t, []string{"GET /version", "PUT /snapshot/load", "GET /machine-config"}, try(failing.restore))
	})
}

// TestADiskComesWhileTheProcessStarts: it lies where the process looks for it
// before the state is loaded; one that cannot be had ends the start, and a
// process that dies meanwhile ends the wait for it.
func TestADiskComesWhileTheProcessStarts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skipped: a mount namespace of its own needs root")
	}
	f := newFailing(t)
	state := filepath.Join(f.dir, "state")
	good, err := f.boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.Create(state)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	memory, err := good.(vmm.MemorySaver).Save(t.Context(), w, true)
	if err != nil {
		t.Fatal(err)
	}
	memory.Close()
	if err := good.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	restore := func(disk func(context.Context) (string, error)) (vmm.Machine, error) {
		return f.Restore(t.Context(), vmm.RestoreArgs{
			HostArgs: vmm.HostArgs{ID: "fails", Dir: f.dir, MemorySocket: filepath.Join(f.dir, "pages.sock")},
			State:    vmm.State{Spec: failSpec, Info: f.host.info, File: state}, Disk: disk,
		})
	}
	m, err := restore(func(context.Context) (string, error) { return "/dev/null", nil })
	if err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(fmt.Sprintf("/proc/%d/root%s", m.PID(), drivePath)); err != nil || to != "/dev/null" {
		t.Errorf("the process's disk leads to %q, %v", to, err)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	none := errors.New("there is no device")
	if _, err := restore(func(context.Context) (string, error) { return "", none }); !errors.Is(err, none) {
		t.Errorf("without a device: %v", err)
	}
	f.program.Fail(t, "GET /version", fctest.Die)
	if _, err := restore(func(ctx context.Context) (string, error) { <-ctx.Done(); return "", ctx.Err() }); err == nil || !strings.Contains(err.Error(), fctest.LastWords) {
		t.Errorf("of a process that died meanwhile: %v", err)
	}
	if left := f.program.Living(t); len(left) != 0 {
		t.Errorf("processes %v are left", left)
	}
}

// TestFailureInAnyStepOfASave: one that goes on living is whole and can be let
// run and saved again; one that died says so; nothing of the save is left.
func TestFailureInAnyStepOfASave(t *testing.T) {
	eachFailure(t, []string{"GET /", "PATCH /vm", "PUT /snapshot/create"}, func(t *testing.T, step, kind, want string) {
		f := newFailing(t)
		m, err := f.boot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if step == "GET /" {
			m.(*machine).api.known = "" // as after an adoption
		}
		defer func() { _ = m.Kill(context.Background()) }()
		f.program.Fail(t, step, kind)
		_, err = m.(vmm.MemorySaver).Save(f.patient(t, kind), new(bytes.Buffer), false)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error is %v, want %q in it", err, want)
		}
		if kind == fctest.Die {
			if !errors.Is(err, vmm.ErrGone) {
				t.Errorf("the error does not say that it is gone: %v", err)
			}
			<-m.Done()
			return
		}
		if err := m.Continue(t.Context()); err != nil {
			t.Fatalf("continue: %v", err)
		}
		var state bytes.Buffer
		memory, err := m.(vmm.MemorySaver).Save(t.Context(), &state, true)
		if err != nil {
			t.Fatalf("the next save: %v", err)
		}
		memory.Close()
		if left, _ := filepath.Glob(filepath.Join(f.dir, "vm", "*.new")); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// TestAFullDiskDuringASaveSaysSo: Firecracker's own words name the cause.
func TestAFullDiskDuringASaveSaysSo(t *testing.T) {
	f := newFailing(t)
	m, err := f.boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Kill(context.Background()) }()
	f.program.Fail(t, "PUT /snapshot/create", fctest.Full)
	if _, err := m.(vmm.MemorySaver).Save(t.Context(), new(bytes.Buffer), false); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "No space left on device") {
		t.Errorf("a save on a full disk: %v", err)
	}
	if err := m.Continue(t.Context()); err != nil {
		t.Errorf("continue: %v", err)
	}
}

// TestKillNeedsNoAnswer: a Firecracker that answers nobody is ended all the
// same, while a call waits for it.
func TestKillNeedsNoAnswer(t *testing.T) {
	f := newFailing(t)
	m, err := f.boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.program.Fail(t, "PATCH /vm", fctest.Hang)
	paused := make(chan error, 1)
	go func() { paused <- m.Pause(t.Context()) }()
	for f.program.Pending() {
		time.Sleep(time.Millisecond) // a process of its own, without an event
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-paused; !errors.Is(err, vmm.ErrGone) {
		t.Errorf("the call that waited: %v", err)
	}
	if left := f.program.Living(t); len(left) != 0 {
		t.Errorf("processes %v are left", left)
	}
}

// TestLinksOfAJailedProcessLeadNowhere: in place of what it was to save, and
// in what is removed after it.
func TestLinksOfAJailedProcessLeadNowhere(t *testing.T) {
	f := newFailing(t)
	m, err := f.boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.program.Fail(t, "PUT /snapshot/create", fctest.Lie)
	var state bytes.Buffer
	if _, err := m.(vmm.MemorySaver).Save(t.Context(), &state, false); err == nil {
		t.Error("links were taken for what was saved")
	}
	if state.Len() != 0 {
		t.Errorf("%d bytes of a file of the host were read", state.Len())
	}
	if _, err := os.Stat(fctest.LieTarget); err != nil {
		t.Errorf("a file of the host is gone: %v", err)
	}
	outside := t.TempDir()
	kept := filepath.Join(outside, "kept")
	vm := filepath.Join(f.dir, "vm")
	if err := errors.Join(os.WriteFile(kept, nil, 0o600), os.Symlink(outside, filepath.Join(vm, "dir")), os.Symlink(kept, filepath.Join(vm, "file"))); err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(vm); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory: %v", err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Errorf("what a link led to is gone: %v", err)
	}
}

func TestEveryMachineHasAUserOfItsOwn(t *testing.T) {
	for number, want := range map[int]uint32{0: 60777, 1: 60778, 250: 61027} {
		l := launch{o: Options{UID: 60777, GID: 60777}, args: vmm.HostArgs{ID: "a", Dir: "/d", Number: number}, host: fakeHost("/firecracker")}
		args, err := l.jailArgs()
		if err != nil {
			t.Fatal(err)
		}
		if all := strings.Join(args, " "); !strings.Contains(all, "--uid "+itoa(want)+" --gid 60777 ") {
			t.Errorf("number %d: %s", number, all)
		}
	}
	if uid := (&launch{args: vmm.HostArgs{Number: 7}}).uid(); uid != 0 {
		t.Errorf("where nobody named a user it is %d", uid)
	}
}

func TestAJailNeedsAFileSystemThatAllowsIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skipped: it mounts a file system, which needs root")
	}
	for flag, name := range map[uintptr]string{unix.MS_NODEV: "nodev", unix.MS_NOEXEC: "noexec", 0: ""} {
		dir := t.TempDir()
		if err := unix.Mount("wrenn-test", dir, "tmpfs", flag, "size=64k"); err != nil {
			t.Fatal(err)
		}
		err := checkMount(dir)
		if uerr := unix.Unmount(dir, 0); uerr != nil {
			t.Error(uerr)
		}
		if name == "" && err != nil || name != "" && (err == nil || !strings.Contains(err.Error(), "mounted "+name)) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
