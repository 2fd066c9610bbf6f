package hostnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
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

// TestSlotsInStockArePrepared: before anybody has one, and vacated after
// somebody had it. Who waits for a slot does not wait for its preparation.
func TestSlotsInStockArePrepared(t *testing.T) {
	prepared, vacated := make(chan int, 8), make(chan int, 8)
	o := Options{Size: 1, Max: 1, Vacate: func(n int) { vacated <- n }}
	o.Prepare = func(netns string, n int) {
		if _, err := os.Stat(netns); err != nil || netns != netnsPath(n) {
			t.Errorf("slot %d is prepared in %s: %v", n, netns, err)
		}
		prepared <- n
	}
	p := newTestPool(t, o)
	first := <-prepared
	s := acquire(t, p)
	if s.Index != first {
		t.Errorf("slot %d, want %d", s.Index, first)
	}
	must(t, s.Release(context.Background()))
	if n := <-vacated; n != first {
		t.Errorf("slot %d is vacated, want %d", n, first)
	}
	if n := <-prepared; n != first {
		t.Errorf("slot %d is prepared, want %d again", n, first)
	}

	o.Size, o.Max, o.Prefix = 0, 2, "10.214.0.0/16"
	must(t, acquire(t, newTestPool(t, o)).Release(context.Background()))
	<-vacated
	select {
	case n := <-prepared:
		t.Errorf("slot %d was prepared for somebody who waited", n)
	default:
	}
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
	deadline := time.Now().Add(time.Minute)
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
