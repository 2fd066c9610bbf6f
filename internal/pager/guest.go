package pager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/nbd"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// memory is the service of one sandbox's page faults.
type memory struct {
	image    *image
	keep     bool
	attached *uffd.Attachment
}

func (m *memory) record() *memoryRecord {
	r := &memoryRecord{ImageID: m.image.id, KeepWarm: m.keep}
	if m.attached != nil {
		a := m.attached.Record()
		r.Attachment = &a
	}
	return r
}

// disk is the service of one sandbox's disk.
type disk struct {
	rec     diskRecord
	image   *snapshot.Image
	overlay *block.Overlay
	cancel  context.CancelFunc
	done    chan error
}

func (d *disk) close() error {
	d.cancel()
	errs := []error{<-d.done, d.overlay.Close(), d.image.Close()}
	if err := os.Remove(d.rec.SocketPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove the disk's socket: %w", err))
	}
	return errors.Join(errs...)
}

// PrepareMemory implements pager.v1.
func (s *Server) PrepareMemory(_ context.Context, req *connect.Request[pagerv1.PrepareMemoryRequest]) (*connect.Response[pagerv1.PrepareMemoryResponse], error) {
	id, err := parseImageID(req.Msg.ImageId)
	if err != nil {
		return nil, err
	}
	g, err := s.guestFor(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.memory != nil && g.memory.image.id != id {
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("sandbox %s has memory image %s; release it first", req.Msg.SandboxId, g.memory.image.id))
	}
	if g.memory == nil {
		i, err := s.images.acquire(id, req.Msg.KeepWarm, nil)
		if err != nil {
			return nil, errors.Join(wireError(err), s.settle(req.Msg.SandboxId, g))
		}
		g.memory = &memory{image: i, keep: req.Msg.KeepWarm}
		s.mu.Lock()
		delete(s.fatal, req.Msg.SandboxId)
		s.mu.Unlock()
	}
	if err := s.settle(req.Msg.SandboxId, g); err != nil {
		return nil, wireError(err)
	}
	return connect.NewResponse(&pagerv1.PrepareMemoryResponse{
		Pid:  int32(os.Getpid()),
		Fd:   int32(g.memory.image.shared.File().Fd()),
		Size: g.memory.image.source.Size(),
	}), nil
}

// AttachMemory implements pager.v1.
func (s *Server) AttachMemory(ctx context.Context, req *connect.Request[pagerv1.AttachMemoryRequest]) (*connect.Response[pagerv1.AttachMemoryResponse], error) {
	id := req.Msg.SandboxId
	g, err := s.guestFor(id)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.memory == nil:
		return nil, errors.Join(connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("memory of sandbox %s was not prepared", id)), s.settle(id, g))
	case req.Msg.Pid <= 1:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("pid %d is no VM process", req.Msg.Pid))
	case g.memory.attached != nil:
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("memory of sandbox %s is attached already", id))
	}
	a, err := uffd.Inject(ctx, int(req.Msg.Pid), g.memory.image.shared, userfaultfdDev(int(req.Msg.Pid)))
	if err != nil {
		return nil, wireError(fmt.Errorf("attach to process %d: %w", req.Msg.Pid, err))
	}
	g.memory.attached = a
	// The record comes first: a pager killed right after this must not leave
	// a VM whose faults nobody knows of. The caller kills a VM whose
	// attachment failed, so closing ours is safe.
	err = s.settle(id, g)
	if err == nil {
		err = s.faults.Add(id, a)
	}
	if err != nil {
		g.memory.attached = nil
		a.Close()
		return nil, wireError(err)
	}
	r := a.Record()
	return connect.NewResponse(&pagerv1.AttachMemoryResponse{Address: uint64(r.Addr), Length: r.Length}), nil
}

// ReleaseMemory implements pager.v1.
func (s *Server) ReleaseMemory(_ context.Context, req *connect.Request[pagerv1.ReleaseMemoryRequest]) (*connect.Response[pagerv1.ReleaseMemoryResponse], error) {
	id := req.Msg.SandboxId
	g, err := s.guestFor(id)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.memory != nil {
		if g.memory.attached != nil {
			if err := s.faults.Remove(id); err != nil {
				return nil, wireError(err)
			}
		}
		err = s.images.release(g.memory.image)
		g.memory = nil
	}
	s.mu.Lock()
	delete(s.fatal, id)
	s.mu.Unlock()
	if err := errors.Join(err, s.settle(id, g)); err != nil {
		return nil, wireError(err)
	}
	return connect.NewResponse(&pagerv1.ReleaseMemoryResponse{}), nil
}

