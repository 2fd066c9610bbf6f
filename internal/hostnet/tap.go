package hostnet

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// tapFlags: no packet-information header, and a virtio-net header, so that
// checksum and segmentation offload pass between the guest and the host. QEMU
// reads the flag from the descriptor, Firecracker asks for it; a snapshot that
// was taken with the header cannot be restored without it.
const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// vnetHdrLen is struct virtio_net_hdr, the length a new tap has.
const vnetHdrLen = 10

// attachTap opens tap0 of the calling thread's namespace, creating it when it
// is missing.
func attachTap() (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
			return -1, fmt.Errorf("open /dev/net/tun (load the tun module; in a container, pass the device in): %w", err)
		}
		return -1, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(TapName)
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	ifr.SetUint16(tapFlags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return -1, ErrTapBusy
		}
		return -1, fmt.Errorf("attach %s: %w", TapName, err)
	}
	return fd, nil
}

func createTap() error {
	fd, err := attachTap()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make %s persistent: %w", TapName, err)
	}
	return nil
}

// OpenTap opens the slot's tap for a VMM: one user at a time, ErrTapBusy while
// another descriptor of it is open. The descriptor is non-blocking and carries
// frames behind a 10-byte struct virtio_net_hdr.
func (s *Slot) OpenTap() (*os.File, error) {
	var f *os.File
	err := s.in(func() error {
		// TUNSETIFF would quietly make a new, bare tap.
		if _, err := linkIndex(TapName); err != nil {
			return fmt.Errorf("%s is gone: %w", TapName, ErrSlotLost)
		}
		fd, err := attachTap()
		if err != nil {
			return err
		}
		// Both outlive a VMM that set them.
		if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHdrLen); err != nil {
			unix.Close(fd)
			return fmt.Errorf("set the header length of %s: %w", TapName, err)
		}
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
			unix.Close(fd)
			return fmt.Errorf("reset the offloads of %s: %w", TapName, err)
		}
		f = os.NewFile(uintptr(fd), TapName)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open tap of slot %d: %w", s.Index, err)
	}
	return f, nil
}

func linkIndex(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, err
	}
	return int(ifr.Uint32()), nil
}
