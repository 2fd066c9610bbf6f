package kernelnbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The kernel's generic netlink interface, linux/nbd-netlink.h.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4

	attrIndex       = 1
	attrSize        = 2
	attrBlockSize   = 3
	attrServerFlags = 5
	attrSockets     = 7
	attrDeadTime    = 8
	attrBackend     = 10

	sockItem = 1
	sockFD   = 1

	genlHeader  = 4
	nlaTypeMask = 0x3fff
)

func family() (*netlink.GenlFamily, error) {
	f, err := netlink.GenlFamilyGet("nbd")
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrMissing
	}
	if err != nil {
		return nil, fmt.Errorf("ask the kernel for its NBD client: %w", err)
	}
	return f, nil
}

// request sends one command and returns the attributes of its answer.
func request(cmd uint8, attrs ...nl.NetlinkRequestData) (answer map[uint16][]byte, err error) {
	f, err := family()
	if err != nil {
		return nil, err
	}
	req := nl.NewNetlinkRequest(int(f.ID), unix.NLM_F_ACK)
	req.AddData(&nl.Genlmsg{Command: cmd, Version: 1})
	for _, a := range attrs {
		req.AddData(a)
	}
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return nil, err
	}
	answer = map[uint16][]byte{}
	for _, m := range msgs {
		if err := parse(m, answer); err != nil {
			return nil, err
		}
	}
	return answer, nil
}

func parse(m []byte, into map[uint16][]byte) error {
	if len(m) < genlHeader {
		return fmt.Errorf("the kernel's answer has %d bytes", len(m))
	}
	attrs, err := nl.ParseRouteAttr(m[genlHeader:])
	if err != nil {
		return fmt.Errorf("decode the kernel's answer: %w", err)
	}
	for _, a := range attrs {
		into[a.Attr.Type&nlaTypeMask] = a.Value
	}
	return nil
}

func u64(kind int, v uint64) nl.NetlinkRequestData {
	return nl.NewRtAttr(kind, binary.NativeEndian.AppendUint64(nil, v))
}

func u32(kind int, v uint32) nl.NetlinkRequestData {
	return nl.NewRtAttr(kind, binary.NativeEndian.AppendUint32(nil, v))
}

func sockets(conn *os.File) nl.NetlinkRequestData {
	list := nl.NewRtAttr(attrSockets|unix.NLA_F_NESTED, nil)
	list.AddRtAttr(sockItem|unix.NLA_F_NESTED, nil).
		AddRtAttr(sockFD, binary.NativeEndian.AppendUint32(nil, uint32(conn.Fd())))
	return list
}

// connect gives the kernel the connection and learns which device it is now.
func connect(conn *os.File, e export, backend string) (int, error) {
	answer, err := request(cmdConnect,
		u64(attrSize, e.size), u64(attrBlockSize, blockSize), u64(attrServerFlags, uint64(e.flags)),
		u64(attrDeadTime, uint64(DeadTime/time.Second)), nl.NewRtAttr(attrBackend, nl.ZeroTerminated(backend)),
		sockets(conn))
	if err != nil {
		return 0, fmt.Errorf("connect a block device: %w", err)
	}
	v := answer[attrIndex]
	if len(v) != 4 {
		return 0, errors.New("connect a block device: the kernel does not say which")
	}
	return int(binary.NativeEndian.Uint32(v)), nil
}

func disconnect(index int) error {
	_, err := request(cmdDisconnect, u32(attrIndex, uint32(index)))
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // it is not connected any more
		return nil
	}
	return err
}

// reconfigure gives a device another connection in place of one that broke. The
// kernel wants the name back that the device bears.
func reconfigure(index int, conn *os.File, backend string) error {
	_, err := request(cmdReconfigure, u32(attrIndex, uint32(index)),
		nl.NewRtAttr(attrBackend, nl.ZeroTerminated(backend)), sockets(conn))
	if err != nil {
		return fmt.Errorf("connect %s anew: %w", device(index), err)
	}
	return nil
}

// subscribe sends the index of each device whose connection breaks, until ctx
// ends.
func subscribe(ctx context.Context) (<-chan int, error) {
	f, err := family()
	if err != nil {
		return nil, err
	}
	if len(f.Groups) == 0 {
		return nil, errors.New("the kernel's NBD client has no multicast group")
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("listen for broken connections: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(f.Groups[0].ID))
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen for broken connections: %w", err)
	}
	s := os.NewFile(uintptr(fd), "netlink")
	stop := context.AfterFunc(ctx, func() { s.Close() })
	out := make(chan int)
	go func() {
		defer stop()
		defer s.Close()
		buf := make([]byte, 16<<10)
		for {
			n, err := s.Read(buf)
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			for _, index := range deadLinks(buf[:max(n, 0)]) {
				select {
				case out <- index:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out, nil
}

// deadLinks reads the announcements in a datagram.
func deadLinks(b []byte) (out []int) {
	for len(b) >= unix.NLMSG_HDRLEN {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			return out
		}
		body := b[unix.NLMSG_HDRLEN:n]
		attrs := map[uint16][]byte{}
		if len(body) >= genlHeader && body[0] == cmdLinkDead && parse(body, attrs) == nil && len(attrs[attrIndex]) == 4 {
			out = append(out, int(binary.NativeEndian.Uint32(attrs[attrIndex])))
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return out
}