// DropImage implements pager.v1.
func (s *Server) DropImage(_ context.Context, req *connect.Request[pagerv1.DropImageRequest]) (*connect.Response[pagerv1.DropImageResponse], error) {
	id, err := parseImageID(req.Msg.ImageId)
	if err != nil {
		return nil, err
	}
	if err := s.images.forget(id); err != nil {
		return nil, wireError(err)
	}
	return connect.NewResponse(&pagerv1.DropImageResponse{}), nil
}

// ServeDisk implements pager.v1.
func (s *Server) ServeDisk(_ context.Context, req *connect.Request[pagerv1.ServeDiskRequest]) (*connect.Response[pagerv1.ServeDiskResponse], error) {
	id, err := parseImageID(req.Msg.ImageId)
	if err != nil {
		return nil, err
	}
	for field, p := range map[string]string{"overlay_path": req.Msg.OverlayPath, "socket_path": req.Msg.SocketPath} {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%s %q: want a clean absolute path", field, p))
		}
	}
	g, err := s.guestFor(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	rec := diskRecord{ImageID: id, OverlayPath: req.Msg.OverlayPath, SocketPath: req.Msg.SocketPath}
	if g.disk != nil && g.disk.rec != rec {
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("sandbox %s has disk image %s; stop it first", req.Msg.SandboxId, g.disk.rec.ImageID))
	}
	if g.disk == nil {
		d, err := openDisk(s.opts, rec, s.log.With("sandbox", req.Msg.SandboxId))
		if err != nil {
			return nil, errors.Join(wireError(err), s.settle(req.Msg.SandboxId, g))
		}
		g.disk = d
	}
	if err := s.settle(req.Msg.SandboxId, g); err != nil {
		return nil, wireError(err)
	}
	return connect.NewResponse(&pagerv1.ServeDiskResponse{Size: g.disk.overlay.Size()}), nil
}

// readChunk is the size of one message of ReadDisk.
const readChunk = 1 << 20

// ReadDisk implements pager.v1.
func (s *Server) ReadDisk(ctx context.Context, req *connect.Request[pagerv1.ReadDiskRequest], stream *connect.ServerStream[pagerv1.ReadDiskResponse]) error {
	id := req.Msg.SandboxId
	g, err := s.guestFor(id)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disk == nil {
		return errors.Join(connect.NewError(connect.CodeNotFound, fmt.Errorf("sandbox %s has no disk here", id)), s.settle(id, g))
	}
	buf := make([]byte, readChunk)
	g.disk.overlay.Dirty(func(off, n int64, kind format.Kind) bool {
		if kind == format.Zero {
			err = stream.Send(&pagerv1.ReadDiskResponse{Offset: off, Zeros: n})
			return err == nil
		}
		for n > 0 && err == nil {
			p := buf[:min(n, readChunk)]
			if _, err = g.disk.overlay.ReadAt(p, off); err == nil || errors.Is(err, io.EOF) {
				err = stream.Send(&pagerv1.ReadDiskResponse{Offset: off, Data: p})
			}
			off, n = off+int64(len(p)), n-int64(len(p))
		}
		return err == nil
	})
	if err != nil {
		return wireError(fmt.Errorf("read the overlay: %w", err))
	}
	return nil
}

