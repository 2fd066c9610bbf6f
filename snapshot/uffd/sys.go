//go:build linux

package uffd

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The userfaultfd interface, include/uapi/linux/userfaultfd.h.
const (
	ioctlAPI      = 0xc018aa3f
	ioctlRegister = 0xc020aa00
	ioctlWake     = 0x8010aa02
	ioctlCopy     = 0xc028aa03
	ioctlZeropage = 0xc020aa04
	ioctlNew      = 0xaa00 // on /dev/userfaultfd

	uffdAPI             = 0xaa
	uffdUserModeOnly    = 1
	registerModeMissing = 1
	copyModeDontwake    = 1

	// Bits in the answer to UFFDIO_REGISTER.
	canWake     = 1 << 2
	canCopy     = 1 << 3
	canZeropage = 1 << 4

	eventPagefault = 0x12
	eventFork      = 0x13
	eventRemove    = 0x15
	msgSize        = 32
)

type uffdioAPI struct{ api, features, ioctls uint64 }
type uffdioRange struct{ start, length uint64 }
type uffdioRegister struct {
	uffdioRange
	mode, ioctls uint64
}
type uffdioCopy struct {
	dst          uint64
	src          *byte
	length, mode uint64
	copied       int64
}
type uffdioZeropage struct {
	uffdioRange
	mode   uint64
	zeroed int64
}

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

func ioctlCopyPages(fd int, c *uffdioCopy) error { return ioctl(fd, ioctlCopy, unsafe.Pointer(c)) }

func ioctlZeroPages(fd int, z *uffdioZeropage) error {
	return ioctl(fd, ioctlZeropage, unsafe.Pointer(z))
}

// handshake must be the first call on a userfaultfd.
func handshake(fd int) error {
	a := uffdioAPI{api: uffdAPI}
	if err := ioctl(fd, ioctlAPI, unsafe.Pointer(&a)); err != nil {
		return fmt.Errorf("UFFDIO_API: %w", err)
	}
	return nil
}

func register(fd int, addr uintptr, length int64, need uint64) error {
	r := uffdioRegister{uffdioRange: uffdioRange{uint64(addr), uint64(length)}, mode: registerModeMissing}
	if err := ioctl(fd, ioctlRegister, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("UFFDIO_REGISTER: %w", err)
	}
	if r.ioctls&need != need {
		return fmt.Errorf("UFFDIO_REGISTER: kernel offers operations %#x on the range, %#x needed", r.ioctls, need)
	}
	return nil
}

func wake(fd int, addr uintptr, length int64) error {
	r := uffdioRange{uint64(addr), uint64(length)}
	if err := ioctl(fd, ioctlWake, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("UFFDIO_WAKE: %w", err)
	}
	return nil
}

// agains bounds the retries of an operation that the kernel answers with
// EAGAIN because the address space is changing.
const agains = 10000

// copyPages puts p at addr in the address space of fd. exists is called for
// each page that is already there, with the offset of the page in p; the rest
// is put in all the same.
func copyPages(fd int, addr uintptr, p []byte, exists func(off int64) error) error {
	tries := 0
	for done := 0; done < len(p); {
		c := uffdioCopy{
			dst: uint64(addr) + uint64(done), src: &p[done],
			length: uint64(len(p) - done), mode: copyModeDontwake,
		}
		err := ioctl(fd, ioctlCopy, unsafe.Pointer(&c))
		switch {
		case err == nil:
			return nil
		case c.copied > 0:
			done += int(c.copied)
		case err == unix.EEXIST:
			if err := exists(int64(done)); err != nil {
				return err
			}
			done += pageSize
		case (err == unix.EAGAIN || err == unix.EINTR) && tries < agains:
			tries++
			runtime.Gosched()
		default:
			return fmt.Errorf("UFFDIO_COPY: %w", err)
		}
	}
	return nil
}

// zeroPages maps zeros in [addr, addr+length) where nothing is mapped yet and
// wakes who waits there.
func zeroPages(fd int, addr uintptr, length int64) error {
	tries, stepped := 0, false
	for done := int64(0); done < length; {
		z := uffdioZeropage{uffdioRange: uffdioRange{uint64(addr) + uint64(done), uint64(length - done)}}
		err := ioctl(fd, ioctlZeropage, unsafe.Pointer(&z))
		switch {
		case err == nil:
			done = length
		case z.zeroed > 0:
			done += z.zeroed
		case err == unix.EEXIST:
			stepped = true
			done += pageSize
		case (err == unix.EAGAIN || err == unix.EINTR) && tries < agains:
			tries++
			runtime.Gosched()
		default:
			return fmt.Errorf("UFFDIO_ZEROPAGE: %w", err)
		}
	}
	if stepped {
		// A page that was there already was not woken above.
		return wake(fd, addr, length)
	}
	return nil
}

// newLocal makes a userfaultfd for this process's own mappings: nobody but
// the ioctls of ours touches them, so user mode is enough and needs no right.
func newLocal() (int, error) {
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|uffdUserModeOnly, 0, 0)
	if e != 0 {
		return -1, fmt.Errorf("userfaultfd: %w", e)
	}
	if err := handshake(int(fd)); err != nil {
		unix.Close(int(fd))
		return -1, err
	}
	return int(fd), nil
}
