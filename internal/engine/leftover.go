package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killHolders kills the processes that were started on a sandbox's directory
// but are in no journal.
func killHolders(_ context.Context, dir string, log *slog.Logger) error {
	var errs []error
	eachHolder(dir, func(pid, pidfd int) {
		log.Warn("killing a VM process that was never entered", "pid", pid, "dir", dir)
		errs = append(errs, killPidfd(pidfd))
	})
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
