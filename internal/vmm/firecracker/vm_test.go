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

// warmed has a process started ahead for each machine.
type warmed struct {
	*Driver
	t *testing.T
}

func (d warmed) Boot(ctx context.Context, a vmm.BootArgs) (vmm.Machine, error) {
	d.warm(ctx, a.HostArgs)
	return d.Driver.Boot(ctx, a)
}

func (d warmed) Restore(ctx context.Context, a vmm.RestoreArgs) (vmm.Machine, error) {
	d.warm(ctx, a.HostArgs)
	return d.Driver.Restore(ctx, a)
}

func (d warmed) warm(ctx context.Context, a vmm.HostArgs) {
	if err := d.Warm(ctx, a.NetNS, a.Number); err != nil && ctx.Err() == nil {
		d.t.Errorf("start a process ahead: %v", err)
	}
}

// TestVMWarmedConforms: a machine that takes a process started ahead is as any
// other.
func TestVMWarmedConforms(t *testing.T) {
	s := subject(t, Options{UID: 60777, GID: 60777, SpareDir: spareDir(t)})
	d := s.Driver.(*Driver)
	t.Cleanup(func() { d.Close() })
	s.Driver, s.Brief = warmed{d, t}, true
	vmmtest.Run(t, s)
}

func spareDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestVMTheNextDriverEndsWhatWasStartedAhead: of one that was killed.
func TestVMTheNextDriverEndsWhatWasStartedAhead(t *testing.T) {
	s := subject(t, Options{UID: 60777, GID: 60777, SpareDir: spareDir(t)})
	killed := s.Driver.(*Driver)
	if err := killed.Warm(t.Context(), "", 3); err != nil {
		t.Fatal(err)
	}
	spare := killed.spares[3]
	t.Cleanup(spare.end)
	next := New(killed.o)
	if _, err := next.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-spare.proc.Done()
	if left, err := os.ReadDir(killed.o.SpareDir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestVMADiskComesLate: a machine is restored whose disk is brought while its
// process starts, and finds it at the path that its state names.
func TestVMADiskComesLate(t *testing.T) {
	const device = "/dev/nbd0" // whatever it holds: no guest of this test uses it
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		t.Skip("skipped: it needs a block device:", err)
	}
	for name, o := range map[string]Options{
		"jailed": {UID: 60777, GID: 60777}, "direct": {Direct: true}, "jailed, started ahead": {UID: 60777, GID: 60777, SpareDir: spareDir(t)},
		"direct, started ahead": {Direct: true, SpareDir: spareDir(t)},
	} {
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
			args.DiskDevice, args.Number = "", 7
			d := s.Driver.(*Driver)
			if err := d.Warm(t.Context(), "", args.Number); err != nil {
				t.Fatal(err)
			}
			ahead := 0
			if sp := d.spares[args.Number]; sp != nil {
				ahead = sp.proc.PID()
			}
			args.Disk = func(context.Context) (string, error) { return device, nil }
			r, err := s.Driver.Restore(t.Context(), args)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = r.Kill(context.Background()) })
			if ahead != 0 && ahead != r.PID() {
				t.Errorf("the machine is process %d, not %d that was started ahead", r.PID(), ahead)
			}
			var got unix.Stat_t
			fd := fmt.Sprintf("/proc/%d/root%s", r.PID(), drivePath)
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
