package hostnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestNothingIsLeft(t *testing.T) {
	w := newWorld(t)
	_ = w
	must(t, prepareNetnsDir()) // stays, as ip netns leaves it
	before := hostState(t)
	ctx := context.Background()
	p, err := NewPool(ctx, Options{Size: 2, Max: 5, StateDir: t.TempDir()})
	must(t, err)
	for i := range 20 {
		s, err := p.Acquire(ctx, fmt.Sprintf("sandbox%d", i))
		must(t, err)
		tap, err := s.OpenTap()
		must(t, err)
		must(t, tap.Close())
		must(t, s.Release(ctx))
		must(t, s.Release(ctx))
	}
	if hostState(t) == before {
		t.Error("the comparison sees nothing of a pool at work")
	}
	must(t, p.Close(ctx, nil))
	must(t, p.Close(ctx, nil))
	if after := hostState(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := p.Acquire(ctx, "late"); !errors.Is(err, ErrClosed) {
		t.Errorf("acquire from a closed pool: %v", err)
	}
}

func TestMaxAndCancel(t *testing.T) {
	p := newTestPool(t, Options{Size: 1, Max: 2})
	ctx := context.Background()
	a, b := acquire(t, p), acquire(t, p)
	if a.Index == b.Index {
		t.Fatal("one slot twice")
	}
	if _, err := p.Acquire(ctx, "third"); !errors.Is(err, ErrNoSlot) {
		t.Fatalf("third of two: %v", err)
	}
	must(t, a.Release(ctx))
	if _, err := a.OpenTap(); !errors.Is(err, ErrReleased) {
		t.Errorf("tap of a released slot: %v", err)
	}
	if _, err := a.Dial(ctx, 80); !errors.Is(err, ErrReleased) {
		t.Errorf("dial of a released slot: %v", err)
	}
	c := acquire(t, p) // waits for the clean-up
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := p.Acquire(cancelled, "gone"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled acquire: %v", err)
	}
	must(t, c.Release(ctx))
	must(t, b.Release(ctx))
}

// TestAbandonedWaiter: who stops waiting does not keep the slot.
func TestAbandonedWaiter(t *testing.T) {
	p := newTestPool(t, Options{Max: 1})
	for range 10 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		s, err := p.Acquire(ctx, "hasty")
		cancel()
		if err == nil {
			must(t, s.Release(context.Background()))
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	}
	must(t, acquire(t, p).Release(context.Background()))
}

func TestFiftyAtOnce(t *testing.T) {
	p := newTestPool(t, Options{Size: 4, Max: 50})
	var mu sync.Mutex
	seen := map[int]bool{}
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			s, err := p.Acquire(context.Background(), fmt.Sprintf("s%d", i))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if seen[s.Index] {
				t.Errorf("slot %d twice", s.Index)
			}
			seen[s.Index] = true
		})
	}
	wg.Wait()
	if len(seen) != 50 {
		t.Errorf("%d slots, want 50", len(seen))
	}
}

func TestTapIsExclusiveAndReopens(t *testing.T) {
	p := newTestPool(t, Options{Max: 1})
	s := acquire(t, p)
	for range 3 {
		f, err := s.OpenTap()
		must(t, err)
		if _, err := s.OpenTap(); !errors.Is(err, ErrTapBusy) {
			t.Errorf("second open: %v", err)
		}
		must(t, f.Close())
	}
}

