package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// egressMark is the alias of the tap that holds the slot's egress setting.
const egressMark = "wrenn hostnet egress="

func (e Egress) mark() string {
	if len(e.Allow)+len(e.Deny)+len(e.Names) > 0 || e.Web != nil {
		// They are too long for an alias: who adopts the slot sets them again,
		// and until then it is closed.
		return egressMark + "lists"
	}
	if e.AllowInternet {
		return egressMark + "internet"
	}
	return egressMark + "none"
}

// parseEgress reads a mark. An unknown one is closed, not open.
func parseEgress(alias string) Egress {
	v, _ := strings.CutPrefix(alias, egressMark)
	return Egress{AllowInternet: v == "internet"}
}

// wiring is what one slot is to be built from.
type wiring struct {
	index        int
	host, inside netip.Prefix // addresses of the veth's ends
	home, ns     *os.File
	egress       Egress
	adopt        bool // the tap must exist, and its mark decides the egress
}

// ensure makes the slot's network what it has to be, whatever is there
// already: building a new slot and repairing an adopted one are the same
// steps. The rules are loaded before any link is up.
func (w *wiring) ensure() error {
	if err := inNetns(w.home, w.ns, w.ensureInside); err != nil {
		return err
	}
	if err := inNetns(w.home, w.home, w.ensureHostEnd); err != nil {
		return err
	}
	// A route needs its link up, and a veth's carrier is up when both ends are.
	return inNetns(w.home, w.ns, w.ensureRoute)
}

func (w *wiring) ensureInside() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	tap, err := w.findTap()
	if err != nil {
		return err
	}
	uplink, err := w.ensureVeth()
	if err != nil {
		return err
	}
	if err := loadSlotRules(w.egress, !w.adopt); err != nil {
		return err
	}
	if err := ensureLink(tap, gatewayMAC, netip.PrefixFrom(GatewayAddr, slotBits)); err != nil {
		return err
	}
	// Known for good: no ARP before the first packet to a guest, and none that
	// a guest could answer wrongly.
	if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: tap.Attrs().Index, Family: unix.AF_INET,
		State: netlink.NUD_PERMANENT, IP: GuestAddr.AsSlice(), HardwareAddr: guestMAC}); err != nil {
		return fmt.Errorf("set the guest's neighbour entry: %w", err)
	}
	return ensureLink(uplink, nil, w.inside)
}

func (w *wiring) findTap() (netlink.Link, error) {
	tap, err := netlink.LinkByName(TapName)
	if isLinkMissing(err) {
		if w.adopt {
			// The VM holds a descriptor of the tap that was; a new one would
			// not be connected to it.
			return nil, fmt.Errorf("%s is gone: %w", TapName, ErrSlotLost)
		}
		if err := createTap(); err != nil {
			return nil, err
		}
		tap, err = netlink.LinkByName(TapName)
	}
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", TapName, err)
	}
	if w.adopt {
		w.egress = parseEgress(tap.Attrs().Alias)
		return tap, nil
	}
	if err := netlink.LinkSetAlias(tap, w.egress.mark()); err != nil {
		return nil, fmt.Errorf("mark %s: %w", TapName, err)
	}
	return tap, nil
}

// ensureVeth finds or makes the pair; its far end is made in the host's
// namespace.
func (w *wiring) ensureVeth() (netlink.Link, error) {
	link, err := netlink.LinkByName(uplinkName)
	if err == nil {
		return link, nil
	}
	if !isLinkMissing(err) {
		return nil, fmt.Errorf("find %s: %w", uplinkName, err)
	}
	if err := inNetns(w.home, w.home, func() error { return removeHostLink(w.index) }); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = uplinkName
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: hostLink(w.index),
		PeerNamespace: netlink.NsFd(int(w.home.Fd()))})
	if err != nil {
		return nil, fmt.Errorf("make veth %s: %w", hostLink(w.index), err)
	}
	if link, err = netlink.LinkByName(uplinkName); err != nil {
		return nil, fmt.Errorf("find %s: %w", uplinkName, err)
	}
	return link, nil
}

