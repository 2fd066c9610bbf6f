package vmm

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Holders are the VMM processes that were started on a machine's directory.
func Holders(dir string) []int {
	var pids []int
	eachHolder(dir, func(pid, _ int) { pids = append(pids, pid) })
	return pids
}

// KillHolders kills the processes that were started on a machine's directory but
// that nobody has a record of, and waits for their end.
func KillHolders(dir string, log *slog.Logger) error {
	var errs []error
	eachHolder(dir, func(pid, pidfd int) {
		log.Warn("killing a VM process that was never entered", "pid", pid, "dir", dir)
		errs = append(errs, killPidfd(pidfd))
	})
	return errors.Join(errs...)
}

// eachHolder calls f with each VM process of a machine's directory and a pidfd of
// it. They are known by their command line naming a path inside the directory,
// which is theirs alone.
func eachHolder(dir string, f func(pid, pidfd int)) {
	entries, _ := os.ReadDir("/proc") // without it nothing of ours works
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		// Read after the pidfd was opened: what it says is of that process.
		cmdline, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err == nil && (isVMMOf(string(cmdline), dir) || jailedIn(entry.Name(), dir)) {
			f(pid, fd)
		}
		unix.Close(fd)
	}
}

// isVMMOf tells whether a command line is that of a VMM on the directory.
func isVMMOf(cmdline, dir string) bool {
	program, _, _ := strings.Cut(cmdline, "\x00")
	name := filepath.Base(program)
	// A jailer becomes the VMM that it prepares a jail for.
	return (strings.HasPrefix(name, "qemu-system-") || name == "firecracker" || name == "jailer") && strings.Contains(cmdline, dir+"/")
}

// jailedIn tells whether a process's root lies below a machine's directory: a
// jailed VMM's command line does not name it.
func jailedIn(pid, dir string) bool {
	root, err := os.Stat(filepath.Join("/proc", pid, "root"))
	if err != nil {
		return false
	}
	jails, _ := filepath.Glob(filepath.Join(dir, "jail", "*", "*", "root"))
	for _, j := range jails {
		if st, err := os.Stat(j); err == nil && os.SameFile(st, root) {
			return true
		}
	}
	return false
}

func killPidfd(fd int) error {
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill: %w", err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for a killed process: %w", err)
		}
	}
	return errors.New("a killed process does not end")
}
