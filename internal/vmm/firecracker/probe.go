package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// kvmTime is how long a boot may take that proves KVM. A real one needs one
// second; within an emulated processor it is ten.
const kvmTime = 60 * time.Second

const probeMemoryMB = 128

// ErrNoKVM: the host's KVM does not run the guest's kernel.
var ErrNoKVM = errors.New("firecracker needs KVM")

// Probe implements vmm.Driver. What it found is kept; a failure is not.
func (d *Driver) Probe(ctx context.Context) (vmm.Info, error) {
	select {
	case d.probe <- struct{}{}:
		defer func() { <-d.probe }()
	case <-ctx.Done():
		return vmm.Info{}, ctx.Err()
	}
	if h := d.found(); h != nil {
		return h.info, nil
	}
	h, err := d.look(ctx)
	if err != nil {
		return vmm.Info{}, err
	}
	remark, err := d.tryKVM(ctx, h)
	if err != nil {
		return vmm.Info{}, err
	}
	if remark != "" {
		h.info.Remarks = append(h.info.Remarks, remark)
	}
	if err := d.sweepSpares(); err != nil {
		return vmm.Info{}, err
	}
	sweepCgroups()
	d.mu.Lock()
	d.host = &h
	d.mu.Unlock()
	return h.info, nil
}

func (d *Driver) found() *host {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.host
}

func (d *Driver) ready(ctx context.Context) (host, error) {
	if _, err := d.Probe(ctx); err != nil {
		return host{}, err
	}
	return *d.found(), nil
}

// look finds the programs and describes the host.
func (d *Driver) look(ctx context.Context) (h host, err error) {
	if h.binary, h.version, err = find(ctx, d.o.Binary); err != nil {
		return h, err
	}
	if err := h.version.check(); err != nil {
		return h, err
	}
	if asRoot() && !d.o.Direct {
		var v version
		if h.jailer, v, err = find(ctx, d.o.Jailer); err != nil {
			return h, err
		}
		if v != h.version {
			return h, fmt.Errorf("%s has version %s and %s version %s: they must come from one release", h.jailer, v, h.binary, h.version)
		}
	}
	if err := checkUserfaultfd(d.o.UID, "/dev/userfaultfd", "/proc/sys/vm/unprivileged_userfaultfd"); err != nil {
		return h, err
	}
	state, err := stateVersion(ctx, h.binary)
	if err != nil {
		return h, err
	}
	khz, err := vmm.HostTSCKHz(ctx)
	if err != nil {
		return h, err
	}
	flags, err := vmm.HostFlagsDigest()
	if err != nil {
		return h, err
	}
	h.info = vmm.Info{
		Kind: Name, Version: h.version.String(), Accel: vmm.AccelKVM,
		MachineType: "microvm, state " + state, CPUModel: "host " + vendor(), CPUFlagsDigest: flags, TSCKHz: khz,
	}
	return h, nil
}

// checkUserfaultfd: without one Firecracker could boot a machine and never bring
// it back. Root may always make one; others by the device, which jailer brings
// into the jail, or where the sysctl lets everybody.
func checkUserfaultfd(uid uint32, device, sysctl string) error {
	if uid == 0 {
		return nil
	}
	_, err := os.Stat(device)
	if err == nil {
		return nil
	}
	if b, err := os.ReadFile(sysctl); err == nil && strings.TrimSpace(string(b)) == "1" {
		return nil
	}
	return fmt.Errorf("user %d, which Firecracker would run as, may not use userfaultfd: %w; Linux 6.1 has that device, "+
		"sysctl vm.unprivileged_userfaultfd=1 allows it to everybody, --vmm-user 0 runs Firecracker as root", uid, err)
}

// vendor of the host's CPU: "AuthenticAMD".
func vendor() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "vendor_id" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// tryKVM proves KVM by a boot of the guest's kernel, once for each host kernel,
// CPU, Firecracker and guest kernel.
func (d *Driver) tryKVM(ctx context.Context, h host) (remark string, err error) {
	if d.o.ProbeKernel == "" {
		return "", nil
	}
	f, err := os.OpenFile(d.kvm, os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoKVM, err)
	}
	f.Close()
	kernel, err := vmm.FileDigest(d.o.ProbeKernel)
	if err != nil {
		return "", fmt.Errorf("reading the guest's kernel: %w", err)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("asking the host's kernel version: %w", err)
	}
	key := strings.Join([]string{
		"host " + unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Version[:]),
		"cpu " + h.info.CPUFlagsDigest, "firecracker " + h.info.Version, "guest " + kernel,
	}, "; ")
	v, found := vmm.LoadVerdict(d.o.ProbeCache, key)
	if !found {
		d.log.Info("proving KVM by a boot of the guest's kernel in Firecracker", "limit", kvmTime)
		finding := d.bootProbe(ctx, h)
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		v = vmm.Verdict{Key: key, Works: finding == nil, Finding: "Firecracker boots the guest's kernel", At: time.Now().UTC()}
		if finding != nil {
			v.Finding = "Firecracker does not boot the guest's kernel: " + finding.Error()
		}
		if err := vmm.SaveVerdict(d.o.ProbeCache, v); err != nil {
			d.log.Warn("the finding will be made again next time", "error", err)
		}
	}
	if !v.Works {
		return "", fmt.Errorf("%w: %s", ErrNoKVM, v.Finding)
	}
	return v.Finding, nil
}

// bootProbe boots the kernel into one tiny program; nil when that has spoken.
func (d *Driver) bootProbe(ctx context.Context, h host) error {
	ctx, cancel := context.WithTimeout(ctx, kvmTime)
	defer cancel()
	dir, err := os.MkdirTemp("", "wrenn-kvm-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, vmm.ProbeInitrd(), 0o644); err != nil {
		return err
	}
	m, err := d.boot(ctx, h, vmm.BootArgs{
		HostArgs: vmm.HostArgs{ID: "kvmprobe", Dir: dir},
		Spec:     vmm.Spec{VCPUs: 1, MemoryMB: probeMemoryMB},
		Kernel:   d.o.ProbeKernel, Initrd: initrd,
	})
	if err != nil {
		return err
	}
	select {
	case <-m.Done():
	case <-ctx.Done():
		return m.abandon(fmt.Errorf("it hung for %s", kvmTime))
	}
	if !strings.Contains(vmm.Tail(m.rec.ConsolePath, 1<<20), vmm.ProbeWord) {
		return m.Err()
	}
	return nil
}
