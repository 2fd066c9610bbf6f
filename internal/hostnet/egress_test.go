package hostnet

import (
	"net/netip"
	"slices"
	"testing"
)

func TestRangesDoNotOverlap(t *testing.T) {
	p := netip.MustParsePrefix
	for _, c := range []struct {
		in   []netip.Prefix
		want []addrRange
	}{
		{nil, nil},
		{[]netip.Prefix{p("0.0.0.0/0"), p("10.0.0.0/8")}, []addrRange{{0, 1 << 32}}},
		{[]netip.Prefix{p("10.0.1.0/24"), p("10.0.0.0/24")}, []addrRange{{10 << 24, 10<<24 + 512}}},
		{[]netip.Prefix{p("1.2.3.4/32"), p("1.2.3.4/32")}, []addrRange{{0x01020304, 0x01020305}}},
		{[]netip.Prefix{p("255.255.255.255/32"), p("0.0.0.0/32")}, []addrRange{{0, 1}, {1<<32 - 1, 1 << 32}}},
	} {
		if got := ranges(c.in); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
}

// TestListsDecideWhatAGuestReaches: allowed before denied before the rest, and
// nothing opens what is private.
func TestListsDecideWhatAGuestReaches(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	w.listenUDP(t, "host", w.home)
	p := newTestPool(t, Options{Max: 2})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	inet := []netip.Prefix{netip.MustParsePrefix(inetPublic + "/32")}
	send := func(to, text string) { g.send(t, frame(guestMAC, GuestAddr.String(), to, text)) }
	must(t, s.SetEgress(t.Context(), Egress{AllowInternet: true, Deny: inet}))
	send(inetPublic, "denied by address")
	must(t, s.SetEgress(t.Context(), Egress{AllowInternet: true, Deny: all}))
	send(inetPublic, "denied with all")
	must(t, s.SetEgress(t.Context(), Egress{Allow: all}))
	hostEnd, _ := p.layout.addrs(s.Index)
	send(hostEnd.Addr().String(), "to the host, all allowed")
	must(t, s.SetEgress(t.Context(), Egress{Allow: inet, Deny: all}))
	send(inetPublic, "allowed")
	if got := w.arrived(t, "allowed"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
}

// TestASlotWithListsIsClosedUntilTheyAreSetAgain: who takes it over has them.
func TestASlotWithListsIsClosedUntilTheyAreSetAgain(t *testing.T) {
	e := Egress{AllowInternet: true, Deny: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}
	if got := parseEgress(e.mark()); got.AllowInternet || len(got.Allow) != 0 {
		t.Errorf("a mark of lists is read as %+v", got)
	}
}
