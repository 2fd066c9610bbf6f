package vmmtest

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// FakeKind is the Kind of fake machines.
const FakeKind = "fake"

// fakePeriod is the time between two ticks of a fake guest.
const fakePeriod = 2 * time.Millisecond

// CounterOffset is where a fake guest keeps its tick counter in RAM, eight
// bytes, little endian. Its page is the only one that it writes by itself.
const CounterOffset = 4096

// Fake is a vmm.Driver whose machines are objects of this process, each with
// a real child process that holds the memory descriptor, so that PIDs, pidfds
// and /proc are real. It stands for the world outside as well: Close and
// Adopt on the same Fake play a restart of the engine.
//
// A fake guest counts in its memory file (CounterOffset) and writes the
// console lines of the real test guest. Its Cmdline understands
// vmmtest.end=<poweroff|reboot|panic>@<tick>.
type Fake struct {
	// Info is what Probe answers.
	Info vmm.Info

	mu     sync.Mutex
	vms    map[int]*fakeVM
	faults map[string]map[int]error
	counts map[string]int
	calls  []string
	hook   func(method, id string) error
}

var _ vmm.Driver = (*Fake)(nil)

// NewFake makes a Fake without machines or faults.
func NewFake() *Fake {
	return &Fake{
		Info: vmm.Info{Kind: FakeKind, Version: "1.0", Accel: vmm.AccelTCG, MachineType: "object", CPUModel: "none", TSCKHz: 1_000_000},
		vms:  map[int]*fakeVM{}, faults: map[string]map[int]error{}, counts: map[string]int{},
	}
}

// Fail makes the nth call from now (1 is the next) of a method fail with err.
// Methods: Probe, Boot, Restore, Adopt, Pause, Continue, SaveState, Kill.
// A SaveState that fails has written a part. The others fail before they did
// anything.
func (f *Fake) Fail(method string, nth int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.faults[method] == nil {
		f.faults[method] = map[int]error{}
	}
	f.faults[method][f.counts[method]+nth] = err
}

// Hook is called before each method with the sandbox's ID, without any lock;
// an error is the method's. Nil removes it.
func (f *Fake) Hook(h func(method, id string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = h
}

// Calls returns what was called so far, "Boot a", "Pause a", in order.
func (f *Fake) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.calls...)
}

// End ends the machine of a sandbox as if its guest or the host had done it.
func (f *Fake) End(id string, r vmm.Reason) error {
	f.mu.Lock()
	var vm *fakeVM
	for _, v := range f.vms {
		if v.rec.ID == id && !v.ended() {
			vm = v
		}
	}
	f.mu.Unlock()
	if vm == nil {
		return fmt.Errorf("no live fake machine of sandbox %q", id)
	}
	return vm.end(context.Background(), r)
}

// FakeStatus is a live machine, whoever has a handle on it.
type FakeStatus struct {
	ID      string
	PID     int
	Running bool // its guest is not stopped
}

// Machines returns the live machines, in no order.
func (f *Fake) Machines() []FakeStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []FakeStatus
	for _, vm := range f.vms {
		if !vm.ended() && lives(vm.rec.PID) {
			out = append(out, FakeStatus{ID: vm.rec.ID, PID: vm.rec.PID, Running: vm.running.Load()})
		}
	}
	return out
}

