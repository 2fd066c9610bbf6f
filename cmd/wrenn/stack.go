package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	connectrpc "connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/agent"
	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
	"git.omukk.dev/wrenn/sandbox/internal/localca"
	"git.omukk.dev/wrenn/sandbox/internal/logctx"
	"git.omukk.dev/wrenn/sandbox/internal/pager"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/qemu"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// stack is all that `wrenn up` runs, wired from the bottom up. What was opened
// is closed in reverse order, by one list.
type stack struct {
	handler http.Handler

	log     *slog.Logger
	engine  *engine.Engine
	pool    *hostnet.Pool
	keeper  *pager.Keeper
	metrics *httpapi.Metrics
	closers []func() error
	// findQEMU looks once.
	findQEMU func() (qemu.Found, error)
}

func (s *stack) push(f func() error) { s.closers = append(s.closers, f) }

// newStack opens everything. Progress of a template build goes to w.
func newStack(ctx context.Context, o upOptions, log *slog.Logger, w io.Writer) (_ *stack, err error) {
	s := &stack{log: log, metrics: httpapi.NewMetrics()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeAll())
		}
	}()
	if err := s.lockDir(o.dir); err != nil {
		return nil, err
	}
	s.lookEarly(ctx, o.driver)
	base, err := buildTemplate(ctx, o.dir, log, w)
	if err != nil {
		return nil, err
	}
	snapshots, err := snapshot.Open(filepath.Join(o.dir, "store"), snapshot.Options{
		Logger: log, Compaction: snapshot.CompactionPolicy{MaxBuilds: o.compact},
	})
	if err != nil {
		return nil, fmt.Errorf("open the snapshot store: %w", err)
	}
	s.push(snapshots.Close)
	if err := s.openHost(ctx, o, snapshots, base); err != nil {
		return nil, err
	}
	client, err := s.serveAgent(o.dir)
	if err != nil {
		return nil, err
	}
	return s, s.openControl(ctx, o, client)
}

// lockDir makes the state directory and refuses a second server on it. VMs'
// processes walk through it to their sockets; all else in it is root's alone.
func (s *stack) lockDir(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		return fmt.Errorf("open the way to the sandboxes' sockets: %w", err)
	}
	f, err := lockState(dir)
	if err == nil {
		s.push(f.Close)
	}
	return err
}

