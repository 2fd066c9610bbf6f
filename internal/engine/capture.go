package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// guestSyncLimit bounds how long a capture waits for the guest to write its
// caches. A guest that does not answer is recorded, not waited for: its dirty
// caches are part of the captured memory anyway.
const guestSyncLimit = 5 * time.Second

// capture freezes the VM of sb and commits its whole state as one manifest.
// The VM is stopped on return if the capture succeeded; if it failed, the VM
// runs again and the store holds nothing new.
func (e *Engine) capture(ctx context.Context, sb *sandbox, r *run, txn *snapshot.Txn, m snapshot.Manifest, ph *phases) (out snapshot.Manifest, st Stats, err error) {
	done := ph.part("guest_sync")
	sctx, cancel := context.WithTimeout(ctx, guestSyncLimit)
	if serr := r.guest.sync(sctx); serr != nil {
		m.GuestSynced = false
		e.log.Warn("the guest did not write its caches before the capture", "sandbox", sb.id(), "err", serr)
	} else {
		m.GuestSynced = true
	}
	cancel()
	done()

	defer func() {
		if err != nil {
			err = errors.Join(err, txn.Abort(), r.machine.Continue(context.WithoutCancel(ctx)))
		}
	}()
	done = ph.part("vm_stop")
	err = r.machine.Pause(ctx)
	done()
	if err != nil {
		return m, st, fmt.Errorf("stop the VM: %w", err)
	}
	j := sb.journal()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		defer ph.part("device_state")()
		m.State, err = saveState(gctx, r.machine, txn)
		return err
	})
	g.Go(func() (err error) {
		defer ph.part("memory")()
		m.Memory, err = e.captureMemory(gctx, r.machine, j)
		if err != nil {
			return fmt.Errorf("capture the memory: %w", err)
		}
		return nil
	})
	g.Go(func() (err error) {
		defer ph.part("disk")()
		m.Disk, err = e.captureDisk(gctx, sb, *j.Run)
		if err != nil {
			return fmt.Errorf("capture the disk: %w", err)
		}
		return nil
	})
	if err = g.Wait(); err != nil {
		return m, st, err
	}
	m.Size = m.Memory.Size + m.Disk.Size + m.State.Size
	defer ph.part("commit")()
	if err = txn.Commit(ctx, m); err != nil {
		return m, st, fmt.Errorf("commit the manifest: %w", err)
	}
	st.MemoryBytes, st.DiskBytes, st.StateBytes = m.Memory.Size, m.Disk.Size, m.State.Size
	return m, st, nil
}

// saveState writes the VMM's device state into the transaction.
func saveState(ctx context.Context, m vmm.Machine, txn *snapshot.Txn) (snapshot.FileRef, error) {
	f, err := txn.StateFile()
	if err != nil {
		return snapshot.FileRef{}, fmt.Errorf("create the device state: %w", err)
	}
	w := &digestWriter{w: f, h: sha256.New()}
	if err := m.SaveState(ctx, w); err != nil {
		return snapshot.FileRef{}, fmt.Errorf("save the device state: %w", err)
	}
	return w.ref(), nil
}

// digestWriter counts and digests what it passes on.
type digestWriter struct {
	w io.Writer
	h hash.Hash
	n int64
}

func (d *digestWriter) Write(p []byte) (int, error) {
	n, err := d.w.Write(p)
	d.h.Write(p[:n])
	d.n += int64(n)
	return n, err
}

func (d *digestWriter) ref() snapshot.FileRef {
	return snapshot.FileRef{Size: d.n, SHA256: [32]byte(d.h.Sum(nil))}
}

// captureMemory writes the pages that differ from the newest capture.
func (e *Engine) captureMemory(ctx context.Context, m vmm.Machine, j journal) (snapshot.ImageRef, error) {
	size := int64(j.MemoryMB) << 20
	if j.Run.RAMAddr == 0 {
		// Booted: the RAM is the VM's own memfd, and what is no hole was written.
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", m.PID(), m.MemoryFD()), os.O_RDONLY, 0)
		if err != nil {
			return snapshot.ImageRef{}, fmt.Errorf("open the guest's memory: %w", err)
		}
		defer f.Close()
		scan := func(yield func(off, n int64) error) error { return scanFile(f, size, yield) }
		return e.writeImage(ctx, size, format.ID{}, j.Run.LastMemory, pagesOf(f, scan))
	}
	addr := uintptr(j.Run.RAMAddr)
	f, closer, err := uffd.ReadMemory(m.PID(), addr)
	if err != nil {
		return snapshot.ImageRef{}, fmt.Errorf("open the guest's memory: %w", err)
	}
	defer closer.Close()
	scan := func(yield func(off, n int64) error) error { return uffd.ScanDirty(m.PID(), addr, size, yield) }
	return e.writeImage(ctx, size, j.Run.MemoryImage, j.Run.LastMemory, pagesOf(f, scan))
}

// captureDisk writes what the overlay holds over the newest capture.
func (e *Engine) captureDisk(ctx context.Context, sb *sandbox, rec runRecord) (snapshot.ImageRef, error) {
	base, err := e.opts.Store.OpenImage(rec.DiskImage)
	if err != nil {
		return snapshot.ImageRef{}, err
	}
	defer base.Close()
	// The pager has it open too. It is quiet: the VM is stopped and all that
	// it wrote is acknowledged, which means it is in the files.
	overlay, err := block.OpenOverlay(storage.OS(), sb.path(overlayName), base)
	if err != nil {
		return snapshot.ImageRef{}, fmt.Errorf("open the overlay: %w", err)
	}
	defer overlay.Close()
	last := rec.LastDisk
	if last == (format.ID{}) {
		last = rec.DiskImage
	}
	return e.writeImage(ctx, base.Size(), rec.DiskImage, last, func(yield func(change) error) error {
		return overlayChanges(overlay, yield)
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

func overlayChanges(o *block.Overlay, yield func(change) error) error {
	buf := make([]byte, chunk)
	var err error
	o.Dirty(func(off, n int64, kind format.Kind) bool {
		if kind == format.Zero {
			err = yield(change{off: off, zero: n})
		} else {
			err = readRun(o, off, n, buf, yield)
		}
		return err == nil
	})
	return err
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
func (e *Engine) writeImage(ctx context.Context, size int64, mapped, last format.ID, changes func(func(change) error) error) (ref snapshot.ImageRef, err error) {
	var parent *snapshot.Image
	if last != (format.ID{}) {
		parent, err = e.opts.Store.OpenImage(last)
		if err != nil {
			return ref, fmt.Errorf("open the newest capture: %w", err)
		}
		defer parent.Close()
	}
	w, err := e.opts.Store.NewImage(size, parent)
	if err != nil {
		return ref, err
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
	if err != nil {
		return ref, errors.Join(err, w.Abort())
	}
	id, err := w.Finish(ctx)
	if err != nil {
		return ref, errors.Join(err, w.Abort())
	}
	return snapshot.ImageRef{ID: id, Size: w.BytesWritten()}, nil
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

// snapshotOverlayRemove removes an overlay's files.
func snapshotOverlayRemove(path string) error {
	files, err := filepath.Glob(path + ".*")
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		errs = append(errs, os.Remove(f))
	}
	return errors.Join(errs...)
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