// lives tells whether a child of ours has not ended, seen or not.
func lives(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, ok := strings.Cut(string(b), ") ")
	return err == nil && ok && !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

func (f *Fake) enter(method, id string) error {
	f.mu.Lock()
	f.calls = append(f.calls, method+" "+id)
	f.counts[method]++
	err := f.faults[method][f.counts[method]]
	hook := f.hook
	f.mu.Unlock()
	if err == nil && hook != nil {
		err = hook(method, id)
	}
	if err != nil {
		return fmt.Errorf("%s of sandbox %q: %w", method, id, err)
	}
	return nil
}

// Name implements vmm.Driver.
func (f *Fake) Name() string { return FakeKind }

// Capabilities implements vmm.Driver.
func (f *Fake) Capabilities() vmm.Capabilities {
	return vmm.Capabilities{SharedMemory: true, DirtySource: vmm.DirtyPrivatePages, LiveCheckpoint: true, ConsoleLimit: 1 << 20}
}

// Probe implements vmm.Driver.
func (f *Fake) Probe(ctx context.Context) (vmm.Info, error) {
	if err := errors.Join(ctx.Err(), f.enter("Probe", "")); err != nil {
		return vmm.Info{}, err
	}
	return f.Info, nil
}

// Boot implements vmm.Driver.
func (f *Fake) Boot(ctx context.Context, a vmm.BootArgs) (vmm.Machine, error) {
	if err := errors.Join(ctx.Err(), f.enter("Boot", a.ID), a.Validate(), a.NeedMemory()); err != nil {
		return nil, err
	}
	vm, err := f.start(a.HostArgs, a.Spec)
	if err != nil {
		return nil, err
	}
	vm.guestEnd(a.Cmdline)
	vm.print("READY clocksource=fake uptime=0\n")
	vm.running.Store(true)
	return &fakeMachine{f: f, vm: vm}, nil
}

// fakeState is the device state of a fake machine.
type fakeState struct {
	Magic string   `json:"magic"`
	Spec  vmm.Spec `json:"spec"`
	Tick  uint64   `json:"tick"`
	Pad   string   `json:"pad"` // so that a truncated state is possible at many places
}

const fakeMagic = "fake machine state"

// Restore implements vmm.Driver.
func (f *Fake) Restore(ctx context.Context, a vmm.RestoreArgs) (vmm.Machine, error) {
	if err := errors.Join(ctx.Err(), f.enter("Restore", a.ID), a.Validate(), a.NeedMemory()); err != nil {
		return nil, err
	}
	if err := f.Info.Fits(a.State.Info); err != nil {
		return nil, err
	}
	vm, err := f.start(a.HostArgs, a.State.Spec)
	if err != nil {
		return nil, err
	}
	if err := vm.load(ctx, a); err != nil {
		_ = vm.end(context.Background(), vm.reason)
		return nil, fmt.Errorf("restoring sandbox %s: %w", a.ID, err)
	}
	return &fakeMachine{f: f, vm: vm}, nil
}

func (vm *fakeVM) load(ctx context.Context, a vmm.RestoreArgs) error {
	if a.Attach != nil {
		if err := a.Attach(ctx, vm.rec.PID); err != nil {
			return err
		}
	}
	b, err := os.ReadFile(a.State.File)
	if err != nil {
		return err
	}
	var s fakeState
	if err := json.Unmarshal(b, &s); err != nil || s.Magic != fakeMagic {
		return fmt.Errorf("the state is damaged: %v", err)
	}
	if s.Spec != a.State.Spec {
		return fmt.Errorf("the state is that of a machine of %+v", s.Spec)
	}
	return ctx.Err()
}

// Adopt implements vmm.Driver.
func (f *Fake) Adopt(ctx context.Context, r vmm.Record) (vmm.Machine, error) {
	if err := errors.Join(ctx.Err(), f.enter("Adopt", r.ID)); err != nil {
		return nil, err
	}
	if r.Kind != FakeKind {
		return nil, fmt.Errorf("adopting sandbox %s: it is a %q machine", r.ID, r.Kind)
	}
	f.mu.Lock()
	vm := f.vms[r.PID]
	f.mu.Unlock()
	if vm == nil || vm.rec.StartTime != r.StartTime || vm.rec.BootID != r.BootID || vm.ended() {
		return nil, fmt.Errorf("adopting sandbox %s: %w", r.ID, vmm.ErrGone)
	}
	return &fakeMachine{f: f, vm: vm}, nil
}

// program is what the child runs: sleep, under the name and path by which a
// VMM process is told from others when no journal has its number.
func (f *Fake) program(dir string) (string, error) {
	path := filepath.Join(dir, "qemu-system-fake")
	if err := os.Symlink("/bin/sleep", path); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("name the fake's process: %w", err)
	}
	return path, nil
}

