package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// guestSyncLimit bounds how long a capture waits for the guest to write its
// caches. A guest that does not answer is recorded, not waited for: its dirty
// caches are part of the captured memory anyway.
const guestSyncLimit = 5 * time.Second

// capturing freezes the whole state of a running VM into one manifest: a
// pause, which ends the VM then, or a snapshot, after which it goes on.
type capturing struct {
	e   *Engine
	sb  *sandbox
	ph  *phases
	own bool // the driver keeps memory to itself

	stopped      bool // the VM was told to stop, or may have been
	r            *run
	before       journal
	txn          *snapshot.Txn
	m            snapshot.Manifest // as committed in the end
	memory, disk *snapshot.Writer
	written      Stats
}

func (cp *capturing) pauseSteps() []step {
	return slices.Concat(cp.steps(), []step{{name: "record_paused", do: cp.recordPaused}})
}

func (cp *capturing) snapshotSteps() []step {
	return slices.Concat(cp.steps(), []step{{name: "record_captured", do: cp.recordCaptured}})
}

// steps end with the commit: before it the VM can go on, after it the VM is
// not needed.
func (cp *capturing) steps() []step {
	parts := []step{{beside: []step{
		{name: "device_state", do: cp.deviceState},
		{name: "memory", do: cp.captureMemory},
		{name: "disk", do: cp.captureDisk},
	}}}
	if cp.own {
		// State and memory come together, and the disk is flushed after them.
		parts = []step{{name: "memory", do: cp.captureOwnMemory}, {name: "disk", do: cp.captureOwnDisk}}
	}
	return slices.Concat(
		[]step{{name: "record_pending", do: cp.recordPending}, {name: "guest_sync", do: cp.guestSync}, {name: "vm_stop", do: cp.stopVM}},
		parts, []step{{name: "commit", do: cp.commit}})
}

// capture takes the steps. On an error the VM runs again and the store holds
// nothing new.
func (e *Engine) capture(ctx context.Context, op Op, cp *capturing, steps []step) error {
	var err error
	if cp.txn, err = e.opts.Store.Begin(); err != nil {
		return fmt.Errorf("begin a manifest: %w", err)
	}
	cp.r = cp.sb.current()
	cp.r.telling.stop()
	cp.before = cp.sb.journal()
	if err = e.perform(ctx, op, cp.ph, steps); err != nil {
		return errors.Join(err, cp.undo(context.WithoutCancel(ctx)))
	}
	return nil
}

// undo lets the VM run again and takes back what was written: also a manifest
// that is there, as nobody was told of it.
func (cp *capturing) undo(ctx context.Context) error {
	errs := []error{cp.txn.Abort()}
	for _, w := range []*snapshot.Writer{cp.memory, cp.disk} {
		if w != nil {
			errs = append(errs, w.Abort())
		}
	}
	back := func() error {
		return cp.sb.settle(func(j *journal) {
			*j = cp.before
			run := *cp.before.Run
			run.ChangesLost = run.ChangesLost || cp.own
			run.ClockBehind = run.ClockBehind || cp.stopped
			j.Run = &run
		})
	}
	if cp.sb.journal().Manifest == cp.txn.ID() {
		// The journal names the pause as the newest: it must not any more
		// before the pause goes.
		if err := back(); err != nil {
			return errors.Join(append(errs, err, cp.goOn(ctx))...)
		}
	}
	if err := cp.e.opts.Store.Delete(ctx, cp.txn.ID()); err != nil && !errors.Is(err, snapshot.ErrNotFound) {
		errs = append(errs, err)
	}
	errs = append(errs, back(), cp.goOn(ctx))
	if cp.stopped && !cp.r.held {
		cp.e.setClockSoon(cp.sb, cp.r) // who waits for the refusal does not wait for a guest
	}
	return errors.Join(errs...)
}

func (cp *capturing) recordPending(context.Context) error {
	cp.r.wholeMemory = cp.before.Run.ChangesLost
	return cp.sb.update(func(j *journal) {
		j.Pending, j.Run.ChangesLost = cp.txn.ID(), cp.own // until it is committed
		j.Run.ClockBehind = true                           // from the stop on
		if cp.m.Kind == snapshot.KindPause {
			j.State = Pausing
		}
	})
}

// guestSync has the guest write its caches to the disk.
func (cp *capturing) guestSync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, guestSyncLimit)
	defer cancel()
	if err := cp.r.guest.sync(ctx); err != nil {
		cp.e.log.WarnContext(ctx, "the guest did not write its caches before the capture", "sandbox", cp.sb.id(), "err", err)
	}
	return nil
}

