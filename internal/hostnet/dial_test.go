package hostnet

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime/pprof"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestDialParallel(t *testing.T) {
	w := newWorld(t)
	p := newTestPool(t, Options{Max: 1})
	s := acquire(t, p)
	g := w.newGuest(t, s)
	w.serveTCP(t, g.ns, 7)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	before := pprof.Lookup("threadcreate").Count()
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			c, err := s.Dial(ctx, 7)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			buf := make([]byte, 100)
			if n, err := c.Read(buf); n == 0 {
				t.Error("no answer:", err)
			}
		})
	}
	wg.Wait()
	if made := pprof.Lookup("threadcreate").Count() - before; made > maxThreads+24 {
		t.Errorf("%d threads made by 200 dials", made)
	}
	// Everything is back in the host's namespace.
	var home, now syscall.Stat_t
	must(t, syscall.Stat("/proc/self/ns/net", &home))
	tasks, err := os.ReadDir("/proc/self/task")
	must(t, err)
	for _, task := range tasks {
		if syscall.Stat("/proc/self/task/"+task.Name()+"/ns/net", &now) == nil && now.Ino != home.Ino {
			t.Errorf("thread %s is in another namespace", task.Name())
		}
	}
}

func TestDialErrors(t *testing.T) {
	w := newWorld(t)
	p := newTestPool(t, Options{Max: 1})
	s := acquire(t, p)
	ctx := context.Background()
	for _, port := range []int{-1, 0, 65536} {
		if _, err := s.Dial(ctx, port); err == nil {
			t.Errorf("dialed port %d", port)
		}
	}
	// No guest yet: silence, until the context ends.
	short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := s.Dial(short, 7); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial into silence: %v", err)
	}
	if took := time.Since(start); took > time.Minute { // the kernel gives up after two
		t.Errorf("cancelled only after %v", took)
	}
	w.newGuest(t, s)
	if _, err := s.Dial(ctx, 7); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial to a closed port: %v", err)
	}
}

// TestDialWaitsForTheGuest: a guest that comes up is found at once, not at the
// next retransmission. A busy machine may miss that; a dial that waits for the
// retransmission misses it always.
func TestDialWaitsForTheGuest(t *testing.T) {
	w := newWorld(t)
	p := newTestPool(t, Options{Max: 4})
	var took []time.Duration
	for range 4 {
		d := dialUntilGuest(t, w, acquire(t, p))
		if d <= 1500*time.Millisecond {
			return
		}
		took = append(took, d)
	}
	t.Errorf("found the guest only after %v", took)
}

// dialUntilGuest returns how long after a guest has come up a dial that was
// under way before finds it.
func dialUntilGuest(t *testing.T, w *world, s *Slot) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		c, err := s.Dial(ctx, 7)
		done <- result{c, err}
	}()
	select {
	case r := <-done:
		t.Fatalf("dial ended without a guest: %v", r.err)
	case <-time.After(1200 * time.Millisecond): // the second SYN would be due, the third is not
	}
	// A port that is not served would refuse, which ends a dial.
	g := w.unpluggedGuest(t)
	w.serveTCP(t, g.ns, 7)
	g.plug(t, s)
	start := time.Now()
	r := <-done
	must(t, r.err)
	r.conn.Close()
	return time.Since(start)
}
