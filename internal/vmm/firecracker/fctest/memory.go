package fctest

import (
	"fmt"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// handOver makes memory of its own and hands its page faults to the server of
// pages at path, as Firecracker does. A path that is no socket is of a test
// without one, and there is no memory.
func handOver(path string, size int) ([]byte, error) {
	if st, err := os.Stat(path); err != nil || st.Mode()&os.ModeSocket == 0 {
		return nil, err
	}
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	// It stays open, as Firecracker's does: closed it would make zeros.
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if e != 0 {
		return nil, e
	}
	base := uintptr(unsafe.Pointer(&mem[0]))
	api := [3]uint64{0xaa, 1 << 3} // removals are told
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, 0xc018aa3f, uintptr(unsafe.Pointer(&api))); e != 0 {
		return nil, e
	}
	reg := [4]uint64{uint64(base), uint64(len(mem)), 1}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, 0xc020aa00, uintptr(unsafe.Pointer(&reg))); e != 0 {
		return nil, e
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	body := fmt.Sprintf(`[{"base_host_virt_addr":%d,"size":%d,"offset":0,"page_size":4096,"page_size_kib":4096}]`, base, len(mem))
	_, _, err = conn.WriteMsgUnix([]byte(body), unix.UnixRights(int(fd)), nil)
	return mem, err
}

// touched is the one page of memory that a machine changes, and reads when it
// goes on.
const touched = 1 << 20
