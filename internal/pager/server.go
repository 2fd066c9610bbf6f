// Package pager is the body of the process that serves guest memory and disks
// to the VMs of one host, and the engine's client for it.
//
// The pager is a process of its own so that it outlives the engine: a VM whose
// page faults or disk requests nobody answers stands still, so whoever answers
// them must not be restarted for an upgrade of the API. It holds no decision:
// the engine tells it what to serve, it serves until told to stop, and its
// records on disk let a pager that was killed go on where it stood.
//
// Invariants:
//   - a userfaultfd is never closed while the VM lives (it would read zeros);
//   - a record is on disk before the call that made it answers, so that what
//     was promised survives kill -9;
//   - an image in RAM has at least one user, or is on the bounded warm list;
//   - a file that VMs map has every page of its image, and loses none while
//     it has a user.
//
// internal/engine and cmd/wrenn may import it.
package pager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1/pagerv1connect"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// Options say what a Server needs.
type Options struct {
	// Dir holds the pager's records, one file for each sandbox. It is made
	// if missing.
	Dir   string
	Store *snapshot.Store
	// WarmBytes bounds the RAM of images kept without a user; 0 means 1 GiB.
	WarmBytes int64
	// SocketGID is the group that may open disks' sockets: the VMMs'. 0: only
	// root.
	SocketGID int
	// OrderDir keeps what cold starts needed, to read it ahead of the next
	// one; it is made if missing. Empty: nothing is read ahead.
	OrderDir string
	// OrderWindow is how long after its attachment a VM's needs belong to its
	// start; 0 means 5 s.
	OrderWindow time.Duration
	// WholeDir is where images are kept whole in RAM, for VMMs that map one from
	// a file; a memory file system is mounted there while there are any. Empty:
	// none are.
	WholeDir string
	// LowWater is how much of the host's memory should stay available, bytes:
	// below it Serve gives pages of images back. 0: never.
	LowWater int64
	// MemAvailable tells what is available; nil reads /proc/meminfo.
	MemAvailable func() (int64, error)
	// Reserve is the free disk below Dir, bytes, that guests' writes leave to the
	// host's own records: with less, what takes room waits. 0: none.
	Reserve int64
	// DiskFree tells what is free; nil asks the file system.
	DiskFree func() (int64, error)
	Version  string
	Logger   *slog.Logger
}

// Server implements pager.v1.
type Server struct {
	opts   Options
	log    *slog.Logger
	faults *uffd.Server
	images *images
	orders orders

	short atomic.Bool // of disk: see Options.Reserve

	mu      sync.Mutex
	totals  totals
	guests  map[string]*guest
	fatal   map[string]string
	waits   map[string]time.Time // since when writes wait for room, by sandbox
	closing bool
}

// totals are counted over all sandboxes: bytes, and disks that began to wait.
type totals struct{ aheadRead, aheadUsed, aheadWasted, aheadMissed, evicted, diskWaits uint64 }

func (t totals) message(resident int64, faults uffd.Stats) *pagerv1.Totals {
	return &pagerv1.Totals{
		Faults: faults.Faults, FilledBytes: faults.BytesFilled,
		Prefetch:     &pagerv1.Prefetch{ReadBytes: t.aheadRead, UsedBytes: t.aheadUsed, WastedBytes: t.aheadWasted, MissedBytes: t.aheadMissed},
		EvictedBytes: t.evicted, SharedResidentBytes: resident, DiskWaits: t.diskWaits,
	}
}

// guest is what is served for one sandbox. Its lock orders the calls for that
// sandbox; calls for different sandboxes run side by side.
type guest struct {
	mu     sync.Mutex
	memory *memory
	disk   *disk
}

var _ pagerv1connect.PagerServiceHandler = (*Server)(nil)

// New makes a server and takes up again what the records in Dir name.
func New(opts Options) (*Server, error) {
	if opts.WarmBytes == 0 {
		opts.WarmBytes = 1 << 30
	}
	if opts.OrderWindow == 0 {
		opts.OrderWindow = 5 * time.Second
	}
	if opts.DiskFree == nil {
		opts.DiskFree = func() (int64, error) { return storage.FreeBelow(opts.Dir) }
	}
	if opts.MemAvailable == nil {
		opts.MemAvailable = memAvailable
	}
	if err := os.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the pager's directory: %w", err)
	}
	s := &Server{
		opts:   opts,
		log:    opts.Logger,
		guests: map[string]*guest{},
		fatal:  map[string]string{},
		waits:  map[string]time.Time{},
		orders: orders{opts.OrderDir},
	}
	s.images = &images{
		store: opts.Store, limit: opts.WarmBytes, byID: map[format.ID]*image{}, readAhead: s.readAhead,
		wholes: wholes{dir: opts.WholeDir, low: opts.LowWater, available: opts.MemAvailable, wait: wholeWait, log: opts.Logger},
	}
	faults, err := uffd.NewServer(uffd.Options{Logger: opts.Logger, OnFatal: s.onFatal})
	if err != nil {
		return nil, fmt.Errorf("start the page-fault server: %w", err)
	}
	s.faults = faults
	s.recover()
	if err := s.images.wholes.sweep(s.images.takeUpWholes()); err != nil {
		s.log.Error("whole images of the last pager remain", "err", err)
	}
	return s, nil
}

