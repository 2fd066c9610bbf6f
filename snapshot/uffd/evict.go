//go:build linux

package uffd

import "fmt"

// Evict takes up to n bytes of the image out of RAM and tells how many went.
// It goes on where the last call stopped, so that all parts take turns. No VM
// loses anything: what it wrote is its own, the rest comes back by fault.
func (s *Shared) Evict(n int64) (int64, error) {
	if err := s.acquire(); err != nil {
		return 0, fmt.Errorf("uffd: evict: %w", err)
	}
	defer s.refs.Add(-1)
	s.evictMu.Lock()
	defer s.evictMu.Unlock()
	var gone int64
	// Once around, the part where it starts twice.
	for left := s.size + lockSpan; left > 0 && gone < n; left -= lockSpan {
		off := s.hand
		if s.hand += lockSpan; s.hand >= s.size {
			s.hand = 0
		}
		got, err := s.evictSpan(off, min(lockSpan, s.size-off), n-gone)
		gone += got
		if err != nil {
			return gone, err
		}
	}
	return gone, nil
}

// evictSpan punches the pages that are there of [off, off+n), which lies in
// one lockSpan, a cluster at a time, up to most bytes.
func (s *Shared) evictSpan(off, n, most int64) (gone int64, err error) {
	l := s.lock(off)
	defer l.Unlock()
	for end := off + n; off < end && gone < most; off += DefaultClusterSize {
		size := min(DefaultClusterSize, end-off)
		var there int64
		for p := off; p < off+size; p += pageSize {
			if s.isOurs(p) {
				there += pageSize
			}
		}
		if there == 0 {
			continue
		}
		if err := s.punch(off, size); err != nil {
			return gone, err
		}
		gone += there
	}
	return gone, nil
}