func (cp *capturing) stopVM(ctx context.Context) error {
	if err := cp.beforeStop(ctx); err != nil {
		return err
	}
	cp.stopped = true
	return cp.withRoom(ctx, func(ctx context.Context) error {
		return wrap("stop the VM", cp.r.machine.Pause(ctx))
	})
}

func (cp *capturing) deviceState(ctx context.Context) error {
	f, err := cp.txn.StateFile()
	if err != nil {
		return fmt.Errorf("create the device state: %w", err)
	}
	if err := cp.r.machine.SaveState(ctx, f); err != nil {
		return fmt.Errorf("save the device state: %w", err)
	}
	return nil
}

// commit makes all of it real, by one rename.
func (cp *capturing) commit(ctx context.Context) error {
	cp.m.Memory.ID, cp.m.Disk.ID = cp.memory.ID(), cp.disk.ID()
	err := cp.txn.Commit(ctx, cp.m)
	if err != nil {
		return fmt.Errorf("commit the manifest: %w", err)
	}
	cp.written.MemoryBytes, cp.written.DiskBytes = cp.memory.BytesWritten(), cp.disk.BytesWritten()
	if cp.m, err = cp.e.opts.Store.Manifest(cp.txn.ID()); err != nil {
		return fmt.Errorf("read the manifest back: %w", err)
	}
	cp.written.StateBytes = cp.m.State.Size
	return nil
}

// recordPaused names the new pause, and still the run, which is to be ended.
func (cp *capturing) recordPaused(context.Context) error {
	return cp.sb.update(func(j *journal) {
		j.State, j.Manifest, j.Generation = Paused, cp.m.ID, cp.m.Generation
		j.Pending, j.StartedAt, j.Error = format.ID{}, nil, ""
	})
}

// recordCaptured makes the next capture write what differs from this one.
func (cp *capturing) recordCaptured(context.Context) error {
	return cp.sb.update(func(j *journal) {
		j.Pending, j.Generation = format.ID{}, cp.m.Generation
		j.Run.LastMemory, j.Run.LastDisk, j.Run.ChangesLost = cp.m.Memory.ID, cp.m.Disk.ID, false
	})
}

func (cp *capturing) goOnSteps() []step {
	return []step{{name: "vm_continue", do: cp.letGoOn}, {name: "guest_clock", do: cp.setClock}}
}

func (cp *capturing) letGoOn(ctx context.Context) error { return cp.goOn(ctx) }

func (cp *capturing) setClock(ctx context.Context) error {
	cp.e.setClock(ctx, cp.sb, cp.r)
	return nil
}

// captureMemory writes the pages that differ from the newest capture.
func (cp *capturing) captureMemory(ctx context.Context) (err error) {
	m, j := cp.r.machine, cp.sb.journal()
	size := int64(j.MemoryMB) << 20
	if j.Run.RAMAddr == 0 {
		// Booted: the RAM is the VM's own memfd, and what is no hole was written.
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", m.PID(), m.MemoryFD()), os.O_RDONLY, 0)
		if err != nil {
			return fmt.Errorf("open the guest's memory: %w", err)
		}
		defer f.Close()
		scan := func(yield func(off, n int64) error) error { return scanFile(f, size, yield) }
		cp.memory, err = cp.e.writeImage(ctx, size, format.ID{}, j.Run.LastMemory, pagesOf(f, scan))
		return wrap("capture the memory", err)
	}
	addr := uintptr(j.Run.RAMAddr)
	f, err := uffd.ReadMemory(m.PID(), addr)
	if err != nil {
		return fmt.Errorf("open the guest's memory: %w", err)
	}
	defer f.Close()
	scan := func(yield func(off, n int64) error) error { return uffd.ScanDirty(m.PID(), addr, size, yield) }
	cp.memory, err = cp.e.writeImage(ctx, size, j.Run.MemoryImage, j.Run.LastMemory, pagesOf(f, scan))
	return wrap("capture the memory", err)
}

// captureDisk writes what the overlay holds over the newest capture. The
// overlay is the pager's alone, so the pager reads it for us.
func (cp *capturing) captureDisk(ctx context.Context) error {
	rec := *cp.sb.journal().Run
	base, err := cp.e.opts.Store.OpenImage(rec.DiskImage)
	if err != nil {
		return fmt.Errorf("capture the disk: %w", err)
	}
	defer base.Close()
	last := rec.LastDisk
	if last == (format.ID{}) {
		last = rec.DiskImage
	}
	cp.disk, err = cp.e.writeImage(ctx, base.Size(), rec.DiskImage, last, func(yield func(change) error) error {
		return cp.e.overlayChanges(ctx, cp.sb, yield)
	})
	return wrap("capture the disk", err)
}

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// change is a run of an image that may differ from its base: bytes, or zeros.
type change struct {
	off  int64
	zero int64  // length of a run of zeros; else
	data []byte // valid until the next change
}

