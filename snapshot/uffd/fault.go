//go:build linux

package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// pollable gives a file over a duplicate of fd that Go's poller waits for.
func pollable(fd int) (*os.File, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate descriptor: %w", err)
	}
	f := os.NewFile(uintptr(dup), "userfaultfd") // non-blocking since it was made
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		f.Close()
		return nil, fmt.Errorf("wait for userfaultfd through the poller: %w", err)
	}
	return f, nil
}

// work serves faults from the queue until it is closed.
func (s *Server) work() {
	buf := make([]byte, s.o.ClusterSize)
	for j := range s.queue {
		if s.handle(j, buf) {
			j.v.inflight.Done()
		}
	}
}

// handle serves a fault. It is false when the fault was put aside.
func (s *Server) handle(j job, buf []byte) bool {
	if j.v.dead.Load() {
		return true
	}
	start := time.Now()
	err := s.serve(j.v, buf, j.off)
	if errors.Is(err, errChanging) {
		return !j.v.park(j)
	}
	if err != nil {
		s.fatal(j.v, err)
	}
	took := time.Since(start)
	j.v.pace(took)
	j.v.counters.observe(took)
	return true
}

// A fault that takes longer than slowFault has the next slowFaults of its VM
// served by workers.
const (
	slowFault  = time.Millisecond
	slowFaults = 32
)

// pace learns from a fault how long the next ones will take.
func (v *served) pace(took time.Duration) {
	if took > slowFault {
		v.slow.Store(slowFaults)
	} else if n := v.slow.Load(); n > 0 {
		v.slow.CompareAndSwap(n, n-1)
	}
}

// park puts a fault aside until the reader has taken more events, or for a
// moment. It is false when the reader has ended.
func (v *served) park(j job) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return false
	}
	v.counters.retries.Add(1)
	v.parked = append(v.parked, j)
	v.file.SetReadDeadline(time.Now().Add(changingRetry))
	return true
}

// unpark queues what was put aside.
func (s *Server) unpark(v *served) {
	v.mu.Lock()
	jobs := v.parked
	v.parked, v.spare = v.spare[:0], jobs
	v.mu.Unlock()
	for _, j := range jobs {
		s.queue <- j
	}
}

// end lets go of what was put aside when the reader ends.
func (v *served) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ended = true
	for range v.parked {
		v.inflight.Done()
	}
	v.parked = nil
}

// serve makes the page at off readable for the VM and wakes who waits for it.
func (s *Server) serve(v *served, buf []byte, off int64) error {
	if v.pages != nil {
		return s.serveCopy(v, buf, off)
	}
	kind, _, err := span(v.shared.src, off, v.shared.size)
	if err != nil {
		return err
	}
	if kind == format.Zero {
		v.counters.zeroFaults.Add(1)
		v.arrived(off)
		return v.zeroRun(off, int64(s.o.ClusterSize))
	}
	start := off &^ (int64(s.o.ClusterSize) - 1)
	n := min(int64(s.o.ClusterSize), v.shared.size-start)
	v.touch(uint32(start / int64(s.o.ClusterSize)))
	filled, err := v.shared.fill(buf, start, n, off)
	if err != nil {
		return err
	}
	if filled == 0 {
		v.counters.hits.Add(1)
	} else {
		v.counters.dataFaults.Add(1)
		v.counters.bytesFilled.Add(uint64(filled))
	}
	v.arrived(off)
	return wake(v.fd, v.rec.Addr+uintptr(start), n)
}

// zeroRun maps the run of zeros around off privately: from where it begins in
// off's cluster to its end, or the end of the 2 MiB it lies in.
func (v *served) zeroRun(off, cluster int64) error {
	end := min(off&^(maxZeroRun-1)+maxZeroRun, v.shared.size)
	start := off &^ (cluster - 1)
	for {
		kind, n, err := span(v.shared.src, start, end)
		if err != nil {
			return err
		}
		if start+n > off {
			if kind != format.Zero {
				return fmt.Errorf("image changed its mind about the block at %d", off)
			}
			err := zeroPages(v.fd, v.rec.Addr+uintptr(start), n)
			if errors.Is(err, unix.ESRCH) {
				// The memory went with its process, moments before the
				// pidfd tells: nobody waits any more.
				return nil
			}
			return err
		}
		start += n
	}
}

func (v *served) touch(cluster uint32) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.touched.has(cluster) {
		v.touched.set(cluster)
		v.order = append(v.order, cluster)
	}
}

// fatal kills a VM one of whose pages cannot be had, then reports it. Errors
// of one that has ended are its end's consequence and no news.
func (s *Server) fatal(v *served, err error) {
	if v.dead.Load() || v.proc.exited() || !v.dead.CompareAndSwap(false, true) {
		return
	}
	if kerr := v.proc.kill(); kerr != nil {
		// Its thread still waits, and never gets a page of ours.
		err = errors.Join(err, fmt.Errorf("kill process %d: %w", v.rec.PID, kerr))
	}
	s.o.Logger.Error("uffd: VM killed, a page of its memory cannot be had", "id", v.id, "pid", v.rec.PID, "error", err)
	if s.o.OnFatal != nil {
		s.callbacks.Go(func() { s.o.OnFatal(v.id, err) })
	}
}

// prefetchRun is how much is read at once ahead of faults.
const prefetchRun = 1 << 20

// Prefetch brings clusters, in units of Options.ClusterSize and in the order
// given, into RAM before anybody faults on them, and returns how many bytes it
// put there. Neighbours are read together. An error ends it and hurts nobody:
// the fault on that page will find out.
func (s *Server) Prefetch(ctx context.Context, shared *Shared, clusters []uint32) (int64, error) {
	if err := shared.acquire(); err != nil {
		return 0, fmt.Errorf("uffd: prefetch: %w", err)
	}
	defer shared.refs.Add(-1)
	size := int64(s.o.ClusterSize)
	buf := make([]byte, max(prefetchRun, size))
	var total int64
	for i := 0; i < len(clusters); {
		start := int64(clusters[i]) * size
		if start >= shared.size {
			return total, fmt.Errorf("uffd: prefetch: cluster %d is beyond the image", clusters[i])
		}
		n := size
		for i++; i < len(clusters) && int64(clusters[i])*size == start+n && n+size <= int64(len(buf)) && (start+n)%lockSpan != 0; i++ {
			n += size
		}
		if err := ctx.Err(); err != nil {
			return total, err
		}
		filled, err := shared.prefetch(buf, start, min(n, shared.size-start))
		total += filled
		if err != nil {
			return total, fmt.Errorf("uffd: prefetch: %w", err)
		}
	}
	return total, nil
}

// prefetch fills the data of [off, off+n), within one lockSpan, that is absent.
func (s *Shared) prefetch(buf []byte, off, n int64) (filled int64, err error) {
	l := s.lock(off)
	defer l.Unlock()
	for end := off + n; off < end; {
		kind, run, err := span(s.src, off, end)
		if err != nil {
			return filled, err
		}
		if kind == format.Data {
			there, err := s.present(off)
			if err == nil && !there {
				if err = s.fillRun(buf[:run], off); err == nil {
					filled += run
				}
			}
			if err != nil {
				return filled, err
			}
		}
		off += run
	}
	return filled, nil
}
