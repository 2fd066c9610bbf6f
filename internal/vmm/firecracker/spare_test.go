package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker/fctest"
)

// newWarm is a driver on the fake program that starts processes ahead.
func newWarm(t *testing.T) failing {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("skipped: processes are started ahead by root alone")
	}
	f := newFailing(t)
	dir, err := os.MkdirTemp("", "ahead") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f.o.SpareDir = dir
	t.Cleanup(func() { f.Close() })
	return f
}

// ahead starts a process for number 0 and returns its PID.
func (f failing) ahead(t *testing.T, netns string) int {
	t.Helper()
	if err := f.Warm(t.Context(), netns, 0); err != nil {
		t.Fatal(err)
	}
	living := f.program.Living(t)
	if len(living) != 1 {
		t.Fatalf("processes %v live, want one", living)
	}
	pid, err := strconv.Atoi(living[0])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// nothingAhead: no process, and no directory of one.
func (f failing) nothingAhead(t *testing.T) {
	t.Helper()
	if left := f.program.Living(t); len(left) != 0 {
		t.Errorf("processes %v are left", left)
	}
	if left, err := os.ReadDir(f.o.SpareDir); err != nil || len(left) != 0 {
		t.Errorf("directories are left: %v, %v", left, err)
	}
}

func TestAMachineTakesTheProcessStartedAhead(t *testing.T) {
	f := newWarm(t)
	pid := f.ahead(t, "")
	m, err := f.boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if m.PID() != pid {
		t.Errorf("the machine is process %d, the one started ahead %d", m.PID(), pid)
	}
	if living := f.program.Living(t); len(living) != 1 {
		t.Errorf("processes %v live, want one", living)
	}
	m.Close() // as a server that ends
	if m, err = f.Adopt(t.Context(), m.Record()); err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	f.nothingAhead(t)
	if _, err := os.Stat(filepath.Join(f.dir, plainName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the files of the ended machine: %v", err)
	}

	// A second machine in the same directory, whose disk is there from the start.
	pid = f.ahead(t, "")
	m, err = f.Boot(t.Context(), vmm.BootArgs{
		HostArgs: vmm.HostArgs{ID: "fails", Dir: f.dir, DiskDevice: "/dev/null"}, Spec: failSpec, Kernel: filepath.Join(f.dir, "vmlinux"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(fmt.Sprintf("/proc/%d/root%s", pid, drivePath)); err != nil || to != "/dev/null" {
		t.Errorf("the process's disk leads to %q, %v", to, err)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	f.nothingAhead(t)
}

// TestAProcessStartedAheadThatDoesNotFit: the machine starts its own, and the
// other ends.
func TestAProcessStartedAheadThatDoesNotFit(t *testing.T) {
	const own = "/proc/self/ns/net"
	netns := filepath.Join(t.TempDir(), "netns")
	for name, c := range map[string]struct {
		spare, machine string // network namespaces
		meanwhile      func(t *testing.T, f failing, pid int)
	}{
		"it has died": {meanwhile: func(t *testing.T, f failing, pid int) {
			f.program.KillAll(t)
			<-f.spares[0].proc.Done()
		}},
		"another namespace": {spare: own, machine: netns},
		"an older namespace of that name": {spare: netns, machine: netns, meanwhile: func(t *testing.T, f failing, pid int) {
			if err := errors.Join(os.Remove(netns), os.Symlink(otherNetns(t), netns)); err != nil {
				t.Fatal(err)
			}
		}},
		"another file system": {meanwhile: func(t *testing.T, f failing, pid int) {
			// A directory that cannot become the machine's.
			if err := os.Remove(filepath.Join(f.spares[0].launch.args.Dir, logName)); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := errors.Join(os.RemoveAll(netns), os.Symlink(own, netns)); err != nil {
				t.Fatal(err)
			}
			f := newWarm(t)
			pid := f.ahead(t, c.spare)
			if c.meanwhile != nil {
				c.meanwhile(t, f, pid)
			}
			m, err := f.Boot(t.Context(), vmm.BootArgs{
				HostArgs: vmm.HostArgs{ID: "fails", Dir: f.dir, NetNS: c.machine}, Spec: failSpec, Kernel: filepath.Join(f.dir, "vmlinux"),
			})
			if err != nil {
				t.Fatal(err)
			}
			if living := f.program.Living(t); m.PID() == pid || len(living) != 1 {
				t.Errorf("the machine is process %d, of %v; %d was started ahead", m.PID(), living, pid)
			}
			if err := m.Kill(t.Context()); err != nil {
				t.Error(err)
			}
			f.nothingAhead(t)
		})
	}
}

// otherNetns returns the path of a network namespace that is not ours.
func otherNetns(t *testing.T) string {
	t.Helper()
	path, done := make(chan string), make(chan struct{})
	t.Cleanup(func() { close(done) })
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			path <- ""
			return
		}
		path <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		<-done
	}()
	p := <-path
	if p == "" {
		t.Skip("skipped: it cannot make a network namespace")
	}
	return p
}

// TestFailuresWithAProcessStartedAhead: nothing is left of it either.
func TestFailuresWithAProcessStartedAhead(t *testing.T) {
	for kind, want := range failures {
		for _, call := range []string{"GET /version", "PUT /machine-config", "PUT /actions"} {
			t.Run(call+" "+kind, func(t *testing.T) {
				f := newWarm(t)
				f.ahead(t, "")
				f.program.Fail(t, call, kind)
				if m, err := f.boot(f.patient(t, kind)); err == nil {
					t.Errorf("a machine: %v", m.Kill(t.Context()))
				} else if kind != fctest.Hang && !strings.Contains(err.Error(), want) {
					t.Errorf("%v; want %q in it", err, want)
				}
				f.nothingAhead(t)
			})
		}
	}
	t.Run("before the machine has it", func(t *testing.T) {
		f := newWarm(t)
		f.ahead(t, "")
		_, err := f.Restore(t.Context(), vmm.RestoreArgs{
			HostArgs: vmm.HostArgs{ID: "fails", Dir: f.dir, MemoryFile: filepath.Join(f.dir, "vmlinux")},
			State:    vmm.State{Spec: failSpec, Info: f.host.info, File: filepath.Join(f.dir, "vmlinux")},
		})
		if err == nil || !strings.Contains(err.Error(), "memory_file") {
			t.Errorf("a memory file of a wrong size: %v", err)
		}
		f.nothingAhead(t)
	})
}

func TestProcessesStartedAheadEnd(t *testing.T) {
	f := newWarm(t)
	first := f.ahead(t, "")
	if second := f.ahead(t, ""); second == first {
		t.Error("a second process for the number is the first")
	}
	f.Cool(0)
	f.Cool(0)
	f.nothingAhead(t)

	f.program.Fail(t, "GET /version", fctest.Die)
	if err := f.Warm(t.Context(), "", 1); err == nil || !strings.Contains(err.Error(), "number 1") {
		t.Errorf("a process that dies at once: %v", err)
	}
	f.nothingAhead(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Warm(ended, "", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("a start that is not wanted any more: %v", err)
	}
	f.nothingAhead(t)

	f.ahead(t, "")
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := f.Warm(t.Context(), "", 2); err != nil {
		t.Errorf("after Close: %v", err)
	}
	f.nothingAhead(t)
}

// TestNoProcessIsStartedAheadUnasked: without a directory for them.
func TestNoProcessIsStartedAheadUnasked(t *testing.T) {
	f := newFailing(t)
	if err := f.Warm(t.Context(), "", 0); err != nil || len(f.program.Living(t)) != 0 {
		t.Errorf("%v, processes %v", err, f.program.Living(t))
	}
}
