package hostnet

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The guest's side of every slot. Snapshots hold these values: changing one is
// a new network layout (LayoutVersion) that old snapshots do not fit.
const (
	LayoutVersion = "1"
	TapName       = "tap0"
	GuestMAC      = "02:77:72:00:00:02"
	GatewayMAC    = "02:77:72:00:00:01"
)

var (
	// GuestAddr is the guest's address, the same in every sandbox.
	GuestAddr = netip.MustParseAddr("172.30.0.2")
	// GatewayAddr is the guest's gateway and the address the host's
	// connections to the guest come from.
	GatewayAddr = netip.MustParseAddr("172.30.0.1")

	guestNet   = netip.MustParsePrefix("172.30.0.0/30")
	guestMAC   = mustMAC(GuestMAC)
	gatewayMAC = mustMAC(GatewayMAC)
)

// privateRanges are the destinations a guest never reaches: everything that is
// not the public IPv4 internet. They are disjoint (an nftables interval set
// refuses overlaps) and ascending.
var privateRanges = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),      // this network
	netip.MustParsePrefix("10.0.0.0/8"),     // RFC 1918
	netip.MustParsePrefix("100.64.0.0/10"),  // carrier NAT, some clouds' services
	netip.MustParsePrefix("127.0.0.0/8"),    // loopback
	netip.MustParsePrefix("169.254.0.0/16"), // link local, cloud metadata
	netip.MustParsePrefix("172.16.0.0/12"),  // RFC 1918
	netip.MustParsePrefix("192.0.0.0/24"),   // IETF protocol assignments
	netip.MustParsePrefix("192.168.0.0/16"), // RFC 1918
	netip.MustParsePrefix("198.18.0.0/15"),  // benchmarking
	netip.MustParsePrefix("224.0.0.0/4"),    // multicast
	netip.MustParsePrefix("240.0.0.0/4"),    // reserved, broadcast
}

func isPrivate(a netip.Addr) bool {
	return slices.ContainsFunc(privateRanges, func(p netip.Prefix) bool { return p.Contains(a) })
}

const (
	netnsPrefix = "wrenn-"
	hostPrefix  = "wrn"
	uplinkName  = "uplink0"
	slotBits    = 30
)

// layout maps slot numbers to addresses: slot n has the n-th /30 of prefix.
type layout struct{ prefix netip.Prefix }

func newLayout(s string) (layout, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return layout{}, fmt.Errorf("network prefix %q: %w", s, err)
	}
	if !p.Addr().Is4() || p.Bits() > slotBits || p.Bits() < 8 {
		return layout{}, fmt.Errorf("network prefix %q: want an IPv4 prefix of 8 to %d bits", s, slotBits)
	}
	p = p.Masked()
	if p.Overlaps(guestNet) {
		return layout{}, fmt.Errorf("network prefix %q overlaps the guests' own %v", s, guestNet)
	}
	// A guest must not reach other slots; that is what makes it so even if the
	// host's rules were flushed.
	for _, r := range privateRanges {
		if r.Bits() <= p.Bits() && r.Contains(p.Addr()) {
			return layout{prefix: p}, nil
		}
	}
	return layout{}, fmt.Errorf("network prefix %q is not in a private range", s)
}

// slots is how many /30 networks the prefix holds.
func (l layout) slots() int { return 1 << (slotBits - l.prefix.Bits()) }

// addrs returns the host's and the namespace's end of slot n's veth.
func (l layout) addrs(n int) (host, inside netip.Prefix) {
	b := l.prefix.Addr().As4()
	base := binary.BigEndian.Uint32(b[:]) + uint32(n)*4
	at := func(i uint32) netip.Prefix {
		binary.BigEndian.PutUint32(b[:], base+i)
		return netip.PrefixFrom(netip.AddrFrom4(b), slotBits)
	}
	return at(1), at(2)
}

func netnsName(n int) string { return netnsPrefix + strconv.Itoa(n) }
func hostLink(n int) string  { return hostPrefix + strconv.Itoa(n) }

// numbered returns n for prefix+n in its one canonical spelling.
func numbered(name, prefix string) (int, bool) {
	s, ok := strings.CutPrefix(name, prefix)
	if !ok || len(s) > 7 {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || strconv.Itoa(n) != s {
		return 0, false
	}
	return n, true
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

func mustMAC(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}
