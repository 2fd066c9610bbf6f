package enginetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1/pagerv1connect"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Pager is a pager without page faults: memory is given whole, as a file of
// the VM's own, and disks are written by the test.
type Pager struct {
	pagerv1connect.UnimplementedPagerServiceHandler
	// Client is the engine's.
	Client pagerv1connect.PagerServiceClient

	host *Host

	mu     sync.Mutex
	memory map[string]*os.File
	disks  map[string]*disk
	waits  map[string]int64 // since when, by sandbox
	orders map[string]bool  // images of which it is known what starts need
	ahead  []string         // sandboxes of which it was said that they run
}

type disk struct {
	image  format.ID
	path   string
	blocks map[int64][]byte // the overlay, by offset
	yields bool
}

func newPager(t testing.TB, h *Host) *Pager {
	p := &Pager{host: h, memory: map[string]*os.File{}, disks: map[string]*disk{}, waits: map[string]int64{}, orders: map[string]bool{}}
	mux := http.NewServeMux()
	mux.Handle(pagerv1connect.NewPagerServiceHandler(p))
	sock := filepath.Join(h.Dir, "pager.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}}
	p.Client = pagerv1connect.NewPagerServiceClient(&http.Client{Transport: transport}, "http://pager")
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		srv.Close()
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, f := range p.memory {
			f.Close()
		}
	})
	return p
}

// Serves returns the sandboxes whose memory or disk is served, sorted.
func (p *Pager) Serves() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for id := range p.disks {
		out = append(out, id)
	}
	for id := range p.memory {
		if p.disks[id] == nil {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// WriteDisk is what a guest does to one block of its disk.
func (p *Pager) WriteDisk(id string, b []byte, off int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.disks[id]
	if d == nil || len(b) != format.BlockSize || off%format.BlockSize != 0 {
		return fmt.Errorf("write %d bytes at %d of the disk of %q", len(b), off, id)
	}
	d.blocks[off] = slices.Clone(b)
	return nil
}

// Block reads one block as the guest sees it.
func (p *Pager) Block(id string, off int64) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.disks[id]
	if d == nil {
		return nil, fmt.Errorf("the disk of %q is not served", id)
	}
	if b := d.blocks[off]; b != nil {
		return b, nil
	}
	img, err := p.open(d.image)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	b := make([]byte, format.BlockSize)
	_, err = img.ReadAt(b, off)
	return b, err
}

// open opens an image as another process does: reading only.
func (p *Pager) open(id format.ID) (*snapshot.Image, error) {
	s, err := snapshot.Open(filepath.Join(p.host.Dir, "store"), snapshot.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	return s.OpenImage(id)
}

// GetStatus implements pager.v1.
func (p *Pager) GetStatus(context.Context, *connect.Request[pagerv1.GetStatusRequest]) (*connect.Response[pagerv1.GetStatusResponse], error) {
	out := &pagerv1.GetStatusResponse{Pid: int32(os.Getpid()), Sandboxes: p.Serves()}
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, since := range p.waits {
		out.Waits = append(out.Waits, &pagerv1.DiskWait{SandboxId: id, SinceUnixMs: since})
	}
	return connect.NewResponse(out), nil
}

// PrepareMemory implements pager.v1.
func (p *Pager) PrepareMemory(_ context.Context, req *connect.Request[pagerv1.PrepareMemoryRequest]) (*connect.Response[pagerv1.PrepareMemoryResponse], error) {
	id, err := format.ParseID(req.Msg.ImageId)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	f, size, err := p.load(id)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if old := p.memory[req.Msg.SandboxId]; old != nil {
		p.host.note("the memory of %s is prepared twice", req.Msg.SandboxId)
		old.Close()
	}
	p.memory[req.Msg.SandboxId] = f
	return connect.NewResponse(&pagerv1.PrepareMemoryResponse{Pid: int32(os.Getpid()), Fd: int32(f.Fd()), Size: size}), nil
}

// load makes a memfd of an image.
func (p *Pager) load(id format.ID) (*os.File, int64, error) {
	img, err := p.open(id)
	if err != nil {
		return nil, 0, err
	}
	defer img.Close()
	fd, err := unix.MemfdCreate("fake-"+id.String(), unix.MFD_CLOEXEC)
	if err != nil {
		return nil, 0, err
	}
	f := os.NewFile(uintptr(fd), "memory")
	err = f.Truncate(img.Size())
	for off, n := int64(0), int64(0); err == nil && off < img.Size(); off += n {
		var kind format.Kind
		if kind, n = img.Span(off); kind != format.Data {
			continue
		}
		buf := make([]byte, n)
		if _, err = img.ReadAt(buf, off); err == nil || errors.Is(err, io.EOF) {
			_, err = f.WriteAt(buf, off)
		}
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, img.Size(), nil
}

// AttachMemory implements pager.v1. Address 0: all of the RAM is in the file.
func (p *Pager) AttachMemory(context.Context, *connect.Request[pagerv1.AttachMemoryRequest]) (*connect.Response[pagerv1.AttachMemoryResponse], error) {
	return connect.NewResponse(&pagerv1.AttachMemoryResponse{}), nil
}

// ReadAhead implements pager.v1. There is nothing to read: all of it is there.
func (p *Pager) ReadAhead(_ context.Context, req *connect.Request[pagerv1.ReadAheadRequest]) (*connect.Response[pagerv1.ReadAheadResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ahead = append(p.ahead, req.Msg.SandboxId)
	return connect.NewResponse(&pagerv1.ReadAheadResponse{}), nil
}

// ReadsAhead are the sandboxes of which it was said that they run, so that it may
// read ahead for them, in the order of the calls.
func (p *Pager) ReadsAhead() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.ahead)
}

// ReleaseMemory implements pager.v1.
func (p *Pager) ReleaseMemory(_ context.Context, req *connect.Request[pagerv1.ReleaseMemoryRequest]) (*connect.Response[pagerv1.ReleaseMemoryResponse], error) {
	p.mustBeDead(req.Msg.SandboxId, "memory")
	p.mu.Lock()
	defer p.mu.Unlock()
	if f := p.memory[req.Msg.SandboxId]; f != nil {
		f.Close()
		delete(p.memory, req.Msg.SandboxId)
		if to := req.Msg.SuccessorImageId; to != "" {
			p.orders[to] = true
		}
	}
	return connect.NewResponse(&pagerv1.ReleaseMemoryResponse{}), nil
}

func (p *Pager) mustBeDead(id, what string) {
	if _, lives := p.host.VM(id); lives {
		p.host.note("the %s of %s is released while its VM lives", what, id)
	}
}

// ServeDisk implements pager.v1.
func (p *Pager) ServeDisk(_ context.Context, req *connect.Request[pagerv1.ServeDiskRequest]) (*connect.Response[pagerv1.ServeDiskResponse], error) {
	id, err := format.ParseID(req.Msg.ImageId)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	img, err := p.open(id)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.disks[req.Msg.SandboxId]; d != nil {
		if d.image != id {
			p.host.note("the disk of %s is served from two images", req.Msg.SandboxId)
		}
		d.yields = false
		return connect.NewResponse(&pagerv1.ServeDiskResponse{Size: img.Size()}), nil
	}
	path := req.Msg.OverlayPath + ".data"
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		p.host.note("the disk of %s is served over what an earlier run wrote: %v", req.Msg.SandboxId, err)
		return nil, err
	}
	f.Close()
	p.disks[req.Msg.SandboxId] = &disk{image: id, path: path, blocks: map[int64][]byte{}}
	return connect.NewResponse(&pagerv1.ServeDiskResponse{Size: img.Size()}), nil
}

// ReadDisk implements pager.v1.
func (p *Pager) ReadDisk(_ context.Context, req *connect.Request[pagerv1.ReadDiskRequest], stream *connect.ServerStream[pagerv1.ReadDiskResponse]) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.disks[req.Msg.SandboxId]
	if d == nil {
		return connect.NewError(connect.CodeNotFound, errors.New("no such disk"))
	}
	var offs []int64
	for off := range d.blocks {
		offs = append(offs, off)
	}
	slices.Sort(offs)
	for _, off := range offs {
		if err := stream.Send(&pagerv1.ReadDiskResponse{Offset: off, Data: d.blocks[off]}); err != nil {
			return err
		}
	}
	return nil
}

