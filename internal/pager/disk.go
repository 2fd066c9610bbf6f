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
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/nbd"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// disk is the service of one sandbox's disk.
type disk struct {
	rec     diskRecord
	image   *snapshot.Image
	overlay *block.Overlay
	room    *roomy
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
		d, err := s.openDisk(req.Msg.SandboxId, rec)
		if err != nil {
			return nil, errors.Join(wireError(err), s.settle(req.Msg.SandboxId, g))
		}
		g.disk = d
	}
	g.disk.room.setYield(false) // whoever wanted it so has gone
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

// YieldDisk implements pager.v1.
func (s *Server) YieldDisk(_ context.Context, req *connect.Request[pagerv1.YieldDiskRequest]) (*connect.Response[pagerv1.YieldDiskResponse], error) {
	g, err := s.guestFor(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disk == nil {
		return nil, errors.Join(connect.NewError(connect.CodeNotFound, fmt.Errorf("sandbox %s has no disk here", req.Msg.SandboxId)), s.settle(req.Msg.SandboxId, g))
	}
	return connect.NewResponse(&pagerv1.YieldDiskResponse{Waiting: g.disk.room.setYield(req.Msg.Yield)}), nil
}

// diskWaits enters that a sandbox's writes wait for room, or do not any more.
func (s *Server) diskWaits(id string, since time.Time, waits bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if waits {
		s.waits[id] = since
		s.totals.diskWaits++
	} else {
		delete(s.waits, id)
	}
}

func (s *Server) openDisk(id string, rec diskRecord) (*disk, error) {
	log := s.log.With("sandbox", id)
	img, err := s.opts.Store.OpenImage(rec.ImageID)
	if err != nil {
		return nil, fmt.Errorf("open disk image %s: %w", rec.ImageID, err)
	}
	overlay, err := block.OpenOverlay(storage.OS{}, rec.OverlayPath, img)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the overlay: %w", err), img.Close())
	}
	l, err := listenUnix(rec.SocketPath, s.opts.SocketGID)
	if err != nil {
		return nil, errors.Join(err, overlay.Close(), img.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	room := newRoomy(ctx, overlay, s.short.Load, log, func(since time.Time, waits bool) { s.diskWaits(id, since, waits) })
	d := &disk{rec: rec, image: img, overlay: overlay, room: room, cancel: cancel, done: make(chan error, 1)}
	go func() { d.done <- serveNBD(ctx, l, room, log) }()
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
