package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// Files in stage that say how far a switch is.
const (
	readyMark = "ready"
	movedMark = "moved"
	oldRoot   = "/.wrenn-old"
)

const (
	agentDir  = "/usr/local/bin"
	agentName = "envd"
	modules   = "/lib/modules"
)

// Adopt makes an unpacked image a root that a sandbox boots from, and marks it
// ready. The process has it as its "/" from then on.
func Adopt() error {
	var kernel unix.Utsname
	if err := unix.Uname(&kernel); err != nil {
		return fmt.Errorf("ask for the kernel's version: %w", err)
	}
	agents, err := os.Open(agentDir)
	if err != nil {
		return err
	}
	defer agents.Close()
	ours, err := os.Open(modules)
	if err != nil {
		return err
	}
	defer ours.Close()
	marks, err := os.Open(stage)
	if err != nil {
		return err
	}
	defer marks.Close()
	if err := enter(NewRoot); err != nil {
		return err
	}
	if err := checkShell(); err != nil {
		return err
	}
	if err := bring(agents, agentDir, agentName); err != nil {
		return fmt.Errorf("put the guest agent into the image: %w", err)
	}
	if err := bring(ours, modules, unix.ByteSliceToString(kernel.Release[:])); err != nil {
		return fmt.Errorf("put the kernel's modules into the image: %w", err)
	}
	if err := complete(); err != nil {
		return err
	}
	return mark(marks)
}

// checkShell finds out before the switch that commands could not be run after it.
func checkShell() error {
	if !runnable("/bin/sh") {
		return errors.New("the image has no shell (/bin/sh), which commands need: choose one with a distribution in it, as its -slim instead of its distroless form")
	}
	// What can install bash, in provision.sh of the template's build.
	for _, name := range []string{"bash", "apt-get", "apk", "dnf", "microdnf", "yum", "zypper", "pacman"} {
		for _, dir := range []string{"/bin", "/usr/bin", "/usr/local/bin", "/sbin", "/usr/sbin"} {
			if runnable(path.Join(dir, name)) {
				return nil
			}
		}
	}
	return errors.New("the image has no bash, which commands run in, and no package manager that could install it: take an image that has it")
}

func runnable(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && fi.Mode().IsRegular() && fi.Mode().Perm()&0o111 != 0
}

// bring moves an entry of the old root's directory into the same directory of
// the image. The running agent goes on from a file without its name there; its
// own name is linked, since it may be started again before the switch.
func bring(from *os.File, dir, name string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(path.Join(dir, name)); err != nil {
		return err
	}
	to, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer to.Close()
	if name == agentName {
		return unix.Linkat(int(from.Fd()), name, int(to.Fd()), name, 0)
	}
	return unix.Renameat(int(from.Fd()), name, int(to.Fd()), name)
}

// complete gives the image what a sandbox has beyond an image's files.
func complete() error {
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	// Each machine has its own; boot writes them, and must not do it through links.
	for _, f := range []string{"/etc/machine-id", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", stage, oldRoot} {
		if err := os.RemoveAll(f); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/etc/machine-id", nil, 0o444); err != nil {
		return err
	}
	if err := ensureUser("/etc", sandboxUser, "/home/"+sandboxUser); err != nil {
		return fmt.Errorf("make the user %s: %w", sandboxUser, err)
	}
	if err := os.MkdirAll("/etc/sudoers.d", 0o750); err != nil {
		return err
	}
	if err := writeNew("/etc/sudoers.d/"+sandboxUser, sandboxUser+" ALL=(ALL:ALL) NOPASSWD:ALL\n", 0o440); err != nil {
		return err
	}
	// Of /tmp boot takes care.
	if err := errors.Join(os.MkdirAll("/var/tmp", 0o755), unix.Chmod("/var/tmp", 0o1777)); err != nil {
		return err
	}
	// PID 1 is the agent; these talk to it by signal.
	for name, signal := range map[string]string{"poweroff": "USR2", "halt": "USR1", "reboot": "TERM"} {
		if err := writeNew("/usr/sbin/"+name, "#!/bin/sh\nexec kill -s "+signal+" 1\n", 0o755); err != nil {
			return err
		}
	}
	return nil
}

// writeNew writes a file in place of whatever has its name.
func writeNew(name, text string, mode fs.FileMode) error {
	if err := os.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(name); err != nil {
		return err
	}
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		return err
	}
	return os.Chmod(name, mode)
}

// mark says that the new root is whole.
func mark(marks *os.File) error {
	fd, err := unix.Openat(int(marks.Fd()), readyMark, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("mark the new root ready: %w", err)
	}
	unix.Sync()
	return unix.Close(fd)
}
