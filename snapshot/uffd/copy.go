//go:build linux

package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// errChanging: the VMM is changing its memory, of which an event tells that
// nobody has read yet. The operation is tried again when it has been read.
var errChanging = errors.New("address space is changing")

// changingRetry is when an operation is tried again if no event comes: the
// thread that raised one needs a moment after it was read.
const changingRetry = time.Millisecond

// serveCopy makes the page at off of the image readable in a VM that has
// memory of its own, and wakes who waits for it.
func (s *Server) serveCopy(v *served, buf []byte, off int64) error {
	r := v.regionAt(off)
	if r == nil {
		return fmt.Errorf("no region holds the page at %d", off)
	}
	kind, _, err := span(v.src, off, v.src.Size())
	if err != nil {
		return err
	}
	if kind == format.Zero || v.pages.has(off) {
		v.counters.zeroFaults.Add(1)
		v.arrived(off)
		return v.zeroPrivate(r, off)
	}
	size := int64(s.o.ClusterSize)
	start := max(off&^(size-1), r.Offset)
	end := min(off&^(size-1)+size, r.end())
	v.touch(uint32(off / size))
	filled, err := v.fillPrivate(r, buf, start, end, off)
	if filled > 0 {
		v.counters.bytesFilled.Add(uint64(filled))
	}
	if err != nil {
		return err
	}
	if filled == 0 {
		v.counters.hits.Add(1)
	} else {
		v.counters.dataFaults.Add(1)
	}
	if v.pages.has(off) {
		// Removed while we read the image.
		return v.zeroPrivate(r, off)
	}
	return nil
}

// fillPrivate copies the data of [start, end), which lies in r, into the VM
// and wakes who waits there. fault, if not negative, is the page that is
// needed: what else cannot be read does no harm.
func (v *served) fillPrivate(r *Region, buf []byte, start, end, fault int64) (filled int64, err error) {
	for p := start; p < end; {
		kind, run, err := span(v.src, p, end)
		if err != nil {
			return filled, err
		}
		if kind == format.Data {
			b := buf[:run]
			err := readFull(v.src, b, p)
			if err != nil && fault >= p && fault < p+run {
				p, run, b = fault, pageSize, buf[:pageSize]
				if err = readFull(v.src, b, p); err != nil {
					return filled, err
				}
			}
			if err == nil {
				if fault >= p && fault < p+run {
					v.arrived(fault)
				}
				n, err := v.put(r, b, p)
				filled += n
				if err != nil {
					return filled, err
				}
			} else if fault < 0 {
				return filled, err
			}
		}
		p += run
	}
	return filled, nil
}

// put copies b, which is the image at off, into the VM, but for pages that were
// removed. Between the look at those and the copy no event is read, so that
// none of them can come back. copied is how many bytes were not there yet.
func (v *served) put(r *Region, b []byte, off int64) (copied int64, err error) {
	v.removing.RLock()
	defer v.removing.RUnlock()
	for end := off + int64(len(b)); off < end; {
		removed, n := v.pages.run(off, end)
		if !removed {
			c, err := v.copyPrivate(r, b[:n], off)
			copied += c
			if err != nil {
				return copied, err
			}
		}
		b, off = b[n:], off+n
	}
	return copied, nil
}

// copyPrivate is UFFDIO_COPY for all of b, stepping over pages that are there.
func (v *served) copyPrivate(r *Region, b []byte, off int64) (copied int64, err error) {
	addr := r.Addr + uint64(off-r.Offset)
	for done := 0; done < len(b); {
		c := uffdioCopy{dst: addr + uint64(done), src: &b[done], length: uint64(len(b) - done)}
		err := ioctlCopyPages(v.fd, &c)
		switch {
		case err == nil:
			return copied + int64(len(b)-done), nil
		case c.copied > 0:
			done += int(c.copied)
			copied += c.copied
		case err == unix.EEXIST:
			// Its waiters came before it did, or wait for nothing.
			if err := wake(v.fd, uintptr(addr)+uintptr(done), pageSize); err != nil {
				return copied, err
			}
			done += pageSize
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return copied, errChanging
		case err == unix.ESRCH:
			return copied, nil // the memory went with its process
		default:
			return copied, fmt.Errorf("UFFDIO_COPY of %d bytes to %#x: %w", len(b)-done, addr+uint64(done), err)
		}
	}
	return copied, nil
}

