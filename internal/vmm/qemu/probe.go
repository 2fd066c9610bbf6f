package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// kvmTime is how long a boot may take that proves KVM; a real one needs two
// seconds.
const kvmTime = 15 * time.Second

// probeMemoryMB is enough for a kernel and a handful of pages.
const probeMemoryMB = 128

// tryKVM says whether KVM runs the guest's kernel, with a remark for people
// where it does not. The verdict of a boot is remembered; what is known
// without one is not.
func (d *Driver) tryKVM(ctx context.Context, binary string, info vmm.Info) (ok bool, remark string, err error) {
	switch {
	case d.o.Accel == AccelTCG:
		return false, "", nil
	case d.o.Accel != AccelAuto && d.o.Accel != AccelKVM:
		return false, "", fmt.Errorf("unknown accelerator %q: auto, kvm or tcg", d.o.Accel)
	case d.o.ProbeKernel == "":
		return false, "KVM was not tried: no guest kernel to prove it with", nil
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false, "no KVM: " + err.Error(), nil
	}
	f.Close()
	key, err := d.probeKey(info)
	if err != nil {
		return false, "", err
	}
	if v, found := vmm.LoadVerdict(d.o.ProbeCache, key); found {
		return v.Works, v.Finding, nil
	}
	d.log.Info("proving KVM by a boot of the guest's kernel", "limit", kvmTime)
	finding := d.bootProbe(ctx, binary, info)
	if ctx.Err() != nil {
		return false, "", ctx.Err()
	}
	v := vmm.Verdict{Key: key, Works: finding == nil, Finding: "KVM boots the guest's kernel", At: time.Now().UTC()}
	if finding != nil {
		v.Finding = "KVM does not boot the guest's kernel: " + finding.Error()
	}
	if err := vmm.SaveVerdict(d.o.ProbeCache, v); err != nil {
		d.log.Warn("the finding will be made again next time", "error", err)
	}
	return v.Works, v.Finding, nil
}

// probeKey names everything that a verdict depends on.
func (d *Driver) probeKey(info vmm.Info) (string, error) {
	kernel, err := vmm.FileDigest(d.o.ProbeKernel)
	if err != nil {
		return "", fmt.Errorf("reading the guest's kernel: %w", err)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("asking the host's kernel version: %w", err)
	}
	flags, err := vmm.HostFlagsDigest()
	if err != nil {
		return "", err
	}
	host := unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Version[:])
	return strings.Join([]string{"host " + host, "cpu " + flags, "qemu " + info.Version, "guest " + kernel}, "; "), nil
}

// bootProbe boots the kernel with KVM into one tiny program; nil when that
// program has spoken.
func (d *Driver) bootProbe(ctx context.Context, binary string, info vmm.Info) error {
	ctx, cancel := context.WithTimeout(ctx, kvmTime)
	defer cancel()
	dir, err := os.MkdirTemp("", "wrenn-kvm-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := d.o.own(dir); err != nil {
		return err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, vmm.ProbeInitrd(), 0o644); err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("wrenn-kvm-probe", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("making a memfd: %w", err)
	}
	mem := os.NewFile(uintptr(fd), "memfd")
	defer mem.Close()
	if err := mem.Truncate(probeMemoryMB << 20); err != nil {
		return fmt.Errorf("sizing a memfd: %w", err)
	}
	info.Accel, info.CPUModel = vmm.AccelKVM, cpuKVM
	m, err := d.boot(ctx, info, binary, vmm.BootArgs{
		HostArgs: vmm.HostArgs{ID: "kvmprobe", Dir: dir, Memory: mem},
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
	if console := vmm.Tail(m.rec.ConsolePath, 1<<20); !strings.Contains(console, vmm.ProbeWord) {
		return m.Err()
	}
	return nil
}