// StopDisk implements pager.v1.
func (s *Server) StopDisk(_ context.Context, req *connect.Request[pagerv1.StopDiskRequest]) (*connect.Response[pagerv1.StopDiskResponse], error) {
	g, err := s.guestFor(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disk != nil {
		err = g.disk.close()
		g.disk = nil
	}
	if err := errors.Join(err, s.settle(req.Msg.SandboxId, g)); err != nil {
		return nil, wireError(err)
	}
	return connect.NewResponse(&pagerv1.StopDiskResponse{}), nil
}

func openDisk(o Options, rec diskRecord, log *slog.Logger) (*disk, error) {
	img, err := o.Store.OpenImage(rec.ImageID)
	if err != nil {
		return nil, fmt.Errorf("open disk image %s: %w", rec.ImageID, err)
	}
	overlay, err := block.OpenOverlay(storage.OS{}, rec.OverlayPath, img)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the overlay: %w", err), img.Close())
	}
	l, err := listenUnix(rec.SocketPath, o.SocketGID)
	if err != nil {
		return nil, errors.Join(err, overlay.Close(), img.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := &disk{rec: rec, image: img, overlay: overlay, cancel: cancel, done: make(chan error, 1)}
	go func() { d.done <- serveNBD(ctx, l, overlay, log) }()
	return d, nil
}

func serveNBD(ctx context.Context, l net.Listener, dev nbd.Device, log *slog.Logger) error {
	err := nbd.Serve(ctx, l, dev, nbd.Options{Exclusive: true, Logger: log})
	if err != nil && ctx.Err() == nil {
		log.Error("the disk's server ended", "err", err)
		return fmt.Errorf("serve the disk: %w", err)
	}
	return nil
}

// recover takes up what the pager before this one served. A VM that died
// meanwhile loses its record. One that lives but cannot be served again is
// killed, with the reason kept for the engine: it would stand still for ever.
func (s *Server) recover() {
	records, err := readRecords(s.opts.Dir)
	if err != nil {
		s.log.Error("some records of the last pager are lost", "err", err)
	}
	for _, r := range records {
		log := s.log.With("sandbox", r.SandboxID)
		g := &guest{}
		if err := s.recoverOne(r, g, log); err != nil {
			s.log.Error("a sandbox cannot be served again", "sandbox", r.SandboxID, "err", err)
			s.fatal[r.SandboxID] = err.Error()
		}
		if g.disk == nil && g.memory == nil {
			if err := removeRecord(s.opts.Dir, r.SandboxID); err != nil {
				log.Error("a stale record stays", "err", err)
			}
			continue
		}
		s.guests[r.SandboxID] = g
		log.Info("taken up again", "memory", g.memory != nil, "disk", g.disk != nil)
	}
}

func (s *Server) recoverOne(r record, g *guest, log *slog.Logger) (err error) {
	if r.Disk != nil {
		if g.disk, err = openDisk(s.opts, *r.Disk, log); err != nil {
			// Its VM waits for the disk to come back; the engine ends it.
			return fmt.Errorf("serve the disk again: %w", err)
		}
	}
	if r.Memory == nil || r.Memory.Attachment == nil {
		return nil
	}
	g.memory, err = s.reattach(r)
	if err == nil || errors.Is(err, uffd.ErrGone) {
		return nil
	}
	rec := r.Memory.Attachment
	return errors.Join(fmt.Errorf("serve the memory again: %w", err), killProcess(rec.PID, rec.StartTime))
}

func (s *Server) reattach(r record) (*memory, error) {
	rec := *r.Memory.Attachment
	i, err := s.images.acquire(r.Memory.ImageID, r.Memory.KeepWarm, func() (*os.File, error) {
		return findMemfd(rec.PID, sharedName(r.Memory.ImageID))
	})
	if err != nil {
		return nil, err
	}
	a, err := uffd.Reattach(context.Background(), rec, i.shared)
	if err == nil {
		err = s.faults.Add(r.SandboxID, a)
	}
	if err != nil {
		return nil, errors.Join(err, s.images.release(i))
	}
	return &memory{image: i, keep: r.Memory.KeepWarm, attached: a}, nil
}

// findMemfd opens the memfd of that name which a process holds.
func findMemfd(pid int, name string) (*os.File, error) {
	fd, err := findFD(pid, "/memfd:"+name+" ")
	if err != nil {
		return nil, fmt.Errorf("look for the shared pages: %w", err)
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", pid, fd), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open the shared pages: %w", err)
	}
	return f, nil
}

// userfaultfdDev returns the number of the descriptor of /dev/userfaultfd that
// a VM process was started with, -1 where it has none.
func userfaultfdDev(pid int) int {
	fd, err := findFD(pid, "/dev/userfaultfd")
	if err != nil {
		return -1
	}
	return fd
}

// findFD returns the first descriptor of a process whose target begins so.
func findFD(pid int, prefix string) (int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return -1, err
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && strings.HasPrefix(target, prefix) {
			return strconv.Atoi(e.Name())
		}
	}
	return -1, fmt.Errorf("process %d has no descriptor of %q", pid, prefix)
}

// killProcess ends a VM process if it is still the one that was attached.
func killProcess(pid int, start uint64) error {
	boot, err := vmm.BootID()
	if err != nil {
		return err
	}
	p, err := vmm.AdoptProcess(pid, start, boot)
	if errors.Is(err, vmm.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return p.Kill(ctx)
}

func parseImageID(s string) (format.ID, error) {
	id, err := format.ParseID(s)
	if err != nil {
		return id, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("image_id %q: %w", s, err))
	}
	return id, nil
}

// wireError gives an error its code. The engine is the only reader, so the
// text goes out whole.
func wireError(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return connect.NewError(connect.CodeNotFound, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}