// openHost starts what runs VMs: network, pager, engine.
func (s *stack) openHost(ctx context.Context, o upOptions, snapshots *snapshot.Store, base template.Result) error {
	driver, user, err := s.chooseDriver(ctx, o, &base)
	if err != nil {
		return err
	}
	// The VMM gets them as descriptors and opens those again as its own user.
	for _, f := range []string{base.Kernel, base.Initrd} {
		if err := os.Chmod(f, 0o644); err != nil {
			return fmt.Errorf("let VMs' processes read the kernel: %w", err)
		}
	}
	slots := hostnet.Options{Size: o.pool, Prefix: o.addresses, StateDir: o.dir, Logger: s.log}
	warmer, warms := driver.(vmm.Warmer)
	if warms {
		slots.Prepare, slots.Vacate = s.warm(ctx, warmer), warmer.Cool
	}
	pool, err := hostnet.NewPool(ctx, slots)
	if err != nil {
		return fmt.Errorf("prepare the sandboxes' network: %w", err)
	}
	s.pool = pool
	s.push(func() error { return pool.Close(context.Background(), s.slotsInUse()) })
	if warms {
		s.push(warmer.Close)
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	log := filepath.Join(o.dir, "run", "pager.log")
	keeper, err := pager.Keep(ctx, pager.KeeperOptions{
		Command: []string{exe, "pager", "--dir", o.dir, "--socket-gid", strconv.Itoa(user), "--log", log},
		Socket:  pagerSocket(o.dir), LogPath: log, Version: version(), Logger: s.log,
	})
	if err != nil {
		return err
	}
	s.keeper = keeper
	s.push(s.closePager)
	disks, err := s.openDisks(driver, o.dir)
	if err != nil {
		return err
	}
	ca, err := localca.OpenEgress(filepath.Join(o.dir, "egress-ca"), time.Now)
	if err != nil {
		return err
	}
	e, err := engine.New(ctx, engine.Options{
		Disks: disks, Dir: o.dir, Store: snapshots, Driver: driver, Pager: keeper.Client(),
		Network: engine.HostNetwork(pool, ca, s.log), Authority: ca,
		MemoryLimitMB: o.memoryLimit, VCPULimit: o.vcpuLimit, MinFreeDisk: lowWater(o),
		Cmdline: "wrenn.dns=" + o.dns, Logger: s.log, AfterStep: killAfter(),
	})
	if err != nil {
		return fmt.Errorf("start the engine: %w", err)
	}
	s.engine = e
	s.push(func() error { e.Close(); return nil })
	// What the last process left and no sandbox claims, now or later.
	if err := pool.Sweep(ctx, e.Slots()...); err != nil {
		s.log.Error("some network slots of an earlier process remain", "err", err)
	}
	d := e.Driver()
	s.log.Info("the host is ready", "driver", d.Kind, "version", d.Version, "accelerator", d.Accel)
	err = e.ImportBase(ctx, engine.BaseFiles{
		Name: "base", Digest: base.Digest, Rootfs: base.Rootfs,
		Kernel: base.Kernel, Initrd: base.Initrd, KernelDigest: base.KernelDigest,
	}, nil)
	if err != nil {
		return err
	}
	pruneTemplates(ctx, o.dir, s.log)
	return nil
}

// warmTime bounds the start of a process for a network slot that is kept prepared.
const warmTime = 30 * time.Second

// warm starts VMM processes ahead, where the driver can. Without one a sandbox
// starts its own.
func (s *stack) warm(ctx context.Context, d vmm.Warmer) func(netns string, slot int) {
	return func(netns string, slot int) {
		ctx, cancel := context.WithTimeout(ctx, warmTime)
		defer cancel()
		if err := d.Warm(ctx, netns, slot); err != nil && ctx.Err() == nil {
			s.log.Warn("no VMM process is started ahead", "slot", slot, "err", err)
		}
	}
}

// closedParent returns the first directory on the way to dir that other users
// may not pass, or nothing.
func closedParent(dir string) string {
	for p := filepath.Dir(dir); ; p = filepath.Dir(p) {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm()&0o001 == 0 {
			return p
		}
		if p == "/" {
			return ""
		}
	}
}

// serveAgent serves hostagent.v1 on a unix socket and returns its client.
func (s *stack) serveAgent(dir string) (hostagentv1connect.HostAgentServiceClient, error) {
	path := filepath.Join(dir, "run", "agent.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old agent socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the control plane: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("close the agent's socket to others: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle(agentHandler(s.engine, s.log))
	// Streams in both directions need HTTP/2.
	var h2 http.Protocols
	h2.SetUnencryptedHTTP2(true)
	// Every connection into a sandbox is a stream here. One whose reader, a
	// guest or a client, does not read holds up what was sent to it, and nobody
	// else; and it can have us hold no more than its window and a frame.
	windows := &http.HTTP2Config{
		MaxConcurrentStreams: 1000, MaxReceiveBufferPerConnection: 1 << 30, MaxReceiveBufferPerStream: 128 << 10, MaxReadFrameSize: 64 << 10,
	}
	srv := &http.Server{Handler: mux, Protocols: &h2, HTTP2: windows}
	go srv.Serve(l)
	s.push(srv.Close)
	transport := &http.Transport{Protocols: &h2, HTTP2: windows, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	return agentClient(&http.Client{Transport: transport}, "http://agent", newOperationFigures(s.metrics.Registerer()).intercept), nil
}

// agentClient speaks to a host agent; figures, where not nil, sees its answers.
func agentClient(c connectrpc.HTTPClient, url string, figures connectrpc.UnaryInterceptorFunc) hostagentv1connect.HostAgentServiceClient {
	interceptors := []connectrpc.Interceptor{logctx.Interceptor{}}
	if figures != nil {
		interceptors = append(interceptors, figures)
	}
	// Both ends are this machine: compressing what passes would only cost time.
	return hostagentv1connect.NewHostAgentServiceClient(c, url,
		connectrpc.WithAcceptCompression("gzip", nil, nil), connectrpc.WithInterceptors(interceptors...))
}

// agentHandler is the host agent on an engine, as it is served.
func agentHandler(e *engine.Engine, log *slog.Logger) (string, http.Handler) {
	return hostagentv1connect.NewHostAgentServiceHandler(agent.New(e, version(), log),
		connectrpc.WithInterceptors(logctx.Interceptor{}, agent.LogCalls(log)))
}

// openControl opens the database and starts the control plane.
func (s *stack) openControl(ctx context.Context, o upOptions, client hostagentv1connect.HostAgentServiceClient) error {
	if err := closeDatabase(o.database); err != nil {
		return err
	}
	db, err := store.Open(ctx, o.database)
	if err != nil {
		return err
	}
	s.push(db.Close)
	if err := control.EnsureAPIKey(ctx, db, filepath.Join(o.dir, "api-key")); err != nil {
		return err
	}
	s.metrics.Registerer().MustRegister(pagerCollector{s.keeper.Client()}, hostCollector{s.pool, o.dir, lowWater(o)})
	service := control.New(control.Options{
		Store: db, Host: control.NewHost(client), Resolve: db.ResolveTemplate, Logger: s.log, Observe: s.metrics.ObserveOperation,
	})
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		if err := service.Run(run); err != nil && run.Err() == nil {
			s.log.Error("the control plane's loops ended", "err", err)
		}
	}()
	s.push(func() error { cancel(); wg.Wait(); return nil })
	if err := waitReady(ctx, service); err != nil {
		return err
	}
	routes, err := s.openTemplates(ctx, o, db, service)
	if err != nil {
		return err
	}
	limiter := httpapi.NewLimiter(o.limits)
	api := httpapi.New(httpapi.Options{
		Service: service, Logger: s.log, Metrics: s.metrics, Limiter: limiter, Checks: s.checks(o.dir, lowWater(o)),
	})
	routes.Limit = limiter.Begin
	s.openTraffic(o, service, api, routes)
	return nil
}

// closeDatabase makes a SQLite file readable by its owner alone, before there
// is anything in it; SQLite gives its other files the same mode.
func closeDatabase(dsn string) error {
	if strings.Contains(dsn, "://") {
		return nil
	}
	f, err := os.OpenFile(strings.TrimPrefix(dsn, "sqlite:"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = errors.Join(f.Chmod(0o600), f.Close())
	}
	if err != nil {
		return fmt.Errorf("close the database to others: %w", err)
	}
	return nil
}

// waitReady returns when the control plane has taken in what the host has: who
// is told that the server serves may ask for any template at once.
func waitReady(ctx context.Context, service *control.Service) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond) // it is a matter of some calls
	defer tick.Stop()
	for {
		err := service.Ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the control plane does not get ready: %w", err)
		case <-tick.C:
		}
	}
}

