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
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
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
	restoreLimit = 120 * time.Second
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

// starting is the start of a VM: of a new sandbox, or of a paused one.
type starting struct {
	e   *Engine
	sb  *sandbox
	src source
	ph  *phases

	c      closer // what was acquired
	slot   Slot
	rec    runRecord
	memory *os.File // the guest's RAM, until the VMM has it
	// own: the VMM keeps memory to itself, see own.go.
	own    bool
	served served
	// wholePath is the file that the VMM maps its memory from, or empty.
	wholePath string
	machine   vmm.Machine
	guest     *Guest
	// entered: the directory is ours. left: what a start that failed could
	// not release.
	entered bool
	left    error
}

func (st *starting) createSteps() []step {
	return append([]step{{name: "enter", do: st.enter}}, st.steps()...)
}

func (st *starting) resumeSteps() []step {
	return append([]step{{name: "record_resuming", do: st.recordResuming}}, st.steps()...)
}

func (e *Engine) newStarting(sb *sandbox, src source, ph *phases) *starting {
	return &starting{e: e, sb: sb, src: src, ph: ph, own: e.ownMemory(), served: newServed()}
}

func (st *starting) steps() []step {
	steps := []step{
		{name: "network", do: st.network},
		{name: "record_run", do: st.recordRun},
	}
	prepare, vmm := step{name: "disk_and_memory", do: st.prepare}, step{name: "vmm", do: st.startMachine}
	if st.own {
		steps = append(steps, step{beside: []step{prepare, vmm}})
	} else {
		steps = append(steps, prepare, vmm)
	}
	return append(steps, []step{
		{name: "record_vm", do: st.recordVM},
		{name: "vm_run", do: st.letRun},
		{name: "guest_confirm", do: st.confirm},
		{name: "guest_trust", do: st.trust},
		{name: "record_running", do: st.recordRunning},
	}...)
}

// start brings up the VM of sb by steps, confirmed by its guest. On an error
// the run is undone; what could not be released stays in the journal.
func (e *Engine) start(ctx context.Context, op Op, st *starting, steps []step) error {
	err := e.perform(ctx, op, st.ph, steps)
	st.closeMemory()
	r := &run{machine: st.machine, slot: st.slot, guest: st.guest, ending: make(chan struct{})}
	if err != nil {
		if st.guest != nil {
			st.guest.close()
		}
		if st.left = st.c.close(ctx); st.left != nil {
			st.sb.setRun(r) // for who clears it
		}
		return errors.Join(err, st.left)
	}
	st.c.keep()
	st.sb.setRun(r)
	e.watchMachine(st.sb, r)
	return nil
}

// closeMemory drops our handle on the guest's RAM; the VMM has its own.
func (st *starting) closeMemory() {
	if st.memory != nil {
		st.memory.Close()
		st.memory = nil
	}
}

// enter makes the directory and the first journal of a new sandbox.
func (st *starting) enter(context.Context) error {
	if err := os.Mkdir(st.sb.dir, 0o711); err != nil {
		return fmt.Errorf("make the sandbox's directory: %w", err)
	}
	st.entered = true
	return st.sb.update(func(*journal) {})
}

func (st *starting) recordResuming(context.Context) error {
	return st.sb.update(func(j *journal) { j.State, j.Error = Resuming, "" })
}

func (st *starting) network(ctx context.Context) error {
	slot, err := st.e.opts.Network.Acquire(ctx, st.sb.id())
	if errors.Is(err, hostnet.ErrNoSlot) {
		return fmt.Errorf("%w in the host's network: all slots for sandboxes are taken; pause or remove some sandboxes, or give a larger --network-prefix", ErrNoRoom)
	}
	if err != nil {
		return fmt.Errorf("get a network slot: %w", err)
	}
	st.slot = slot
	st.c.push(slot.Release)
	if egress := st.sb.journal().Egress; egress != nil {
		return slot.SetEgress(ctx, egress)
	}
	return nil
}

// record is a copy for the journal, which others read.
func (st *starting) record() *runRecord {
	r := st.rec
	return &r
}

func (st *starting) recordRun(context.Context) error {
	st.rec = runRecord{Slot: st.slot.Index(), Life: randomHex(16), DiskImage: st.src.disk()}
	if b := st.src.base; b != nil {
		st.rec.KernelDigest = b.KernelDigest
	} else {
		m := st.src.manifest
		st.rec.KernelDigest = m.VMM.KernelDigest
		st.rec.MemoryImage = m.Memory.ID
		st.rec.LastMemory, st.rec.LastDisk = st.rec.MemoryImage, st.rec.DiskImage
		st.rec.WholeImage = st.e.mayHaveWhole(st.sb)
	}
	return st.sb.update(func(j *journal) { j.Run = st.record() })
}

// startMachine starts the VMM process; a restored guest has not run yet.
func (st *starting) startMachine(ctx context.Context) error {
	if st.own {
		return st.startOwn(ctx)
	}
	sb := st.sb
	tap, err := st.slot.OpenTap()
	if err != nil {
		return fmt.Errorf("open the tap device: %w", err)
	}
	defer tap.Close()
	defer st.closeMemory()
	// Where the kernel has the device, the VMM process needs no privilege for
	// its page faults to be served; where not, the system call is used.
	uffdDev, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		uffdDev = nil
	} else {
		defer uffdDev.Close()
	}
	return st.launch(ctx, vmm.HostArgs{
		ID: sb.id(), Dir: sb.dir, Memory: st.memory, UffdDev: uffdDev,
		DiskSocket: sb.path(diskSocket), Tap: tap, ConsolePath: sb.path(consoleName),
	})
}

