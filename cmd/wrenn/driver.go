package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/kernelnbd"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/qemu"
)

// Values of --driver.
const (
	driverAuto        = "auto"
	driverQEMU        = "qemu"
	driverFirecracker = "firecracker"
)

// lookEarly begins to find out what takes time and needs nothing else: a server
// that takes over what runs is waited for. What asks later has what was found.
func (s *stack) lookEarly(ctx context.Context, driver string) {
	s.findQEMU = sync.OnceValues(func() (qemu.Found, error) { return qemu.Find(ctx, "") })
	if driver == driverFirecracker {
		return
	}
	go s.findQEMU()
	go vmm.HostTSCKHz(ctx)
}

// chooseDriver finds what runs VMs, and the user that it runs as. Where that is
// Firecracker, the base's kernel becomes the one that it boots.
//
// A choice is kept in the state directory: what was snapshotted by one VMM
// cannot be resumed by another, so that a program which somebody installs must
// not change it.
func (s *stack) chooseDriver(ctx context.Context, o upOptions, base *template.Result) (vmm.Driver, int, error) {
	file := filepath.Join(o.dir, "driver")
	want := o.driver
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("read which driver was chosen: %w", err)
	}
	kept := strings.TrimSpace(string(b))
	if want == driverAuto {
		want = cmp.Or(kept, driverAuto)
	}
	driver, user, err := s.findDriver(ctx, o, want, base)
	if err != nil {
		return nil, 0, err
	}
	if kept == driver.Name() {
		return driver, user, nil // a full disk would not take it again
	}
	if err := os.WriteFile(file, []byte(driver.Name()+"\n"), 0o600); err != nil {
		return nil, 0, fmt.Errorf("keep which driver was chosen: %w", err)
	}
	return driver, user, nil
}

func (s *stack) findDriver(ctx context.Context, o upOptions, want string, base *template.Result) (vmm.Driver, int, error) {
	if want == driverQEMU {
		return s.qemuDriver(ctx, o, *base)
	}
	kernel, driver, err := s.firecrackerDriver(ctx, o, *base)
	if err == nil {
		base.Kernel = kernel
		return driver, o.vmmUser, nil
	}
	if want == driverFirecracker {
		return nil, 0, fmt.Errorf("run VMs by Firecracker: %w; wrenn doctor tells what this host lacks, --driver qemu does without", err)
	}
	s.log.Info("Firecracker is not used", "why", err)
	return s.qemuDriver(ctx, o, *base)
}

// firecrackerDriver is Firecracker where all that it needs is here: the
// programs, KVM that a boot of the guest's kernel has proved, block devices.
func (s *stack) firecrackerDriver(ctx context.Context, o upOptions, base template.Result) (kernel string, _ vmm.Driver, err error) {
	if _, _, _, err := firecracker.Find(ctx, firecracker.Options{}); err != nil {
		return "", nil, err
	}
	disks, err := kernelnbd.Open("", s.log)
	if err != nil {
		return "", nil, err
	}
	disks.Close()
	if kernel, err = template.EnsureVmlinux(base.Kernel); err != nil {
		return "", nil, err
	}
	d := firecracker.New(firecracker.Options{
		ProbeKernel: kernel, ProbeCache: firecrackerVerdict(o.dir),
		UID: uint32(o.vmmUser), GID: uint32(o.vmmUser), SpareDir: filepath.Join(o.dir, "spares"), Logger: s.log,
	})
	_, err = d.Probe(ctx)
	return kernel, d, err
}

// firecrackerVerdict is where the finding about KVM is kept, beside QEMU's.
func firecrackerVerdict(dir string) string {
	return filepath.Join(filepath.Dir(kvmVerdict(dir)), "kvm-verdict-firecracker.json")
}

// openDisks opens the block devices that a driver without NBD needs. The
// devices of this state directory bear its digest.
func (s *stack) openDisks(d vmm.Driver, dir string) (engine.Disks, error) {
	if !d.Capabilities().OwnMemory {
		return nil, nil
	}
	sum := sha256.Sum256([]byte(dir))
	disks, err := kernelnbd.Open("wrenn-"+hex.EncodeToString(sum[:6]), s.log)
	if err != nil {
		return nil, err
	}
	s.push(func() error { disks.Close(); return nil })
	return disks, nil
}

// qemuDriver is QEMU, and the user that it runs as. An unprivileged one, unless
// this host makes that impossible: page faults can then be served only through
// /dev/userfaultfd, and KVM only where everybody may open it.
func (s *stack) qemuDriver(ctx context.Context, o upOptions, base template.Result) (vmm.Driver, int, error) {
	user := o.vmmUser
	if _, err := os.Stat("/dev/userfaultfd"); err != nil && user != 0 {
		s.log.Warn("VMs' processes run as root: this kernel has no /dev/userfaultfd (Linux 6.1 and later have)")
		user = 0
	}
	if closed := closedParent(o.dir); closed != "" && user != 0 {
		s.log.Warn("VMs' processes run as root: another user cannot pass through "+closed, "remedy", "chmod o+x "+closed+", or another --dir")
		user = 0
	}
	found, err := s.findQEMU()
	if err != nil {
		return nil, 0, fmt.Errorf("find out what runs VMs here: %w", err)
	}
	d := qemu.New(qemu.Options{Found: &found, ProbeKernel: base.Kernel, ProbeCache: kvmVerdict(o.dir), Logger: s.log})
	// Asked as root: an unprivileged user that may not open /dev/kvm must not
	// be taken for a host without it. The answer is remembered.
	info, err := d.Probe(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("find out what runs VMs here: %w", err)
	}
	if st, err := os.Stat("/dev/kvm"); user != 0 && info.Accel == vmm.AccelKVM && (err != nil || st.Mode().Perm()&0o006 != 0o006) {
		s.log.Warn("VMs' processes run as root: /dev/kvm is not open to others; chmod 666 /dev/kvm allows an unprivileged user")
		user = 0
	}
	return d.As(uint32(user), uint32(user)), user, nil
}
