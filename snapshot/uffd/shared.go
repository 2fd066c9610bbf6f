//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// lockSpan is the part of an image that is filled by one at a time.
const lockSpan = 2 << 20

// unmapAfter bounds how much of the memfd our own page tables refer to:
// without it the server would look like the host's largest process to the OOM
// killer, by memory that belongs to the VMs.
const unmapAfter = 32 << 20

// Shared holds the pages of one memory image in RAM, for all VMs that run
// from it. It is made once per image and host, outlives its VMs' attachments
// and is closed last.
type Shared struct {
	name string
	src  Source
	size int64
	file *os.File
	fd   int
	// mapping is ours alone and never touched: the target of UFFDIO_COPY.
	mapping uintptr
	uffd    int

	locks [64]sync.Mutex
	ours  []atomic.Uint64 // a bit per page that we put into the memfd
	count atomic.Int64    // bits set in ours, or about to be
	// unmapped counts bytes put in since the mapping was last dropped.
	unmapped atomic.Int64
	refs     atomic.Int64 // attachments; -1 when closed
	// suspect: a wrong page was met since the last attachment, see expel.
	suspect atomic.Bool

	evictMu sync.Mutex
	hand    int64 // where Evict goes on, guarded by evictMu
}

// NewShared makes the shared image of src, empty. name appears in
// /proc/<pid>/maps as memfd:<name> and must be unique on the host and at most
// 200 bytes. Size must be a positive multiple of 4096.
func NewShared(name string, src Source) (*Shared, error) {
	if len(name) == 0 || len(name) > 200 {
		return nil, fmt.Errorf("uffd: name of a shared image has %d bytes, 1 to 200 allowed", len(name))
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("uffd: create memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd:"+name)
	if err := unix.Ftruncate(fd, src.Size()); err != nil {
		f.Close()
		return nil, fmt.Errorf("uffd: size memfd to %d bytes: %w", src.Size(), err)
	}
	// A VMM has the file for writing; it must not be able to cut it.
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		f.Close()
		return nil, fmt.Errorf("uffd: seal memfd: %w", err)
	}
	s, err := newShared(name, f, src)
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// AdoptShared takes over a memfd that a server before this one made and
// filled, found for example as /proc/<vmm>/fd/<n>. Its pages are kept, but for
// zeros, which a server never puts there: a VMM not yet attached may have made
// them by reading a hole. f must be open for reading and writing; on success it
// belongs to the Shared.
func AdoptShared(name string, f *os.File, src Source) (*Shared, error) {
	s, err := newShared(name, f, src)
	if err != nil {
		return nil, err
	}
	if err := s.adoptPages(); err != nil {
		s.release()
		return nil, err
	}
	return s, nil
}

func (s *Shared) adoptPages() error {
	var page, zeros [pageSize]byte
	return s.extents(func(off, n int64) error {
		for end := off + n; off < end; off += pageSize {
			if _, err := unix.Pread(s.fd, page[:], off); err != nil {
				return fmt.Errorf("uffd: read page at %d: %w", off, err)
			}
			if page == zeros {
				if err := s.punch(off, pageSize); err != nil {
					return err
				}
				continue
			}
			s.setOurs(off)
			s.count.Add(1)
		}
		return nil
	})
}

func newShared(name string, f *os.File, src Source) (*Shared, error) {
	size := src.Size()
	if size <= 0 || size%pageSize != 0 {
		return nil, fmt.Errorf("uffd: image of %d bytes is not a positive multiple of %d", size, pageSize)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("uffd: stat memfd: %w", err)
	}
	if st.Size() != size {
		return nil, fmt.Errorf("uffd: memfd has %d bytes, image %d", st.Size(), size)
	}
	s := &Shared{name: name, src: src, size: size, file: f, fd: int(f.Fd()), ours: make([]atomic.Uint64, (size/pageSize+63)/64)}
	if s.uffd, err = newLocal(); err != nil {
		return nil, fmt.Errorf("uffd: %w", err)
	}
	// No access: a stray read of ours would create pages of zeros.
	m, _, e := unix.Syscall6(unix.SYS_MMAP, 0, uintptr(size), unix.PROT_NONE, unix.MAP_SHARED, uintptr(s.fd), 0)
	if e != 0 {
		unix.Close(s.uffd)
		return nil, fmt.Errorf("uffd: map %d bytes of memfd: %w", size, e)
	}
	s.mapping = m
	if err := register(s.uffd, s.mapping, size, canCopy); err != nil {
		s.release()
		return nil, fmt.Errorf("uffd: own mapping: %w", err)
	}
	return s, nil
}

// File is the memfd, to hand to a VMM. It stays the Shared's.
func (s *Shared) File() *os.File { return s.file }

// Size is the size of the image in bytes.
func (s *Shared) Size() int64 { return s.size }

// Resident is how many bytes of the image are in RAM (or swapped out).
func (s *Shared) Resident() int64 {
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		return 0
	}
	return st.Blocks * 512
}