// zeroPrivate maps zeros from off to the end of the zeros there, by the image
// or by removal, within 2 MiB and r.
func (v *served) zeroPrivate(r *Region, off int64) error {
	end := min(off&^(maxZeroRun-1)+maxZeroRun, r.end())
	p := off
	for p < end {
		removed, n := v.pages.run(p, end)
		if !removed {
			kind, run, err := span(v.src, p, end)
			if err != nil {
				return err
			}
			if kind != format.Zero {
				break
			}
			n = run // removed pages in it are zeros, too
		}
		p += n
	}
	if p == off {
		return fmt.Errorf("image changed its mind about the block at %d", off)
	}
	return v.zeroRange(r.Addr+uint64(off-r.Offset), p-off)
}

func (v *served) zeroRange(addr uint64, length int64) error {
	stepped := false
	for done := int64(0); done < length; {
		z := uffdioZeropage{uffdioRange: uffdioRange{addr + uint64(done), uint64(length - done)}}
		err := ioctlZeroPages(v.fd, &z)
		switch {
		case err == nil:
			done = length
		case z.zeroed > 0:
			done += z.zeroed
		case err == unix.EEXIST:
			stepped = true
			done += pageSize
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return errChanging
		case err == unix.ESRCH:
			return nil
		default:
			return fmt.Errorf("UFFDIO_ZEROPAGE of %d bytes at %#x: %w", length-done, addr+uint64(done), err)
		}
	}
	if stepped {
		return wake(v.fd, uintptr(addr), length)
	}
	return nil
}

// enter counts a user of the descriptor, unless it is about to be closed.
func (v *served) enter() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return false
	}
	v.inflight.Add(1)
	return true
}

// Layout of struct uffd_msg.
func msgAddr(b []byte) uint64     { return binary.NativeEndian.Uint64(b[16:]) }
func msgStart(b []byte) uint64    { return binary.NativeEndian.Uint64(b[8:]) }
func msgEnd(b []byte) uint64      { return binary.NativeEndian.Uint64(b[16:]) }
func msgForkedFD(b []byte) uint32 { return binary.NativeEndian.Uint32(b[8:]) }

// readCopyEvents reads what is there into the page map's file and notes
// removals, without anybody filling pages meanwhile. It is unix.EAGAIN when
// there is nothing.
func (v *served) readCopyEvents() (int, error) {
	// A VMM that takes O_NONBLOCK back would hold us in the read; the kernel
	// then gives POLLERR.
	fds := [1]unix.PollFd{{Fd: int32(v.fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds[:], 0); n == 0 || err == unix.EINTR {
		return 0, unix.EAGAIN
	} else if err != nil {
		return 0, err
	}
	if fds[0].Revents&unix.POLLIN == 0 {
		return 0, fmt.Errorf("userfaultfd gives poll events %#x", fds[0].Revents)
	}
	v.removing.Lock()
	defer v.removing.Unlock()
	v.pages.touch()
	n, err := unix.Read(v.fd, v.pages.events)
	if n > 0 {
		v.noteRemovals(v.pages.events[:n])
	}
	return n, err
}

// noteRemovals puts what was removed into the page map. The VMM's numbers are
// not to be trusted: only what lies in its regions counts, and a page removed
// in part is removed.
func (v *Attachment) noteRemovals(b []byte) (noted int) {
	for ; len(b) >= msgSize; b = b[msgSize:] {
		start, end := msgStart(b), msgEnd(b)
		if b[0] != eventRemove || end <= start {
			continue
		}
		noted++
		for i := range v.regions {
			r := &v.regions[i]
			lo, hi := max(start, r.Addr), min(end, r.Addr+uint64(r.Size))
			if lo >= hi {
				continue
			}
			lo, hi = (lo-r.Addr)&^(pageSize-1), (hi-r.Addr+pageSize-1)&^(pageSize-1)
			v.pages.remove(r.Offset+int64(lo), int64(hi-lo))
		}
	}
	return noted
}

// replay notes again what the server before us had read last.
func (v *Attachment) replay() { v.noteRemovals(v.pages.events) }