// StopDisk implements pager.v1.
func (p *Pager) StopDisk(_ context.Context, req *connect.Request[pagerv1.StopDiskRequest]) (*connect.Response[pagerv1.StopDiskResponse], error) {
	p.mustBeDead(req.Msg.SandboxId, "disk")
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.disks, req.Msg.SandboxId)
	return connect.NewResponse(&pagerv1.StopDiskResponse{}), nil
}

// SetWaits has a disk's writes wait for room since then; 0: no more.
func (p *Pager) SetWaits(id string, sinceUnixMs int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waits[id] = sinceUnixMs; sinceUnixMs == 0 {
		delete(p.waits, id)
	}
}

// Yields tells whether a disk's writes fail where there is no room.
func (p *Pager) Yields(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.disks[id] != nil && p.disks[id].yields
}

// YieldDisk implements pager.v1.
func (p *Pager) YieldDisk(_ context.Context, req *connect.Request[pagerv1.YieldDiskRequest]) (*connect.Response[pagerv1.YieldDiskResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.disks[req.Msg.SandboxId]
	if d == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such disk"))
	}
	d.yields = req.Msg.Yield
	_, waits := p.waits[req.Msg.SandboxId]
	return connect.NewResponse(&pagerv1.YieldDiskResponse{Waiting: waits}), nil
}

// KnowsOrder tells whether it is known what starts of an image need.
func (p *Pager) KnowsOrder(id format.ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.orders[id.String()]
}

// DropImage implements pager.v1; nothing is kept warm here.
func (p *Pager) DropImage(_ context.Context, req *connect.Request[pagerv1.DropImageRequest]) (*connect.Response[pagerv1.DropImageResponse], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if to := req.Msg.SuccessorImageId; to != "" && p.orders[req.Msg.ImageId] {
		p.orders[to] = true
	}
	delete(p.orders, req.Msg.ImageId)
	return connect.NewResponse(&pagerv1.DropImageResponse{}), nil
}

// GetStats implements pager.v1.
func (p *Pager) GetStats(context.Context, *connect.Request[pagerv1.GetStatsRequest]) (*connect.Response[pagerv1.GetStatsResponse], error) {
	return connect.NewResponse(&pagerv1.GetStatsResponse{}), nil
}
