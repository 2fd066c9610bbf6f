package vmm

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// maxSunPath is what a socket address has room for.
const maxSunPath = 107

// SockAddr is the address of a socket; where the path is too long for one, it
// goes by the directory's descriptor, which lives until done is called.
func SockAddr(path string) (addr *net.UnixAddr, done func(), err error) {
	if len(path) <= maxSunPath {
		return &net.UnixAddr{Name: path, Net: "unix"}, func() {}, nil
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, nil, fmt.Errorf("opening the control socket's directory: %w", err)
	}
	name := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	return &net.UnixAddr{Name: name, Net: "unix"}, func() { dir.Close() }, nil
}