// TestRestart: the next process adopts what lives, with its egress, repairs
// what is missing, and sweeps the rest.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	w.listenUDP(t, "inet", w.inet)
	dir, ctx := t.TempDir(), context.Background()
	p, err := NewPool(ctx, Options{Max: 4, StateDir: dir})
	must(t, err)
	kept, lost, swept := acquire(t, p), acquire(t, p), acquire(t, p)
	must(t, lost.SetEgress(ctx, Egress{}))
	if _, err := NewPool(ctx, Options{StateDir: dir}); err == nil {
		t.Error("two pools with one state directory")
	}
	g := w.newGuest(t, kept)
	must(t, p.Close(ctx, []int{kept.Index, lost.Index, swept.Index}))

	// The connection works on while nobody is there.
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "alone"))
	w.mail.until(t, "alone")

	// Damage everything that can be repaired.
	must(t, removeHostRules())
	must(t, removeHostLink(kept.Index))
	ns, err := openNetns(kept.Index)
	must(t, err)
	must(t, inNetns(w.home, ns, removeHostRules))
	// By the thread's namespace. A new one may have 1 from the initial one.
	must(t, inNetns(w.home, ns, func() error { return os.WriteFile(forwardFile, []byte("0"), 0) }))
	ns.Close()

	p = newTestPool(t, Options{Size: 1, Max: 4, StateDir: dir, Prefix: "10.77.0.0/20"})
	kept, err = p.Adopt(ctx, "kept", kept.Index)
	must(t, err)
	if _, err := p.Adopt(ctx, "again", kept.Index); err == nil {
		t.Error("adopted twice")
	}
	g.send(t, frame(guestMAC, "172.30.0.3", inetPublic, "spoofed"))
	g.send(t, frame(guestMAC, GuestAddr.String(), "10.99.0.1", "private"))
	g.send(t, frame(guestMAC, GuestAddr.String(), inetPublic, "adopted"))
	if got := w.arrived(t, "adopted"); len(got) != 0 {
		t.Errorf("arrived: %v", got)
	}
	lost, err = p.Adopt(ctx, "closed", lost.Index)
	must(t, err)
	if lost.Egress().AllowInternet {
		t.Error("adoption opened the egress")
	}
	for _, n := range []int{-1, 1 << 20, 3} {
		if _, err := p.Adopt(ctx, "none", n); err == nil {
			t.Errorf("adopted slot %d, which is not there", n)
		}
	}
	must(t, p.Sweep(ctx))
	if _, err := os.Stat(netnsPath(swept.Index)); err == nil {
		if s := p.slotOf(swept.Index); s == nil {
			t.Error("the slot that nobody adopted is still there")
		}
	}
	if _, err := p.Adopt(ctx, "late", swept.Index); err == nil {
		t.Error("adopted a slot that was swept")
	}
}

// slotOf finds a slot among those the pool made itself, or is making.
func (p *Pool) slotOf(n int) *Slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.ready {
		if s.Index == n {
			return s
		}
	}
	if p.building > 0 {
		return &Slot{Index: n}
	}
	return p.used[n]
}

func TestAdoptLostTap(t *testing.T) {
	w := newWorld(t)
	dir, ctx := t.TempDir(), context.Background()
	p, err := NewPool(ctx, Options{Max: 1, StateDir: dir})
	must(t, err)
	s := acquire(t, p)
	must(t, p.Close(ctx, []int{s.Index}))
	ns, err := openNetns(s.Index)
	must(t, err)
	must(t, inNetns(w.home, ns, func() error {
		tap, err := netlink.LinkByName(TapName)
		if err != nil {
			return err
		}
		return netlink.LinkDel(tap)
	}))
	ns.Close()
	p = newTestPool(t, Options{Max: 1, StateDir: dir})
	if _, err := p.Adopt(ctx, "lost", s.Index); !errors.Is(err, ErrSlotLost) {
		t.Fatalf("adopt without a tap: %v", err)
	}
	must(t, p.Sweep(ctx))
	acquire(t, p)
}

