package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/pager"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

func pagerSocket(dir string) string { return filepath.Join(dir, "run", "pager.sock") }

// pagerLowWater is how much of the host's memory the pager keeps available, as
// far as giving back pages of images can do it.
const pagerLowWater = 256 << 20

// pagerReserve is the disk that guests leave to journals, the database and what a
// delete writes: the way out of a full disk needs some.
const pagerReserve = 16 << 20

// newPagerCmd is the process that serves guest memory and disks. `wrenn up`
// starts it; people do not.
func newPagerCmd() *cobra.Command {
	var dir, logFile string
	var gid int
	cmd := &cobra.Command{
		Use: "pager", Short: "Serve guest memory and disks (started by up)", Hidden: true,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			log := newLogger(upOptions{})
			if logFile != "" {
				out, err := openRotatingLog(logFile, pagerLogMost, ontoStandardOutputs)
				if err != nil {
					return err
				}
				log = newLoggerTo(out, upOptions{})
			}
			lock, err := os.OpenFile(filepath.Join(dir, "run", "pager.lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
			if err != nil {
				return fmt.Errorf("open the pager's lock: %w", err)
			}
			defer lock.Close()
			if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
				return fmt.Errorf("another pager serves %s", dir)
			}
			store, err := snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{ReadOnly: true, Logger: log})
			if err != nil {
				return fmt.Errorf("open the snapshot store: %w", err)
			}
			defer store.Close()
			s, err := pager.New(pager.Options{
				Dir: filepath.Join(dir, "run", "pager"), Store: store, SocketGID: gid, Version: version(), Logger: log,
				OrderDir: filepath.Join(dir, "cache", "orders"), LowWater: pagerLowWater, Reserve: pagerReserve,
				WholeDir: filepath.Join(dir, "run", "memory"),
			})
			if err != nil {
				return err
			}
			err = s.Serve(ctx, pagerSocket(dir))
			// No Close: the userfaultfds end with the process, and a VM that
			// still lives is taken up by the next pager.
			return errors.Join(err, s.LetGo())
		},
	}
	cmd.Flags().StringVar(&dir, "dir", stateDir(), "state directory")
	cmd.Flags().StringVar(&logFile, "log", "", "file that takes the log, bounded, in place of standard output and error")
	cmd.Flags().IntVar(&gid, "socket-gid", 0, "group that may open the disks' sockets")
	return cmd
}
