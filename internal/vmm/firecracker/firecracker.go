// Package firecracker drives Firecracker, which needs KVM. Only wiring code
// imports it; everybody else knows vmm.Driver.
//
// What holds for its processes:
//
//  1. As root they run through jailer: chroot, user, mount and network
//     namespace of their own, cgroup, seccomp filter on. Otherwise they are
//     started directly, with the filter.
//  2. What lies in a jail may have been replaced by the jailed process: paths
//     in it are opened without following links, and who answers on the socket
//     is compared with the process.
//  3. RAM is Firecracker's own. A restore loads nothing: a server of pages,
//     whose socket is HostArgs.MemorySocket, is handed a userfaultfd, or the
//     file HostArgs.MemoryFile is mapped, read-only to a jail.
//  4. The disk is always /tmp/fc-vm/rootfs, a node or link in the machine's own
//     mount namespace: the path is part of the saved state, the device behind
//     it is not.
//  5. The console goes through a FIFO that never blocks Firecracker: what
//     nobody reads is lost, and what is kept is bounded.
package firecracker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Name of the driver.
const Name = "firecracker"

// logLimit bounds the console and Firecracker's own messages, bytes each.
const logLimit = 4 << 20

// Options of a Driver.
type Options struct {
	// Binary and Jailer are paths or names; empty: firecracker, jailer.
	Binary, Jailer string
	// Direct starts Firecracker without jailer, also as root.
	Direct bool
	// ProbeKernel is the guest's vmlinux, booted once to prove KVM. Empty:
	// KVM is taken to work.
	ProbeKernel string
	// ProbeCache is the file that remembers the verdict; empty: none does.
	ProbeCache string
	// UID is the first of the users that Firecracker runs as, to which
	// HostArgs.Number is added; GID is the group of all. Both zero: as the
	// caller.
	UID, GID uint32
	// SpareDir takes the processes that Warm starts, on the file system of the
	// machines' directories; nobody else uses it. Empty: Warm starts none.
	SpareDir string
	// CallLimit and SaveLimit bound the wait for an answer, SaveLimit where
	// memory is saved or state loaded; 0: 30 s, 5 min.
	CallLimit, SaveLimit time.Duration
	// Logger; nil: none.
	Logger *slog.Logger
}

func (o Options) limits() limits {
	return limits{cmp.Or(o.CallLimit, callLimit), cmp.Or(o.SaveLimit, saveLimit)}
}

// Driver implements vmm.Driver.
type Driver struct {
	o   Options
	log *slog.Logger
	kvm string // the device

	probe  chan struct{} // holds one token: a mutex that a context can leave
	mu     sync.Mutex
	host   *host          // what Probe found
	spares map[int]*spare // by HostArgs.Number
	closed bool
}

// host is what the probe found.
type host struct {
	info           vmm.Info
	binary, jailer string // jailer empty: direct
	version        version
}

var _ vmm.Warmer = (*Driver)(nil)

