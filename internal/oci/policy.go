package oci

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"oras.land/oras-go/v2/registry"
)

// Registry is one that the operator names.
type Registry struct {
	// Host is a name or address, with a port where it is not the scheme's.
	Host string
	// Plain: it speaks HTTP.
	Plain bool
}

// ParseRegistry reads host[:port], or http://host[:port] for one without TLS.
func ParseRegistry(s string) (Registry, error) {
	host, plain := strings.CutPrefix(s, "http://")
	host = strings.TrimSuffix(strings.TrimPrefix(host, "https://"), "/")
	if err := (registry.Reference{Registry: host}).ValidateRegistry(); err != nil || host == "" {
		return Registry{}, fmt.Errorf("%.80q: want host[:port], or http://host[:port] for a registry without TLS", s)
	}
	return Registry{host, plain}, nil
}

// addr is where its connections go.
func (r Registry) addr() string {
	u := url.URL{Host: r.Host}
	port := u.Port()
	if port == "" {
		port = "443"
		if r.Plain {
			port = "80"
		}
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// errNotAllowed is what connections end with that an image must not cause.
var errNotAllowed = errors.New("not allowed")

// policy decides which connections images may cause.
type policy struct{ named []Registry }

// checkURL holds a request, also one of a redirect, to HTTPS.
func (p policy) checkURL(u *url.URL) error {
	if u.Scheme == "https" {
		return nil
	}
	for _, r := range p.named {
		if r.Plain && u.Scheme == "http" && r.Host == u.Host {
			return nil
		}
	}
	return fmt.Errorf("%w: %s://%s is not HTTPS; for registries without TLS the operator has `wrenn up --registry http://host:port`", errNotAllowed, u.Scheme, u.Host)
}

// dial connects to what the operator named, and else to public addresses alone.
// The address is looked at when the name has been resolved, at each connection.
func (p policy) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: 15 * time.Second, Control: func(_, to string, _ syscall.RawConn) error { return checkAddr(addr, to) }}
	if slices.ContainsFunc(p.named, func(r Registry) bool { return r.addr() == addr }) {
		d.Control = nil
	}
	return d.DialContext(ctx, network, addr)
}

func checkAddr(name, to string) error {
	ap, err := netip.ParseAddrPort(to)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errNotAllowed, to, err)
	}
	a := ap.Addr().Unmap().WithZone("")
	own, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("%w: this machine's addresses cannot be listed: %w", errNotAllowed, err)
	}
	if !isPublic(a) || slices.ContainsFunc(own, func(o net.Addr) bool {
		n, ok := o.(*net.IPNet)
		return ok && n.IP.Equal(a.AsSlice())
	}) {
		return fmt.Errorf("%w: %s is not at a public address; for such registries the operator has `wrenn up --registry`", errNotAllowed, name)
	}
	return nil
}

// notPublic are the ranges that lead, or may lead, somewhere else than to the
// public internet; of IPv6 only 2000::/3 is looked at.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("192.88.99.0/24"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("2001::/23"), // Teredo and other protocols'
	netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("2002::/16"), // 6to4 holds an IPv4 address
	netip.MustParsePrefix("3fff::/20"),
}

var publicIPv6 = netip.MustParsePrefix("2000::/3")

func isPublic(a netip.Addr) bool {
	if !a.Is4() && !publicIPv6.Contains(a) {
		return false
	}
	return !slices.ContainsFunc(notPublic, func(p netip.Prefix) bool { return p.Contains(a) })
}

// transport holds every request to the policy. No proxy: which address a proxy
// connects to could not be seen.
func (p policy) transport() http.RoundTripper {
	return roundTripper{p, &http.Transport{
		DialContext: p.dial, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 15 * time.Second,
		ResponseHeaderTimeout: time.Minute, IdleConnTimeout: 30 * time.Second, MaxIdleConns: 16,
		MaxResponseHeaderBytes: 256 << 10,
		// A layer is what its digest says: nobody unpacks it on the way.
		DisableCompression: true,
	}}
}

type roundTripper struct {
	policy policy
	next   http.RoundTripper
}

func (t roundTripper) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := t.policy.checkURL(r.URL); err != nil {
		return nil, err
	}
	return t.next.RoundTrip(r)
}
