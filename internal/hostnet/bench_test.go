package hostnet

import (
	"context"
	"testing"

	"github.com/vishvananda/netlink"
)

// BenchmarkCreate: a slot from nothing, and BenchmarkDestroy its end. What a
// release and refill cost in the background.
func BenchmarkCreate(b *testing.B) {
	p := newTestPool(b, Options{Max: 1})
	for b.Loop() {
		s, err := p.create(0)
		must(b, err)
		b.StopTimer()
		s.detach()
		must(b, destroy(0))
		b.StartTimer()
	}
}

func BenchmarkDestroy(b *testing.B) {
	p := newTestPool(b, Options{Max: 1})
	for b.Loop() {
		b.StopTimer()
		s, err := p.create(0)
		must(b, err)
		s.detach()
		b.StartTimer()
		must(b, destroy(0))
	}
}

// BenchmarkCleanInPlace is the alternative to destroying a released slot that
// ADR 5 weighs: forget connections and neighbours, keep the rest.
func BenchmarkCleanInPlace(b *testing.B) {
	p := newTestPool(b, Options{Max: 1})
	s := acquire(b, p)
	for b.Loop() {
		must(b, s.in(func() error {
			if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
				return err
			}
			neighbours, err := netlink.NeighList(0, netlink.FAMILY_ALL)
			must(b, err)
			for _, n := range neighbours {
				if n.State != netlink.NUD_PERMANENT && n.State != netlink.NUD_NOARP {
					must(b, netlink.NeighDel(&n))
				}
			}
			return nil
		}))
	}
}

// BenchmarkAcquirePrepared: what a resume waits for.
func BenchmarkAcquirePrepared(b *testing.B) {
	p := newTestPool(b, Options{Size: 1, Max: 1})
	ctx := context.Background()
	s := acquire(b, p)
	for b.Loop() {
		b.StopTimer()
		p.mu.Lock()
		delete(p.used, s.Index)
		p.ready = append(p.ready, s)
		p.mu.Unlock()
		b.StartTimer()
		var err error
		s, err = p.Acquire(ctx, "sandbox")
		must(b, err)
	}
}

func BenchmarkOpenTap(b *testing.B) {
	p := newTestPool(b, Options{Max: 1})
	s := acquire(b, p)
	for b.Loop() {
		f, err := s.OpenTap()
		must(b, err)
		f.Close()
	}
}

// BenchmarkAdopt: per sandbox that lives on when the process starts again.
func BenchmarkAdopt(b *testing.B) {
	p := newTestPool(b, Options{Max: 1})
	s := acquire(b, p)
	for b.Loop() {
		r, err := p.repair(s.Index)
		must(b, err)
		r.detach()
	}
}

func BenchmarkDial(b *testing.B) {
	w := newWorld(b)
	p := newTestPool(b, Options{Max: 1})
	s := acquire(b, p)
	g := w.newGuest(b, s)
	w.serveTCP(b, g.ns, 7)
	for b.Loop() {
		c, err := s.Dial(context.Background(), 7)
		must(b, err)
		c.Close()
	}
}

// BenchmarkSocket: the part of Dial that holds a thread.
func BenchmarkSocket(b *testing.B) {
	p := newTestPool(b, Options{Max: 1})
	s := acquire(b, p)
	for b.Loop() {
		must(b, s.in(func() error { return nil }))
	}
}