// slotsInUse are the network slots that sandboxes go on using after us.
func (s *stack) slotsInUse() []int {
	if s.engine == nil {
		return nil
	}
	return s.engine.Slots()
}

// closePager ends the pager where nobody needs it any more.
func (s *stack) closePager() error {
	if len(s.slotsInUse()) > 0 {
		s.keeper.Close()
		return nil
	}
	return s.keeper.Stop()
}

// close ends the stack. Running sandboxes are left, paused or destroyed.
func (s *stack) close(onExit string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var errs []error
	for _, sb := range s.engine.List() {
		switch {
		case onExit == onExitPause && sb.State == engine.Running:
			_, _, err := s.engine.Pause(ctx, sb.ID)
			errs = append(errs, err)
		case onExit == onExitDestroy:
			errs = append(errs, s.engine.Destroy(ctx, sb.ID))
		}
	}
	return errors.Join(append(errs, s.closeAll())...)
}

func (s *stack) closeAll() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// lowWater is the free disk, bytes, below which nothing new is begun.
func lowWater(o upOptions) int64 {
	if o.minFreeDisk >= 0 {
		return o.minFreeDisk << 20
	}
	var st unix.Statfs_t
	if err := unix.Statfs(o.dir, &st); err != nil {
		return 0
	}
	return min(int64(st.Blocks)*st.Bsize/20, 2<<30)
}

func hostMemoryMB() int {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 1024
	}
	return int(uint64(si.Totalram) * uint64(si.Unit) >> 20)
}
