package hostnet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{
		"example.com": true, "*.example.com": true, "a-b.c_d.example.com": true, "_x.example.com": true, "xn--bcher-kva.example": true, "a.b": true,
		"": false, "com": false, "*": false, "*.": false, "*.com": false, "a.*.com": false, "Example.com": false, "example.com.": false,
		"exa mple.com": false, "-a.com": false, "a-.com": false, "192.0.2.1": false, "a..b": false, "bücher.example": false,
		strings.Repeat("a", 64) + ".com": false, strings.Repeat("a.", 126) + "com": false,
	} {
		if ValidName(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}

// asked is what a guest hears of a query that it sends to any name server.
type asked struct {
	code  dnsmessage.RCode
	addrs []netip.Addr
}

func query(t testing.TB, name string, typ dnsmessage.Type) []byte {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 7, RecursionDesired: true})
	must(t, errors.Join(b.StartQuestions(), b.Question(dnsmessage.Question{
		Name: dnsmessage.MustNewName(name + "."), Type: typ, Class: dnsmessage.ClassINET})))
	q, err := b.Finish()
	must(t, err)
	return q
}

// exchange sends a datagram from the guest's port 53 connection and gives the
// answer, or nil when none comes in time.
func (g *guest) exchange(t testing.TB, w *world, server string, datagram []byte, limit time.Duration) []byte {
	t.Helper()
	var out []byte
	must(t, inNetns(w.home, g.ns, func() error {
		c, err := net.Dial("udp4", server+":53")
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write(datagram); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		if n, err := c.Read(buf); err == nil {
			out = buf[:n]
		}
		return nil
	}))
	return out
}

func (g *guest) ask(t testing.TB, w *world, name string, typ dnsmessage.Type) asked {
	t.Helper()
	b := g.exchange(t, w, "8.8.8.8", query(t, name, typ), 10*time.Second)
	if len(b) > 512 {
		t.Errorf("an answer of %d bytes", len(b))
	}
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil || m.ID != 7 || !m.Response {
		t.Fatalf("%s: the answer is %x: %v", name, b, err)
	}
	a := asked{code: m.RCode}
	for _, r := range m.Answers {
		a.addrs = append(a.addrs, netip.AddrFrom4(r.Body.(*dnsmessage.AResource).A))
	}
	return a
}

// names is a table of names that counts who asked for what.
type names struct {
	mu    sync.Mutex
	asked []string
	table map[string][]string
}

func (n *names) lookup(_ context.Context, name string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, name)
	if name == "broken.test" {
		return nil, errors.New("no name server")
	}
	list, ok := n.table[name]
	if !ok {
		return nil, &net.DNSError{Name: name, IsNotFound: true}
	}
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out, nil
}

// A guest reaches the addresses of allowed names once it has asked for them,
// whichever name server it asks; it learns nothing of other names, and nothing
// private, and what was taken away is closed again.
func TestNamesOpenTheirAddresses(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	many := make([]string, 100)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}).String()
	}
	n := &names{table: map[string][]string{
		"www.allowed.test": {inetPublic, "10.99.0.1", "169.254.169.254"}, "a.below.test": {inetPublic},
		"below.test": {inetPublic}, "other.test": {inetPublic}, "many.below.test": many, "inner.below.test": {"192.168.77.1"},
	}}
	p := newTestPool(t, Options{Max: 2, Lookup: n.lookup})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	send := func(text string) { g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, text)) }
	closed := Egress{Deny: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Names: []string{"www.allowed.test", "*.below.test", "broken.test", "none.below.test"}}
	must(t, s.SetEgress(t.Context(), closed))

	send("before it is asked for")
	for name, want := range map[string]dnsmessage.RCode{
		"other.test": dnsmessage.RCodeRefused, "below.test": dnsmessage.RCodeRefused, "xbelow.test": dnsmessage.RCodeRefused,
		"allowed.test": dnsmessage.RCodeRefused, "broken.test": dnsmessage.RCodeServerFailure, "none.below.test": dnsmessage.RCodeNameError,
	} {
		if a := g.ask(t, w, name, dnsmessage.TypeA); a.code != want || len(a.addrs) != 0 {
			t.Errorf("%s: %v %v, want %v", name, a.code, a.addrs, want)
		}
	}
	if a := g.ask(t, w, "inner.below.test", dnsmessage.TypeA); a.code != 0 || len(a.addrs) != 0 {
		t.Errorf("a private address was told: %+v", a)
	}
	for _, typ := range []dnsmessage.Type{dnsmessage.TypeAAAA, dnsmessage.TypeTXT} {
		if a := g.ask(t, w, "www.allowed.test", typ); a.code != 0 || len(a.addrs) != 0 {
			t.Errorf("type %v: %+v", typ, a)
		}
	}
	send("after others were asked for")
	if a := g.ask(t, w, "many.below.test", dnsmessage.TypeA); len(a.addrs) != maxAnswer {
		t.Errorf("%d addresses", len(a.addrs))
	}
	for range 2 {
		if a := g.ask(t, w, "WWW.Allowed.Test", dnsmessage.TypeA); a.code != 0 || !slices.Equal(a.addrs, []netip.Addr{netip.MustParseAddr(inetPublic)}) {
			t.Fatalf("an allowed name: %+v", a)
		}
	}
	send("asked for")
	if got := w.arrived(t, "asked for"); len(got) != 0 {
		t.Errorf("arrived too early: %v", got)
	}
	n.mu.Lock()
	for _, name := range n.asked {
		if !strings.HasSuffix(name, ".below.test") && name != "www.allowed.test" && name != "broken.test" {
			t.Errorf("%s was looked up", name)
		}
	}
	n.mu.Unlock()

	// Another list closes what the first one opened, until it is asked for.
	must(t, s.SetEgress(t.Context(), Egress{Deny: closed.Deny, Names: []string{"a.below.test"}}))
	send("of a list that was")
	if a := g.ask(t, w, "www.allowed.test", dnsmessage.TypeA); a.code != dnsmessage.RCodeRefused {
		t.Errorf("a name that was taken away: %+v", a)
	}
	g.ask(t, w, "a.below.test", dnsmessage.TypeA)
	send("of the list that is")
	if got := w.arrived(t, "of the list that is"); len(got) != 0 {
		t.Errorf("arrived through an older list: %v", got)
	}
	// Without names nobody answers, and the guest's own server is as far as
	// the rules let it be.
	must(t, s.SetEgress(t.Context(), Egress{Deny: closed.Deny}))
	if b := g.exchange(t, w, GatewayAddr.String(), query(t, "a.below.test", dnsmessage.TypeA), time.Second/2); b != nil {
		t.Errorf("an answer without names: %x", b)
	}
}

