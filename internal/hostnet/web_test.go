package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// told is a Web that tells a guest where it wanted to go, and tries ways out.
type told struct {
	mu  sync.Mutex
	way Way
}

func (w *told) Open(way Way) WebHandler {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.way = way
	return w
}

func (w *told) Handle(c net.Conn, to netip.AddrPort) {
	fmt.Fprintf(c, "for %v", to)
	c.Close()
}

func (w *told) Close() {}

// reach is how a connection to an address, over the way out, ends.
func (w *told) reach(addr string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	w.mu.Lock()
	way := w.way
	w.mu.Unlock()
	c, err := way.Dial(ctx, netip.MustParseAddrPort(addr))
	if err == nil {
		c.Close()
	}
	return err
}

var everything = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}

// A guest's web connections are taken where it may make them, all others go
// where they went; and what is sent on in its place reaches no more than it.
func TestWebConnectionsAreTaken(t *testing.T) {
	w := newWorld(t)
	for _, port := range []int{80, 443, 8080, webListen} {
		w.serveTCP(t, w.inet, port)
	}
	p := newTestPool(t, Options{Max: 2})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	web := &told{}
	must(t, s.SetEgress(t.Context(), Egress{AllowInternet: true, Web: web}))
	for _, addr := range []string{inetPublic + ":80", inetPublic + ":443", "198.51.100.7:443"} {
		if got, err := w.dialTCP(g.ns, addr, 5*time.Second); err != nil || got != "for "+addr {
			t.Errorf("%s: %q, %v", addr, got, err)
		}
	}
	if got, err := w.dialTCP(g.ns, inetPublic+":8080", 5*time.Second); err != nil || !strings.HasPrefix(got, hostPublic) {
		t.Errorf("another port: %q, %v", got, err)
	}
	for _, addr := range append(forbidden, GatewayAddr.String()) {
		for _, port := range []string{":443", fmt.Sprint(":", webListen)} {
			if got, err := w.dialTCP(g.ns, addr+port, time.Second/4); err == nil {
				t.Errorf("%s answers %q", addr+port, got)
			}
		}
		if err := web.reach(addr + ":443"); err == nil {
			t.Errorf("the way out leads to %s", addr)
		}
	}
	if err := web.reach(inetPublic + ":443"); err != nil {
		t.Errorf("the way out: %v", err)
	}

	// What is denied is neither taken nor reached in the guest's place.
	must(t, s.SetEgress(t.Context(), Egress{AllowInternet: true, Deny: []netip.Prefix{netip.MustParsePrefix(inetPublic + "/32")}, Web: web}))
	if got, err := w.dialTCP(g.ns, inetPublic+":443", time.Second/4); err == nil {
		t.Errorf("what is denied answers %q", got)
	}
	if err := web.reach(inetPublic + ":443"); err == nil {
		t.Error("the way out leads to what is denied")
	}
	// Without a Web the connections are the guest's own again.
	must(t, s.SetEgress(t.Context(), Egress{AllowInternet: true}))
	if got, err := w.dialTCP(g.ns, inetPublic+":80", 5*time.Second); err != nil || !strings.HasPrefix(got, hostPublic) {
		t.Errorf("without a Web: %q, %v", got, err)
	}
	must(t, s.Release(t.Context()))
	if err := web.reach(inetPublic + ":443"); !errors.Is(err, ErrReleased) {
		t.Errorf("the way out of a released slot: %v", err)
	}
}

// The way out finds names as the host sees them, nothing private among them,
// and opens what the guest may reach by name.
func TestTheWayOutLooksNamesUp(t *testing.T) {
	w := newWorld(t)
	w.serveTCP(t, w.inet, 443)
	n := &names{table: map[string][]string{"api.test.example": {"10.99.0.1", inetPublic}, "inner.test.example": {"10.99.0.1"}, "other.example": {inetPublic}}}
	p := newTestPool(t, Options{Max: 2, Lookup: n.lookup})
	s := acquire(t, p)
	web := &told{}
	must(t, s.SetEgress(t.Context(), Egress{Deny: everything, Names: []string{"*.test.example"}, Web: web}))
	way := wayOut{s}
	if got, err := way.Lookup(t.Context(), "other.example"); err != nil || len(got) != 1 {
		t.Errorf("another name: %v, %v", got, err)
	}
	if err := web.reach(inetPublic + ":443"); err == nil {
		t.Error("the look-up of a name that is not allowed opened its address")
	}
	if got, err := way.Lookup(t.Context(), "inner.test.example"); err != nil || len(got) != 0 {
		t.Errorf("a private address is found: %v, %v", got, err)
	}
	if got, err := way.Lookup(t.Context(), "api.test.example"); err != nil || len(got) != 1 || got[0].String() != inetPublic {
		t.Fatalf("an allowed name: %v, %v", got, err)
	}
	if err := web.reach(inetPublic + ":443"); err != nil {
		t.Errorf("the address of an allowed name: %v", err)
	}
}

// A guest that opens more connections than it may has the others closed, and
// all of them end with the slot.
func TestWebConnectionsAreBounded(t *testing.T) {
	w := newWorld(t)
	p := newTestPool(t, Options{Max: 2})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	hold := &holding{held: make(chan net.Conn, maxWeb+10)}
	must(t, s.SetEgress(t.Context(), Egress{AllowInternet: true, Web: hold}))
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	must(t, inNetns(w.home, g.ns, func() error {
		for range maxWeb + 1 {
			c, err := net.DialTimeout("tcp4", inetPublic+":443", 5*time.Second)
			if err != nil {
				return err
			}
			conns = append(conns, c)
		}
		return nil
	}))
	_ = conns[maxWeb].SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := conns[maxWeb].Read(make([]byte, 1)); n != 0 || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		t.Errorf("one connection too many: %d bytes, %v", n, err)
	}
	must(t, s.Release(t.Context())) // waits for those that are handled
	if len(hold.held) != maxWeb {
		t.Errorf("%d were handled", len(hold.held))
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// holding keeps connections until it is closed.
type holding struct {
	held chan net.Conn
	once sync.Once
	done chan struct{}
}

func (h *holding) Open(Way) WebHandler { h.done = make(chan struct{}); return h }

func (h *holding) Handle(c net.Conn, _ netip.AddrPort) {
	defer c.Close()
	h.held <- c
	<-h.done
}

func (h *holding) Close() { h.once.Do(func() { close(h.done) }) }
