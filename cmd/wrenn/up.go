package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
	"git.omukk.dev/wrenn/sandbox/internal/logctx"
	"git.omukk.dev/wrenn/sandbox/internal/oci"
)

// upOptions are the flags of `wrenn up`.
type upOptions struct {
	dir         string
	listen      string
	driver      string
	onExit      string
	memoryLimit int
	vcpuLimit   int
	minFreeDisk int64 // MiB; -1 is the default
	limits      httpapi.Limits
	compact     int
	pool        int
	addresses   string
	database    string
	dns         string
	logJSON     bool
	verbose     bool
	vmmUser     int
	traffic     trafficOptions
	registries  registryFlags
	images      oci.Options // what registries say
	// published is below what sandboxes' ports have their hosts.
	published string
}

// defaultVMMUser is a number that no distribution gives to anybody, like those
// after it: a VM on Firecracker gets one of its own.
const defaultVMMUser = 60777

// What becomes of running sandboxes when the server ends by SIGTERM or Ctrl-C.
const (
	onExitLeave   = "leave"
	onExitPause   = "pause"
	onExitDestroy = "destroy"
)

const upLong = `Serve the API, and run sandboxes on this machine.

The first start builds the base template, which takes some minutes; later
starts find it. Sandboxes outlive the server: after a restart, planned or not,
it takes over those that run. --on-exit says otherwise for a planned end.`

func newUpCmd() *cobra.Command {
	var o upOptions
	cmd := &cobra.Command{
		Use: "up", Short: "Serve the API and run sandboxes", Long: upLong,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return up(ctx, o, cmd)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", stateDir(), "state directory")
	f.StringVar(&o.listen, "listen", "127.0.0.1:8000", "address of the API")
	f.StringVar(&o.driver, "driver", driverAuto, "what runs the VMs: auto, qemu or firecracker")
	f.StringVar(&o.onExit, "on-exit", onExitLeave, "running sandboxes at a planned end: leave, pause or destroy")
	f.IntVar(&o.memoryLimit, "memory-limit", 0, "MiB of RAM for all running sandboxes together (default: 90 % of this machine's)")
	f.IntVar(&o.vcpuLimit, "vcpu-limit", 0, "virtual CPUs of all running sandboxes together (default: 32 for each CPU of this machine)")
	f.Int64Var(&o.minFreeDisk, "min-free-disk", -1, "MiB of disk below which no sandbox is started and no snapshot made; 0 is no bound (default: 5 % of the disk, at most 2048)")
	f.Float64Var(&o.limits.PerSecond, "rate-limit", httpapi.DefaultLimits.PerSecond, "requests a second for each API key, twice as many at once; -1 is no limit")
	f.IntVar(&o.limits.Concurrent, "max-requests", httpapi.DefaultLimits.Concurrent, "requests under way for each API key; -1 is no limit")
	f.IntVar(&o.compact, "compact-above", 32, "generations that a sandbox's or snapshot's memory and disk may each be read from before they are copied together")
	f.IntVar(&o.pool, "network-pool", 4, "network slots to keep prepared, on Firecracker each with a process that waits for its machine")
	f.StringVar(&o.addresses, "network-prefix", "", "addresses for the sandboxes' links, a /30 each (default 10.213.0.0/16)")
	f.StringVar(&o.database, "database", "", "SQLite file or postgres:// URL (default: wrenn.db in the state directory)")
	f.StringVar(&o.dns, "dns", "1.1.1.1,8.8.8.8", "name servers that sandboxes ask")
	f.IntVar(&o.vmmUser, "vmm-user", defaultVMMUser, "user and group id that VMs' processes run as, on Firecracker the first of many; 0 is root")
	o.traffic.flags(f)
	o.registries.flags(f)
	f.BoolVar(&o.logJSON, "log-json", false, "write the log as JSON")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "log more")
	return cmd
}

