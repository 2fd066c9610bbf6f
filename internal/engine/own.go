package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// This file is for drivers that keep guest memory to themselves
// (vmm.Capabilities.OwnMemory): pages are copied in over a userfaultfd that the
// VMM hands over, changes come from the VMM's own list, and the disk is a block
// device.

// Disks makes block devices of NBD exports. A device is known by its sandbox.
type Disks interface {
	Attach(ctx context.Context, sandboxID, socket string) (path string, err error)
	Adopt(ctx context.Context, sandboxID, socket string) error
	Flush(sandboxID string) error
	Detach(ctx context.Context, sandboxID string) error
	// Owners are the sandboxes that have a device.
	Owners() ([]string, error)
}

// pagesSocket is where a VMM hands its userfaultfd over.
const pagesSocket = "pages.sock"

func (e *Engine) ownMemory() bool { return e.opts.Driver.Capabilities().OwnMemory }

// prepareOwn has the pager wait for the hand-over, or give the image whole; a VM
// that boots needs neither.
func (st *starting) prepareOwn(ctx context.Context) error {
	image := st.rec.MemoryImage
	if image.IsZero() {
		return nil
	}
	r, err := st.e.opts.Pager.PrepareMemory(ctx, connect.NewRequest(&pagerv1.PrepareMemoryRequest{
		SandboxId: st.sb.id(), ImageId: image.String(), KeepWarm: st.src.keepWarm, Whole: st.rec.WholeImage,
		Mode: pagerv1.MemoryMode_MEMORY_MODE_COPY, SocketPath: st.sb.path(pagesSocket),
	}))
	if err != nil {
		return fmt.Errorf("prepare the memory: %w", err)
	}
	if st.wholePath = r.Msg.WholePath; st.wholePath == "" {
		st.rec.WholeImage = false
		st.e.hasNoWhole(st.sb)
	}
	return nil
}

// sharedBy is the memory image that clones of a named snapshot share by having
// it whole in RAM, where the VMM keeps its memory to itself.
func (e *Engine) sharedBy(src source) format.ID {
	if src.manifest == nil || !e.ownMemory() {
		return format.ID{}
	}
	return src.manifest.Memory.ID
}

// served tells when the pager serves what a VMM of this kind opens itself, which
// is prepared while its process starts.
type served struct{ disk, memory chan struct{} }

func newServed() served { return served{make(chan struct{}), make(chan struct{})} }

// await returns when ready is closed; what failed before that has ended ctx.
func await(ctx context.Context, ready <-chan struct{}) error {
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// startOwn starts a VMM that opens disk and memory itself. Restored, its process
// starts as soon as the memory is served, while the disk is being prepared.
func (st *starting) startOwn(ctx context.Context) error {
	sb := st.sb
	named, ok := st.slot.(interface{ Tap() (name, netns string) })
	if !ok {
		return fmt.Errorf("the network slot does not name its tap")
	}
	h := vmm.HostArgs{ID: sb.id(), Dir: sb.dir, ConsolePath: sb.path(consoleName), Number: st.slot.Index(), Part: st.ph.part}
	h.TapName, h.NetNS = named.Tap()
	if st.src.base != nil {
		var err error
		if h.DiskDevice, err = st.attachDisk(ctx); err != nil {
			return err
		}
		return st.launch(ctx, h)
	}
	h.MemorySocket = sb.path(pagesSocket)
	// A jail gets the file or the socket before its process starts.
	if err := await(ctx, st.served.memory); err != nil {
		return err
	}
	if st.wholePath != "" {
		h.MemoryFile, h.MemorySocket = st.wholePath, ""
	}
	return st.launch(ctx, h)
}

// aheadLimit bounds the call; what it begins goes on. It is longer than a pager
// takes to be replaced.
const aheadLimit = 10 * time.Second

// readAhead has the pager put what starts need into the memory of a VM that runs
// now, in which nobody waits for it. One that was released meanwhile needs
// nothing.
func (st *starting) readAhead() {
	if st.rec.MemoryImage.IsZero() || st.wholePath != "" {
		return
	}
	e, id := st.e, st.sb.id()
	e.wg.Go(func() {
		ctx, cancel := context.WithTimeout(e.ctx, aheadLimit)
		defer cancel()
		_, err := e.opts.Pager.ReadAhead(ctx, connect.NewRequest(&pagerv1.ReadAheadRequest{SandboxId: id}))
		if err != nil && connect.CodeOf(err) != connect.CodeNotFound && e.ctx.Err() == nil {
			e.log.WarnContext(ctx, "nothing is read ahead for a VM", "sandbox", id, "err", err)
		}
	})
}

// attachDisk makes a block device of the disk when the pager serves it.
func (st *starting) attachDisk(ctx context.Context) (device string, err error) {
	if err := await(ctx, st.served.disk); err != nil {
		return "", err
	}
	defer st.ph.part("disk_device")()
	return st.e.opts.Disks.Attach(ctx, st.sb.id(), st.sb.path(diskSocket))
}

// captureOwnDisk comes after the memory: what the host's kernel holds back of
// the device is not in the overlay.
func (cp *capturing) captureOwnDisk(ctx context.Context) error {
	if err := cp.e.opts.Disks.Flush(cp.sb.id()); err != nil {
		return fmt.Errorf("capture the disk: %w", err)
	}
	return cp.captureDisk(ctx)
}

// captureOwnMemory saves state and memory, which come together.
func (cp *capturing) captureOwnMemory(ctx context.Context) error {
	r, j := cp.r, cp.sb.journal()
	saver, ok := r.machine.(vmm.MemorySaver)
	if !ok {
		return fmt.Errorf("the %s driver's machines cannot save their memory", cp.e.info.Kind)
	}
	state, err := cp.txn.StateFile()
	if err != nil {
		return fmt.Errorf("create the device state: %w", err)
	}
	done := cp.ph.part("device_state")
	var f *os.File
	err = cp.withRoom(ctx, func(ctx context.Context) (err error) {
		f, err = saver.Save(ctx, state, r.wholeMemory)
		return err
	})
	done()
	if err != nil {
		return fmt.Errorf("save the device state and the memory: %w", err)
	}
	defer f.Close()
	size := int64(j.MemoryMB) << 20
	mapped := j.Run.LastMemory // the changes are those since the last capture
	if r.wholeMemory {
		mapped = format.ID{} // and here they are to be found
	}
	scan := func(yield func(off, n int64) error) error { return scanFile(f, size, yield) }
	cp.memory, err = cp.e.writeImage(ctx, size, mapped, j.Run.LastMemory, pagesOf(f, scan))
	return wrap("capture the memory", err)
}

// ownMemoryOf is the anonymous memory of a VMM, bytes: that of its guest and a
// little of its own.
func ownMemoryOf(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("ask for the VM's memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			var kb int64
			_, err := fmt.Sscan(v, &kb)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("the kernel does not tell the memory of process %d", pid)
}

// removeJail removes the files of a VMM that ended while nobody had a handle on
// it. Links in them are not followed.
func removeJail(dir string) error {
	for _, name := range []string{"jail", "vm"} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("remove the files of an ended VM: %w", err)
		}
	}
	return nil
}
