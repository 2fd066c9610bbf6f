package hostnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// WebPorts are the TCP ports whose connections a Web takes.
var WebPorts = []uint16{80, 443}

// Web takes a guest's connections to the web's ports in place of the hosts that
// they are for. Its values can be compared: a changed one is another one.
type Web interface {
	// Open begins it for one slot.
	Open(way Way) WebHandler
}

// WebHandler handles one guest's connections.
type WebHandler interface {
	// Handle has a connection that the guest meant for an address, and closes it.
	Handle(conn net.Conn, to netip.AddrPort)
	// Close ends all that Handle does.
	Close()
}

// Way is the way out of a slot: what goes over it is held to the rules that the
// guest's own packets are held to.
type Way interface {
	// Lookup finds the public addresses of a name, as the host sees them; where
	// the guest may reach the name they are open to it from then on.
	Lookup(ctx context.Context, name string) ([]netip.Addr, error)
	Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error)
}

// maxWeb bounds the connections of one guest that are handled at a time; more
// are closed at once.
const maxWeb = 256

// webServer accepts one guest's connections.
type webServer struct {
	listener net.Listener
	turns    chan struct{}
	wg       sync.WaitGroup

	mu      sync.Mutex
	handler WebHandler
}

// newWeb starts one without a handler: it closes what comes. Held: mu.
func (s *Slot) newWeb() (*webServer, error) {
	w := &webServer{turns: make(chan struct{}, maxWeb)}
	err := inNetns(s.pool.home, s.ns, func() (err error) {
		w.listener, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(GatewayAddr, webListen)))
		return err
	})
	if err != nil {
		return nil, err
	}
	w.wg.Go(w.serve)
	return w, nil
}

// handle replaces the handler, and ends the connections of the last one.
func (w *webServer) handle(h WebHandler) {
	if w == nil {
		return
	}
	w.mu.Lock()
	old := w.handler
	w.handler = h
	w.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

// close ends it all. Not held: slot.mu.
func (w *webServer) close() {
	if w == nil {
		return
	}
	w.listener.Close()
	w.handle(nil)
	w.wg.Wait()
}

func (w *webServer) serve() {
	for {
		c, err := w.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // the guest hung up, or a descriptor is short for a moment
		}
		to, err := meantFor(c.(*net.TCPConn))
		w.mu.Lock()
		h := w.handler
		w.mu.Unlock()
		if err != nil || h == nil {
			c.Close()
			continue
		}
		select {
		case w.turns <- struct{}{}:
		default:
			c.Close()
			continue
		}
		w.wg.Go(func() {
			defer func() { <-w.turns }()
			h.Handle(c, to)
		})
	}
}

// meantFor is where a connection was to go before the rules led it here.
func meantFor(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	// A sockaddr_in fits into what the call for this type reads.
	var m *unix.IPv6Mreq
	if cerr := raw.Control(func(fd uintptr) {
		m, err = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST)
	}); cerr != nil {
		return netip.AddrPort{}, cerr
	}
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockopt", err)
	}
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Multiaddr[4:8])), binary.BigEndian.Uint16(m.Multiaddr[2:4]))
	if !slices.Contains(WebPorts, to.Port()) || isPrivate(to.Addr()) {
		return to, fmt.Errorf("%v is not for a guest to reach", to)
	}
	return to, nil
}

// wayOut is a slot's Way.
type wayOut struct{ s *Slot }

func (w wayOut) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	// The rules would drop it; refused at once is better.
	if !to.Addr().Is4() || isPrivate(to.Addr()) {
		return nil, fmt.Errorf("%v is private", to.Addr())
	}
	return w.s.dialTo(ctx, to)
}

func (w wayOut) Lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	w.s.mu.RLock()
	r := w.s.dns
	w.s.mu.RUnlock()
	addrs, err := w.s.pool.publicAddrs(ctx, name)
	if err != nil || len(addrs) == 0 {
		return nil, err
	}
	if r != nil && r.allowed(name) {
		err = r.admit(name, addrs)
	}
	return addrs, err
}
