package vmm

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Bounds of a machine.
const (
	MaxVCPUs    = 64
	MinMemoryMB = 64
	MaxMemoryMB = 1 << 20
	maxID       = 64
	maxCmdline  = 1536 // the kernel's limit is 2048 with the driver's own part
)

// MemoryBytes is the size of guest RAM.
func (s Spec) MemoryBytes() int64 { return int64(s.MemoryMB) << 20 }

// Validate checks the numbers; the error names the field.
func (s Spec) Validate() error {
	if s.VCPUs < 1 || s.VCPUs > MaxVCPUs {
		return fmt.Errorf("vcpus: %d is not within 1 to %d", s.VCPUs, MaxVCPUs)
	}
	if s.MemoryMB < MinMemoryMB || s.MemoryMB > MaxMemoryMB {
		return fmt.Errorf("memory_mb: %d is not within %d to %d", s.MemoryMB, MinMemoryMB, MaxMemoryMB)
	}
	if s.MAC != "" {
		hw, err := net.ParseMAC(s.MAC)
		if err != nil || len(hw) != 6 {
			return fmt.Errorf("mac: %q is not an Ethernet address", s.MAC)
		}
		if hw[0]&1 != 0 {
			return fmt.Errorf("mac: %q is a multicast address", s.MAC)
		}
	}
	return nil
}

// Validate checks everything that can be checked before a process is started;
// the error names the field.
func (a HostArgs) Validate(s Spec) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if err := checkID(a.ID); err != nil {
		return err
	}
	if fi, err := os.Stat(a.Dir); err != nil {
		return fmt.Errorf("dir: %w", err)
	} else if !fi.IsDir() || !filepath.IsAbs(a.Dir) {
		return fmt.Errorf("dir: %q is not an absolute path of a directory", a.Dir)
	}
	if a.Memory != nil {
		fi, err := a.Memory.Stat()
		if err != nil {
			return fmt.Errorf("memory: %w", err)
		}
		if fi.Size() != s.MemoryBytes() {
			return fmt.Errorf("memory: the file has %d bytes, the machine %d MiB (%d bytes)", fi.Size(), s.MemoryMB, s.MemoryBytes())
		}
	}
	if (a.Tap != nil || a.TapName != "") && s.MAC == "" {
		return fmt.Errorf("mac: needed with a tap")
	}
	for name, p := range map[string]string{
		"disk_socket": a.DiskSocket, "disk_device": a.DiskDevice, "memory_socket": a.MemorySocket, "memory_file": a.MemoryFile,
		"console_path": a.ConsolePath, "netns": a.NetNS,
	} {
		if p == "" {
			continue
		}
		if !filepath.IsAbs(p) || strings.ContainsAny(p, "\x00\n") {
			return fmt.Errorf("%s: %q is not an absolute path", name, p)
		}
	}
	return nil
}

// NeedMemory is the check of drivers that map RAM from a file.
func (a HostArgs) NeedMemory() error {
	if a.Memory == nil {
		return fmt.Errorf("memory: no file given")
	}
	return nil
}

// Validate checks everything that can be checked before a process is started.
func (a BootArgs) Validate() error {
	if err := a.HostArgs.Validate(a.Spec); err != nil {
		return err
	}
	if _, err := os.Stat(a.Kernel); err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	if a.Initrd != "" {
		if _, err := os.Stat(a.Initrd); err != nil {
			return fmt.Errorf("initrd: %w", err)
		}
	}
	if len(a.Cmdline) > maxCmdline {
		return fmt.Errorf("cmdline: %d bytes, the limit is %d", len(a.Cmdline), maxCmdline)
	}
	if strings.ContainsAny(a.Cmdline, "\x00\n") {
		return fmt.Errorf("cmdline: holds a NUL or a line feed")
	}
	return nil
}

// Validate checks everything that can be checked before a process is started.
func (a RestoreArgs) Validate() error {
	if err := a.HostArgs.Validate(a.State.Spec); err != nil {
		return err
	}
	fi, err := os.Stat(a.State.File)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if !fi.Mode().IsRegular() || fi.Size() == 0 {
		return fmt.Errorf("state: %s is empty or not a regular file", a.State.File)
	}
	return nil
}

func checkID(id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("id: %q must have 1 to %d characters", id, maxID)
	}
	for _, c := range id {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return fmt.Errorf("id: %q must match [a-z0-9]+", id)
		}
	}
	return nil
}

// tscTolerance is the share (1/n) by which two measurements of the TSC of the
// same kind of host may differ: 200 ppm, two seconds of guest time in three
// hours, and ten times what measuring errs by.
const tscTolerance = 5000

// series is "7.2" of "7.2.22": bug fix releases within a series read each
// other's device state, and distributions bring them as security updates.
func series(version string) string {
	parts := strings.SplitN(version, ".", 3)
	if len(parts) < 2 {
		return version
	}
	return parts[0] + "." + parts[1]
}

// Fits compares the host that saved a state (saved) with this one. The error,
// one sentence, wraps ErrIncompatible.
func (i Info) Fits(saved Info) error {
	for _, f := range []struct{ name, saved, here string }{
		{"VMM", saved.Kind, i.Kind},
		{"VMM version", series(saved.Version), series(i.Version)},
		{"accelerator", saved.Accel, i.Accel},
		{"machine type", saved.MachineType, i.MachineType},
		{"CPU model", saved.CPUModel, i.CPUModel},
		{"set of CPU flags", saved.CPUFlagsDigest, i.CPUFlagsDigest},
	} {
		if f.saved != f.here {
			return fmt.Errorf("%w: its %s is %q and this host's is %q", ErrIncompatible, f.name, f.saved, f.here)
		}
	}
	diff := i.TSCKHz - saved.TSCKHz
	if diff < 0 {
		diff = -diff
	}
	if diff*tscTolerance > saved.TSCKHz {
		return fmt.Errorf("%w: its time stamp counter runs at %d kHz and this host's at %d kHz", ErrIncompatible, saved.TSCKHz, i.TSCKHz)
	}
	return nil
}
