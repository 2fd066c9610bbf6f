package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
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

// captured is what a capture made and committed.
type captured struct {
	manifest snapshot.Manifest
	stats    Stats
}

// capture freezes the VM of sb and commits its whole state as one manifest.
// The VM is stopped on return if the capture succeeded; if it failed, the VM
// runs again and the store holds nothing new.
func (e *Engine) capture(ctx context.Context, sb *sandbox, r *run, txn *snapshot.Txn, m snapshot.Manifest, ph *phases) (out captured, err error) {
	e.guestSync(ctx, sb, r, ph)
	var c closer
	c.push(func(context.Context) error { return txn.Abort() })
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close(ctx))
		}
	}()
	c.push(r.machine.Continue)
	done := ph.part("vm_stop")
	err = r.machine.Pause(ctx)
	done()
	if err != nil {
		return out, fmt.Errorf("stop the VM: %w", err)
	}
	memory, disk, err := e.captureParts(ctx, sb, r, txn, ph, &c)
	if err != nil {
		return out, err
	}
	defer ph.part("commit")()
	m.Memory.ID, m.Disk.ID = memory.ID(), disk.ID()
	if err = txn.Commit(ctx, m); err != nil {
		return out, fmt.Errorf("commit the manifest: %w", err)
	}
	out.stats.MemoryBytes, out.stats.DiskBytes = memory.BytesWritten(), disk.BytesWritten()
	if out.manifest, err = e.opts.Store.Manifest(txn.ID()); err != nil {
		return out, fmt.Errorf("read the manifest back: %w", err)
	}
	out.stats.StateBytes = out.manifest.State.Size
	return out, nil
}

// guestSync has the guest write its caches to the disk.
func (e *Engine) guestSync(ctx context.Context, sb *sandbox, r *run, ph *phases) {
	defer ph.part("guest_sync")()
	ctx, cancel := context.WithTimeout(ctx, guestSyncLimit)
	defer cancel()
	if err := r.guest.sync(ctx); err != nil {
		e.log.Warn("the guest did not write its caches before the capture", "sandbox", sb.id(), "err", err)
	}
}

// captureParts writes device state, memory and disk, side by side. What it
// made is undone through c.
func (e *Engine) captureParts(ctx context.Context, sb *sandbox, r *run, txn *snapshot.Txn, ph *phases, c *closer) (memory, disk *snapshot.Writer, err error) {
	defer func() {
		for _, w := range []*snapshot.Writer{memory, disk} {
			if w != nil {
				c.push(func(context.Context) error { return w.Abort() })
			}
		}
	}()
	if e.ownMemory() {
		return e.captureOwn(ctx, sb, r, txn, ph)
	}
	j := sb.journal()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer ph.part("device_state")()
		f, err := txn.StateFile()
		if err != nil {
			return fmt.Errorf("create the device state: %w", err)
		}
		if err := r.machine.SaveState(gctx, f); err != nil {
			return fmt.Errorf("save the device state: %w", err)
		}
		return nil
	})
	g.Go(func() (err error) {
		defer ph.part("memory")()
		memory, err = e.captureMemory(gctx, r.machine, j)
		if err != nil {
			return fmt.Errorf("capture the memory: %w", err)
		}
		return nil
	})
	g.Go(func() (err error) {
		defer ph.part("disk")()
		disk, err = e.captureDisk(gctx, sb, *j.Run)
		if err != nil {
			return fmt.Errorf("capture the disk: %w", err)
		}
		return nil
	})
	err = g.Wait()
	return memory, disk, err
}

// captureMemory writes the pages that differ from the newest capture.
func (e *Engine) captureMemory(ctx context.Context, m vmm.Machine, j journal) (*snapshot.Writer, error) {
	size := int64(j.MemoryMB) << 20
	if j.Run.RAMAddr == 0 {
		// Booted: the RAM is the VM's own memfd, and what is no hole was written.
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", m.PID(), m.MemoryFD()), os.O_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("open the guest's memory: %w", err)
		}
		defer f.Close()
		scan := func(yield func(off, n int64) error) error { return scanFile(f, size, yield) }
		return e.writeImage(ctx, size, format.ID{}, j.Run.LastMemory, pagesOf(f, scan))
	}
	addr := uintptr(j.Run.RAMAddr)
	f, err := uffd.ReadMemory(m.PID(), addr)
	if err != nil {
		return nil, fmt.Errorf("open the guest's memory: %w", err)
	}
	defer f.Close()
	scan := func(yield func(off, n int64) error) error { return uffd.ScanDirty(m.PID(), addr, size, yield) }
	return e.writeImage(ctx, size, j.Run.MemoryImage, j.Run.LastMemory, pagesOf(f, scan))
}

// captureDisk writes what the overlay holds over the newest capture. The
// overlay is the pager's alone, so the pager reads it for us.
func (e *Engine) captureDisk(ctx context.Context, sb *sandbox, rec runRecord) (*snapshot.Writer, error) {
	base, err := e.opts.Store.OpenImage(rec.DiskImage)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	last := rec.LastDisk
	if last == (format.ID{}) {
		last = rec.DiskImage
	}
	return e.writeImage(ctx, base.Size(), rec.DiskImage, last, func(yield func(change) error) error {
		return e.overlayChanges(ctx, sb, yield)
	})
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
