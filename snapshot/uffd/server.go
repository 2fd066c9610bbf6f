//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Options are the knobs of a Server. The zero value is usable.
type Options struct {
	// ClusterSize is how much of the image a fault brings in, in bytes: a
	// power of two from 4096 to 2 MiB. Default DefaultClusterSize.
	ClusterSize int
	// Workers is how many goroutines serve faults for all attachments, beside
	// each attachment's own, which serves one itself where that is quick.
	// Default 8.
	Workers int
	// OnFatal is told that a VM was killed because a page of it could not be
	// had. The VM is dead, or dying of SIGKILL, when it is called, once per
	// attachment, in a goroutine of its own. It may call Remove, not Close.
	OnFatal func(id string, err error)
	// Logger gets what OnFatal gets and oddities. Default: none.
	Logger *slog.Logger
}

// batch is how many events are read at once.
const batch = 64

// Server answers the page faults of any number of VMs.
type Server struct {
	o     Options
	queue chan job
	bufs  chan []byte // a cluster each, for readers that serve themselves
	// workers, readers and callbacks end in this order at Close.
	workers, callbacks sync.WaitGroup

	mu     sync.Mutex
	closed bool
	served map[string]*served
	past   Stats // of attachments that are gone
}

type job struct {
	v   *served
	off int64 // of the page in the image
}

// served is an attachment in a Server's hands.
type served struct {
	*Attachment
	id       string
	file     *os.File // the userfaultfd, known to the poller
	reader   sync.WaitGroup
	inflight sync.WaitGroup // jobs queued or at work
	dead     atomic.Bool
	counters counters
	events   [batch * msgSize]byte
	stopping atomic.Bool
	// slow counts down the faults that are left to workers after one that took
	// long.
	slow atomic.Int32

	// removing is held for reading while pages are put into a VM in copy
	// mode, and for writing while events are read that may remove some.
	removing sync.RWMutex

	mu      sync.Mutex
	touched bitmap // of clusters that were faulted on
	order   []uint32
	coming  []int64 // pages that somebody will wake who waits for them now
	parked  []job   // faults to try again
	spare   []job
	ended   bool // the reader is gone
}

// NewServer starts a server without attachments. It fails on bad options only.
func NewServer(o Options) (*Server, error) {
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultClusterSize
	}
	if o.ClusterSize < pageSize || o.ClusterSize > maxClusterSize || bits.OnesCount(uint(o.ClusterSize)) != 1 {
		return nil, fmt.Errorf("uffd: cluster size %d is not a power of two from %d to %d", o.ClusterSize, pageSize, maxClusterSize)
	}
	if o.Workers <= 0 {
		o.Workers = 8
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, queue: make(chan job, 4*batch), bufs: make(chan []byte, o.Workers), served: map[string]*served{}}
	for range o.Workers {
		s.bufs <- make([]byte, o.ClusterSize)
		s.workers.Go(s.work)
	}
	return s, nil
}

// Add starts serving a, which then belongs to the server, under a name that
// must be new. On error a still belongs to the caller.
func (s *Server) Add(id string, a *Attachment) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errors.New("uffd: server is closed")
	}
	if s.served[id] != nil {
		return fmt.Errorf("uffd: attachment %q exists", id)
	}
	clusters := (a.src.Size() + int64(s.o.ClusterSize) - 1) / int64(s.o.ClusterSize)
	v := &served{Attachment: a, id: id, touched: make(bitmap, (clusters+63)/64), order: make([]uint32, 0, min(clusters, 4096))}
	f, err := pollable(a.fd)
	if err != nil {
		return fmt.Errorf("uffd: attachment %q: %w", id, err)
	}
	v.file = f
	s.served[id] = v
	v.reader.Go(func() { s.read(v) })
	return nil
}

// Remove stops serving an attachment and lets go of it; it is due for a VM that
// has ended, too. A living one is not ended: its faults wait until it is
// attached to again.
func (s *Server) Remove(id string) error {
	s.mu.Lock()
	v := s.served[id]
	delete(s.served, id)
	s.mu.Unlock()
	if v == nil {
		return fmt.Errorf("uffd: no attachment %q", id)
	}
	s.drop(v)
	return nil
}

func (s *Server) drop(v *served) {
	// Wakes the reader and makes it end; the descriptors stay valid until
	// nobody uses their numbers any more.
	v.stopping.Store(true)
	v.file.SetReadDeadline(time.Unix(1, 0))
	v.reader.Wait()
	v.inflight.Wait()
	st := v.stats()
	s.mu.Lock()
	s.past.add(st)
	s.mu.Unlock()
	v.file.Close()
	v.Attachment.Close()
}

// Close removes all attachments and ends the server. VMs go on, and wait when
// they fault.
func (s *Server) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	all := s.served
	s.served = map[string]*served{}
	s.mu.Unlock()
	for _, v := range all {
		s.drop(v)
	}
	close(s.queue)
	s.workers.Wait()
	s.callbacks.Wait()
}

