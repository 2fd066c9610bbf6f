package engine

import (
	"context"
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

// killHolders kills the processes that were started on a sandbox's directory
// but are in no journal yet. They are known by their command line naming a
// path inside the directory, which is theirs alone.
func killHolders(ctx context.Context, dir string, log *slog.Logger) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	var errs []error
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		// Read after the pidfd was opened: what it says is of that process.
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && (isVMMOf(string(cmdline), dir) || jailedIn(e.Name(), dir)) {
			log.Warn("killing a VM process that was never entered", "pid", pid, "dir", dir)
			errs = append(errs, killPidfd(fd))
		}
		unix.Close(fd)
	}
	return errors.Join(errs...)
}

// isVMMOf tells whether a command line is that of a VMM on the directory.
func isVMMOf(cmdline, dir string) bool {
	program, _, _ := strings.Cut(cmdline, "\x00")
	name := filepath.Base(program)
	// A jailer becomes the VMM that it prepares a jail for.
	return (strings.HasPrefix(name, "qemu-system-") || name == "firecracker" || name == "jailer") && strings.Contains(cmdline, dir+"/")
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
