//go:build linux

package uffd

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Punch takes the pages of [off, off+n), bytes, rounded inward to pages, out
// of RAM. VMs that want them again fault and get them from the image; pages
// that a VM wrote are its own and stay.
func (s *Shared) Punch(off, n int64) error {
	if off < 0 || n < 0 || off > s.size || n > s.size-off {
		return fmt.Errorf("uffd: punch %d bytes at %d of an image of %d", n, off, s.size)
	}
	end := (off + n) / pageSize * pageSize
	for off = (off + pageSize - 1) / pageSize * pageSize; off < end; {
		next := min(end, off/lockSpan*lockSpan+lockSpan)
		if err := s.punchLocked(off, next-off); err != nil {
			return err
		}
		off = next
	}
	return nil
}

func (s *Shared) punchLocked(off, n int64) error {
	l := s.lock(off)
	defer l.Unlock()
	return s.punch(off, n)
}

// punch is called with the lock of off held.
func (s *Shared) punch(off, n int64) error {
	if err := unix.Fallocate(s.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n); err != nil {
		return fmt.Errorf("uffd: punch %d bytes at %d: %w", n, off, err)
	}
	for p := off; p < off+n; p += pageSize {
		if s.clearOurs(p) {
			s.count.Add(-1)
		}
	}
	return nil
}

// expel finds pages in the memfd that we did not put there: a VMM that maps
// the file shared makes one by reading a hole. Clones would take it for the
// image's content, so it is taken out. When its content is not the image's,
// the VMM has seen or written something wrong, and that is ErrPoisoned.
// Writes over pages of ours cannot be found this way.
func (s *Shared) expel() error {
	if s.suspect.Swap(false) {
		// Met and taken out while filling: a process that is not attached yet
		// made it, most likely the one at hand.
		return fmt.Errorf("a page was replaced while it was filled: %w", ErrPoisoned)
	}
	if s.Resident()/pageSize <= s.count.Load() {
		return nil
	}
	var bad error
	err := s.extents(func(off, n int64) error {
		for end := off + n; off < end; off += pageSize {
			if s.isOurs(off) {
				continue
			}
			if err := s.expelPage(off); errors.Is(err, ErrPoisoned) {
				bad = err
			} else if err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(bad, err)
}

func (s *Shared) expelPage(off int64) error {
	l := s.lock(off)
	defer l.Unlock()
	if there, err := s.present(off); err != nil || !there || s.isOurs(off) {
		return err
	}
	kind, _, err := span(s.src, off, s.size)
	if err != nil {
		return err
	}
	want := make([]byte, pageSize)
	if kind == format.Data {
		if err := readFull(s.src, want, off); err != nil {
			return err
		}
	}
	return errors.Join(s.sameAs(want, off), s.punch(off, pageSize))
}

// sameAs checks a page that was there before us against what belongs there.
func (s *Shared) sameAs(want []byte, off int64) error {
	var have [pageSize]byte
	if _, err := unix.Pread(s.fd, have[:], off); err != nil {
		return fmt.Errorf("read page at %d: %w", off, err)
	}
	if !bytes.Equal(have[:], want) {
		return fmt.Errorf("page at %d: %w", off, ErrPoisoned)
	}
	return nil
}

// keepOrPunch is sameAs for a page met while filling: a wrong one is not left
// for the next VM to read.
func (s *Shared) keepOrPunch(want []byte, off int64) error {
	err := s.sameAs(want, off)
	if errors.Is(err, ErrPoisoned) {
		s.suspect.Store(true)
		err = errors.Join(err, s.punch(off, pageSize))
	}
	return err
}