// Close frees the pages unless a VM still maps them. It fails while there are
// attachments.
func (s *Shared) Close() error {
	if !s.refs.CompareAndSwap(0, -1) {
		if s.refs.Load() < 0 {
			return nil
		}
		return fmt.Errorf("uffd: shared image %s has %d attachments", s.name, s.refs.Load())
	}
	s.release()
	return s.file.Close()
}

// release gives back all but the file.
func (s *Shared) release() {
	unix.Syscall(unix.SYS_MUNMAP, s.mapping, uintptr(s.size), 0)
	unix.Close(s.uffd)
}

func (s *Shared) acquire() error {
	for {
		n := s.refs.Load()
		if n < 0 {
			return errors.New("shared image is closed")
		}
		if s.refs.CompareAndSwap(n, n+1) {
			return nil
		}
	}
}

func (s *Shared) lock(off int64) *sync.Mutex {
	l := &s.locks[off/lockSpan%int64(len(s.locks))]
	l.Lock()
	return l
}

func (s *Shared) isOurs(off int64) bool {
	page := off / pageSize
	return s.ours[page/64].Load()&(1<<(page%64)) != 0
}

func (s *Shared) setOurs(off int64) {
	page := off / pageSize
	s.ours[page/64].Or(1 << (page % 64))
}

// clearOurs reports whether the page was ours.
func (s *Shared) clearOurs(off int64) bool {
	page := off / pageSize
	return s.ours[page/64].And(^uint64(1<<(page%64)))&(1<<(page%64)) != 0
}

// present asks the kernel whether the memfd holds the page at off, swapped
// out or not.
func (s *Shared) present(off int64) (bool, error) {
	at, err := unix.Seek(s.fd, off, unix.SEEK_DATA)
	if err == unix.ENXIO {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("seek data in memfd at %d: %w", off, err)
	}
	return at == off, nil
}

// extents calls yield for the parts of the memfd that hold pages.
func (s *Shared) extents(yield func(off, n int64) error) error {
	for off := int64(0); off < s.size; {
		start, err := unix.Seek(s.fd, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return fmt.Errorf("uffd: seek data in memfd at %d: %w", off, err)
		}
		end, err := unix.Seek(s.fd, start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("uffd: seek hole in memfd at %d: %w", start, err)
		}
		if end > start { // else punched between the two calls
			if err := yield(start, end-start); err != nil {
				return err
			}
		}
		off = max(end, start+pageSize)
	}
	return nil
}

// fill makes sure that the page at fault is in the memfd, and brings in the
// other data of [off, off+n), which may lie in one lockSpan only, when it has
// to read at all. buf has at least n bytes. filled is how many bytes were put
// in.
func (s *Shared) fill(buf []byte, off, n, fault int64) (filled int64, err error) {
	l := s.lock(off)
	defer l.Unlock()
	there, err := s.present(fault)
	if err != nil || there {
		return 0, err
	}
	for p := off; p < off+n; {
		kind, run, err := span(s.src, p, off+n)
		if err != nil {
			return filled, err
		}
		if kind == format.Data {
			err := s.fillRun(buf[:run], p)
			if err != nil && fault >= p && fault < p+run {
				// A bad block beside it must not cost the VM its life.
				p, run = fault, pageSize
				if err = s.fillRun(buf[:run], p); err != nil {
					return filled, err
				}
			}
			if err == nil {
				filled += run
			}
		}
		p += run
	}
	return filled, nil
}

// fillRun reads buf's length at off and puts it into the memfd. The caller
// holds the lock.
func (s *Shared) fillRun(buf []byte, off int64) error {
	if err := readFull(s.src, buf, off); err != nil {
		return err
	}
	// Counted before they appear, so that expel never takes them for
	// somebody else's.
	pages := int64(len(buf) / pageSize)
	s.count.Add(pages)
	for p := off; p < off+int64(len(buf)); p += pageSize {
		if s.isOurs(p) {
			s.count.Add(-1)
		}
		s.setOurs(p)
	}
	err := copyPages(s.uffd, s.mapping+uintptr(off), buf, func(o int64) error { return s.keepOrPunch(buf[o:o+pageSize], off+o) })
	if err != nil {
		return fmt.Errorf("put %d bytes into the shared image at %d: %w", len(buf), off, err)
	}
	if s.unmapped.Add(int64(len(buf))) > unmapAfter {
		s.unmapped.Store(0)
		unix.Syscall(unix.SYS_MADVISE, s.mapping, uintptr(s.size), unix.MADV_DONTNEED)
	}
	return nil
}
