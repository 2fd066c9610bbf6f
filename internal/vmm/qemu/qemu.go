// Package qemu drives QEMU: machine type microvm, by emulation (TCG)
// everywhere and by KVM where a boot of the guest's kernel has proved that KVM
// works. docs/adr/0003-qemu-machine.md gives the reasons for the machine.
//
// Only wiring code imports it; everybody else knows vmm.Driver.
//
// What holds for its processes:
//
//  1. QEMU is started in its own session with its control socket already
//     listening; descriptors have fixed numbers (fdMemory and so on), which
//     is how an adopting process finds them.
//  2. Nothing is written outside HostArgs.Dir and ConsolePath, and nothing
//     QEMU writes grows beyond logLimit: the kernel enforces it
//     (RLIMIT_FSIZE), no process of ours is needed.
//  3. QEMU runs in its seccomp sandbox, with a minimal environment, and RAM
//     is kept out of core dumps.
package qemu

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Name of the driver.
const Name = "qemu"

// machineType is the same for both accelerators.
const machineType = "microvm"

// cpuTCG is the CPU that emulation shows: what x86-64-v2 asks for, AES, and
// rdrand, which seeds the guest at boot. Everything in it is emulated by QEMU
// 7.2 without a warning. ARAT says that the local timer never stops.
const cpuTCG = "Westmere-v1,+rdrand,+fsgsbase,+arat"

// cpuKVM is the host's CPU as far as it can be restored elsewhere;
// Info.CPUFlagsDigest says which that is.
const cpuKVM = "host,migratable=on"

const defaultBinary = "qemu-system-x86_64"

// Accelerator choices of Options.Accel.
const (
	AccelAuto = "auto"
	AccelKVM  = vmm.AccelKVM
	AccelTCG  = vmm.AccelTCG
)

// Options of a Driver. The zero value works: emulation only, since nothing
// says which kernel would prove KVM.
type Options struct {
	// Binary is the path or name of QEMU; empty: qemu-system-x86_64.
	Binary string
	// Found is what Find said of Binary; nil: Probe asks.
	Found *Found
	// Accel is AccelAuto (also when empty), AccelTCG or AccelKVM; the last
	// fails in Probe where KVM does not work.
	Accel string
	// ProbeKernel is the guest's kernel, booted once to prove KVM. Empty:
	// AccelAuto means TCG.
	ProbeKernel string
	// ProbeCache is the file that remembers the verdict; empty: none does.
	ProbeCache string
	// NoSandbox leaves out QEMU's seccomp filter.
	NoSandbox bool
	// UID and GID that QEMU runs as; both zero: as the caller. The driver
	// gives it the files it makes itself; HostArgs.Dir and DiskSocket are
	// the caller's to make reachable.
	UID, GID uint32
	// Logger; nil: none.
	Logger *slog.Logger
}

// Driver implements vmm.Driver.
type Driver struct {
	o   Options
	log *slog.Logger

	probe  chan struct{} // holds one token: a mutex that a context can leave
	info   *vmm.Info
	binary string
	mu     sync.Mutex // info and binary
}

var _ vmm.Driver = (*Driver)(nil)

// New makes a Driver; nothing is started before Probe or the first machine.
func New(o Options) *Driver {
	o.Binary = cmp.Or(o.Binary, defaultBinary)
	if o.Accel == "" {
		o.Accel = AccelAuto
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Driver{o: o, log: o.Logger, probe: make(chan struct{}, 1)}
}

// As is a driver like d whose machines run as another user. What d has found out
// holds for it too.
func (d *Driver) As(uid, gid uint32) *Driver {
	o := d.o
	o.UID, o.GID = uid, gid
	as := New(o)
	d.mu.Lock()
	defer d.mu.Unlock()
	as.info, as.binary = d.info, d.binary
	return as
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return Name }

// Capabilities implements vmm.Driver.
func (d *Driver) Capabilities() vmm.Capabilities {
	return vmm.Capabilities{
		SharedMemory:   true,
		DirtySource:    vmm.DirtyPrivatePages,
		LiveCheckpoint: true,
		ConsoleLimit:   logLimit,
	}
}

// Probe implements vmm.Driver. What it found is kept; a failure is not.
func (d *Driver) Probe(ctx context.Context) (vmm.Info, error) {
	select {
	case d.probe <- struct{}{}:
		defer func() { <-d.probe }()
	case <-ctx.Done():
		return vmm.Info{}, ctx.Err()
	}
	if info := d.found(); info != nil {
		return *info, nil
	}
	found := d.o.Found
	if found == nil {
		f, err := Find(ctx, d.o.Binary)
		if err != nil {
			return vmm.Info{}, err
		}
		found = &f
	}
	khz, err := vmm.HostTSCKHz(ctx)
	if err != nil {
		return vmm.Info{}, err
	}
	info := vmm.Info{
		Kind: Name, Version: found.Version, Accel: vmm.AccelTCG,
		MachineType: machineType, CPUModel: cpuTCG, TSCKHz: khz,
	}
	ok, remark, err := d.tryKVM(ctx, found.Path, info)
	if err != nil {
		return vmm.Info{}, err
	}
	if remark != "" {
		info.Remarks = append(info.Remarks, remark)
		d.log.Info("QEMU probe", "accel_kvm", ok, "finding", remark)
	}
	if ok {
		info.Accel, info.CPUModel = vmm.AccelKVM, cpuKVM
		if info.CPUFlagsDigest, err = vmm.HostFlagsDigest(); err != nil {
			return vmm.Info{}, err
		}
	} else if d.o.Accel == AccelKVM {
		return vmm.Info{}, fmt.Errorf("KVM was asked for: %s", remark)
	}
	d.mu.Lock()
	d.info, d.binary = &info, found.Path
	d.mu.Unlock()
	return info, nil
}

func (d *Driver) found() *vmm.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.info
}

