package boot

import (
	"fmt"
	"net/netip"
	"strings"
)

const (
	// rootDisk is the whole-disk ext4 that every sandbox has.
	rootDisk = "/dev/vda"
	// defaultHostname is used until the host names the sandbox.
	defaultHostname = "sandbox"
	// maxHostname is the kernel's limit for a host name, in bytes.
	maxHostname = 64
)

// params are the kernel parameters that boot understands. The host writes
// them, so a value that does not parse is an error and not a default.
type params struct {
	IP       netip.Prefix // wrenn.ip=172.30.0.2/30; zero: no network
	Gateway  netip.Addr   // wrenn.gw=172.30.0.1; zero: no default route
	DNS      []netip.Addr // wrenn.dns=1.1.1.1,8.8.8.8
	Hostname string       // wrenn.hostname=<sandbox id>
}

// parseCmdline reads the wrenn.* parameters out of the contents of
// /proc/cmdline. Unknown wrenn.* names are ignored: an older guest must boot
// under a newer host.
func parseCmdline(line string) (params, error) {
	p := params{Hostname: defaultHostname}
	for _, field := range strings.Fields(line) {
		name, value, _ := strings.Cut(field, "=")
		var err error
		switch name {
		case "wrenn.ip":
			p.IP, err = netip.ParsePrefix(value)
		case "wrenn.gw":
			p.Gateway, err = netip.ParseAddr(value)
		case "wrenn.dns":
			p.DNS, err = parseAddrs(value)
		case "wrenn.hostname":
			p.Hostname, err = value, CheckHostname(value)
		}
		if err != nil {
			return params{}, fmt.Errorf("kernel parameter %s: %w", name, err)
		}
	}
	if p.Gateway.IsValid() && !p.IP.IsValid() {
		return params{}, fmt.Errorf("kernel parameter wrenn.gw without wrenn.ip")
	}
	return p, nil
}

func parseAddrs(list string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for s := range strings.SplitSeq(list, ",") {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, err
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

// CheckHostname tells whether name may become the host name of a sandbox: 1 to
// 64 bytes of a-z, A-Z, 0-9, '-' and '.', not starting with '-' or '.'. It is
// written into files that are parsed by line and by blank, hence the strictness.
func CheckHostname(name string) error {
	if name == "" || len(name) > maxHostname {
		return fmt.Errorf("host name of %d bytes, want 1 to %d", len(name), maxHostname)
	}
	if name[0] == '-' || name[0] == '.' {
		return fmt.Errorf("host name %q starts with %q", name, name[0])
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.':
		default:
			return fmt.Errorf("host name %q contains %q", name, c)
		}
	}
	return nil
}
