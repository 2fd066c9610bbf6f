package pager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
)

// tightDisk is a Device in memory on a host's disk that is full, or has room.
type tightDisk struct {
	mu      sync.Mutex
	full    error
	written []byte
	tries   int
}

func (d *tightDisk) setFull(err error) { d.mu.Lock(); d.full = err; d.mu.Unlock() }

func (d *tightDisk) do(p []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tries++
	if d.full != nil {
		return fmt.Errorf("write: %w", d.full)
	}
	d.written = append(d.written, p...)
	return nil
}

func (d *tightDisk) Owned(off, n int64) bool                  { return off >= 1000 }
func (d *tightDisk) Size() int64                              { return 1 << 20 }
func (d *tightDisk) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (d *tightDisk) WriteAt(p []byte, off int64) (int, error) { return len(p), d.do(p) }
func (d *tightDisk) Zero(off, n int64) error                  { return d.do([]byte{0}) }
func (d *tightDisk) Flush() error                             { return d.do([]byte{'F'}) }

// tight makes a disk that is full and tells on waits what it says of itself.
func tight(t *testing.T, ctx context.Context, full error) (d *tightDisk, r *roomy, waits chan bool) {
	d, waits = &tightDisk{full: full}, make(chan bool, 16)
	r = newRoomy(ctx, d, func() bool { return false }, slog.New(slog.DiscardHandler), func(since time.Time, w bool) {
		if since.IsZero() {
			t.Error("it waits since never")
		}
		waits <- w
	})
	r.every = time.Millisecond
	return d, r, waits
}

func ways(r *roomy) map[string]func() error {
	return map[string]func() error{
		"write": func() error { _, err := r.WriteAt([]byte("x"), 0); return err },
		"zero":  func() error { return r.Zero(0, 1) },
		"flush": func() error { return r.Flush() },
	}
}

func TestAWriteWithoutRoomWaitsForIt(t *testing.T) {
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		d, r, waits := tight(t, t.Context(), full)
		for name, do := range ways(r) {
			d.setFull(full)
			ended := make(chan error, 2)
			go func() { ended <- do() }()
			if !<-waits {
				t.Fatalf("%s: it went on before it waited", name)
			}
			go func() { ended <- do() }() // a second one waits too, and is not told of
			select {
			case err := <-ended:
				t.Fatalf("%s: %v while there is no room", name, err)
			case w := <-waits:
				t.Fatalf("%s: waits %v while there is no room", name, w)
			case <-time.After(20 * time.Millisecond): // it is tried in vain meanwhile
			}
			if _, err := r.ReadAt(make([]byte, 1), 0); err != nil {
				t.Errorf("a read meanwhile: %v", err)
			}
			d.setFull(nil)
			for range 2 {
				if err := <-ended; err != nil {
					t.Errorf("%s: %v with room again", name, err)
				}
			}
			if <-waits {
				t.Errorf("%s: it waits on", name)
			}
		}
	}
}

func TestTheReserveIsNotForGuests(t *testing.T) {
	d, r, waits := tight(t, t.Context(), nil)
	var short atomic.Bool
	r.short = short.Load
	short.Store(true)
	ended := make(chan error, 1)
	go func() { _, err := r.WriteAt([]byte("new"), 0); ended <- err }()
	<-waits
	// What takes no room, or gives some back, goes on.
	if _, err := r.WriteAt([]byte("old"), 1000); err != nil {
		t.Error(err)
	}
	if err := errors.Join(r.Zero(0, 1), r.Flush()); err != nil {
		t.Error(err)
	}
	if len(ended) != 0 {
		t.Error("the reserve was written to")
	}
	short.Store(false)
	if err := <-ended; err != nil || string(d.written) != "old\x00Fnew" {
		t.Errorf("%v, written %q", err, d.written)
	}
}

func TestTheReserveIsWatched(t *testing.T) {
	r := newRig(t, 4)
	var free atomic.Int64
	looked := make(chan struct{}, 1)
	r.srv.opts.Reserve = 100
	r.srv.opts.DiskFree = func() (int64, error) {
		select {
		case looked <- struct{}{}:
		default:
		}
		return free.Load(), nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { r.srv.watchRoom(ctx); close(ended) }()
	for _, c := range []struct {
		free  int64
		short bool
	}{{99, true}, {100, false}, {0, true}, {1 << 20, false}} {
		free.Store(c.free)
		for range 3 { // the last look began after the change
			<-looked
		}
		if r.srv.short.Load() != c.short {
			t.Errorf("%d bytes free: short is %v", c.free, !c.short)
		}
	}
	cancel()
	<-ended
}

func TestOtherErrorsAreNotWaitedOut(t *testing.T) {
	_, r, waits := tight(t, t.Context(), syscall.EIO)
	for name, do := range ways(r) {
		if err := do(); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v, want EIO", name, err)
		}
	}
	if len(waits) != 0 {
		t.Error("it waited")
	}
}

func TestAWriteThatWaitsYieldsToAStop(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	d, r, waits := tight(t, ctx, syscall.EDQUOT)
	ended := make(chan error, 1)
	write := func() { _, err := r.WriteAt([]byte("x"), 0); ended <- err }
	go write()
	<-waits
	if !r.setYield(true) {
		t.Error("it is not told that one waited")
	}
	if err := <-ended; !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("yielding: %v, want ENOSPC, which a VMM knows", err)
	}
	<-waits
	go write() // and so does the next one
	if err := <-ended; !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("yielding: %v", err)
	}
	for len(waits) > 0 {
		<-waits
	}
	if r.setYield(false) {
		t.Error("it is told that one waits")
	}
	go write()
	<-waits
	cancel() // the service ends
	if err := <-ended; err == nil {
		t.Error("it was written after all")
	}
	if len(d.written) != 0 {
		t.Errorf("written: %q", d.written)
	}
}

func TestStatusNamesWhoWaitsForRoom(t *testing.T) {
	r := newRig(t, 4)
	since := time.UnixMilli(1700000000123)
	r.srv.diskWaits("a", since, true)
	s, err := call(r.srv.GetStatus, &pagerv1.GetStatusRequest{})
	must(t, err)
	if len(s.Waits) != 1 || s.Waits[0].SandboxId != "a" || s.Waits[0].SinceUnixMs != since.UnixMilli() || s.Totals.DiskWaits != 1 {
		t.Errorf("%v", s)
	}
	r.srv.diskWaits("a", since, false)
	if s, err = call(r.srv.GetStatus, &pagerv1.GetStatusRequest{}); err != nil || len(s.Waits) != 0 || s.Totals.DiskWaits != 1 {
		t.Errorf("%v, %v", s, err)
	}
	_, err = call(r.srv.YieldDisk, &pagerv1.YieldDiskRequest{SandboxId: "nobody", Yield: true})
	wantCode(t, err, connect.CodeNotFound, "nobody")
}
