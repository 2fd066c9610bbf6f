package pager

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/nbd"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// roomEvery is how often a write that waits is tried again: nobody tells when a
// disk has room.
const roomEvery = 250 * time.Millisecond

// errReserve: what is left is not for guests.
var errReserve = fmt.Errorf("what room is left is kept for the host's own records: %w", syscall.ENOSPC)

// ownedDevice is a device that knows which writes need no room.
type ownedDevice interface {
	nbd.Device
	Owned(off, n int64) bool
}

// roomy is a guest's disk on a host's disk that may be full. A write that finds
// no room waits for some instead of failing: a guest that is told of an error
// gives up its file system. Reads go on, as far as the VMM asks for any while
// its writes wait.
type roomy struct {
	ownedDevice
	// short tells whether what room is left is not for guests any more.
	short func() bool
	ctx   context.Context // ends with the service
	log   *slog.Logger
	every time.Duration
	// changed is told when writes begin to wait, and when the last one goes on.
	changed func(since time.Time, waits bool)

	mu      sync.Mutex
	waiting int
	since   time.Time
	yield   chan struct{} // closed while writes that find no room fail
}

func newRoomy(ctx context.Context, dev ownedDevice, short func() bool, log *slog.Logger, changed func(time.Time, bool)) *roomy {
	return &roomy{ownedDevice: dev, short: short, ctx: ctx, log: log, every: roomEvery, changed: changed, yield: make(chan struct{})}
}

// WriteAt implements nbd.Device.
func (d *roomy) WriteAt(p []byte, off int64) (n int, err error) {
	err = d.wait(func() error {
		if d.short() && !d.Owned(off, int64(len(p))) {
			n, err = 0, errReserve
			return err
		}
		n, err = d.ownedDevice.WriteAt(p, off)
		return err
	})
	return n, err
}

// Zero implements nbd.Device.
func (d *roomy) Zero(off, n int64) error {
	return d.wait(func() error { return d.ownedDevice.Zero(off, n) })
}

// Flush implements nbd.Device.
func (d *roomy) Flush() error { return d.wait(d.ownedDevice.Flush) }

// wait does f until there is room for it. f may be done again.
func (d *roomy) wait(f func() error) error {
	err := f()
	if !storage.NoRoom(err) {
		return err
	}
	yield := d.begin()
	defer d.end()
	tick := time.NewTicker(d.every)
	defer tick.Stop()
	for storage.NoRoom(err) {
		select {
		case <-tick.C:
			err = f()
		case <-yield:
			// A quota is the same to the VMM.
			return fmt.Errorf("the host's disk is full: %w: %w", syscall.ENOSPC, err)
		case <-d.ctx.Done():
			return err
		}
	}
	return err
}

func (d *roomy) begin() (yield <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiting++; d.waiting == 1 {
		d.since = time.Now()
		d.log.Warn("the host's disk is full: a guest's writes wait for room")
		d.changed(d.since, true)
	}
	return d.yield
}

func (d *roomy) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiting--; d.waiting == 0 {
		d.log.Info("no write of the guest waits for room any more", "waited", time.Since(d.since).Round(time.Millisecond))
		d.changed(d.since, false)
	}
}

// setYield tells what becomes of writes that find no room, those that wait
// included, and whether any waited.
func (d *roomy) setYield(yield bool) (waited bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	set := false
	select {
	case <-d.yield:
		set = true
	default:
	}
	switch {
	case yield && !set:
		close(d.yield)
	case !yield && set:
		d.yield = make(chan struct{})
	}
	return d.waiting > 0
}

// Intervals of looking at the free room: guests cannot write more than
// roomNear between two looks at a disk that has it.
const (
	roomNear      = 1 << 30
	roomEveryNear = 50 * time.Millisecond
	roomEveryFar  = time.Second
)

// watchRoom keeps Options.Reserve of the disk from guests, until ctx ends.
func (s *Server) watchRoom(ctx context.Context) {
	for {
		next := roomEveryFar
		if free, err := s.opts.DiskFree(); err != nil {
			s.log.Error("cannot tell how much disk is free", "err", err)
		} else {
			s.short.Store(free < s.opts.Reserve)
			if free < roomNear {
				next = roomEveryNear
			}
		}
		t := time.NewTimer(next)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}
