package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// TCP repeats a lost SYN after one second, then two, then four. The first
// packet to a tap that has just got its user, or to a guest that is booting or
// being resumed, is easily lost, and a resume is to take less than that
// second. So Dial starts another attempt after firstTry, then at growing
// intervals up to maxInterval, and the first to get through wins; older
// attempts live on for attemptLife, for a guest that answers slowly.
const (
	firstTry    = 50 * time.Millisecond
	maxInterval = 250 * time.Millisecond
	attemptLife = 2 * time.Second
)

// Dial connects to a TCP port of the guest. The socket is made inside the
// slot's namespace, which takes a thread there for some microseconds; the
// connection is then awaited by the runtime's poller, so any number of dials
// may wait at once. A guest that is not up does not refuse, it is silent: Dial
// then goes on until ctx ends. The guest may see further connections that are
// closed at once.
func (s *Slot) Dial(ctx context.Context, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("dial slot %d: port %d out of range", s.Index, port)
	}
	conn, err := s.try(ctx, port, firstTry)
	if errors.Is(err, errNoAnswer) {
		conn, err = s.keepTrying(ctx, port)
	}
	if err != nil {
		return nil, fmt.Errorf("dial port %d of slot %d: %w", port, s.Index, err)
	}
	return conn, nil
}

var errNoAnswer = errors.New("no answer in time")

// keepTrying has at most attemptLife/firstTry attempts under way, and none
// that outlives it by more than the time to notice.
func (s *Slot) keepTrying(ctx context.Context, port int) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	attempt := func() {
		conn, err := s.try(ctx, port, attemptLife)
		select {
		case results <- result{conn, err}:
		case <-ctx.Done():
			if conn != nil {
				conn.Close()
			}
		}
	}
	interval := firstTry
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-next.C:
			go attempt()
			interval = min(2*interval, maxInterval)
			next.Reset(interval)
		case r := <-results:
			if !errors.Is(r.err, errNoAnswer) {
				return r.conn, r.err
			}
		}
	}
}

func (s *Slot) try(ctx context.Context, port int, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errNoAnswer)
	defer cancel()
	return s.dialTo(ctx, netip.AddrPortFrom(GuestAddr, uint16(port)))
}

// dialTo connects from inside the slot's namespace.
func (s *Slot) dialTo(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	// Bounds the OS threads, which a locked goroutine each occupies.
	select {
	case s.pool.threads <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	fd := -1
	err := s.in(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return err
	})
	<-s.pool.threads
	if err != nil {
		return nil, err
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	f := os.NewFile(uintptr(fd), "slot")
	defer f.Close() // FileConn keeps a duplicate
	if err := awaitConnect(ctx, f); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// awaitConnect waits for a connect under way on f, as package net does for its
// own sockets.
func awaitConnect(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var soErr error
	err = raw.Write(func(fd uintptr) bool {
		n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			soErr = os.NewSyscallError("getsockopt", err)
			return true
		}
		switch e := unix.Errno(n); e {
		case 0:
			// Also what a socket says that is still connecting.
			_, err := unix.Getpeername(int(fd))
			return err == nil
		case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
			return false
		case unix.EISCONN:
			return true
		default:
			soErr = os.NewSyscallError("connect", e)
			return true
		}
	})
	if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(err, soErr)
}
