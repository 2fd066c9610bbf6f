package hostnet

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The test's internet: a namespace behind the host's link up0 that also answers
// for addresses a guest must never reach, so that only rules keep it away.
const (
	hostPublic = "203.0.113.1"
	inetPublic = "203.0.113.2"
)

var forbidden = []string{"10.99.0.1", "100.64.0.1", "169.254.169.254", "172.16.5.5", "172.31.0.1", "192.168.77.1",
	"192.0.0.10", "198.18.0.1", "198.19.255.254"}

type world struct {
	inet      *os.File // namespace
	home      *os.File
	mail      *mailbox // UDP datagrams that arrived anywhere they were listened for
	listeners []*os.File
}

// newWorld plugs the internet in; the host's own state is as before at the end.
func newWorld(t testing.TB) *world {
	t.Helper()
	needHost(t)
	home, err := openHome()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{home: home, inet: newNS(t, home), mail: &mailbox{got: make(chan string, 1000)}}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(w.inet.Fd()))}))
	t.Cleanup(func() {
		if l, err := netlink.LinkByName("up0"); err == nil {
			netlink.LinkDel(l)
		}
		home.Close()
	})
	addAddr(t, "up0", hostPublic+"/24")
	must(t, inNetns(home, w.inet, func() error {
		// Setting lo up gives it 127.0.0.1.
		addAddr(t, "eth0", inetPublic+"/24")
		for _, a := range forbidden {
			addAddr(t, "lo", a+"/32")
		}
		return nil
	}))
	up0, err := netlink.LinkByName("up0")
	must(t, err)
	// The carrier needs both ends up, so the route comes last.
	must(t, netlink.RouteReplace(&netlink.Route{LinkIndex: up0.Attrs().Index, Gw: net.ParseIP(inetPublic),
		Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}}))
	return w
}

func newNS(t testing.TB, home *os.File) *os.File {
	t.Helper()
	var ns *os.File
	must(t, onThread(home, func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			ns, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	}))
	t.Cleanup(func() { ns.Close() })
	return ns
}

// addAddr works in the calling thread's namespace.
func addAddr(t testing.TB, link, cidr string) {
	l, err := netlink.LinkByName(link)
	must(t, err)
	a, err := netlink.ParseAddr(cidr)
	must(t, err)
	must(t, netlink.AddrAdd(l, a))
	must(t, netlink.LinkSetUp(l))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mailbox collects datagrams; each carries its own name as its text.
type mailbox struct{ got chan string }

// listenUDP puts every datagram that reaches ns on port 9999 into the mailbox,
// as "where<text from source".
func (w *world) listenUDP(t testing.TB, where string, ns *os.File) {
	t.Helper()
	var pc net.PacketConn
	must(t, inNetns(w.home, ns, func() (err error) {
		pc, err = net.ListenPacket("udp4", "0.0.0.0:9999")
		return err
	}))
	w.listeners = append(w.listeners, ns)
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 2000)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(from.String())
			w.mail.got <- fmt.Sprintf("%s<%s from %s", where, buf[:n], host)
		}
	})
	t.Cleanup(func() { pc.Close(); wg.Wait() })
}

// until returns what arrived before the datagram that contains sentinel.
func (m *mailbox) until(t testing.TB, sentinel string) []string {
	t.Helper()
	var got []string
	for {
		select {
		case s := <-m.got:
			if strings.Contains(s, "<"+sentinel+" ") {
				return append(got, s)
			}
			got = append(got, s)
		case <-time.After(time.Minute):
			t.Fatalf("%q never arrived; others: %v", sentinel, got)
		}
	}
}

// arrived returns what arrived anywhere, once the sentinel has. Each listener
// then gets a datagram from its own namespace, behind all that is in its queue.
func (w *world) arrived(t testing.TB, sentinel string) []string {
	t.Helper()
	got := w.mail.until(t, sentinel)
	got = got[:len(got)-1]
	for i, ns := range w.listeners {
		last := fmt.Sprint("last", i)
		w.sendUDP(t, ns, "127.0.0.1", last)
		more := w.mail.until(t, last)
		got = append(got, more[:len(more)-1]...)
	}
	return got
}

// sendUDP sends one datagram with the given text from a namespace.
func (w *world) sendUDP(t testing.TB, ns *os.File, to, text string) {
	t.Helper()
	must(t, inNetns(w.home, ns, func() error {
		c, err := net.Dial("udp4", net.JoinHostPort(to, "9999"))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(text))
		return err
	}))
}

// serveTCP answers each connection with its remote address.
func (w *world) serveTCP(t testing.TB, ns *os.File, port int) {
	t.Helper()
	var l net.Listener
	must(t, inNetns(w.home, ns, func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
		return err
	}))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, c.RemoteAddr())
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

