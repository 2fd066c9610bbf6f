package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// memory is the service of one sandbox's page faults.
type memory struct {
	image    *image
	keep     bool
	handover *handover // copy mode; nil in shared mode
	attached *uffd.Attachment
	whole    string      // the file that the VM maps, in place of both
	window   *time.Timer // ends when its start is over; nil if nobody asks
	learned  bool        // what its start needed is stored, or will not be
	// In copy mode: what starts of the image need, how much of it was given to be
	// put into the VM, and whether that runs, so that all of it may be.
	order   []uint32
	given   int
	runs    bool
	putting sync.WaitGroup
}

func (m *memory) record() *memoryRecord {
	r := &memoryRecord{ImageID: m.image.id, KeepWarm: m.keep, Whole: m.whole != ""}
	if m.attached != nil {
		a := m.attached.Record()
		r.Attachment = &a
	}
	if m.handover != nil {
		r.Copy = &m.handover.rec
	}
	return r
}

// PrepareMemory implements pager.v1.
func (s *Server) PrepareMemory(ctx context.Context, req *connect.Request[pagerv1.PrepareMemoryRequest]) (*connect.Response[pagerv1.PrepareMemoryResponse], error) {
	id, err := parseImageID(req.Msg.ImageId)
	if err != nil {
		return nil, err
	}
	if err := checkMode(req.Msg); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	g, err := s.guestFor(req.Msg.SandboxId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if m := g.memory; m != nil && (m.image.id != id || m.whole == "" && m.socket() != req.Msg.SocketPath) {
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("sandbox %s has memory image %s, hand-over socket %q; release it first", req.Msg.SandboxId, m.image.id, m.socket()))
	}
	if g.memory == nil {
		m, err := s.openMemory(ctx, id, req.Msg)
		if err != nil {
			return nil, errors.Join(wireError(err), s.settle(req.Msg.SandboxId, g))
		}
		g.memory = m
		s.mu.Lock()
		delete(s.fatal, req.Msg.SandboxId)
		s.mu.Unlock()
	}
	if err := s.settle(req.Msg.SandboxId, g); err != nil {
		return nil, wireError(err)
	}
	out := &pagerv1.PrepareMemoryResponse{Size: g.memory.image.source.Size(), WholePath: g.memory.whole}
	if g.memory.handover == nil && g.memory.whole == "" {
		out.Pid, out.Fd = int32(os.Getpid()), int32(g.memory.image.shared.File().Fd())
	}
	return connect.NewResponse(out), nil
}

func (s *Server) openMemory(ctx context.Context, id format.ID, req *pagerv1.PrepareMemoryRequest) (*memory, error) {
	m := &memory{keep: req.KeepWarm}
	copies := req.Mode == pagerv1.MemoryMode_MEMORY_MODE_COPY
	var err error
	if m.image, err = s.images.acquire(id, acquireOptions{keep: req.KeepWarm, share: !copies}); err != nil {
		return nil, err
	}
	if copies && req.Whole {
		m.whole = s.images.wholeOf(ctx, m.image)
	}
	if copies && m.whole == "" {
		if m.handover, err = newHandover(copyRecord{SocketPath: req.SocketPath}, s.opts.SocketGID); err != nil {
			return nil, errors.Join(err, s.images.release(m.image))
		}
		m.order = s.orderOf(m.image)
	}
	return m, nil
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
	case g.memory.whole != "":
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("memory of sandbox %s is a whole image: nothing is attached to it", id))
	case g.memory.attached != nil:
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("memory of sandbox %s is attached already", id))
	case g.memory.handover != nil:
		if err := s.expect(id, g, int(req.Msg.Pid)); err != nil {
			return nil, err
		}
		return connect.NewResponse(&pagerv1.AttachMemoryResponse{Length: g.memory.image.source.Size()}), nil
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
	s.watch(id, g)
	r := a.Record()
	return connect.NewResponse(&pagerv1.AttachMemoryResponse{Address: uint64(r.Addr), Length: r.Length}), nil
}

// ReleaseMemory implements pager.v1.
func (s *Server) ReleaseMemory(_ context.Context, req *connect.Request[pagerv1.ReleaseMemoryRequest]) (*connect.Response[pagerv1.ReleaseMemoryResponse], error) {
	id := req.Msg.SandboxId
	successor, err := parseSuccessor(req.Msg.SuccessorImageId)
	if err != nil {
		return nil, err
	}
	g, err := s.guestFor(id)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if h := g.handoverOf(); h != nil {
		// Its goroutine takes the lock to say what came.
		h.cancel()
		g.mu.Unlock()
		<-h.done
		g.mu.Lock()
	}
	if g.memory != nil {
		s.learn(id, g.memory)
		if from := g.memory.image; from.source != nil {
			s.passOn(from.id, from.source.Header().Parent, successor)
		}
		if g.memory.attached != nil {
			if err := s.faults.Remove(id); err != nil {
				return nil, wireError(err)
			}
		}
		g.memory.putting.Wait() // it ends with the attachment
		if g.memory.handover != nil {
			err = g.memory.handover.close()
		}
		err = errors.Join(err, s.images.release(g.memory.image))
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
	successor, err := parseSuccessor(req.Msg.SuccessorImageId)
	if err != nil {
		return nil, err
	}
	s.passOn(id, format.ID{}, successor)
	if err := errors.Join(s.images.forget(id), s.orders.remove(id)); err != nil {
		return nil, wireError(err)
	}
	return connect.NewResponse(&pagerv1.DropImageResponse{}), nil
}

// parseSuccessor is parseImageID for an image that there need not be.
func parseSuccessor(s string) (format.ID, error) {
	if s == "" {
		return format.ID{}, nil
	}
	id, err := format.ParseID(s)
	if err != nil {
		err = connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("successor_image_id %q: %w", s, err))
	}
	return id, err
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