func (f *Fake) start(h vmm.HostArgs, s vmm.Spec) (*fakeVM, error) {
	boot, err := vmm.BootID()
	if err != nil {
		return nil, err
	}
	console := h.ConsolePath
	if console == "" {
		console = filepath.Join(h.Dir, "console.log")
	}
	log, err := vmm.OpenLog(console, f.Capabilities().ConsoleLimit)
	if err != nil {
		return nil, err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", h.Memory.Fd()), os.O_RDWR, 0)
	if err != nil {
		log.Close()
		return nil, err
	}
	files := []*os.File{h.Memory}
	uffd := -1
	if h.UffdDev != nil {
		files, uffd = append(files, h.UffdDev), 4
	}
	program, err := f.program(h.Dir)
	if err != nil {
		log.Close()
		mem.Close()
		return nil, err
	}
	p, err := vmm.StartProcess(vmm.ProcessSpec{Args: []string{program, "infinity"}, Dir: "/", Stderr: log, Files: files})
	if err != nil {
		log.Close()
		mem.Close()
		return nil, err
	}
	vm := &fakeVM{
		proc: p, mem: mem, console: log, done: make(chan struct{}), reason: vmm.ReasonProcess,
		rec: vmm.Record{
			ID: h.ID, Kind: FakeKind, PID: p.PID(), StartTime: p.StartTime(), BootID: boot,
			ConsolePath: console, MemoryFD: 3, UffdDevFD: uffd, Spec: s, Info: f.Info,
		},
	}
	f.mu.Lock()
	f.vms[p.PID()] = vm
	f.mu.Unlock()
	go vm.run()
	return vm, nil
}

// fakeVM is the machine, whoever has a handle on it.
type fakeVM struct {
	rec     vmm.Record
	proc    *vmm.Process
	mem     *os.File
	console *os.File
	running atomic.Bool
	done    chan struct{}

	mu     sync.Mutex // held for each tick: whoever has it sees a stopped guest
	reason vmm.Reason
	exit   *vmm.ExitError
	endAt  uint64
	endHow string
}

// run is the guest; it ends with the process.
func (vm *fakeVM) run() {
	t := time.NewTicker(fakePeriod)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			vm.tick()
		case <-vm.proc.Done():
			vm.mu.Lock()
			vm.exit = &vmm.ExitError{
				ID: vm.rec.ID, Reason: vm.reason, Status: vm.proc.Status(), At: time.Now(),
				Console: vmm.Tail(vm.rec.ConsolePath, 2048),
			}
			vm.mem.Close()
			vm.console.Close()
			vm.proc.Close()
			vm.mu.Unlock()
			close(vm.done)
			return
		}
	}
}

func (vm *fakeVM) tick() {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if !vm.running.Load() {
		return
	}
	n := vm.counter() + 1
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	if _, err := vm.mem.WriteAt(b[:], CounterOffset); err != nil {
		vm.print("memory: " + err.Error() + "\n")
		return
	}
	vm.print(fmt.Sprintf("tick %d mono=%d sum=ok\n", n, n*uint64(fakePeriod)))
	if vm.endHow != "" && n >= vm.endAt {
		vm.running.Store(false)
		vm.reason = map[string]vmm.Reason{"poweroff": vmm.ReasonShutdown, "reboot": vmm.ReasonReset, "panic": vmm.ReasonPanic}[vm.endHow]
		go func() { _ = vm.proc.Kill(context.Background()) }() // ends when the process has
	}
}

