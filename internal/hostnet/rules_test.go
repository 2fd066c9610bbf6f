package hostnet

import (
	"context"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

func TestGuestReachesInternetBehindNAT(t *testing.T) {
	w := newWorld(t)
	w.serveTCP(t, w.inet, 80)
	p := newTestPool(t, Options{Size: 1, Max: 4})
	g := w.newGuest(t, acquire(t, p))
	got, err := w.dialTCP(g.ns, inetPublic+":80", 3*time.Second)
	must(t, err)
	if host, _, _ := net.SplitHostPort(got); host != hostPublic {
		t.Errorf("the internet sees %q, want the host's address", got)
	}
}

func TestGuestReachesNothingPrivate(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	w.listenUDP(t, "host", w.home)
	p := newTestPool(t, Options{Max: 4})
	a, b := acquire(t, p), acquire(t, p)
	g, other := w.newGuest(t, a), w.newGuest(t, b)
	w.listenUDP(t, "other guest", other.ns)
	w.listenUDP(t, "own namespace", a.ns)
	w.listenUDP(t, "other namespace", b.ns)
	hostEnd, inside := p.layout.addrs(a.Index)
	otherHostEnd, otherInside := p.layout.addrs(b.Index)

	// The addresses do answer, to those who may.
	for _, to := range forbidden {
		w.sendUDP(t, w.home, to, "control")
		w.mail.until(t, "control")
	}
	w.sendUDP(t, w.inet, hostPublic, "control")
	w.mail.until(t, "control")

	targets := slices.Concat(forbidden, []string{hostPublic, GatewayAddr.String(), "172.30.0.3",
		hostEnd.Addr().String(), inside.Addr().String(),
		otherHostEnd.Addr().String(), otherInside.Addr().String(), "127.0.0.1", "224.0.0.251", "240.0.0.1", "0.1.2.3"})
	for _, to := range targets {
		g.send(t, frame(guestMAC, GuestAddr.String(), to, "to "+to))
	}
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "end"))
	if got := w.arrived(t, "end"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
	// TCP, as a program in the guest would try it.
	w.serveTCP(t, w.home, 8080)
	if got, err := w.dialTCP(w.inet, hostPublic+":8080", time.Second); err != nil || !strings.HasPrefix(got, inetPublic) {
		t.Fatalf("control: %q %v", got, err)
	}
	for _, to := range []string{hostPublic, hostEnd.Addr().String(), GatewayAddr.String()} {
		if _, err := w.dialTCP(g.ns, to+":8080", 50*time.Millisecond); err == nil {
			t.Errorf("guest reached the host's service at %s", to)
		}
	}
}

func (g *guest) send(t testing.TB, frame []byte) {
	t.Helper()
	_, err := g.tap.Write(frame)
	must(t, err)
}

func TestSpoofedFramesAreDropped(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	p := newTestPool(t, Options{Max: 2})
	g := w.newGuest(t, acquire(t, p))
	mac := mustMAC("02:77:72:00:00:99")
	g.send(t, frame(guestMAC, "172.30.0.3", inetPublic, "neighbour's address"))
	g.send(t, frame(guestMAC, "172.30.0.1", inetPublic, "gateway's address"))
	g.send(t, frame(guestMAC, "10.213.0.2", inetPublic, "veth's address"))
	g.send(t, frame(guestMAC, "198.51.100.7", inetPublic, "somebody's address"))
	g.send(t, frame(mac, GuestAddr.String(), inetPublic, "other MAC"))
	// A VLAN tag in front of a good packet.
	f := frame(guestMAC, GuestAddr.String(), inetPublic, "vlan")
	g.send(t, slices.Insert(f, vnetHdrLen+12, 0x81, 0, 0, 5))
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "end"))
	if got := w.arrived(t, "end"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
}

// TestIngressAlone: frames of other senders do not get as far as the rules
// that see connections.
func TestIngressAlone(t *testing.T) {
	w := newWorld(t)
	p := newTestPool(t, Options{Max: 2})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	w.listenUDP(t, "own namespace", s.ns)
	must(t, inNetns(w.home, s.ns, removeHostRules)) // the table has the same name
	gw := GatewayAddr.String()
	g.send(t, frame(guestMAC, "198.51.100.7", gw, "other address"))
	g.send(t, frame(gatewayMAC, GuestAddr.String(), gw, "other MAC"))
	g.send(t, frame(guestMAC, GuestAddr.String(), gw, "end"))
	if got := w.arrived(t, "end"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
}

// TestHostIsTheSecondLine: rules of the host hold even for what a slot's
// namespace itself sends, with the rules of the namespaces gone.
func TestHostIsTheSecondLine(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	w.listenUDP(t, "host", w.home)
	p := newTestPool(t, Options{Max: 2})
	a, b := acquire(t, p), acquire(t, p)
	w.listenUDP(t, "other namespace", b.ns)
	for _, ns := range []*os.File{a.ns, b.ns} {
		must(t, inNetns(w.home, ns, removeHostRules)) // the table has the same name
	}
	hostEnd, _ := p.layout.addrs(a.Index)
	_, otherInside := p.layout.addrs(b.Index)
	w.sendUDP(t, w.home, otherInside.Addr().String(), "control")
	w.mail.until(t, "control")
	for _, to := range []string{hostPublic, hostEnd.Addr().String(), otherInside.Addr().String()} {
		w.sendUDP(t, a.ns, to, "to "+to)
	}
	w.sendUDP(t, a.ns, inetPublic, "end")
	if got := w.arrived(t, "end"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
}

func TestEgressChangesForOpenConnections(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	p := newTestPool(t, Options{Max: 2})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	ctx := context.Background()
	if !s.Egress().AllowInternet {
		t.Fatal("a fresh slot has no internet")
	}
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "before"))
	w.mail.until(t, "before")
	must(t, s.SetEgress(ctx, Egress{}))
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "closed"))
	must(t, s.SetEgress(ctx, Egress{AllowInternet: true}))
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "open"))
	if got := w.arrived(t, "open"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
}

func TestOnlyTheHostsDialReachesTheGuest(t *testing.T) {
	w := newWorld(t)
	p := newTestPool(t, Options{Max: 2})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	w.serveTCP(t, g.ns, 49983)
	c, err := s.Dial(context.Background(), 49983)
	must(t, err)
	defer c.Close()
	buf := make([]byte, 100)
	n, err := c.Read(buf)
	must(t, err)
	if got := string(buf[:n]); !strings.HasPrefix(got, GatewayAddr.String()+":") {
		t.Errorf("the guest saw %q, want the gateway", got)
	}
	// Other processes of the host have no way: not by the guest's address, not
	// by the namespace's, and the internet has none either. A route that root
	// adds does not make one.
	_, inside := p.layout.addrs(s.Index)
	link, err := netlink.LinkByName(hostLink(s.Index))
	must(t, err)
	for _, ns := range []*os.File{w.home, w.inet} {
		for _, to := range []string{GuestAddr.String(), inside.Addr().String()} {
			if got, err := w.dialTCP(ns, to+":49983", 50*time.Millisecond); err == nil {
				t.Errorf("reached %s: %q", to, got)
			}
		}
	}
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: inside.Addr().AsSlice(), Dst: ipNet(guestNet)}))
	w.listenUDP(t, "guest", g.ns)
	w.sendUDP(t, w.home, GuestAddr.String(), "by a route")
	w.sendUDP(t, s.ns, GuestAddr.String(), "end")
	if got := w.arrived(t, "end"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
}