func (o *upOptions) check() error {
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return fmt.Errorf("--dir: %w", err)
	}
	o.dir = dir
	// Sandboxes' sockets lie at <dir>/sandboxes/<id>/nbd.sock and the kernel
	// takes 107 bytes.
	if len(dir) > 50 {
		return usagef("--dir %s is longer than 50 bytes, and the sockets below it would have no valid path; choose a shorter one", dir)
	}
	switch o.driver {
	case driverAuto, driverQEMU, driverFirecracker:
	default:
		return usagef("--driver %q is not known; use auto, qemu or firecracker", o.driver)
	}
	switch o.onExit {
	case onExitLeave, onExitPause, onExitDestroy:
	default:
		return usagef("--on-exit %q is not known; use leave, pause or destroy", o.onExit)
	}
	if err := o.traffic.check(); err != nil {
		return err
	}
	if o.images, err = o.registries.options(); err != nil {
		return err
	}
	if o.compact < 1 {
		return usagef("--compact-above %d: want 1 or more", o.compact)
	}
	if o.pool < 0 || o.pool > 256 {
		return usagef("--network-pool %d: want 0 to 256", o.pool)
	}
	if o.vmmUser < 0 || o.vmmUser > 1<<31-2 {
		return usagef("--vmm-user %d is no user id", o.vmmUser)
	}
	if o.limits.PerSecond != -1 && !(o.limits.PerSecond > 0 && o.limits.PerSecond <= 1e6) {
		return usagef("--rate-limit %g: want requests a second, up to a million, or -1 for no limit", o.limits.PerSecond)
	}
	o.limits.Burst = max(1, int(2*o.limits.PerSecond))
	if o.limits.Concurrent < -1 || o.limits.Concurrent == 0 {
		return usagef("--max-requests %d: want a number above 0, or -1 for no limit", o.limits.Concurrent)
	}
	if o.memoryLimit < 0 {
		return usagef("--memory-limit %d: want a number of MiB", o.memoryLimit)
	}
	if o.vcpuLimit < 0 {
		return usagef("--vcpu-limit %d: want a number of virtual CPUs", o.vcpuLimit)
	}
	if o.minFreeDisk < -1 || o.minFreeDisk > 1<<30 {
		return usagef("--min-free-disk %d: want a number of MiB, or 0 for no bound", o.minFreeDisk)
	}
	if o.vcpuLimit == 0 {
		o.vcpuLimit = 32 * runtime.NumCPU()
	}
	if o.memoryLimit == 0 {
		o.memoryLimit = hostMemoryMB() * 9 / 10
	}
	if o.database == "" {
		o.database = filepath.Join(o.dir, "wrenn.db")
	}
	if os.Geteuid() != 0 {
		return errors.New("wrenn up must run as root: it makes network namespaces and serves other processes' page faults")
	}
	return nil
}

func newLogger(o upOptions) *slog.Logger { return newLoggerTo(os.Stderr, o) }

func newLoggerTo(w io.Writer, o upOptions) *slog.Logger {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if o.verbose {
		opts.Level = slog.LevelDebug
	}
	if o.logJSON {
		return slog.New(logctx.Handler(slog.NewJSONHandler(w, opts)))
	}
	return slog.New(logctx.Handler(slog.NewTextHandler(w, opts)))
}

// up runs the server until ctx ends.
func up(ctx context.Context, o upOptions, cmd *cobra.Command) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	log := newLogger(o)
	// Bound early: an address that is taken must not cost a template build.
	listener, err := net.Listen("tcp", o.listen)
	if err != nil {
		return fmt.Errorf("listen on %s: %w; is another server running? --listen chooses another address", o.listen, err)
	}
	defer listener.Close()
	secure, err := listenTLS(o)
	if err != nil {
		return err
	}
	listeners := []net.Listener{listener}
	if secure != nil {
		defer secure.Close()
		listeners = append(listeners, secure)
	}
	o.published = o.traffic.published(listener, secure)
	s, err := newStack(ctx, o, log, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close(o.onExit)) }()
	srv := newServer(s.handler, log)
	serveErr := serveAll(srv, listeners...)
	fmt.Fprintf(cmd.OutOrStdout(), "wrenn %s serves on http://%s (key in %s)\n", version(), listener.Addr(), filepath.Join(o.dir, "api-key"))
	if secure != nil {
		fmt.Fprintf(cmd.OutOrStdout(), "and over TLS as *.%s\n", o.published)
	}
	select {
	case err := <-serveErr:
		return fmt.Errorf("serve the API: %w", err)
	case <-ctx.Done():
	}
	log.Info("ending", "running_sandboxes", o.onExit)
	grace, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := srv.Shutdown(grace); err != nil {
		srv.Close() // streams that last longer than the grace are cut
	}
	return nil
}
