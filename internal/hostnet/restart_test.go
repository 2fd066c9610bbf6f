package hostnet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

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
