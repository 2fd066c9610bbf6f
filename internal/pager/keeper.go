package pager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1/pagerv1connect"
)

// Client is the engine's side of pager.v1.
type Client = pagerv1connect.PagerServiceClient

// Dial makes a client of the pager on a socket. It connects when it is used.
func Dial(socket string) Client { return dial(socket, 0) }

// dial's clients wait so long for somebody to listen: nothing was sent yet, so
// who calls while the pager is being replaced need not fail.
func dial(socket string, patience time.Duration) Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, max(patience, dialLimit))
			defer cancel()
			tick := time.NewTicker(10 * time.Millisecond) // there is no event for it
			defer tick.Stop()
			for deadline := time.Now().Add(patience); ; {
				var d net.Dialer
				conn, err := d.DialContext(ctx, "unix", socket)
				if err == nil || time.Now().After(deadline) {
					return conn, err
				}
				select {
				case <-ctx.Done():
					return nil, err
				case <-tick.C:
				}
			}
		},
	}
	// Both ends are this machine: compressing what passes would only cost time.
	return pagerv1connect.NewPagerServiceClient(&http.Client{Transport: transport}, "http://pager",
		connect.WithAcceptCompression("gzip", nil, nil))
}

const (
	// dialLimit bounds the connection to one that listens and does not accept.
	dialLimit = 10 * time.Second
	// replaceLimit is how long calls wait for a pager that is being replaced.
	replaceLimit = 5 * time.Second
)

// KeeperOptions say how to start a pager.
type KeeperOptions struct {
	// Command is the program and its arguments; it must serve on Socket.
	Command []string
	Socket  string
	// LogPath takes what the pager prints.
	LogPath string
	// Version is what a pager that Command starts says of itself. One of
	// another version, which an earlier program left, is replaced: its VMs
	// wait for a moment and go on. Empty: any pager will do.
	Version string
	Logger  *slog.Logger
}

// Keeper sees to it that a pager runs: it finds the one that is there, or
// starts one, and starts another when it dies. Closing the Keeper leaves the
// pager running.
type Keeper struct {
	opts   KeeperOptions
	client Client // waits while the pager is replaced
	probe  Client // does not
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu  sync.Mutex
	pid int
}

// startLimit bounds how long a new pager may take until it answers. Taking up
// a hundred VMs again is included.
const startLimit = 30 * time.Second

// Keep finds or starts the pager and answers when it takes calls.
func Keep(ctx context.Context, opts KeeperOptions) (*Keeper, error) {
	k := &Keeper{opts: opts, client: dial(opts.Socket, replaceLimit), probe: Dial(opts.Socket)}
	pid, err := k.ensure(ctx)
	if err != nil {
		return nil, err
	}
	watch, cancel := context.WithCancel(context.WithoutCancel(ctx))
	k.cancel = cancel
	k.wg.Add(1)
	go k.watch(watch, pid)
	return k, nil
}

// Client returns the connection to whichever pager serves now.
func (k *Keeper) Client() Client { return k.client }

// PID returns the process id of the present pager.
func (k *Keeper) PID() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.pid
}

// Close ends the watch, not the pager.
func (k *Keeper) Close() {
	k.cancel()
	k.wg.Wait()
}

// Stop ends the watch and the pager. No VM may be left.
func (k *Keeper) Stop() error {
	k.Close()
	return endPID(context.Background(), k.PID())
}

// endPID ends a pager and returns when it is gone.
func endPID(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the pager: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end the pager: %w", err)
	}
	return waitPidfd(ctx, fd)
}

// ensure returns the pid of a pager that answers, and is of our version.
func (k *Keeper) ensure(ctx context.Context) (int, error) {
	if pid, version, err := k.ask(ctx); err == nil {
		if k.opts.Version == "" || version == k.opts.Version {
			k.setPID(pid)
			return pid, nil
		}
		k.opts.Logger.Info("replacing the pager of another version", "pid", pid, "version", version)
		if err := endPID(ctx, pid); err != nil {
			return 0, fmt.Errorf("replace the pager of version %s: %w", version, err)
		}
	}
	if err := k.spawn(); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	// The socket appears when the pager is ready; there is no event for that
	// across processes, so ask again at short intervals.
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		pid, _, err := k.ask(ctx)
		if err == nil {
			k.setPID(pid)
			return pid, nil
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("the pager does not answer on %s (see %s): %w", k.opts.Socket, k.opts.LogPath, err)
		case <-tick.C:
		}
	}
}

func (k *Keeper) ask(ctx context.Context) (pid int, version string, err error) {
	r, err := k.probe.GetStatus(ctx, connect.NewRequest(&pagerv1.GetStatusRequest{}))
	if err != nil {
		return 0, "", err
	}
	return int(r.Msg.Pid), r.Msg.Version, nil
}

func (k *Keeper) setPID(pid int) {
	k.mu.Lock()
	k.pid = pid
	k.mu.Unlock()
}

// spawn starts a pager in a session of its own, so that neither our end nor
// the terminal's takes it along.
func (k *Keeper) spawn() error {
	if err := os.MkdirAll(filepath.Dir(k.opts.LogPath), 0o700); err != nil {
		return fmt.Errorf("make the log's directory: %w", err)
	}
	log, err := os.OpenFile(k.opts.LogPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open the pager's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(k.opts.Command[0], k.opts.Command[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the pager: %w", err)
	}
	// Reaps it if it dies before us; ends with it or with our process.
	go cmd.Wait()
	return nil
}

// watch starts a new pager whenever the present one dies: VMs stand still
// until then, so nothing else is waited for.
func (k *Keeper) watch(ctx context.Context, pid int) {
	defer k.wg.Done()
	for ctx.Err() == nil {
		if err := waitPID(ctx, pid); err != nil {
			if ctx.Err() == nil {
				k.opts.Logger.Error("cannot watch the pager", "pid", pid, "err", err)
			}
			return
		}
		k.opts.Logger.Error("the pager died; starting another", "pid", pid)
		if pid = k.replace(ctx); pid == 0 {
			return
		}
	}
}

// replaceEvery is how long after a failed start of a pager the next is tried:
// what was missing, a full process table or a full disk, may be over.
const replaceEvery = 2 * time.Second

// replace tries until a pager runs, or ctx ends: then it returns 0.
func (k *Keeper) replace(ctx context.Context) int {
	for {
		pid, err := k.ensure(ctx)
		if err == nil {
			return pid
		}
		if ctx.Err() != nil {
			return 0
		}
		k.opts.Logger.Error("no pager runs: guests stand still; trying again", "err", err)
		select {
		case <-ctx.Done():
			return 0
		case <-time.After(replaceEvery):
		}
	}
}

// waitPID returns nil when the process is gone.
func waitPID(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open a pidfd: %w", err)
	}
	defer unix.Close(fd)
	return waitPidfd(ctx, fd)
}

// waitPidfd polls in slices, so that an ended context is seen.
func waitPidfd(ctx context.Context, fd int) error {
	const slice = 200 // ms
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, slice)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll a pidfd: %w", err)
		}
	}
	return ctx.Err()
}
