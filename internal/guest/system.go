package guest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/guest/boot"
)

// System is what the agent does to the whole guest. Each method may be called
// again with the same value. The real one is NewSystem's; tests use another,
// because these change the machine they run on.
type System interface {
	// SetClock steps the wall clock.
	SetClock(t time.Time) error
	// AddEntropy mixes b into the kernel's generator, credits it, and makes
	// the generator start over from it at once.
	AddEntropy(b []byte) error
	SetHostname(name string) error
	// SetMachineID writes 32 lower-case hex digits.
	SetMachineID(id string) error
	// WriteGeneration replaces RunDir/generation atomically.
	WriteGeneration(generation string) error
	// CloseConnections destroys the guest's TCP connections to elsewhere (by
	// IPv4: a sandbox has nothing else), but not those of the agent's own port. errors.ErrUnsupported: the kernel
	// cannot.
	CloseConnections(agentPort int) (closed int, err error)
	// BootID is the kernel's random id of this boot.
	BootID() (string, error)
	// Sync flushes all file systems.
	Sync()
}

type realSystem struct{ runDir string }

// NewSystem is the real System; its generation file is in runDir.
func NewSystem(runDir string) System { return realSystem{runDir} }

func (realSystem) SetClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("setting the clock: %w", err)
	}
	return nil
}

// From linux/random.h; x/sys has neither.
const (
	rndAddEntropy = 0x40085203 // _IOW('R', 3, int[2])
	rndReseedCRNG = 0x5207     // _IO('R', 7)
)

func (realSystem) AddEntropy(b []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("opening the random device: %w", err)
	}
	defer f.Close()
	// struct rand_pool_info: the credit in bits, the size in bytes, the bytes.
	words := make([]uint32, 2+(len(b)+3)/4)
	words[0], words[1] = uint32(len(b)*8), uint32(len(b))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&words[2])), len(b)), b)
	// Only adding leaves the generator as it was until its next own reseed, up
	// to a minute later: two clones would agree until then.
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&words[0]))); e != 0 {
		return fmt.Errorf("adding entropy: %w", e)
	}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); e != 0 {
		return fmt.Errorf("reseeding the generator: %w", e)
	}
	return nil
}

func (realSystem) SetHostname(name string) error { return boot.SetHostname(name) }

func (realSystem) SetMachineID(id string) error {
	if err := replaceFile("/etc/machine-id", []byte(id+"\n"), 0o444); err != nil {
		return fmt.Errorf("writing the machine id: %w", err)
	}
	// D-Bus keeps a copy where it is not a link to the first.
	const dbus = "/var/lib/dbus/machine-id"
	if fi, err := os.Lstat(dbus); err == nil && fi.Mode().IsRegular() {
		if err := replaceFile(dbus, []byte(id+"\n"), 0o444); err != nil {
			return fmt.Errorf("writing D-Bus's machine id: %w", err)
		}
	}
	return nil
}

func (r realSystem) WriteGeneration(generation string) error {
	if err := os.MkdirAll(r.runDir, 0o755); err != nil {
		return fmt.Errorf("making the run directory: %w", err)
	}
	if err := replaceFile(filepath.Join(r.runDir, "generation"), []byte(generation+"\n"), 0o644); err != nil {
		return fmt.Errorf("writing the generation: %w", err)
	}
	return nil
}

// replaceFile replaces a file in one step: a reader sees the old or the new
// content, and a watcher of the directory one IN_MOVED_TO.
func replaceFile(path string, data []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode) // whatever the umask
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return err
}

func (realSystem) BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("reading the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (realSystem) Sync() { unix.Sync() }

// liveStates are the kernel's TCP states of a connection that some program may
// still use: not listening, closed, or only waiting for late packets.
const liveStates = 1<<1 | 1<<2 | 1<<4 | 1<<5 | 1<<8 | 1<<9 | 1<<11

// CloseConnections goes on until nothing is left: destroying one end resets
// another one within the guest, which the kernel then refuses to destroy.
func (realSystem) CloseConnections(agentPort int) (int, error) {
	const passes = 3
	closed := 0
	var failed error
	for range passes {
		socks, err := netlink.SocketDiagTCP(unix.AF_INET)
		// ENOENT here: the module is not there, as in Debian's kernels unless
		// tcp_diag is loaded.
		if notInKernel(err) || errors.Is(err, syscall.ENOENT) {
			return closed, errors.ErrUnsupported
		}
		if err != nil {
			return closed, fmt.Errorf("listing connections: %w", err)
		}
		failed = nil
		for _, k := range socks {
			if liveStates&(1<<k.State) == 0 || int(k.ID.SourcePort) == agentPort || !foreign(k.ID.Destination) {
				continue
			}
			err := destroy(k)
			if notInKernel(err) {
				return closed, errors.ErrUnsupported
			}
			if err == nil {
				closed++
			} else if !errors.Is(err, syscall.ENOENT) {
				failed = fmt.Errorf("closing the connection to %s: %w", k.ID.Destination, err)
			}
		}
		if failed == nil {
			break
		}
	}
	return closed, failed
}

func foreign(ip net.IP) bool { return !ip.IsLoopback() && !ip.IsUnspecified() }

func destroy(k *netlink.Socket) error {
	return netlink.SocketDestroy(
		&net.TCPAddr{IP: k.ID.Source, Port: int(k.ID.SourcePort)},
		&net.TCPAddr{IP: k.ID.Destination, Port: int(k.ID.DestinationPort)})
}

// notInKernel tells that the kernel was built without the socket-diagnosis
// module or without its destroy operation.
func notInKernel(err error) bool {
	return errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.EPROTONOSUPPORT)
}