func (w *world) dialTCP(ns *os.File, addr string, limit time.Duration) (answer string, err error) {
	err = inNetns(w.home, ns, func() error {
		c, err := net.DialTimeout("tcp4", addr, limit)
		if err != nil {
			return err
		}
		defer c.Close()
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		answer = string(buf[:n])
		return err
	})
	return answer, err
}

// guest plays the VM: a namespace whose own tap is wired, frame by frame, to
// the slot's tap, as QEMU does it.
type guest struct {
	ns  *os.File
	nic *os.File
	tap *os.File // the slot's
}

func (w *world) newGuest(t testing.TB, s *Slot) *guest {
	t.Helper()
	g := w.unpluggedGuest(t)
	g.plug(t, s)
	return g
}

func (w *world) unpluggedGuest(t testing.TB) *guest {
	t.Helper()
	g := &guest{ns: newNS(t, w.home)}
	must(t, inNetns(w.home, g.ns, func() error {
		fd, err := attachTap()
		if err != nil {
			return err
		}
		g.nic = os.NewFile(uintptr(fd), "guest nic")
		l, err := netlink.LinkByName(TapName)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(l, guestMAC); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		addAddr(t, TapName, GuestAddr.String()+"/30")
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: GatewayAddr.AsSlice(),
			Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}})
	}))
	t.Cleanup(func() { g.nic.Close() })
	return g
}

func (g *guest) plug(t testing.TB, s *Slot) {
	t.Helper()
	var err error
	g.tap, err = s.OpenTap()
	must(t, err)
	var wg sync.WaitGroup
	pump := func(dst, src *os.File) {
		buf := make([]byte, 65536)
		for {
			n, err := src.Read(buf)
			if err != nil {
				return
			}
			dst.Write(buf[:n])
		}
	}
	wg.Go(func() { pump(g.tap, g.nic) })
	wg.Go(func() { pump(g.nic, g.tap) })
	t.Cleanup(func() { g.tap.Close(); g.nic.Close(); wg.Wait() })
	// A link drops what it is given until the kernel has noticed its carrier.
	deadline := time.Now().Add(time.Minute)
	for _, ns := range []*os.File{g.ns, s.ns} {
		for up := false; !up; time.Sleep(time.Millisecond) {
			must(t, inNetns(s.pool.home, ns, func() error {
				l, err := netlink.LinkByName(TapName)
				// A tap that never was without a user is in state unknown.
				up = err == nil && (l.Attrs().OperState == netlink.OperUp || l.Attrs().OperState == netlink.OperUnknown)
				return err
			}))
			if time.Now().After(deadline) {
				t.Fatal("the guest's link does not come up")
			}
		}
	}
}

// frame is an Ethernet frame with a UDP datagram to port 9999 in it, behind
// the tap's header.
func frame(srcMAC net.HardwareAddr, src, dst, text string) []byte {
	udp := binary.BigEndian.AppendUint16(nil, 4444)
	udp = binary.BigEndian.AppendUint16(udp, 9999)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(text)))
	udp = append(udp, 0, 0) // no checksum
	udp = append(udp, text...)
	ip := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(udp)))
	ip = append(ip, netip.MustParseAddr(src).AsSlice()...)
	ip = append(ip, netip.MustParseAddr(dst).AsSlice()...)
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	return slices.Concat(make([]byte, vnetHdrLen), gatewayMAC, srcMAC, []byte{8, 0}, ip, udp)
}

// hostState is what a pool may not leave changed.
func hostState(t testing.TB) string {
	t.Helper()
	var out []string
	links, err := listLinks()
	must(t, err)
	for _, l := range links {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		must(t, err)
		out = append(out, fmt.Sprint("link ", l.Attrs().Name, " ", len(addrs), " addresses"))
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	must(t, err)
	for _, r := range routes {
		out = append(out, "route "+r.String())
	}
	c, err := nftables.New()
	must(t, err)
	tables, err := c.ListTables()
	must(t, err)
	for _, tab := range tables {
		out = append(out, "table "+tab.Name)
	}
	names, err := os.ReadDir(netnsDir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, n := range names {
		out = append(out, "netns "+n.Name())
	}
	forward, err := os.ReadFile(forwardFile)
	must(t, err)
	out = append(out, "ip_forward "+strings.TrimSpace(string(forward)))
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	nets := 0
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(target, "net:") {
			nets++
		}
	}
	out = append(out, fmt.Sprint("open namespaces ", nets))
	return strings.Join(out, "\n")
}

func newTestPool(t testing.TB, o Options) *Pool {
	t.Helper()
	needHost(t)
	if o.StateDir == "" {
		o.StateDir = t.TempDir()
	}
	p, err := NewPool(context.Background(), o)
	must(t, err)
	t.Cleanup(func() {
		if err := p.Close(context.Background(), nil); err != nil {
			t.Error(err)
		}
	})
	return p
}

func acquire(t testing.TB, p *Pool) *Slot {
	t.Helper()
	s, err := p.Acquire(context.Background(), "sandbox")
	must(t, err)
	return s
}
