package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guest/rootfs"
)

const (
	newRoot = "/newroot"
	// diskWait bounds the wait for the root disk. It is long because two
	// saturated cores can slow an emulated guest down by an order of magnitude.
	diskWait = 30 * time.Second
	diskPoll = 2 * time.Millisecond
)

// Initrd is /init of the initramfs. It does not return: it becomes PID 1 of
// the root file system, or turns the machine off and says why.
func Initrd() {
	die("initrd", initrd())
}

func initrd() error {
	t := newTrace(os.Stdout, "initrd", time.Now)
	if err := mountAll(kernelMounts, t.warn); err != nil {
		return err
	}
	t.step("mounts")
	if err := loadModules(); err != nil {
		return err
	}
	t.step("modules")
	if err := waitForDisk(rootDisk, diskWait); err != nil {
		return err
	}
	t.step("disk")
	if err := os.Mkdir(newRoot, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making %s: %w", newRoot, err)
	}
	if err := unix.Mount(rootDisk, newRoot, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mounting %s as ext4: %w", rootDisk, err)
	}
	t.step("root")
	if switched, err := rootfs.Switch(newRoot); err != nil {
		return fmt.Errorf("taking an image's file system as the root: %w", err)
	} else if switched {
		t.step("image")
	}
	if err := switchRoot(); err != nil {
		return err
	}
	t.step("switch")
	t.done()
	return execInit()
}

// waitForDisk polls for a block device: devtmpfs sends no event that is cheaper
// to wait for, and with the drivers loaded it is normally there at once.
func waitForDisk(path string, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	ticker := time.NewTicker(diskPoll)
	defer ticker.Stop()
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil {
			if st.Mode&unix.S_IFMT != unix.S_IFBLK {
				return fmt.Errorf("%s is not a block device", path)
			}
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("root disk %s did not appear within %v: %w", path, limit, err)
		}
		<-ticker.C
	}
}

// switchRoot makes newRoot the root of the file system, taking the kernel's
// mounts along, and gives the initramfs's memory back.
func switchRoot() error {
	for _, m := range kernelMounts {
		target := filepath.Join(newRoot, m.target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return fmt.Errorf("making mount point: %w", err)
		}
		if err := unix.Mount(m.target, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s into the root: %w", m.target, err)
		}
	}
	emptyInitramfs()
	if err := unix.Chdir(newRoot); err != nil {
		return fmt.Errorf("entering the root: %w", err)
	}
	// The initramfs itself cannot be unmounted or pivoted away; the root is
	// mounted over it.
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root to /: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot into the root: %w", err)
	}
	return unix.Chdir("/")
}

// emptyInitramfs removes our own files, which live in RAM that the guest would
// never get back (and which every snapshot would carry). Errors only cost memory.
func emptyInitramfs() {
	for _, p := range []string{moduleDir, "/init"} {
		_ = os.RemoveAll(p)
	}
}

// execInit goes on as PID 1 of the root file system, by the binary found there:
// it is the one that the service runs too, so they share its pages.
func execInit() error {
	err := unix.Exec(servicePath, []string{servicePath, "init"}, os.Environ())
	return fmt.Errorf("executing %s of the root file system: %w", servicePath, err)
}
