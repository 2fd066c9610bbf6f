package guest

import (
	"errors"
	"net"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inOwnNetwork runs f on a thread in a network of its own, which goes with it.
func inOwnNetwork(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends here
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("making a network namespace: %v", err)
			return
		}
		f(t)
	}()
	<-done
}

// The connections of the old life go; those within the guest stay.
func TestCloseConnections(t *testing.T) {
	unsupported := false
	inOwnNetwork(t, func(t *testing.T) {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err == nil {
			err = netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 99, 0, 1), Mask: net.CIDRMask(32, 32)}})
		}
		if err != nil {
			t.Errorf("setting the network up: %v", err)
			return
		}
		outside := connectTo(t, "10.99.0.1:0")
		inside := connectTo(t, "127.0.0.1:0")
		connectTo(t, "10.99.0.1:49983")
		n, err := NewSystem(t.TempDir()).CloseConnections(Port)
		if errors.Is(err, errors.ErrUnsupported) {
			unsupported = true
			return
		}
		// One or both ends of the outside one, and the client's of the agent's.
		if err != nil || n < 2 || n > 3 {
			t.Errorf("closed %d, %v", n, err)
		}
		if _, err := outside.Write([]byte("x")); err == nil {
			t.Error("the outside connection still works")
		}
		if _, err := inside.Write([]byte("x")); err != nil {
			t.Errorf("inside: %v", err)
		}
	})
	if unsupported {
		t.Skip("this kernel cannot list or destroy sockets")
	}
}

// connectTo returns the server's end of a connection to an address of its own.
func connectTo(t *testing.T, addr string) net.Conn {
	l, err := net.Listen("tcp4", addr)
	if err != nil {
		t.Errorf("listening: %v", err)
		runtime.Goexit()
	}
	t.Cleanup(func() { _ = l.Close() })
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Errorf("connecting: %v", err)
		runtime.Goexit()
	}
	s, err := l.Accept()
	if err != nil {
		t.Errorf("accepting: %v", err)
		runtime.Goexit()
	}
	t.Cleanup(func() { _, _ = c.Close(), s.Close() })
	return s
}