// TestCutOffSetup: whatever step a build died after, the next process cleans up.
func TestCutOffSetup(t *testing.T) {
	w := newWorld(t)
	must(t, prepareNetnsDir())
	before := hostState(t)
	dir, ctx := t.TempDir(), context.Background()
	owner, lock, err := lockStateDir(dir)
	must(t, err)
	lock.Close()
	wire := func(n int, ns *os.File) *wiring {
		l, _ := newLayout(DefaultPrefix)
		host, inside := l.addrs(n)
		return &wiring{index: n, host: host, inside: inside, home: w.home, ns: ns}
	}
	steps := []func(n int) error{
		func(n int) error { return os.WriteFile(netnsPath(n), nil, 0o444) },
		func(n int) error { ns, err := createNetns(w.home, n, owner); ns.Close(); return err },
		func(n int) error {
			ns, err := createNetns(w.home, n, owner)
			must(t, err)
			defer ns.Close()
			return inNetns(w.home, ns, func() error { _, err := wire(n, ns).findTap(); return err })
		},
		func(n int) error {
			ns, err := createNetns(w.home, n, owner)
			must(t, err)
			defer ns.Close()
			return inNetns(w.home, ns, wire(n, ns).ensureInside)
		},
		func(n int) error { // a clean-up, cut off
			ns, err := createNetns(w.home, n, owner)
			must(t, err)
			defer ns.Close()
			return errors.Join(wire(n, ns).ensure(), removeHostLink(n))
		},
	}
	for n, step := range steps {
		must(t, step(n))
	}
	p, err := NewPool(ctx, Options{Max: len(steps), StateDir: dir})
	must(t, err)
	must(t, p.Sweep(ctx))
	for range steps {
		acquire(t, p)
	}
	must(t, p.Close(ctx, nil))
	if after := hostState(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// TestTwoPools: pools with state directories of their own share a host, its
// table and its slot numbers, and leave each other's slots alone.
func TestTwoPools(t *testing.T) {
	w := newWorld(t)
	w.serveTCP(t, w.inet, 80)
	ctx := context.Background()
	a := newTestPool(t, Options{Size: 1, Max: 3})
	sa := acquire(t, a)
	dirB := t.TempDir()
	b, err := NewPool(ctx, Options{Max: 3, Prefix: "10.214.0.0/16", StateDir: dirB})
	must(t, err)
	must(t, b.Sweep(ctx))
	sb, err := b.Acquire(ctx, "other")
	must(t, err)
	if sa.Index == sb.Index {
		t.Fatal("one number in two pools")
	}
	if _, err := b.Adopt(ctx, "thief", sa.Index); err == nil {
		t.Error("adopted another pool's slot")
	}
	ga, gb := w.newGuest(t, sa), w.newGuest(t, sb)
	for _, g := range []*guest{ga, gb} {
		_, err := w.dialTCP(g.ns, inetPublic+":80", 3*time.Second)
		must(t, err)
	}
	must(t, b.Close(ctx, nil))
	_, err = w.dialTCP(ga.ns, inetPublic+":80", 3*time.Second)
	must(t, err)
}

func TestForeignNumbersAreSkipped(t *testing.T) {
	a := newTestPool(t, Options{Max: 2})
	acquire(t, a)
	b := newTestPool(t, Options{Max: 2})
	s := acquire(t, b)
	if _, err := b.Acquire(context.Background(), "more"); !errors.Is(err, ErrNoSlot) {
		t.Errorf("with all numbers taken: %v", err)
	}
	if s.Index != 1 {
		t.Errorf("got slot %d, want 1", s.Index)
	}
	must(t, a.Close(context.Background(), nil))
	acquire(t, b) // number 0 again
}

func TestReadOnlySysctl(t *testing.T) {
	needHost(t)
	must(t, unix.Mount("/proc/sys", "/proc/sys", "none", unix.MS_BIND, ""))
	defer unix.Unmount("/proc/sys", unix.MNT_DETACH)
	must(t, unix.Mount("", "/proc/sys", "none", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	_, err := NewPool(context.Background(), Options{StateDir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "sysctl -w net.ipv4.ip_forward=1") {
		t.Errorf("error does not say what to do: %v", err)
	}
}

func TestBadOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"no directory":   {},
		"no prefix":      {StateDir: "x", Prefix: "ten"},
		"IPv6":           {StateDir: "x", Prefix: "fd00::/64"},
		"public":         {StateDir: "x", Prefix: "203.0.113.0/24"},
		"half public":    {StateDir: "x", Prefix: "172.0.0.0/8"},
		"the guests'":    {StateDir: "x", Prefix: "172.30.0.0/16"},
		"too small":      {StateDir: "x", Prefix: "10.0.0.0/31"},
		"max too large":  {StateDir: "x", Prefix: "10.0.0.0/29", Max: 3},
		"negative max":   {StateDir: "x", Max: -1},
		"negative size":  {StateDir: "x", Size: -1},
		"size above max": {StateDir: "x", Size: 2, Max: 1},
	} {
		if o.StateDir != "" {
			o.StateDir = t.TempDir()
		}
		if p, err := newPool(o); err == nil {
			p.home.Close()
			p.lock.Close()
			t.Errorf("%s: accepted", name)
		}
	}
	p := &Pool{}
	for _, id := range []string{"", "A", "a-b", "../x", strings.Repeat("a", 65)} {
		if _, err := p.Acquire(context.Background(), id); err == nil {
			t.Errorf("sandbox id %q accepted", id)
		}
	}
}

func TestPrefixInUse(t *testing.T) {
	w := newWorld(t)
	_ = w
	addAddr(t, "up0", "10.55.3.1/24")
	_, err := NewPool(context.Background(), Options{Prefix: "10.55.0.0/16", StateDir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "up0") {
		t.Errorf("prefix of another link: %v", err)
	}
	acquire(t, newTestPool(t, Options{Max: 1}))
	if _, err := NewPool(context.Background(), Options{Prefix: "10.208.0.0/12", StateDir: t.TempDir()}); err == nil {
		t.Error("a prefix that gives another pool's addresses to other slots")
	}
	newTestPool(t, Options{Max: 4, StateDir: t.TempDir()}) // the same prefix is fine
}

func TestForeignForwardPolicy(t *testing.T) {
	needHost(t)
	c, err := nftables.New()
	must(t, err)
	drop := nftables.ChainPolicyDrop
	table := c.AddTable(&nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4})
	c.AddChain(&nftables.Chain{Name: "FORWARD", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
	must(t, c.Flush())
	defer func() { c.DelTable(table); c.Flush() }()
	var log strings.Builder
	newTestPool(t, Options{StateDir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if !strings.Contains(log.String(), "filter FORWARD") {
		t.Errorf("no warning: %s", log.String())
	}
}

func TestLayout(t *testing.T) {
	l, err := newLayout("10.213.0.0/16")
	must(t, err)
	seen := map[netip.Prefix]bool{}
	for n := range l.slots() {
		host, inside := l.addrs(n)
		if host.Masked() != inside.Masked() || !l.prefix.Contains(inside.Addr()) || seen[host.Masked()] || host == inside {
			t.Fatalf("slot %d: %v %v", n, host, inside)
		}
		seen[host.Masked()] = true
	}
	if l.slots() != 16384 {
		t.Errorf("%d slots in a /16", l.slots())
	}
	for _, name := range []string{"wrenn-", "wrenn-01", "wrenn--1", "wrenn-1x", "wrenn-99999999", "other-1"} {
		if n, ok := numbered(name, netnsPrefix); ok {
			t.Errorf("%q is number %d", name, n)
		}
	}
}

// TestBuildFails: the reason reaches who waits, nothing is left of the attempt,
// and the stock is filled when it works again.
func TestBuildFails(t *testing.T) {
	needHost(t)
	must(t, prepareNetnsDir())
	before := hostState(t)
	must(t, unix.Mount("/dev/null", "/dev/net/tun", "none", unix.MS_BIND, ""))
	broken := true
	fix := func() {
		if broken {
			must(t, unix.Unmount("/dev/net/tun", unix.MNT_DETACH))
			broken = false
		}
	}
	defer fix()
	ctx := context.Background()
	p := newTestPool(t, Options{Size: 1, Max: 2})
	if _, err := p.Acquire(ctx, "early"); err == nil || !strings.Contains(err.Error(), TapName) {
		t.Errorf("acquire without a tun device: %v", err)
	}
	p.await(t, func() bool { return p.building == 0 })
	fix()
	acquire(t, p)
	p.mu.Lock()
	p.timer.Reset(0) // instead of the second that it would take
	p.mu.Unlock()
	p.await(t, func() bool { return len(p.ready) == 1 })
	must(t, p.Close(ctx, nil))
	if after := hostState(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// await polls the pool's state, for which it reports no event.
func (p *Pool) await(t *testing.T, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		p.mu.Lock()
		ok := cond()
		p.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the pool does not get there")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestKilled kills a process that makes and releases slots, wherever it is,
// and lets the next one clean up.
func TestKilled(t *testing.T) {
	needHost(t)
	must(t, prepareNetnsDir())
	before := hostState(t)
	dir, ctx := t.TempDir(), context.Background()
	for _, delay := range []time.Duration{3, 9, 15, 30, 47} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), churnEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		_, err = out.Read(make([]byte, 1)) // it has begun
		must(t, err)
		time.Sleep(delay * time.Millisecond) // any moment will do
		must(t, cmd.Process.Kill())
		cmd.Wait()
		p, err := NewPool(ctx, Options{Max: 8, StateDir: dir})
		must(t, err)
		must(t, p.Sweep(ctx))
		must(t, acquire(t, p).Release(ctx))
		must(t, p.Close(ctx, nil))
		if after := hostState(t); after != before {
			t.Fatalf("after %v ms, before:\n%s\nafter:\n%s", int(delay), before, after)
		}
	}
}

func churn(dir string) error {
	ctx := context.Background()
	p, err := NewPool(ctx, Options{Size: 4, Max: 8, StateDir: dir})
	if err != nil {
		return err
	}
	fmt.Println("begun")
	for range 1000 {
		s, err := p.Acquire(ctx, "churn")
		if err != nil {
			return err
		}
		s.Release(ctx)
	}
	return nil
}
