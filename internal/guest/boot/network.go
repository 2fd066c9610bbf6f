package boot

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// nic is the sandbox's only network card.
const nic = "eth0"

// setupNetwork brings up the loopback and, when the host gave an address, the
// network card with its address, default route and name servers.
func setupNetwork(p params) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding the loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bringing up the loopback: %w", err)
	}
	if !p.IP.IsValid() {
		return nil
	}
	link, err := netlink.LinkByName(nic)
	if err != nil {
		return fmt.Errorf("finding %s, for which wrenn.ip is given: %w", nic, err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   p.IP.Addr().AsSlice(),
		Mask: net.CIDRMask(p.IP.Bits(), p.IP.Addr().BitLen()),
	}}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("giving %s the address %s: %w", nic, p.IP, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing up %s: %w", nic, err)
	}
	if p.Gateway.IsValid() {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: p.Gateway.AsSlice()}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("routing by %s: %w", p.Gateway, err)
		}
	}
	if len(p.DNS) > 0 {
		if err := writeIfChanged(resolvConfPath, resolvConf(p.DNS)); err != nil {
			return fmt.Errorf("writing the name servers: %w", err)
		}
	}
	return nil
}
