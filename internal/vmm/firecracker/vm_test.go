package firecracker

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// subject boots real machines; the patience is for an emulated processor.
func subject(t *testing.T, o Options) vmmtest.Subject {
	t.Helper()
	vmmtest.RequireKVM(t)
	kernel := vmmtest.Vmlinux(t)
	return vmmtest.Subject{
		Driver: New(o), Patience: 2 * time.Minute,
		Boot: vmm.BootArgs{
			Kernel: kernel, Initrd: vmmtest.Initrd(t), Spec: vmm.Spec{VCPUs: 1, MemoryMB: 128},
			Cmdline: "mitigations=off",
		},
	}
}

func TestVMJailedConforms(t *testing.T) {
	vmmtest.Run(t, subject(t, Options{UID: 60777, GID: 60777}))
}

func TestVMDirectConforms(t *testing.T) {
	s := subject(t, Options{Direct: true})
	s.Brief = true
	vmmtest.Run(t, s)
}

// TestVMADiskComesLate: a machine is restored whose disk is brought while its
// process starts, and finds it at the path that its state names.
func TestVMADiskComesLate(t *testing.T) {
	const device = "/dev/nbd0" // whatever it holds: no guest of this test uses it
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		t.Skip("skipped: it needs a block device:", err)
	}
	for name, o := range map[string]Options{"jailed": {UID: 60777, GID: 60777}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			s := subject(t, o)
			boot := s.Boot
			boot.HostArgs = vmm.HostArgs{ID: "late", Dir: t.TempDir(), DiskDevice: device}
			if err := os.Chmod(boot.Dir, 0o711); err != nil {
				t.Fatal(err)
			}
			m, err := s.Driver.Boot(t.Context(), boot)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = m.Kill(context.Background()) })
			args := vmm.RestoreArgs{HostArgs: boot.HostArgs, State: vmm.State{Spec: boot.Spec, Info: m.Record().Info}}
			args.State.File, args.MemoryFile = saveTo(t, m)
			if err := m.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			args.DiskDevice = ""
			args.Disk = func(context.Context) (string, error) { return device, nil }
			r, err := s.Driver.Restore(t.Context(), args)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = r.Kill(context.Background()) })
			var got unix.Stat_t
			fd := fmt.Sprintf("/proc/%d/root%s", r.PID(), drivePath)
			if name == "direct" {
				fd = filepath.Join(boot.Dir, "vm", lateName)
			}
			if err := unix.Stat(fd, &got); err != nil || got.Rdev != st.Rdev {
				t.Errorf("its disk is device %#x, %v; want %#x", got.Rdev, err, st.Rdev)
			}
			if err := r.Continue(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// saveTo saves a machine to files.
func saveTo(t *testing.T, m vmm.Machine) (state, memory string) {
	t.Helper()
	dir := t.TempDir()
	state, memory = filepath.Join(dir, "state"), filepath.Join(dir, "memory")
	sf, err := os.Create(state)
	if err != nil {
		t.Fatal(err)
	}
	defer sf.Close()
	from, err := m.(vmm.MemorySaver).Save(t.Context(), sf, true)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.Create(memory)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	return state, memory
}