func (vm *fakeVM) counter() uint64 {
	var b [8]byte
	if _, err := vm.mem.ReadAt(b[:], CounterOffset); err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

func (vm *fakeVM) print(s string) { _, _ = vm.console.WriteString(s) }

func (vm *fakeVM) guestEnd(cmdline string) {
	for _, f := range strings.Fields(cmdline) {
		if v, ok := strings.CutPrefix(f, "vmmtest.end="); ok {
			how, at, _ := strings.Cut(v, "@")
			vm.mu.Lock()
			vm.endHow = how
			vm.endAt, _ = strconv.ParseUint(at, 10, 64)
			vm.mu.Unlock()
		}
	}
}

func (vm *fakeVM) ended() bool {
	select {
	case <-vm.done:
		return true
	default:
		return false
	}
}

func (vm *fakeVM) end(ctx context.Context, r vmm.Reason) error {
	vm.mu.Lock()
	if vm.exit == nil {
		vm.reason = r
	}
	vm.mu.Unlock()
	if err := vm.proc.Kill(ctx); err != nil && !errors.Is(err, vmm.ErrClosed) {
		return err
	}
	select {
	case <-vm.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fakeMachine is one handle.
type fakeMachine struct {
	f      *Fake
	vm     *fakeVM
	closed atomic.Bool
}

func (m *fakeMachine) PID() int              { return m.vm.rec.PID }
func (m *fakeMachine) Record() vmm.Record    { return m.vm.rec }
func (m *fakeMachine) MemoryFD() int         { return m.vm.rec.MemoryFD }
func (m *fakeMachine) Done() <-chan struct{} { return m.vm.done }
func (m *fakeMachine) Close()                { m.closed.Store(true) }

func (m *fakeMachine) Err() error {
	m.vm.mu.Lock()
	defer m.vm.mu.Unlock()
	if m.vm.exit == nil {
		return nil
	}
	return m.vm.exit
}

func (m *fakeMachine) enter(ctx context.Context, method string) error {
	if m.closed.Load() {
		return fmt.Errorf("%s of sandbox %q: %w", method, m.vm.rec.ID, vmm.ErrClosed)
	}
	if err := errors.Join(ctx.Err(), m.f.enter(method, m.vm.rec.ID)); err != nil {
		return err
	}
	if m.vm.ended() && method != "Kill" {
		return fmt.Errorf("%s: %w", method, m.Err())
	}
	return nil
}

// set waits for the tick at hand to end.
func (m *fakeMachine) set(running bool) {
	m.vm.mu.Lock()
	defer m.vm.mu.Unlock()
	m.vm.running.Store(running)
}

func (m *fakeMachine) Pause(ctx context.Context) error {
	if err := m.enter(ctx, "Pause"); err != nil {
		return err
	}
	m.set(false)
	return nil
}

func (m *fakeMachine) Continue(ctx context.Context) error {
	if err := m.enter(ctx, "Continue"); err != nil {
		return err
	}
	m.set(true)
	return nil
}

func (m *fakeMachine) SaveState(ctx context.Context, w io.Writer) error {
	err := m.enter(ctx, "SaveState")
	if errors.Is(err, vmm.ErrGone) || errors.Is(err, vmm.ErrClosed) || ctx.Err() != nil {
		return err
	}
	m.set(false)
	b, jerr := json.Marshal(fakeState{Magic: fakeMagic, Spec: m.vm.rec.Spec, Tick: m.vm.counter(), Pad: strings.Repeat("x", 4096)})
	if jerr != nil {
		return jerr
	}
	if err != nil {
		_, _ = w.Write(b[:len(b)/2]) // it fails anyway
		return err
	}
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("writing the state: %w", err)
	}
	return nil
}

func (m *fakeMachine) Kill(ctx context.Context) error {
	if err := m.enter(ctx, "Kill"); err != nil {
		return err
	}
	return m.vm.end(ctx, vmm.ReasonKilled)
}
