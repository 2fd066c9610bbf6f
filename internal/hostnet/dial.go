package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Dial connects to a TCP port of the guest. The socket is made inside the
// slot's namespace, which takes a thread there for some microseconds; the
// connection is then awaited by the runtime's poller, so any number of dials
// may wait at once.
//
// A guest that is not up yet does not refuse, it stays silent, and TCP sends
// its SYN again only after a second: to wait for a guest, dial with short
// deadlines.
func (s *Slot) Dial(ctx context.Context, port int) (net.Conn, error) {
	conn, err := s.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial port %d of slot %d: %w", port, s.Index, err)
	}
	return conn, nil
}

func (s *Slot) dial(ctx context.Context, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, errors.New("port out of range")
	}
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
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: GuestAddr.As4()})
	if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	f := os.NewFile(uintptr(fd), "guest")
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