func (w *wiring) ensureHostEnd() error {
	link, err := netlink.LinkByName(hostLink(w.index))
	if err != nil {
		return fmt.Errorf("find %s: %w", hostLink(w.index), err)
	}
	return ensureLink(link, nil, w.host)
}

func (w *wiring) ensureRoute() error {
	link, err := netlink.LinkByName(uplinkName)
	if err != nil {
		return fmt.Errorf("find %s: %w", uplinkName, err)
	}
	err = netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: w.host.Addr().AsSlice(),
		Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}})
	if err != nil {
		return fmt.Errorf("set the default route of slot %d: %w", w.index, err)
	}
	return nil
}

// ensureLink gives a link its MAC (nil: whatever it has) and its one address,
// lets it forward, keeps IPv6 off it and sets it up.
func ensureLink(link netlink.Link, mac net.HardwareAddr, addr netip.Prefix) error {
	name := link.Attrs().Name
	if mac != nil && link.Attrs().HardwareAddr.String() != mac.String() {
		if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
			return fmt.Errorf("set the MAC of %s: %w", name, err)
		}
	}
	// No link-local address; not by sysctl, which a container may not write.
	// A kernel without IPv6 does not need it.
	const addrGenNone = 1
	if err := netlink.LinkSetIP6AddrGenMode(link, addrGenNone); err != nil &&
		!errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("turn IPv6 addresses off on %s: %w", name, err)
	}
	have, err := listAddrs(link)
	if err != nil {
		return err
	}
	found := false
	for _, a := range have {
		if a == addr {
			found = true
		} else if err := netlink.AddrDel(link, &netlink.Addr{IPNet: ipNet(a)}); err != nil {
			return fmt.Errorf("remove address %v of %s: %w", a, name, err)
		}
	}
	if !found {
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(addr)}); err != nil {
			return fmt.Errorf("give %s address %v: %w", name, addr, err)
		}
	}
	if err := setForwarding(link); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// setForwarding is sysctl net.ipv4.conf.<link>.forwarding=1 by netlink: it
// works where /proc/sys is read-only, as in most containers.
func setForwarding(link netlink.Link) error {
	const (
		iflaInetConf         = 1 // IFLA_INET_CONF
		ipv4DevconfForwading = 1 // IPV4_DEVCONF_FORWARDING
	)
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(link.Attrs().Index)
	req.AddData(msg)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	inet := spec.AddRtAttr(unix.AF_INET, nil)
	conf := inet.AddRtAttr(iflaInetConf, nil)
	conf.AddRtAttr(ipv4DevconfForwading, nl.Uint32Attr(1))
	req.AddData(spec)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("let %s forward: %w", link.Attrs().Name, err)
	}
	return nil
}

// listAddrs returns a link's IPv4 addresses.
func listAddrs(link netlink.Link) ([]netip.Prefix, error) {
	for try := 0; ; try++ {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 10 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
		}
		var out []netip.Prefix
		for _, a := range addrs {
			ip, ok := netip.AddrFromSlice(a.IP)
			ones, _ := a.Mask.Size()
			if ok {
				out = append(out, netip.PrefixFrom(ip.Unmap(), ones))
			}
		}
		return out, nil
	}
}

func removeHostLink(n int) error {
	link, err := netlink.LinkByName(hostLink(n))
	if isLinkMissing(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", hostLink(n), err)
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove %s: %w", hostLink(n), err)
	}
	return nil
}

// doomedGroup is the link group of what removeHostLinks is about to remove; a
// link that a crash left in it was to go, too.
const doomedGroup = 0x77726e64

// removeHostLinks removes the host ends of many slots. Held: the host lock.
func removeHostLinks(slots []int) error {
	for _, n := range slots {
		link, err := netlink.LinkByName(hostLink(n))
		if isLinkMissing(err) {
			continue
		}
		if err == nil {
			err = netlink.LinkSetGroup(link, doomedGroup)
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("mark %s for removal: %w", hostLink(n), err)
		}
	}
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(doomedGroup)))
	// ENODEV: nobody is in the group.
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove the links of %d slots: %w", len(slots), err)
	}
	return nil
}

func isLinkMissing(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}
