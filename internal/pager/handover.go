package pager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// handover is the wait for a VMM in copy mode: a socket, and from AttachMemory
// on a goroutine that takes the userfaultfd from the one process expected.
type handover struct {
	rec      copyRecord
	listener *net.UnixListener  // nil once it has done its work
	cancel   context.CancelFunc // nil until a process is expected
	done     chan struct{}
}

// maxSocketPath is what fits into a socket's address.
const maxSocketPath = 107

// checkMode checks what PrepareMemory is asked for.
func checkMode(req *pagerv1.PrepareMemoryRequest) error {
	p := req.SocketPath
	if req.Whole && req.Mode != pagerv1.MemoryMode_MEMORY_MODE_COPY {
		return errors.New("whole: only a VMM of copy mode maps an image from a file")
	}
	switch req.Mode {
	case pagerv1.MemoryMode_MEMORY_MODE_UNSPECIFIED, pagerv1.MemoryMode_MEMORY_MODE_SHARED:
		if p != "" {
			return fmt.Errorf("socket_path %q: only copy mode has one", p)
		}
	case pagerv1.MemoryMode_MEMORY_MODE_COPY:
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || len(p) > maxSocketPath {
			return fmt.Errorf("socket_path %q: want a clean absolute path of at most %d bytes", p, maxSocketPath)
		}
	default:
		return fmt.Errorf("mode %d is unknown", req.Mode)
	}
	return nil
}

func newHandover(rec copyRecord, gid int) (*handover, error) {
	l, err := listenUnix(rec.SocketPath, gid)
	if err != nil {
		return nil, err
	}
	return &handover{rec: rec, listener: l.(*net.UnixListener)}, nil
}

// close is called when the goroutine has ended.
func (h *handover) close() error {
	if h.listener != nil {
		h.listener.Close()
	}
	if err := os.Remove(h.rec.SocketPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the hand-over's socket: %w", err)
	}
	return nil
}

func (m *memory) socket() string {
	if m.handover == nil {
		return ""
	}
	return m.handover.rec.SocketPath
}

// handoverOf returns the hand-over whose goroutine runs or has run, or nil.
// The guest's lock is held.
func (g *guest) handoverOf() *handover {
	if g.memory == nil || g.memory.handover == nil || g.memory.handover.cancel == nil {
		return nil
	}
	return g.memory.handover
}

// expect begins to wait for the process that will hand its userfaultfd over.
// The guest's lock is held.
func (s *Server) expect(id string, g *guest, pid int) error {
	h := g.memory.handover
	if h.cancel != nil {
		if h.rec.PID == pid {
			return nil
		}
		return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("memory of sandbox %s waits for process %d", id, h.rec.PID))
	}
	peer, err := uffd.OpenPeer(pid)
	if err != nil {
		return wireError(err)
	}
	pages, err := uffd.CreatePageMap(pagesPath(s.opts.Dir, id), g.memory.image.source.Size())
	if err != nil {
		peer.Close()
		return wireError(err)
	}
	h.rec.PID, h.rec.StartTime = pid, peer.StartTime()
	if err := s.settle(id, g); err != nil {
		h.rec.PID, h.rec.StartTime = 0, 0
		peer.Close()
		return wireError(errors.Join(err, pages.Close()))
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel, h.done = cancel, make(chan struct{})
	t := taking{id: id, g: g, h: h, src: g.memory.image.source, peer: peer, pages: pages}
	go func() {
		defer close(h.done)
		s.takeHandover(ctx, t)
	}()
	return nil
}

// taking is what the wait for one hand-over holds.
type taking struct {
	id    string
	g     *guest
	h     *handover
	src   uffd.Source
	peer  *uffd.Peer
	pages *uffd.PageMap
}

// takeHandover waits for the process and begins to serve its faults. When
// what it hands over cannot be served it is killed: it would wait for ever.
func (s *Server) takeHandover(ctx context.Context, t taking) {
	defer t.peer.Close()
	pid, start := t.peer.PID(), t.peer.StartTime()
	a, err := t.peer.Accept(ctx, t.h.listener, t.src, t.pages, func(err error) {
		s.log.Warn("a stranger connected to a hand-over's socket", "sandbox", t.id, "err", err)
	})
	if err == nil {
		err = s.serveHandover(ctx, t, a)
	} else if cerr := t.pages.Close(); cerr != nil {
		s.log.Error("a page map was not closed", "sandbox", t.id, "err", cerr)
	}
	if err == nil || ctx.Err() != nil {
		return
	}
	s.onFatal(t.id, errors.Join(fmt.Errorf("take over the VM's memory: %w", err), killProcess(pid, start)))
}

func (s *Server) serveHandover(ctx context.Context, t taking, a *uffd.Attachment) error {
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	if err := ctx.Err(); err != nil {
		a.Close()
		return err
	}
	t.g.memory.attached = a
	err := s.settle(t.id, t.g) // first the record, as in AttachMemory
	if err == nil {
		err = s.faults.Add(t.id, a)
	}
	if err != nil {
		t.g.memory.attached = nil
		a.Close()
		return err
	}
	t.h.listener.Close()
	t.h.listener = nil
	s.watch(t.id, t.g)
	return nil
}

// reattachCopy takes up a VM in copy mode.
func (s *Server) reattachCopy(r record) (*memory, error) {
	i, err := s.images.acquire(r.Memory.ImageID, acquireOptions{keep: r.Memory.KeepWarm})
	if err != nil {
		return nil, err
	}
	pages, err := uffd.OpenPageMap(pagesPath(s.opts.Dir, r.SandboxID), i.source.Size())
	if err != nil {
		return nil, errors.Join(err, s.images.release(i))
	}
	a, err := uffd.ReattachCopy(context.Background(), *r.Memory.Attachment, i.source, pages)
	if err != nil {
		return nil, errors.Join(err, pages.Close(), s.images.release(i))
	}
	if err := s.faults.Add(r.SandboxID, a); err != nil {
		a.Close()
		return nil, errors.Join(err, s.images.release(i))
	}
	return &memory{image: i, keep: r.Memory.KeepWarm, attached: a, handover: &handover{rec: *r.Memory.Copy}, order: s.orderOf(i)}, nil
}

// expectAgain goes on to wait for a process that had not handed over when the
// last pager ended. When it has a userfaultfd already, the hand-over may have
// been lost with that pager, and the process would wait for ever: it is ended.
// That is no loss, it was about to load its state, which can be loaded again.
func (s *Server) expectAgain(r record, g *guest) error {
	c := *r.Memory.Copy
	if c.PID == 0 {
		return nil // prepared, no more: its caller begins again
	}
	peer, err := uffd.OpenPeer(c.PID)
	if errors.Is(err, uffd.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer peer.Close()
	if peer.StartTime() != c.StartTime {
		return nil
	}
	made, err := peer.HasUserfaultfd()
	if err == nil && made {
		err = errors.New("the pager ended while it took over the VM's memory; start the VM again")
	}
	if err != nil {
		return errors.Join(err, peer.Kill())
	}
	i, err := s.images.acquire(r.Memory.ImageID, acquireOptions{keep: r.Memory.KeepWarm})
	if err != nil {
		return errors.Join(err, peer.Kill())
	}
	pid := c.PID
	c.PID, c.StartTime = 0, 0
	h, err := newHandover(c, s.opts.SocketGID)
	if err != nil {
		return errors.Join(err, peer.Kill(), s.images.release(i))
	}
	g.memory = &memory{image: i, keep: r.Memory.KeepWarm, handover: h, order: s.orderOf(i)}
	return s.expect(r.SandboxID, g, pid)
}