// chunk is how much is read at a time: large enough for the disk, small
// enough to stay in the cache.
const chunk = 1 << 20

// pagesOf reads the runs that scan finds.
func pagesOf(r io.ReaderAt, scan func(func(off, n int64) error) error) func(func(change) error) error {
	return func(yield func(change) error) error {
		buf := make([]byte, chunk)
		return scan(func(off, n int64) error { return readRun(r, off, n, buf, yield) })
	}
}

func readRun(r io.ReaderAt, off, n int64, buf []byte, yield func(change) error) error {
	for n > 0 {
		p := buf[:min(n, int64(len(buf)))]
		if _, err := r.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
		}
		if err := yield(change{off: off, data: p}); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

func (e *Engine) overlayChanges(ctx context.Context, sb *sandbox, yield func(change) error) error {
	stream, err := e.opts.Pager.ReadDisk(ctx, connect.NewRequest(&pagerv1.ReadDiskRequest{SandboxId: sb.id()}))
	if err != nil {
		return fmt.Errorf("read the overlay: %w", err)
	}
	defer stream.Close()
	for stream.Receive() {
		m := stream.Msg()
		if err := yield(change{off: m.Offset, zero: m.Zeros, data: m.Data}); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		return fmt.Errorf("read the overlay: %w", err)
	}
	return nil
}

// scanFile yields the runs of a sparse file that are no holes.
func scanFile(f *os.File, size int64, yield func(off, n int64) error) error {
	for off := int64(0); off < size; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find data after %d: %w", off, err)
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("find the hole after %d: %w", start, err)
		}
		if err := yield(start, end-start); err != nil {
			return err
		}
		off = end
	}
	return nil
}

// writeImage makes an image of the changes over last. The changes are those
// since mapped, the image that the VM started from: where a capture came
// between, blocks that have not changed since then are left out.
func (e *Engine) writeImage(ctx context.Context, size int64, mapped, last format.ID, changes func(func(change) error) error) (_ *snapshot.Writer, err error) {
	var parent *snapshot.Image
	if last != (format.ID{}) {
		parent, err = e.opts.Store.OpenImage(last)
		if err != nil {
			return nil, fmt.Errorf("open the newest capture: %w", err)
		}
		defer parent.Close()
	}
	w, err := e.opts.Store.NewImage(size, parent)
	if err != nil {
		return nil, err
	}
	put := func(c change) error {
		if c.zero > 0 {
			return w.Zero(c.off, c.zero)
		}
		return w.WriteAt(c.data, c.off)
	}
	if parent != nil && mapped != last {
		put = skipEqual(parent, put)
	}
	err = changes(func(c change) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return put(c)
	})
	if err == nil {
		_, err = w.Finish(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, w.Abort())
	}
	return w, nil
}

// skipEqual passes on only the blocks that differ from parent.
func skipEqual(parent *snapshot.Image, put func(change) error) func(change) error {
	buf := make([]byte, chunk)
	return func(c change) error {
		if c.zero > 0 {
			return put(c)
		}
		old := buf[:len(c.data)]
		if _, err := parent.ReadAt(old, c.off); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read the newest capture: %w", err)
		}
		for i := 0; i < len(old); {
			n := i
			for n < len(old) && !bytes.Equal(old[n:n+format.BlockSize], c.data[n:n+format.BlockSize]) {
				n += format.BlockSize
			}
			if n > i {
				if err := put(change{off: c.off + int64(i), data: c.data[i:n]}); err != nil {
					return err
				}
			}
			i = n + format.BlockSize
		}
		return nil
	}
}

// vmmInfo and infoOf translate between what a driver found and what a
// manifest records.
func vmmInfo(i vmm.Info, kernelDigest string, j journal) snapshot.VMMInfo {
	return snapshot.VMMInfo{
		Kind: i.Kind, Version: i.Version, MachineType: i.MachineType, CPUModel: i.CPUModel,
		CPUFlagsDigest: i.CPUFlagsDigest, Accel: i.Accel, TSCKHz: i.TSCKHz,
		KernelDigest: kernelDigest, VCPUs: j.VCPUs, MemoryMB: j.MemoryMB,
	}
}

func infoOf(v snapshot.VMMInfo) vmm.Info {
	return vmm.Info{
		Kind: v.Kind, Version: v.Version, MachineType: v.MachineType, CPUModel: v.CPUModel,
		CPUFlagsDigest: v.CPUFlagsDigest, Accel: v.Accel, TSCKHz: v.TSCKHz,
	}
}