// onFatal keeps the reason for the engine to ask; the fault server has killed
// the VM already.
func (s *Server) onFatal(id string, err error) {
	s.log.Error("a guest page could not be had; its VM was killed", "sandbox", id, "err", err)
	s.mu.Lock()
	s.fatal[id] = err.Error()
	s.mu.Unlock()
}

var sandboxID = regexp.MustCompile(`^[a-z0-9]{1,32}$`)

// guestFor returns the entry of a sandbox, made if missing.
func (s *Server) guestFor(id string) (*guest, error) {
	if !sandboxID.MatchString(id) {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("sandbox_id %q: want [a-z0-9]{1,32}", id))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("the pager is ending"))
	}
	g := s.guests[id]
	if g == nil {
		g = &guest{}
		s.guests[id] = g
	}
	return g, nil
}

// settle writes the record of a guest as it is now, or removes it with the
// entry when nothing is served. The guest's lock is held.
func (s *Server) settle(id string, g *guest) error {
	if g.memory == nil {
		if err := removePages(s.opts.Dir, id); err != nil {
			return err
		}
	}
	if g.memory == nil && g.disk == nil {
		s.mu.Lock()
		delete(s.guests, id)
		s.mu.Unlock()
		return removeRecord(s.opts.Dir, id)
	}
	r := record{SandboxID: id}
	if g.memory != nil {
		r.Memory = g.memory.record()
	}
	if g.disk != nil {
		r.Disk = &g.disk.rec
	}
	return writeRecord(s.opts.Dir, r)
}

// GetStatus implements pager.v1.
func (s *Server) GetStatus(context.Context, *connect.Request[pagerv1.GetStatusRequest]) (*connect.Response[pagerv1.GetStatusResponse], error) {
	resident, faults := s.images.resident(), s.faults.Totals()
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &pagerv1.GetStatusResponse{Pid: int32(os.Getpid()), Version: s.opts.Version, Totals: s.totals.message(resident, faults)}
	for id := range s.guests {
		out.Sandboxes = append(out.Sandboxes, id)
	}
	for id, since := range s.waits {
		out.Waits = append(out.Waits, &pagerv1.DiskWait{SandboxId: id, SinceUnixMs: since.UnixMilli()})
	}
	return connect.NewResponse(out), nil
}

// GetStats implements pager.v1.
func (s *Server) GetStats(_ context.Context, req *connect.Request[pagerv1.GetStatsRequest]) (*connect.Response[pagerv1.GetStatsResponse], error) {
	id := req.Msg.SandboxId
	s.mu.Lock()
	g, fatal := s.guests[id], s.fatal[id]
	s.mu.Unlock()
	if g == nil && fatal == "" {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("sandbox %q is not served here", id))
	}
	out := &pagerv1.GetStatsResponse{Fatal: fatal}
	if st, err := s.faults.Stats(id); err == nil {
		out.Faults, out.BytesFilled, out.ZeroFaults = st.Faults, st.BytesFilled, st.ZeroFaults
	}
	if g != nil {
		g.mu.Lock()
		if m := g.memory; m != nil {
			out.Attached = m.attached != nil || m.whole != ""
			out.SharedResidentBytes = s.images.residentOf(m.image)
			if a := m.image.ahead; a != nil {
				s.mu.Lock()
				out.Prefetch = a.result
				s.mu.Unlock()
			}
		}
		g.mu.Unlock()
	}
	return connect.NewResponse(out), nil
}

// Serve answers on the unix socket until ctx ends. It then leaves every
// record in place: VMs stand still until the next pager takes them up.
func (s *Server) Serve(ctx context.Context, socket string) error {
	l, err := listenUnix(socket, 0)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle(pagerv1connect.NewPagerServiceHandler(s))
	srv := &http.Server{Handler: mux}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	watch, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if s.opts.LowWater > 0 {
		wg.Go(func() { s.watchMemory(watch) })
	}
	if s.opts.Reserve > 0 {
		wg.Go(func() { s.watchRoom(watch) })
	}
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", socket, err)
	}
	return nil
}

// listenUnix makes a socket that only root and a group can open, in place of
// one that a dead process left behind.
func listenUnix(path string, gid int) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the socket's directory: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	err = os.Chown(path, 0, gid)
	if err == nil {
		err = os.Chmod(path, 0o660)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("close the socket to others: %w", err)
	}
	return l, nil
}

// Close stops serving disks and drops the shared images. It must be called
// only when no VM is left, or when the process is about to end.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closing = true
	guests := s.guests
	s.guests = map[string]*guest{}
	s.mu.Unlock()
	var errs []error
	for _, g := range guests {
		g.mu.Lock()
		if g.disk != nil {
			errs = append(errs, g.disk.close())
		}
		if m := g.memory; m != nil && m.window != nil {
			m.window.Stop()
		}
		h, waiting := (*handover)(nil), g.handoverOf() != nil
		if g.memory != nil {
			h = g.memory.handover
		}
		g.mu.Unlock()
		if waiting {
			h.cancel()
			<-h.done
		}
		if h != nil {
			errs = append(errs, h.close())
		}
	}
	s.faults.Close()
	for _, g := range guests {
		g.mu.Lock() // a call that came before may begin to put something in
		if g.memory != nil {
			g.memory.putting.Wait()
		}
		g.mu.Unlock()
	}
	s.images.stopReading()
	return errors.Join(append(errs, s.images.dropWarm())...)
}

// LetGo drops the images that nobody uses: what is kept whole outlives the
// process, and would for nothing.
func (s *Server) LetGo() error { return s.images.dropWarm() }