var versionLine = regexp.MustCompile(`(?m)^QEMU emulator version (([0-9]+)\.([0-9]+)(?:\.[0-9]+)?)`)

// Found is a QEMU of this host.
type Found struct{ Path, Version string }

// Find resolves a name or path as Options.Binary has it and asks the program's
// version, which takes a tenth of a second for the program to be linked. 7.2 is
// the oldest that is tried.
func Find(ctx context.Context, name string) (Found, error) {
	path, err := exec.LookPath(cmp.Or(name, defaultBinary))
	if err != nil {
		return Found{}, fmt.Errorf("QEMU is not installed: %w", err)
	}
	cmd := exec.CommandContext(ctx, path, "-version")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Env = environment()
	out, err := cmd.Output()
	if err != nil {
		return Found{}, fmt.Errorf("asking QEMU's version: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return Found{}, fmt.Errorf("asking QEMU's version: %q says none", path)
	}
	major, _ := strconv.Atoi(string(m[2]))
	minor, _ := strconv.Atoi(string(m[3]))
	if major < 7 || major == 7 && minor < 2 {
		return Found{}, fmt.Errorf("QEMU %s is too old: 7.2 or newer is needed", m[1])
	}
	return Found{Path: path, Version: string(m[1])}, nil
}

// environment of QEMU: nothing of ours leaks into a process that runs
// strangers' code.
func environment() []string { return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"} }

// ready probes if need be and returns what a start needs.
func (d *Driver) ready(ctx context.Context) (vmm.Info, string, error) {
	info, err := d.Probe(ctx)
	if err != nil {
		return vmm.Info{}, "", err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return info, d.binary, nil
}

// Boot implements vmm.Driver.
func (d *Driver) Boot(ctx context.Context, a vmm.BootArgs) (vmm.Machine, error) {
	fail := func(err error) (vmm.Machine, error) {
		return nil, fmt.Errorf("booting sandbox %s: %w", a.ID, err)
	}
	if err := errors.Join(a.Validate(), a.NeedMemory()); err != nil {
		return fail(err)
	}
	info, binary, err := d.ready(ctx)
	if err != nil {
		return fail(err)
	}
	m, err := d.boot(ctx, info, binary, a)
	if err != nil {
		return fail(err)
	}
	return m, nil
}

func (d *Driver) boot(ctx context.Context, info vmm.Info, binary string, a vmm.BootArgs) (*machine, error) {
	l := newLaunch(d.o, info, binary, a.HostArgs, a.Spec)
	defer l.close()
	l.args = append(l.args, "-append", cmdline(info)+" "+a.Cmdline)
	if err := l.load("-kernel", a.Kernel); err != nil {
		return nil, fmt.Errorf("opening the kernel: %w", err)
	}
	if a.Initrd != "" {
		if err := l.load("-initrd", a.Initrd); err != nil {
			return nil, fmt.Errorf("opening the initrd: %w", err)
		}
	}
	m, err := l.start(ctx)
	if err != nil {
		return nil, err
	}
	if err := m.expectStatus(ctx, "running"); err != nil {
		return nil, m.abandon(err)
	}
	return m, nil
}

// Adopt implements vmm.Driver.
func (d *Driver) Adopt(ctx context.Context, r vmm.Record) (vmm.Machine, error) {
	if r.Kind != Name {
		return nil, fmt.Errorf("adopting sandbox %s: it is a %q machine, not %q", r.ID, r.Kind, Name)
	}
	p, err := vmm.AdoptProcess(r.PID, r.StartTime, r.BootID)
	if err != nil {
		return nil, fmt.Errorf("adopting sandbox %s: %w", r.ID, err)
	}
	m := newMachine(r, p, d.log)
	if err := m.connect(ctx); err != nil {
		m.Close()
		return nil, fmt.Errorf("adopting sandbox %s: %w", r.ID, err)
	}
	return m, nil
}

// own makes the files of the driver accessible to QEMU's user.
func (o Options) own(paths ...string) error {
	if o.UID == 0 && o.GID == 0 {
		return nil
	}
	for _, p := range paths {
		if err := os.Lchown(p, int(o.UID), int(o.GID)); err != nil {
			return fmt.Errorf("giving %s to QEMU's user: %w", p, err)
		}
	}
	return nil
}
