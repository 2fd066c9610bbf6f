//go:build linux

package uffd

import (
	"context"
	"errors"
	"fmt"
)

// putAtOnce bounds how long events of a VM wait for what is put into it ahead.
const putAtOnce = 256 << 10

// PrefetchCopy puts clusters into the memory of an attachment in copy mode
// before it faults on them, in about the order given, and returns how many
// bytes it put there. Those that adjoin are read and put together, those that
// it has faulted on are left out. It ends with the attachment; an error hurts
// nobody, as with Prefetch.
func (s *Server) PrefetchCopy(ctx context.Context, id string, clusters []uint32) (total int64, err error) {
	v, err := s.find(id)
	switch {
	case err != nil:
		return 0, err
	case v.pages == nil:
		return 0, fmt.Errorf("uffd: attachment %q shares an image", id)
	case !v.enter():
		return 0, fmt.Errorf("uffd: attachment %q is being removed", id)
	}
	defer v.inflight.Done()
	size := int64(s.o.ClusterSize)
	want := make(bitmap, len(v.touched))
	for _, c := range clusters {
		if int64(c)*size >= v.src.Size() {
			return 0, fmt.Errorf("uffd: prefetch: cluster %d is beyond the image", c)
		}
		want.set(c)
	}
	buf := make([]byte, max(putAtOnce, size))
	for _, c := range clusters {
		n := v.runOf(want, c, uint32(int64(len(buf))/size))
		if n == 0 {
			continue
		}
		put, err := v.putAhead(ctx, buf, int64(c)*size, min(int64(c+n)*size, v.src.Size()))
		total += put
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// runOf gives how many clusters from c on, most at most, are wanted and were
// not faulted on. They are not wanted any more then.
func (v *served) runOf(want bitmap, c, most uint32) (n uint32) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for n < most && want.has(c+n) && !v.touched.has(c+n) {
		want.clear(c + n)
		n++
	}
	return n
}

// putAhead puts the data of [off, end) in, as far as the VM lets it.
func (v *served) putAhead(ctx context.Context, buf []byte, off, end int64) (total int64, err error) {
	for off < end {
		if err := ctx.Err(); err != nil {
			return total, err
		}
		if v.dead.Load() || v.stopping.Load() {
			return total, nil
		}
		r := v.regionAt(off)
		stop := min(end, r.end())
		n, err := v.fillPrivate(r, buf, off, stop, -1)
		total += n
		if err != nil && !errors.Is(err, errChanging) { // then by fault
			return total, fmt.Errorf("uffd: prefetch: %w", err)
		}
		off = stop
	}
	return total, nil
}

// bitmap has a bit for each cluster of an image.
type bitmap []uint64

func (b bitmap) set(c uint32)   { b[c/64] |= 1 << (c % 64) }
func (b bitmap) clear(c uint32) { b[c/64] &^= 1 << (c % 64) }

// has is false for what is beyond the image.
func (b bitmap) has(c uint32) bool {
	return int(c/64) < len(b) && b[c/64]&(1<<(c%64)) != 0
}
