//go:build linux

package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PAGEMAP_SCAN, include/uapi/linux/fs.h, since Linux 6.7.
const (
	ioctlPagemapScan = 0xc0606610
	pageIsFile       = 1 << 2
	pageIsPresent    = 1 << 3
	pageIsSwapped    = 1 << 4
	pageIsZero       = 1 << 5
)

type scanArg struct {
	size, flags, start, end, walkEnd uint64
	vec                              unsafe.Pointer
	vecLen, maxPages                 uint64
	inverted, mask, anyOf, returned  uint64
}
type scanRegion struct{ start, end, categories uint64 }

// ScanDirty calls yield for the runs of pages in [addr, addr+length) of
// process pid that are the process's own: the ones it wrote since Inject,
// swapped out or not. Offsets and lengths are bytes from addr, ascending, runs
// do not touch. An error of yield ends the scan and is returned.
//
// It is exact for a process that is stopped, as a paused VM is. Pages of zeros
// that the Server mapped are not reported, as far as the kernel tells them
// apart (PAGEMAP_SCAN does; /proc/<pid>/pagemap does for a privileged reader);
// where it does not, they are reported and read as the zeros that they are.
func ScanDirty(pid int, addr uintptr, length int64, yield func(off, n int64) error) error {
	return scanDirty(pid, addr, length, yield, scanKernel, scanPagemap)
}

var errNoScan = errors.New("kernel has no PAGEMAP_SCAN")

type scanFunc func(f *os.File, addr uintptr, length int64, yield func(off, n int64) error) error

func scanDirty(pid int, addr uintptr, length int64, yield func(off, n int64) error, methods ...scanFunc) error {
	if addr%pageSize != 0 || length < 0 || length%pageSize != 0 || uint64(addr)+uint64(length) < uint64(addr) {
		return fmt.Errorf("uffd: scan of %d bytes at %#x", length, addr)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return fmt.Errorf("uffd: open page map of process %d: %w", pid, err)
	}
	defer f.Close()
	j := joiner{yield: yield}
	for _, scan := range methods {
		if err = scan(f, addr, length, j.add); err != errNoScan {
			break
		}
	}
	if err == nil {
		err = j.flush()
	}
	if err != nil {
		return fmt.Errorf("uffd: scan memory of process %d: %w", pid, err)
	}
	return nil
}

// joiner joins runs that touch.
type joiner struct {
	off, n int64
	yield  func(off, n int64) error
}

func (j *joiner) add(off, n int64) error {
	if j.n > 0 && off == j.off+j.n {
		j.n += n
		return nil
	}
	if err := j.flush(); err != nil {
		return err
	}
	j.off, j.n = off, n
	return nil
}

func (j *joiner) flush() error {
	if j.n == 0 {
		return nil
	}
	n := j.n
	j.n = 0
	return j.yield(j.off, n)
}

func scanKernel(f *os.File, addr uintptr, length int64, yield func(off, n int64) error) error {
	var regions [512]scanRegion
	for start, end := uint64(addr), uint64(addr)+uint64(length); start < end; {
		a := scanArg{
			start: start, end: end,
			vec: unsafe.Pointer(&regions[0]), vecLen: uint64(len(regions)),
			// Not a page of a file, not the zero page, and there at all.
			inverted: pageIsFile | pageIsZero, mask: pageIsFile | pageIsZero,
			anyOf: pageIsPresent | pageIsSwapped, returned: pageIsFile,
		}
		a.size = uint64(unsafe.Sizeof(a))
		n, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlPagemapScan, uintptr(unsafe.Pointer(&a)))
		if e == unix.ENOTTY || e == unix.EINVAL && start == uint64(addr) {
			return errNoScan
		}
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return fmt.Errorf("PAGEMAP_SCAN: %w", e)
		}
		if n > uintptr(len(regions)) || a.walkEnd <= start {
			return fmt.Errorf("PAGEMAP_SCAN gave %d regions and stopped at %#x", n, a.walkEnd)
		}
		for _, r := range regions[:n] {
			if err := yield(int64(r.start-uint64(addr)), int64(r.end-r.start)); err != nil {
				return err
			}
		}
		start = a.walkEnd
	}
	return nil
}

// scanPagemap reads the 64 bits per page of /proc/<pid>/pagemap.
func scanPagemap(f *os.File, addr uintptr, length int64, yield func(off, n int64) error) error {
	const (
		present  = 1 << 63
		swapped  = 1 << 62
		file     = 1 << 61
		frame    = 1<<55 - 1
		perRead  = 8192
		entryLen = 8
	)
	zero := zeroFrame()
	buf := make([]byte, perRead*entryLen)
	for off := int64(0); off < length; {
		n := min(length-off, perRead*pageSize) / pageSize
		b := buf[:n*entryLen]
		if _, err := f.ReadAt(b, (int64(addr)+off)/pageSize*entryLen); err != nil {
			return fmt.Errorf("read page map: %w", err)
		}
		for ; len(b) > 0; b, off = b[entryLen:], off+pageSize {
			e := binary.NativeEndian.Uint64(b)
			if e&file != 0 || e&(present|swapped) == 0 {
				continue
			}
			if zero != 0 && e&present != 0 && e&frame == zero {
				continue
			}
			if err := yield(off, pageSize); err != nil {
				return err
			}
		}
	}
	return nil
}

// zeroFrame is the frame number of the kernel's page of zeros, found by
// looking at one of our own, or 0 when we may not know.
func zeroFrame() uint64 {
	m, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0
	}
	defer unix.Munmap(m)
	if m[0] != 0 { // maps it
		return 0
	}
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0
	}
	defer f.Close()
	var b [8]byte
	if _, err := f.ReadAt(b[:], int64(uintptr(unsafe.Pointer(&m[0])))/pageSize*8); err != nil {
		return 0
	}
	if e := binary.NativeEndian.Uint64(b[:]); e>>63 == 1 {
		return e & (1<<55 - 1)
	}
	return 0
}
