package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// The guest's side of the network is the same in every sandbox: snapshots
// hold it. A change here is a change of networkLayout.
const (
	guestMAC      = "02:77:72:00:00:02"
	guestNetwork  = "wrenn.ip=172.30.0.2/30 wrenn.gw=172.30.0.1"
	networkLayout = "tap0 172.30.0.0/30 v1"
)

// Limits on the parts of a start that wait for somebody else. An emulated
// guest on a busy host is slow, not broken.
const (
	bootLimit    = 120 * time.Second
	restoreLimit = 60 * time.Second
)

// source is what a run starts from.
type source struct {
	base     *Base              // boot; nil: restore
	manifest *snapshot.Manifest // restore
	// keepWarm asks the pager to keep the memory for the next clone.
	keepWarm bool
	// fork makes the guest a new individual.
	fork bool
}

func (s source) disk() format.ID {
	if s.base != nil {
		return s.base.Disk
	}
	return s.manifest.Disk.ID
}

// start brings up the VM of sb, confirmed by its guest. The journal must
// already name the state to fall back to. On an error nothing remains of the
// run.
func (e *Engine) start(ctx context.Context, sb *sandbox, src source, ph *phases) (err error) {
	var c closer
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close(ctx), sb.update(func(j *journal) { j.Run = nil }))
		}
	}()
	done := ph.part("network")
	slot, err := e.opts.Network.Acquire(ctx, sb.id())
	done()
	if err != nil {
		return fmt.Errorf("get a network slot: %w", err)
	}
	c.push(slot.Release)
	if egress := sb.journal().Egress; egress != nil {
		if err := slot.SetEgress(ctx, egress); err != nil {
			return err
		}
	}

	rec := runRecord{Slot: slot.Index(), Life: randomHex(16), DiskImage: src.disk()}
	if src.manifest != nil {
		rec.MemoryImage = src.manifest.Memory.ID
		rec.LastMemory, rec.LastDisk = rec.MemoryImage, rec.DiskImage
	}
	if err := sb.update(func(j *journal) { j.Run = &rec }); err != nil {
		return err
	}
	machine, err := e.startMachine(ctx, sb, src, slot, &rec, &c, ph)
	if err != nil {
		return err
	}
	vm := machine.Record()
	rec.VM = &vm
	if err := sb.update(func(j *journal) { j.Run = &rec }); err != nil {
		return err
	}
	j := sb.journal()
	r := &run{machine: machine, slot: slot, guest: newGuest(slot, j.AccessToken), ending: make(chan struct{})}
	done = ph.part("guest_confirm")
	err = e.confirm(ctx, sb, r, src, rec.Life)
	done()
	if err != nil {
		r.guest.close()
		return fmt.Errorf("the guest did not confirm its identity: %w", err)
	}
	now := e.opts.Now().UTC()
	if err := sb.update(func(j *journal) { j.State, j.Error, j.StartedAt = Running, "", &now }); err != nil {
		r.guest.close()
		return err
	}
	sb.setRun(r)
	e.watchMachine(sb, r)
	c.keep()
	return nil
}

// startMachine prepares memory and disk and starts the VMM process; the guest
// runs on return. Releases are pushed on c.
func (e *Engine) startMachine(ctx context.Context, sb *sandbox, src source, slot Slot, rec *runRecord, c *closer, ph *phases) (vmm.Machine, error) {
	done := ph.part("disk_and_memory")
	memory, err := e.prepare(ctx, sb, rec, src.keepWarm, c)
	done()
	if err != nil {
		return nil, err
	}
	if e.ownMemory() {
		host, err := e.hostArgsOwn(ctx, sb, slot, rec)
		if err != nil {
			return nil, err
		}
		return e.launch(ctx, sb, src, host, rec, c, ph)
	}
	defer memory.Close()
	tap, err := slot.OpenTap()
	if err != nil {
		return nil, fmt.Errorf("open the tap device: %w", err)
	}
	defer tap.Close()
	// Where the kernel has the device, the VMM process needs no privilege for
	// its page faults to be served; where not, the system call is used.
	uffdDev, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		uffdDev = nil
	} else {
		defer uffdDev.Close()
	}
	host := vmm.HostArgs{
		ID: sb.id(), Dir: sb.dir, Memory: memory, UffdDev: uffdDev,
		DiskSocket: sb.path(diskSocket), Tap: tap, ConsolePath: sb.path(consoleName),
	}
	return e.launch(ctx, sb, src, host, rec, c, ph)
}