func (s *Server) find(id string) (*served, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.served[id]; v != nil {
		return v, nil
	}
	return nil, fmt.Errorf("uffd: no attachment %q", id)
}

// Stats tells what was done for an attachment.
func (s *Server) Stats(id string) (Stats, error) {
	v, err := s.find(id)
	if err != nil {
		return Stats{}, err
	}
	return v.stats(), nil
}

// Totals adds up what was done for all attachments, those that are gone
// included. One that is being removed may be missing for a moment.
func (s *Server) Totals() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.past
	for _, v := range s.served {
		t.add(v.stats())
	}
	return t
}

func (v *served) stats() Stats {
	st := v.counters.snapshot()
	if v.pages != nil {
		st.Removed = uint64(v.pages.Removed())
	}
	return st
}

// Touched gives the clusters of data in which an attachment faulted, in the
// order of the first fault, as indices in units of Options.ClusterSize.
// Clusters that were in RAM already raise no fault and are not in it.
func (s *Server) Touched(id string) ([]uint32, error) {
	v, err := s.find(id)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return append([]uint32(nil), v.order...), nil
}

// read takes events off the userfaultfd until it is told to stop.
func (s *Server) read(v *served) {
	defer v.end()
	raw, err := v.file.SyscallConn()
	if err != nil {
		s.fatal(v, fmt.Errorf("wait for page-fault events: %w", err))
		return
	}
	var n int
	var rerr error
	take := func(uintptr) bool {
		n, rerr = v.take()
		return rerr != unix.EAGAIN
	}
	for {
		if err := raw.Read(take); err != nil {
			rerr = err
		}
		// A deadline of ours may come after the one that ends us.
		if v.stopping.Load() {
			return
		}
		switch {
		case rerr == nil:
			s.enqueue(v, v.batch()[:n])
		case rerr == unix.EINTR:
		case errors.Is(rerr, os.ErrDeadlineExceeded):
			v.file.SetReadDeadline(time.Time{})
			s.unpark(v)
			if v.stopping.Load() {
				return
			}
		default:
			s.fatal(v, fmt.Errorf("read page-fault events: %w", rerr))
			return
		}
	}
}

// batch is where events are read to.
func (v *served) batch() []byte {
	if v.pages != nil {
		return v.pages.events
	}
	return v.events[:]
}

// take reads events that are there already, or unix.EAGAIN.
func (v *served) take() (int, error) {
	if v.pages != nil {
		return v.readCopyEvents()
	}
	return unix.Read(v.fd, v.events[:])
}

func (s *Server) enqueue(v *served, b []byte) {
	changed := false
	var last job // not handed on yet
	for ; len(b) >= msgSize; b = b[msgSize:] {
		if v.pages != nil && b[0] == eventRemove {
			changed = true // noted as it was read
			continue
		}
		off, err := v.fault(b[:msgSize])
		if err != nil {
			s.fatal(v, err)
			continue
		}
		v.counters.faults.Add(1)
		if !v.expect(off) {
			v.counters.hits.Add(1)
			continue
		}
		v.inflight.Add(1)
		if last.v != nil {
			s.queue <- last
		}
		last = job{v, off}
	}
	if changed {
		s.unpark(v)
	}
	if last.v != nil {
		s.serveHere(last)
	}
}

// expect notes that a page is to be brought. It is false when that has been
// noted before: threads of a VM often wait for one page, and a signal to a
// waiting thread has it raise its fault again. Waking once is enough for all
// whose events have been read, and no number of them keeps the workers busy.
func (v *served) expect(off int64) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if slices.Contains(v.coming, off) {
		return false
	}
	v.coming = append(v.coming, off)
	return true
}

// arrived is due before those are woken who wait for a page: a fault that is
// raised from then on may miss that.
func (v *served) arrived(off int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if i := slices.Index(v.coming, off); i >= 0 {
		v.coming = slices.Delete(v.coming, i, i+1)
	}
}

// serveHere serves a fault in the reader: handing it to a worker would take
// longer than a page that is in RAM. Where pages come slowly the workers do it,
// so that the VM's other threads need not wait.
func (s *Server) serveHere(j job) {
	if j.v.slow.Load() == 0 {
		select {
		case buf := <-s.bufs:
			if s.handle(j, buf) {
				j.v.inflight.Done()
			}
			s.bufs <- buf
			return
		default:
		}
	}
	s.queue <- j
}

// fault gives the page of the image that a page-fault event is about.
func (v *served) fault(msg []byte) (int64, error) {
	switch addr := msgAddr(msg); msg[0] {
	case eventPagefault:
		r := v.locate(addr)
		if r == nil {
			return 0, fmt.Errorf("page fault at %#x, outside guest memory", addr)
		}
		return r.Offset + int64(addr-r.Addr)&^(pageSize-1), nil
	case eventFork:
		// The kernel has put the child's userfaultfd among our descriptors.
		unix.Close(int(msgForkedFD(msg)))
		return 0, errors.New("unexpected event: the process forked with its memory")
	default:
		return 0, fmt.Errorf("unexpected event %#x at %#x", msg[0], addr)
	}
}