// What is no query gets no answer and harms nothing, and the next one is
// answered.
func TestGarbageToTheResolver(t *testing.T) {
	w := newWorld(t)
	p := newTestPool(t, Options{Max: 2, Lookup: (&names{table: map[string][]string{"a.test": {inetPublic}}}).lookup})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	must(t, s.SetEgress(t.Context(), Egress{Names: []string{"a.test"}}))
	whole := query(t, "a.test", dnsmessage.TypeA)
	for n := range whole {
		must(t, inNetns(w.home, g.ns, func() error {
			c, err := net.Dial("udp4", "1.1.1.1:53")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(whole[:n])
			return err
		}))
	}
	if a := g.ask(t, w, "a.test", dnsmessage.TypeA); len(a.addrs) != 1 {
		t.Errorf("after garbage: %+v", a)
	}
	must(t, s.Release(t.Context()))
}

// TestASlotWithNamesIsTakenOver: the next process answers, and what the last
// one opened is closed until it is asked for again.
func TestASlotWithNamesIsTakenOver(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	n := &names{table: map[string][]string{"a.test": {inetPublic}}}
	o := Options{Max: 2, StateDir: t.TempDir(), Lookup: n.lookup}
	e := Egress{Names: []string{"a.test"}}
	p, err := NewPool(context.Background(), o)
	must(t, err)
	s := acquire(t, p)
	must(t, s.SetEgress(t.Context(), e))
	must(t, p.Close(context.Background(), []int{s.Index}))

	p = newTestPool(t, o)
	s, err = p.Adopt(t.Context(), "sandbox", s.Index)
	must(t, err)
	must(t, p.Sweep(t.Context()))
	g := w.newGuest(t, s)
	must(t, s.SetEgress(t.Context(), e))
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "before"))
	g.ask(t, w, "a.test", dnsmessage.TypeA)
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "after"))
	if got := w.arrived(t, "after"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
}

// FuzzQuery: a guest's datagrams are answered or not, never with more than they
// have, and never with success when no name is allowed.
func FuzzQuery(f *testing.F) {
	f.Add(query(f, "a.test", dnsmessage.TypeA))
	f.Add(query(f, strings.Repeat("a.", 100)+"test", dnsmessage.TypeAAAA))
	f.Add([]byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1})
	f.Add([]byte("\x0c00000000000\xc0\x000000")) // its name is the header
	f.Fuzz(func(t *testing.T, datagram []byte) {
		h, q, ok := parseQuery(datagram)
		if !ok {
			return
		}
		if h.RCode = (&resolver{}).judge(h, q, q.Name.String()); h.RCode == dnsmessage.RCodeSuccess {
			t.Errorf("%x is allowed", datagram)
		}
		b := packAnswer(h, q, nil)
		var m dnsmessage.Message
		if err := m.Unpack(b); err != nil || !m.Response || len(m.Answers) != 0 || len(b) > len(datagram) {
			t.Errorf("%x: answered with %x, %v", datagram, b, err)
		}
	})
}