// launch boots or restores the VM.
func (st *starting) launch(ctx context.Context, host vmm.HostArgs) error {
	e, sb, src := st.e, st.sb, st.src
	j := sb.journal()
	spec := vmm.Spec{VCPUs: j.VCPUs, MemoryMB: j.MemoryMB, MAC: guestMAC}
	var m vmm.Machine
	var err error
	if src.base != nil {
		m, err = e.opts.Driver.Boot(ctx, vmm.BootArgs{
			HostArgs: host, Spec: spec, Kernel: src.base.Kernel, Initrd: src.base.Initrd,
			Cmdline: guestNetwork + " wrenn.hostname=" + sb.id() + " " + e.opts.Cmdline,
		})
		if err != nil {
			return fmt.Errorf("boot: %w", err)
		}
	} else {
		state, err := e.opts.Store.StatePath(src.manifest.ID)
		if err != nil {
			return fmt.Errorf("check the device state: %w", err)
		}
		a := vmm.RestoreArgs{HostArgs: host, State: vmm.State{Spec: spec, Info: infoOf(src.manifest.VMM), File: state}, Attach: st.attach}
		if host.MemoryFile != "" {
			a.Attach = nil // nobody serves it
		}
		if st.own {
			a.Disk = st.attachDisk
		}
		m, err = e.opts.Driver.Restore(ctx, a)
		if err != nil {
			return fmt.Errorf("restore: %w", err)
		}
	}
	st.machine = m
	st.c.push(m.Kill)
	return nil
}

// attach has the pager serve the page faults of the VMM process.
func (st *starting) attach(ctx context.Context, pid int) error {
	if st.own {
		if err := await(ctx, st.served.memory); err != nil {
			return err
		}
	}
	defer st.ph.part("attach")()
	r, err := st.e.opts.Pager.AttachMemory(ctx, connect.NewRequest(&pagerv1.AttachMemoryRequest{SandboxId: st.sb.id(), Pid: int32(pid)}))
	if err == nil {
		st.rec.RAMAddr = r.Msg.Address
	}
	return err
}

func (st *starting) recordVM(context.Context) error {
	vm := st.machine.Record()
	st.rec.VM = &vm
	return st.sb.update(func(j *journal) { j.Run = st.record() })
}

func (st *starting) letRun(ctx context.Context) error {
	if err := st.machine.Continue(ctx); err != nil {
		return fmt.Errorf("let the VM run: %w", err)
	}
	if st.own {
		st.readAhead()
	}
	return nil
}

// confirm makes the guest say that it is the individual of this life.
func (st *starting) confirm(ctx context.Context) error {
	st.guest = newGuest(st.slot, st.sb.journal().AccessToken)
	limit := restoreLimit
	if st.src.base != nil {
		limit = bootLimit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	said, err := st.guest.confirm(ctx, st.machine.Done(), st.e.initRequest(st.sb, st.rec.Life, st.src.fork), st.e.opts.Now)
	if err != nil {
		// A VM that the pager had to kill says more than its silence.
		return fmt.Errorf("the guest did not confirm its identity: %w",
			errors.Join(err, st.machine.Err(), st.e.fatalReason(ctx, st.sb.id())))
	}
	st.rec.EnvdVersion = knownVersion(said.EnvdVersion)
	return nil
}

// trust: a guest that cannot write down whom it trusts goes on all the same when
// it was there before; a full disk must not keep it from its owner.
func (st *starting) trust(ctx context.Context) error {
	j := st.sb.journal()
	err := st.e.trust(ctx, st.guest, j.Egress)
	if err != nil && j.State == Resuming {
		st.e.log.Warn("a resumed guest does not trust the host's certificates", "sandbox", j.ID, "error", err)
		return nil
	}
	return err
}

func (st *starting) recordRunning(context.Context) error {
	now := st.e.opts.Now().UTC()
	return st.sb.update(func(j *journal) { j.State, j.Error, j.StartedAt, j.Run = Running, "", &now, st.record() })
}

// prepare makes the pager serve disk and memory, and opens the guest's RAM as
// a file for the VMM process.
func (st *starting) prepare(ctx context.Context) error {
	e, sb, rec := st.e, st.sb, &st.rec
	// Pushed before the outcome is known: the pager may have done what it did
	// not get to say, and releasing what is not there is fine.
	st.c.push(func(ctx context.Context) error { return e.stopServing(ctx, sb) })
	// A call that is given up may be carried out after what undoes it.
	ctx = context.WithoutCancel(ctx)
	var g errgroup.Group
	g.Go(func() error {
		_, err := e.opts.Pager.ServeDisk(ctx, connect.NewRequest(&pagerv1.ServeDiskRequest{
			SandboxId: sb.id(), ImageId: rec.DiskImage.String(),
			OverlayPath: sb.path(overlayName), SocketPath: sb.path(diskSocket),
		}))
		if err != nil {
			return fmt.Errorf("serve the disk: %w", err)
		}
		close(st.served.disk)
		return nil
	})
	g.Go(func() (err error) {
		if st.own {
			err = st.prepareOwn(ctx)
		} else {
			st.memory, err = e.prepareMemory(ctx, sb, rec.MemoryImage, st.src.keepWarm)
		}
		if err == nil {
			close(st.served.memory)
		}
		return err
	})
	return g.Wait()
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
