//go:build linux

package uffd

import (
	"context"
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Staged is data of an image, verified and held in this process for a VM in copy
// mode that has not handed its memory over yet. See Server.Stage.
type Staged struct{ runs []stagedRun }

type stagedRun struct {
	off  int64
	data []byte
}

// Stage reads clusters, in units of Options.ClusterSize and in the order given, up
// to limit bytes of them, for PutStaged. It is for the time in which a VMM is
// started: when that hands its memory over, ctx is ended, and what was read until
// then is put into the VM at once, before its guest runs. left are the clusters
// that were not read. An error hurts nobody, as with Prefetch.
func (s *Server) Stage(ctx context.Context, src Source, clusters []uint32, limit int64) (st *Staged, left []uint32, err error) {
	size := int64(s.o.ClusterSize)
	most := int(min(int64(len(clusters)), limit/size))
	st = &Staged{}
	for i := 0; i < most; {
		if ctx.Err() != nil {
			return st, clusters[i:], nil
		}
		start := int64(clusters[i]) * size
		if start >= src.Size() {
			return st, nil, fmt.Errorf("uffd: stage: cluster %d is beyond the image", clusters[i])
		}
		n := size
		for i++; i < most && int64(clusters[i])*size == start+n && n < putAtOnce; i++ {
			n += size
		}
		if err := st.read(src, start, min(start+n, src.Size())); err != nil {
			return st, nil, fmt.Errorf("uffd: stage: %w", err)
		}
	}
	return st, clusters[most:], nil
}

// read takes the data of [off, end); zeros come by fault, many at once.
func (st *Staged) read(src Source, off, end int64) error {
	for off < end {
		kind, n, err := span(src, off, end)
		if err != nil {
			return err
		}
		if kind == format.Data {
			b := make([]byte, n)
			if err := readFull(src, b, off); err != nil {
				return err
			}
			st.runs = append(st.runs, stagedRun{off, b})
		}
		off += n
	}
	return nil
}

// Bytes is how much is held.
func (st *Staged) Bytes() (n int64) {
	for _, r := range st.runs {
		n += int64(len(r.data))
	}
	return n
}

// putAtOnce bounds how long events of a VM wait for what is put into it.
const putAtOnce = 256 << 10

// PutStaged puts what was staged into the memory of an attachment in copy mode
// to the same image, but for pages that are there or were removed, and returns
// how many bytes it put there.
func (s *Server) PutStaged(ctx context.Context, id string, st *Staged) (total int64, err error) {
	v, err := s.enterCopy(id)
	if err != nil {
		return 0, err
	}
	defer v.inflight.Done()
	for _, run := range st.runs {
		for off, b := run.off, run.data; len(b) > 0; {
			if err := ctx.Err(); err != nil {
				return total, err
			}
			if v.dead.Load() || v.stopping.Load() {
				return total, nil
			}
			r := v.regionAt(off)
			if r == nil {
				return total, fmt.Errorf("uffd: no region holds the page at %d", off)
			}
			p := b[:min(int64(len(b)), putAtOnce, r.end()-off)]
			n, err := v.put(r, p, off)
			total += n
			if err != nil && !errors.Is(err, errChanging) { // then by fault
				return total, fmt.Errorf("uffd: put what was staged: %w", err)
			}
			b, off = b[len(p):], off+int64(len(p))
		}
	}
	return total, nil
}

// enterCopy finds an attachment in copy mode and keeps its descriptor until the
// caller says inflight.Done.
func (s *Server) enterCopy(id string) (*served, error) {
	v, err := s.find(id)
	if err != nil {
		return nil, err
	}
	if v.pages == nil {
		return nil, fmt.Errorf("uffd: attachment %q shares an image", id)
	}
	if !v.enter() {
		return nil, fmt.Errorf("uffd: attachment %q is being removed", id)
	}
	return v, nil
}