// New makes a Driver; nothing is started before Probe or the first machine.
func New(o Options) *Driver {
	if o.Binary == "" {
		o.Binary = "firecracker"
	}
	if o.Jailer == "" {
		o.Jailer = "jailer"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Driver{o: o, log: o.Logger, kvm: "/dev/kvm", probe: make(chan struct{}, 1), spares: map[int]*spare{}}
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Capabilities implements vmm.Driver.
func (d *Driver) Capabilities() vmm.Capabilities {
	return vmm.Capabilities{
		OwnMemory: true, RestartOnly: true, ClockRuns: true, DirtySource: vmm.DirtyVMM, LiveCheckpoint: true, ConsoleLimit: logLimit,
	}
}

// Boot implements vmm.Driver.
func (d *Driver) Boot(ctx context.Context, a vmm.BootArgs) (vmm.Machine, error) {
	fail := func(err error) (vmm.Machine, error) {
		return nil, fmt.Errorf("booting sandbox %s: %w", a.ID, err)
	}
	if err := errors.Join(a.Validate(), checkArgs(a.HostArgs)); err != nil {
		return fail(err)
	}
	h, err := d.ready(ctx)
	if err != nil {
		return fail(err)
	}
	m, err := d.boot(ctx, h, a)
	if err != nil {
		return fail(err)
	}
	return m, nil
}

func (d *Driver) boot(ctx context.Context, h host, a vmm.BootArgs) (*machine, error) {
	l, err := newLaunch(d.o, h, a.HostArgs, a.Spec, d.spareFor(h, a.HostArgs))
	if err != nil {
		return nil, err
	}
	kernel, err := l.put("vmlinux", a.Kernel)
	if err != nil {
		return nil, l.undo(fmt.Errorf("kernel: %w", err))
	}
	initrd := ""
	if a.Initrd != "" {
		if initrd, err = l.put("initrd", a.Initrd); err != nil {
			return nil, l.undo(fmt.Errorf("initrd: %w", err))
		}
	}
	m, err := l.start(ctx)
	if err != nil {
		return nil, l.undo(err)
	}
	err = d.configure(ctx, m.api, a, kernel, initrd)
	if err == nil {
		err = m.api.start(ctx)
	}
	if err != nil {
		return nil, m.abandon(err)
	}
	l.forget("vmlinux", "initrd") // they are in the guest's memory now
	return m, nil
}

func (d *Driver) configure(ctx context.Context, c *api, a vmm.BootArgs, kernel, initrd string) error {
	if err := c.machineConfig(ctx, a.Spec); err != nil {
		return err
	}
	if err := c.bootSource(ctx, kernel, initrd, cmdline+" "+a.Cmdline); err != nil {
		return err
	}
	if a.DiskDevice != "" {
		if err := c.drive(ctx, drivePath); err != nil {
			return err
		}
	}
	if a.TapName != "" {
		if err := c.network(ctx, a.TapName, a.MAC); err != nil {
			return err
		}
	}
	return c.entropy(ctx)
}

// cmdline is the driver's part of the kernel command line. The time stamp
// counter is kvm-clock's affair; there is no BIOS disk to ask; reboot=k reaches
// the keyboard controller, which ends the machine, and so does a panic.
const cmdline = "console=ttyS0 quiet reboot=k panic=-1 edd=off random.trust_cpu=on no_timer_check " +
	"i8042.noaux i8042.nomux i8042.dumbkbd"

// checkArgs refuses what this driver cannot use.
func checkArgs(h vmm.HostArgs) error {
	switch {
	case h.Memory != nil:
		return errors.New("memory: firecracker keeps RAM to itself, a file cannot be given")
	case h.DiskSocket != "":
		return errors.New("disk_socket: firecracker speaks no NBD; attach it to a device and give disk_device")
	case h.Tap != nil:
		return errors.New("tap: firecracker opens its tap by name; give tap_name and netns")
	}
	return nil
}

// Restore implements vmm.Driver.
func (d *Driver) Restore(ctx context.Context, a vmm.RestoreArgs) (vmm.Machine, error) {
	fail := func(err error) (vmm.Machine, error) {
		return nil, fmt.Errorf("restoring sandbox %s: %w", a.ID, err)
	}
	if err := errors.Join(a.Validate(), checkArgs(a.HostArgs)); err != nil {
		return fail(err)
	}
	if (a.MemorySocket == "") == (a.MemoryFile == "") {
		return fail(errors.New("memory_socket: a restore needs a server of pages, or a memory_file, and not both"))
	}
	h, err := d.ready(ctx)
	if err != nil {
		return fail(err)
	}
	if err := h.info.Fits(a.State.Info); err != nil {
		return fail(err)
	}
	m, err := d.restore(ctx, h, a)
	if err != nil {
		return fail(err)
	}
	return m, nil
}

func (d *Driver) restore(ctx context.Context, h host, a vmm.RestoreArgs) (*machine, error) {
	l, err := newLaunch(d.o, h, a.HostArgs, a.State.Spec, d.spareFor(h, a.HostArgs))
	if err != nil {
		return nil, err
	}
	state, err := l.put("state", a.State.File)
	if err != nil {
		return nil, l.undo(fmt.Errorf("state: %w", err))
	}
	backend, memory, err := l.memory()
	if err != nil {
		return nil, l.undo(err)
	}
	l.attach, l.disk = a.Attach, a.Disk
	m, err := l.start(ctx)
	if err != nil {
		return nil, l.undo(err)
	}
	if err := ctx.Err(); err != nil {
		return nil, m.abandon(err)
	}
	loaded := a.Begin("vmm_load")
	err = m.api.load(ctx, h.version, state, backend, memory)
	if err == nil {
		err = checkSpec(ctx, m.api, a.State.Spec)
	}
	loaded()
	if err != nil {
		return nil, m.abandon(err)
	}
	l.forget("state", pagesName, memoryName)
	return m, nil
}

// checkSpec compares what the state made with what the manifest says.
func checkSpec(ctx context.Context, c *api, want vmm.Spec) error {
	got, err := c.spec(ctx)
	if err != nil {
		return err
	}
	if got.VCPUs != want.VCPUs || got.MemoryMB != want.MemoryMB {
		return fmt.Errorf("%w: the state is of a machine with %d vCPUs and %d MiB, not %d and %d",
			vmm.ErrIncompatible, got.VCPUs, got.MemoryMB, want.VCPUs, want.MemoryMB)
	}
	return nil
}

// Adopt implements vmm.Driver.
func (d *Driver) Adopt(ctx context.Context, r vmm.Record) (vmm.Machine, error) {
	fail := func(err error) (vmm.Machine, error) {
		return nil, fmt.Errorf("adopting sandbox %s: %w", r.ID, err)
	}
	if r.Kind != Name {
		return fail(fmt.Errorf("it is a %q machine, not %q", r.Kind, Name))
	}
	p, err := vmm.AdoptProcess(r.PID, r.StartTime, r.BootID)
	if err != nil {
		return fail(err)
	}
	pumps, err := openPumps(filepath.Dir(r.StderrPath), filepath.Dir(r.Control), r.ConsolePath, r.StderrPath)
	if err != nil {
		p.Close()
		return fail(err)
	}
	m := newMachine(r, p, pumps, d.o)
	if _, err := m.api.version(ctx); err != nil {
		if m.endedBy(err) {
			err = fmt.Errorf("%w: %w", vmm.ErrGone, err)
		}
		m.Close()
		return fail(err)
	}
	return m, nil
}

// Find tells where the programs are and their version, without starting a
// machine, for people's eyes.
func Find(ctx context.Context, o Options) (binary, jailer, version string, err error) {
	d := New(o)
	b, v, err := find(ctx, d.o.Binary)
	if err != nil {
		return "", "", "", err
	}
	if err := v.check(); err != nil {
		return b, "", v.String(), err
	}
	j, jv, err := find(ctx, d.o.Jailer)
	if err == nil && jv != v {
		err = fmt.Errorf("%s has version %s and %s version %s: they must come from one release", j, jv, b, v)
	}
	return b, j, v.String(), err
}

// asRoot: jailer needs it.
func asRoot() bool { return os.Geteuid() == 0 }