// launch boots or restores the VM; it runs on return.
func (e *Engine) launch(ctx context.Context, sb *sandbox, src source, host vmm.HostArgs, rec *runRecord, c *closer, ph *phases) (vmm.Machine, error) {
	j := sb.journal()
	spec := vmm.Spec{VCPUs: j.VCPUs, MemoryMB: j.MemoryMB, MAC: guestMAC}

	defer ph.part("vmm")()
	if src.base != nil {
		m, err := e.opts.Driver.Boot(ctx, vmm.BootArgs{
			HostArgs: host, Spec: spec, Kernel: src.base.Kernel, Initrd: src.base.Initrd,
			Cmdline: guestNetwork + " wrenn.hostname=" + sb.id() + " " + e.opts.Cmdline,
		})
		if err != nil {
			return nil, fmt.Errorf("boot: %w", err)
		}
		c.push(m.Kill)
		return m, nil
	}
	state, err := e.opts.Store.StatePath(src.manifest.ID)
	if err != nil {
		return nil, fmt.Errorf("check the device state: %w", err)
	}
	m, err := e.opts.Driver.Restore(ctx, vmm.RestoreArgs{
		HostArgs: host,
		State:    vmm.State{Spec: spec, Info: infoOf(src.manifest.VMM), File: state},
		Attach: func(ctx context.Context, pid int) error {
			defer ph.part("attach")()
			r, err := e.opts.Pager.AttachMemory(ctx, connect.NewRequest(&pagerv1.AttachMemoryRequest{SandboxId: sb.id(), Pid: int32(pid)}))
			if err == nil {
				rec.RAMAddr = r.Msg.Address
			}
			return err
		},
	})
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	c.push(m.Kill)
	if err := m.Continue(ctx); err != nil {
		return nil, fmt.Errorf("let the restored VM run: %w", err)
	}
	return m, nil
}

// prepare makes the pager serve disk and memory and returns the guest's RAM
// as a file for the VMM process.
func (e *Engine) prepare(ctx context.Context, sb *sandbox, rec *runRecord, keepWarm bool, c *closer) (*os.File, error) {
	var memory *os.File
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := e.opts.Pager.ServeDisk(gctx, connect.NewRequest(&pagerv1.ServeDiskRequest{
			SandboxId: sb.id(), ImageId: rec.DiskImage.String(),
			OverlayPath: sb.path(overlayName), SocketPath: sb.path(diskSocket),
		}))
		if err != nil {
			return fmt.Errorf("serve the disk: %w", err)
		}
		return nil
	})
	g.Go(func() (err error) {
		if e.ownMemory() {
			return e.prepareOwn(gctx, sb, rec.MemoryImage)
		}
		memory, err = e.prepareMemory(gctx, sb, rec.MemoryImage, keepWarm)
		return err
	})
	// Pushed before the outcome is known: the pager may have done what it did
	// not get to say, and releasing what is not there is fine.
	c.push(func(ctx context.Context) error { return e.stopServing(ctx, sb, format.ID{}) })
	if err := g.Wait(); err != nil {
		if memory != nil {
			memory.Close()
		}
		return nil, err
	}
	return memory, nil
}

