package vmmtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// overlayMemory writes the data of a sparse file over mem and returns how much
// it was.
func overlayMemory(t testing.TB, mem, changed *os.File) (total int64) {
	t.Helper()
	buf := make([]byte, 1<<20)
	fd := int(changed.Fd())
	for off := int64(0); ; {
		start, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return total
		}
		if err != nil {
			t.Fatal(err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		for off = start; off < end; {
			n, err := changed.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if err == nil {
				_, err = mem.WriteAt(buf[:n], off)
			}
			if err != nil {
				t.Fatal(err)
			}
			off, total = off+int64(n), total+int64(n)
		}
	}
}

// sameBytes compares two files of memory.
func sameBytes(t testing.TB, x, y *os.File) bool {
	t.Helper()
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(a)) {
		n, err := x.ReadAt(a, off)
		m, yerr := y.ReadAt(b, off)
		if n != m || !bytes.Equal(a[:n], b[:m]) {
			return false
		}
		if errors.Is(err, io.EOF) && errors.Is(yerr, io.EOF) {
			return true
		}
		if err != nil || yerr != nil {
			t.Fatal(errors.Join(err, yerr))
		}
	}
}

// region is what a VMM says of a part of its memory at the hand-over.
type region struct {
	Base   uint64 `json:"base_host_virt_addr"`
	Size   uint64 `json:"size"`
	Offset uint64 `json:"offset"`
}

// ServePages serves the memory of one restored machine and returns the socket
// to hand its userfaultfd to. It is as plain as can be: what the real server
// must do, snapshot/uffd does and tests. It ends with the test.
func ServePages(t testing.TB, mem *os.File) (socket string) {
	t.Helper()
	// A socket's path has room for little, and a jail takes it by link: both
	// are the temporary directory's.
	dir, err := os.MkdirTemp("", "p")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o711), os.Chmod(socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- servePages(l, mem, stop) }()
	t.Cleanup(func() {
		l.Close()
		_, _ = unix.Write(stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		if err := <-done; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("serving pages: %v", err)
		}
		unix.Close(stop)
		os.RemoveAll(dir)
	})
	return socket
}

func servePages(l *net.UnixListener, mem *os.File, stop int) error {
	c, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	defer c.Close()
	buf, oob := make([]byte, 64<<10), make([]byte, 128)
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return err
	}
	var regions []region
	if err := json.Unmarshal(buf[:n], &regions); err != nil {
		return err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return fmt.Errorf("the hand-over has %d messages (%v)", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("the hand-over has %d descriptors (%v)", len(fds), err)
	}
	defer unix.Close(fds[0])
	for {
		p := []unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if p[1].Revents != 0 || p[0].Revents&^unix.POLLIN != 0 {
			return nil
		}
		if p[0].Revents != 0 {
			if err := serveFault(fds[0], regions, mem); err != nil {
				return err
			}
		}
	}
}

// serveFault copies in the 64 KiB around one fault.
func serveFault(fd int, regions []region, mem *os.File) error {
	var msg [32]byte
	if _, err := unix.Read(fd, msg[:]); err != nil {
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		return fmt.Errorf("reading an event: %w", err)
	}
	if msg[0] != 0x12 { // UFFD_EVENT_PAGEFAULT
		return fmt.Errorf("event %#x", msg[0])
	}
	addr := *(*uint64)(unsafe.Pointer(&msg[16]))
	for _, r := range regions {
		if addr < r.Base || addr >= r.Base+r.Size {
			continue
		}
		at := (addr - r.Base) &^ 0xffff
		data := make([]byte, min(64<<10, r.Size-at))
		if _, err := mem.ReadAt(data, int64(r.Offset+at)); err != nil {
			return err
		}
		return copyIn(fd, r.Base+at, data, addr&^0xfff)
	}
	return fmt.Errorf("a fault at %#x, in no region", addr)
}

// copyIn falls back to the one page where some of the others are there.
func copyIn(fd int, to uint64, data []byte, page uint64) error {
	const uffdioCopy = 0xc028aa03
	for _, r := range [][2]uint64{{to, uint64(len(data))}, {page, 4096}} {
		arg := [5]uint64{r[0], uint64(uintptr(unsafe.Pointer(&data[r[0]-to]))), r[1], 0, 0}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uffdioCopy, uintptr(unsafe.Pointer(&arg)))
		switch errno {
		case 0, unix.ESRCH: // gone: it was killed
			return nil
		case unix.EEXIST:
		default:
			return fmt.Errorf("UFFDIO_COPY: %w", errno)
		}
	}
	return nil
}
