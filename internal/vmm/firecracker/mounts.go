package firecracker

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// apart runs start on a thread in namespaces of its own, where there is no jailer
// to make them: see enter. The child inherits them; the thread ends with its
// goroutine, and with the last process what was mounted there.
func (l *launch) apart(start func() (*vmm.Process, error)) (p *vmm.Process, err error) {
	if !l.hasDisk() && l.args.NetNS == "" {
		return start()
	}
	onOwnThread(func() {
		if err = l.enter(); err == nil {
			p, err = start()
		}
	})
	return p, err
}

// onOwnThread runs f on a thread that ends with it, whatever namespaces it entered.
func onOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		f()
	}()
	<-done
}

// ownMounts gives the thread a mount namespace whose changes nobody else sees.
func ownMounts() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mounts private: %w", err)
	}
	return nil
}

// lend mounts the lent file, to be read alone, where the process looks for it and
// nobody else sees it. The process has its mounts, jailed or not.
func (l *launch) lend(pid int) error {
	to := "/" + memoryName
	if !l.jailed() {
		to = driveDir + to
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/root%s", pid, to), nil, 0o400); err != nil {
			return fmt.Errorf("making the place of the memory: %w", err)
		}
	}
	file, err := unix.OpenTree(unix.AT_FDCWD, l.lent, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("taking a mount of the memory: %w", err)
	}
	defer unix.Close(file)
	const flags = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	if err := unix.MountSetattr(file, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: flags}); err != nil {
		return fmt.Errorf("closing the memory to writers: %w", err)
	}
	mounts, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return fmt.Errorf("finding the process's mounts: %w", err)
	}
	defer mounts.Close()
	onOwnThread(func() {
		if err = unix.Unshare(unix.CLONE_FS); err == nil {
			err = unix.Setns(int(mounts.Fd()), unix.CLONE_NEWNS)
		}
		if err == nil {
			err = unix.MoveMount(file, "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
	})
	if err != nil {
		return fmt.Errorf("mounting the memory: %w", err)
	}
	return nil
}

// enter goes where the tap is, and to mounts in which drivePath leads to this
// machine's disk.
func (l *launch) enter() error {
	if l.args.NetNS != "" {
		ns, err := os.Open(l.args.NetNS)
		if err != nil {
			return fmt.Errorf("netns: %w", err)
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering the network namespace: %w", err)
		}
	}
	if !l.hasDisk() {
		return nil
	}
	if err := os.MkdirAll(driveDir, 0o755); err != nil {
		return fmt.Errorf("making %s: %w", driveDir, err)
	}
	if err := ownMounts(); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", driveDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=64k,mode=755"); err != nil {
		return fmt.Errorf("mounting %s: %w", driveDir, err)
	}
	if l.args.DiskDevice == "" {
		return nil
	}
	if err := os.Symlink(l.args.DiskDevice, drivePath); err != nil {
		return fmt.Errorf("linking the disk: %w", err)
	}
	return l.ownDevice(l.args.DiskDevice)
}

// hasDisk tells whether the process has a disk, or may get one.
func (l *launch) hasDisk() bool { return l.ahead || l.disk != nil || l.args.DiskDevice != "" }

// ownDevice gives the disk itself, of which there is no node in a jail, to
// Firecracker's user.
func (l *launch) ownDevice(device string) error {
	if l.o.UID == 0 {
		return nil
	}
	if err := os.Chown(device, int(l.uid()), int(l.o.GID)); err != nil {
		return fmt.Errorf("giving the disk to Firecracker's user: %w", err)
	}
	return nil
}

// place puts a disk that comes late, or none, where the process looks for it. No
// guest has run in the process yet, so that nobody can have prepared the place.
func (l *launch) place(pid int, device string) error {
	switch {
	case device == "":
		return nil
	case l.jailed():
		return l.node(device)
	}
	// The place is in mounts that only the process sees.
	if err := os.Symlink(device, fmt.Sprintf("/proc/%d/root%s", pid, drivePath)); err != nil {
		return fmt.Errorf("linking the disk: %w", err)
	}
	return l.ownDevice(device)
}