func (e *Engine) prepareMemory(ctx context.Context, sb *sandbox, image format.ID, keepWarm bool) (*os.File, error) {
	if image == (format.ID{}) {
		return newMemory(sb.id(), sb.journal().MemoryMB)
	}
	r, err := e.opts.Pager.PrepareMemory(ctx, connect.NewRequest(&pagerv1.PrepareMemoryRequest{
		SandboxId: sb.id(), ImageId: image.String(), KeepWarm: keepWarm,
	}))
	if err != nil {
		return nil, fmt.Errorf("prepare the memory: %w", err)
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", r.Msg.Pid, r.Msg.Fd), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open the shared memory: %w", err)
	}
	return f, nil
}

// newMemory makes the RAM of a VM that boots: all holes.
func newMemory(id string, mb int) (*os.File, error) {
	fd, err := unix.MemfdCreate("wrenn-boot-"+id, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make the guest's memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "guest memory")
	if err := f.Truncate(int64(mb) << 20); err != nil {
		f.Close()
		return nil, fmt.Errorf("size the guest's memory: %w", err)
	}
	return f, nil
}

// stopServing ends the pager's service and removes the overlay. The VM must
// be dead. The successor is the memory image that it was paused to, or zero.
func (e *Engine) stopServing(ctx context.Context, sb *sandbox, successor format.ID) error {
	req := &pagerv1.ReleaseMemoryRequest{SandboxId: sb.id()}
	if !successor.IsZero() {
		req.SuccessorImageId = successor.String()
	}
	_, err := e.opts.Pager.ReleaseMemory(ctx, connect.NewRequest(req))
	if err != nil {
		err = fmt.Errorf("release the memory: %w", err)
	}
	if e.opts.Disks != nil { // the device before its server
		if derr := e.opts.Disks.Detach(ctx, sb.id()); derr != nil {
			return errors.Join(err, derr)
		}
	}
	_, derr := e.opts.Pager.StopDisk(ctx, connect.NewRequest(&pagerv1.StopDiskRequest{SandboxId: sb.id()}))
	if derr != nil {
		return errors.Join(err, fmt.Errorf("stop the disk: %w", derr))
	}
	return errors.Join(err, block.RemoveOverlay(storage.OS{}, sb.path(overlayName)))
}

// confirm makes the guest say that it is the individual of this life.
func (e *Engine) confirm(ctx context.Context, sb *sandbox, r *run, src source, life string) error {
	limit := restoreLimit
	if src.base != nil {
		limit = bootLimit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err := r.guest.confirm(ctx, r.machine.Done(), e.initRequest(sb, life, src.fork), e.opts.Now)
	if err != nil {
		// A VM that the pager had to kill says more than its silence.
		return errors.Join(err, r.machine.Err(), e.fatalReason(ctx, sb.id()))
	}
	return nil
}

func (e *Engine) initRequest(sb *sandbox, life string, fork bool) initRequest {
	j := sb.journal()
	return initRequest{
		Generation: life, Fork: fork, Hostname: j.ID, MachineID: j.MachineID,
		AccessToken: j.AccessToken, Envs: j.Envs, DefaultUser: "user",
	}
}

// fatalReason asks the pager whether it killed the VM, and why.
func (e *Engine) fatalReason(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	r, err := e.opts.Pager.GetStats(ctx, connect.NewRequest(&pagerv1.GetStatsRequest{SandboxId: id}))
	if err != nil || r.Msg.Fatal == "" {
		return nil
	}
	return errors.New(r.Msg.Fatal)
}

// watchMachine turns an end that nobody asked for into the state error.
func (e *Engine) watchMachine(sb *sandbox, r *run) {
	r.watch.Add(1)
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		defer r.watch.Done()
		select {
		case <-e.ctx.Done():
			return
		case <-r.ending:
			return
		case <-r.machine.Done():
		}
		select {
		case <-r.ending: // both at once: it was us
			return
		default:
		}
		e.wg.Add(1)
		go func() {
			defer e.wg.Done()
			e.machineDied(sb, r)
		}()
	}()
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}
