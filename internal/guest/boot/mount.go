package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// mountPoint is one file system that boot mounts.
type mountPoint struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
	// optional: a kernel without it still makes a useful sandbox.
	optional bool
}

const nosuid = unix.MS_NOSUID | unix.MS_NODEV

// kernelMounts are needed by the initramfs; they move along into the root.
var kernelMounts = []mountPoint{
	{"proc", "/proc", "proc", nosuid | unix.MS_NOEXEC, "", false},
	{"sysfs", "/sys", "sysfs", nosuid | unix.MS_NOEXEC, "", false},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755", false},
}

// rootMounts are what PID 1 adds. /tmp is not among them: it stays on the disk,
// where a large upload costs no guest memory.
var rootMounts = []mountPoint{
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666", false},
	{"tmpfs", "/dev/shm", "tmpfs", nosuid, "mode=1777", false},
	{"tmpfs", "/run", "tmpfs", nosuid, "mode=0755,size=20%", false},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", nosuid | unix.MS_NOEXEC, "nsdelegate", true},
}

// mountAll mounts each of mounts that is not mounted yet.
func mountAll(mounts []mountPoint, warn func(doing string, err error)) error {
	for _, m := range mounts {
		err := mountOne(m)
		if err == nil {
			continue
		}
		if !m.optional {
			return err
		}
		warn("mounting", err)
	}
	return nil
}

func mountOne(m mountPoint) error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("making mount point: %w", err)
	}
	mounted, err := isMountPoint(m.target)
	if err != nil {
		return err
	}
	if mounted {
		return nil
	}
	if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mounting %s on %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// isMountPoint compares the devices of a directory and its parent, which is
// exact for everything but bind mounts within one file system.
func isMountPoint(dir string) (bool, error) {
	var self, parent unix.Stat_t
	if err := unix.Lstat(dir, &self); err != nil {
		return false, fmt.Errorf("stat %s: %w", dir, err)
	}
	if err := unix.Lstat(filepath.Dir(dir), &parent); err != nil {
		return false, fmt.Errorf("stat parent of %s: %w", dir, err)
	}
	return self.Dev != parent.Dev, nil
}

// devLinks are the names in /dev that a shell or Python expects and devtmpfs
// lacks.
var devLinks = map[string]string{
	"/dev/fd":     "/proc/self/fd",
	"/dev/stdin":  "/proc/self/fd/0",
	"/dev/stdout": "/proc/self/fd/1",
	"/dev/stderr": "/proc/self/fd/2",
}

func linkDevices() error {
	for name, target := range devLinks {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// makeRunDirs makes the directories below /run and /tmp that programs expect.
func makeRunDirs() error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{
		{"/run/lock", 0o777 | os.ModeSticky},
		{"/run/wrenn", 0o755},
		{"/run/user", 0o755},
		{"/run/sudo", 0o711},
		{"/tmp", 0o777 | os.ModeSticky},
	} {
		if err := os.MkdirAll(d.path, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(d.path, d.mode); err != nil {
			return err
		}
	}
	return nil
}
