package engine

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1/pagerv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/internal/pager"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker/fctest"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

func TestMain(m *testing.M) {
	fctest.Main()
	os.Exit(m.Run())
}

// held counts what is lent to sandboxes, by their ids.
type held struct {
	mu  sync.Mutex
	ids map[string]bool
}

func (h *held) set(id string, there bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ids == nil {
		h.ids = map[string]bool{}
	}
	if there {
		h.ids[id] = true
	} else {
		delete(h.ids, id)
	}
}

func (h *held) list() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for id := range h.ids {
		out = append(out, id)
	}
	return out
}

// fakeNet lends slots whose guest is a server of the test.
type fakeNet struct {
	held
	guest string
}

func (n *fakeNet) Acquire(_ context.Context, id string) (Slot, error) {
	n.set(id, true)
	return fakeSlot{n, id}, nil
}

func (n *fakeNet) Adopt(_ context.Context, id string, _ int) (Slot, error) {
	for _, have := range n.list() {
		if have == id {
			return fakeSlot{n, id}, nil
		}
	}
	return nil, hostnet.ErrSlotLost
}

type fakeSlot struct {
	net *fakeNet
	id  string
}

func (s fakeSlot) Tap() (string, string)                    { return "", "" }
func (s fakeSlot) Index() int                               { return 1 }
func (s fakeSlot) OpenTap() (*os.File, error)               { return nil, errors.New("no tap") }
func (s fakeSlot) SetEgress(context.Context, *Egress) error { return nil }
func (s fakeSlot) Release(context.Context) error            { s.net.set(s.id, false); return nil }
func (s fakeSlot) Dial(ctx context.Context, _ int) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", s.net.guest)
}

// fakeDisks lends no device, so that the VMM opens none.
type fakeDisks struct {
	held
	fail atomic.Pointer[error] // of the next Attach
}

func (d *fakeDisks) Attach(_ context.Context, id, _ string) (string, error) {
	if err := d.fail.Swap(nil); err != nil {
		return "", *err
	}
	d.set(id, true)
	return "", nil
}
func (d *fakeDisks) Adopt(context.Context, string, string) error { return nil }
func (d *fakeDisks) Flush(string) error                          { return nil }
func (d *fakeDisks) Detach(_ context.Context, id string) error   { d.set(id, false); return nil }
func (d *fakeDisks) Owners() ([]string, error)                   { return d.list(), nil }

// ownRig is an engine with a real store and pager and the real Firecracker
// driver, on a program that is told when to fail.
type ownRig struct {
	*Engine
	t       *testing.T
	opts    Options
	program *fctest.Program
	net     *fakeNet
	disks   *fakeDisks
	ran     time.Time // when a machine last began to run, where that is noted
}

func newOwnRig(t *testing.T, callLimit time.Duration) *ownRig {
	t.Helper()
	p := fctest.NewProgram(t)
	return newRigOn(t, p, firecracker.Options{
		Binary: p.Path, Direct: true, CallLimit: callLimit, SaveLimit: callLimit,
	}, BaseFiles{})
}

// newRigOn makes a rig whose base is of the files given, and of some bytes
// where none is.
func newRigOn(t *testing.T, p *fctest.Program, o firecracker.Options, base BaseFiles) *ownRig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("skipped: the pager gives its sockets to a group, which needs root")
	}
	dir, err := os.MkdirTemp("", "own") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	store, err := snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	quiet := slog.New(slog.DiscardHandler)
	server, err := pager.New(pager.Options{Dir: filepath.Join(dir, "pager"), Store: store, Logger: quiet,
		OrderDir: filepath.Join(dir, "orders"), WholeDir: filepath.Join(dir, "memory")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	mux := http.NewServeMux()
	mux.Handle(pagerv1connect.NewPagerServiceHandler(server))
	serves := httptest.NewServer(mux)
	t.Cleanup(serves.Close)
	guest := httptest.NewServer(http.HandlerFunc(confirmAll))
	t.Cleanup(guest.Close)
	r := &ownRig{
		t: t, program: p, disks: &fakeDisks{},
		net: &fakeNet{guest: guest.Listener.Addr().String()},
	}
	// The guest's tick is periodic: emulated processors lose an interrupt now and
	// then, and a timer that is set for once stays silent in every life after that.
	r.opts = Options{
		Dir: dir, Store: store, Cmdline: "mitigations=off nohz=off highres=off lapic=notscdeadline", Network: r.net, Disks: r.disks, Logger: quiet,
		Pager:  pagerv1connect.NewPagerServiceClient(http.DefaultClient, serves.URL, connect.WithAcceptCompression("gzip", nil, nil)),
		Driver: firecracker.New(o),
	}
	r.restart()
	t.Cleanup(func() { r.Close() })
	r.importBase(dir, base)
	return r
}

// restart makes another engine on the same state, as after a crash.
func (r *ownRig) restart() {
	r.t.Helper()
	if r.Engine != nil {
		r.Close()
	}
	var err error
	if r.Engine, err = New(r.t.Context(), r.opts); err != nil {
		r.t.Fatal(err)
	}
}

func (r *ownRig) importBase(dir string, b BaseFiles) {
	r.t.Helper()
	b.Name, b.Digest, b.KernelDigest = "base", "d", "k"
	for name, to := range map[string]*string{"rootfs": &b.Rootfs, "kernel": &b.Kernel, "initrd": &b.Initrd} {
		if *to != "" {
			continue
		}
		*to = filepath.Join(dir, name)
		if err := os.WriteFile(*to, []byte(strings.Repeat(name[:1], 1<<20)), 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := r.ImportBase(r.t.Context(), b, nil); err != nil {
		r.t.Fatal(err)
	}
}

// confirmAll is a guest that confirms whatever it is asked.
func confirmAll(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/init" {
		var in initRequest
		if err := json.NewDecoder(req.Body).Decode(&in); err == nil {
			io.WriteString(w, answer(in.Generation, ""))
		}
	}
}

func (r *ownRig) create(id string) error {
	_, _, err := r.Create(r.t.Context(), CreateSpec{ID: id, Template: "base", MemoryMB: 64})
	return err
}

func (r *ownRig) pause(id string) error {
	_, _, err := r.Pause(r.t.Context(), id)
	return err
}

func (r *ownRig) resume(id string) error {
	_, _, err := r.Resume(r.t.Context(), id, false)
	return err
}

func (r *ownRig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *ownRig) state(id string) State {
	r.t.Helper()
	i, err := r.Get(id)
	r.must(err)
	return i.State
}

// nothingHeld: no process, no slot, no device, nothing served, no directory.
func (r *ownRig) nothingHeld(when string, sandboxes int) {
	r.t.Helper()
	if pids := r.program.Living(r.t); len(pids) != 0 {
		r.t.Errorf("%s: processes %v live", when, pids)
	}
	if slots := r.net.list(); len(slots) != 0 {
		r.t.Errorf("%s: network slots of %v", when, slots)
	}
	if devices := r.disks.list(); len(devices) != 0 {
		r.t.Errorf("%s: block devices of %v", when, devices)
	}
	st, err := r.opts.Pager.GetStatus(r.t.Context(), connect.NewRequest(&pagerv1.GetStatusRequest{}))
	r.must(err)
	if len(st.Msg.Sandboxes) != 0 {
		r.t.Errorf("%s: the pager serves %v", when, st.Msg.Sandboxes)
	}
	dirs, err := os.ReadDir(filepath.Join(r.opts.Dir, "sandboxes"))
	r.must(err)
	if len(dirs) != sandboxes {
		r.t.Errorf("%s: directories %v, want %d", when, dirs, sandboxes)
	}
}

// shortPatience is how long a call without an answer is waited for.
const shortPatience = 5 * time.Second

// eachFailure runs a subtest for each call and each way to fail in it.
func eachFailure(t *testing.T, calls, kinds []string, f func(r *ownRig, call, kind string)) {
	for _, call := range calls {
		for _, kind := range kinds {
			t.Run(kind+" at "+strings.ReplaceAll(call, "/", "_"), func(t *testing.T) {
				t.Parallel()
				limit := time.Minute
				if kind == fctest.Hang {
					limit = shortPatience
				}
				r := newOwnRig(t, limit)
				f(r, call, kind)
				if r.program.Pending() {
					t.Errorf("the call was never made: %v", r.program.Calls(t))
				}
			})
		}
	}
}

var (
	allKinds   = []string{fctest.Die, fctest.Hang, fctest.Refuse}
	aliveKinds = []string{fctest.Hang, fctest.Refuse, fctest.Full}
)

// TestACreateThatFailsLeavesNothing, whatever Firecracker does in whichever
// step.
func TestACreateThatFailsLeavesNothing(t *testing.T) {
	calls := []string{"GET /version", "PUT /machine-config", "PUT /boot-source", "PUT /entropy", "PUT /actions"}
	eachFailure(t, calls, allKinds, func(r *ownRig, call, kind string) {
		r.program.Fail(r.t, call, kind)
		if err := r.create("a"); err == nil {
			r.t.Error("it is created")
		}
		if _, err := r.Get("a"); !errors.Is(err, ErrNotFound) {
			r.t.Errorf("it is there: %v", err)
		}
		r.nothingHeld("after the failure", 0)
		r.must(r.create("a"))
		r.must(r.Destroy(r.t.Context(), "a"))
		r.nothingHeld("at the end", 0)
	})
}

// TestAResumeThatFailsLeavesItPaused, and the next one works.
func TestAResumeThatFailsLeavesItPaused(t *testing.T) {
	calls := []string{"GET /version", "PUT /snapshot/load", "GET /machine-config", "PATCH /vm"}
	eachFailure(t, calls, allKinds, func(r *ownRig, call, kind string) {
		r.must(r.create("a"))
		r.must(r.pause("a"))
		r.program.Fail(r.t, call, kind)
		if err := r.resume("a"); err == nil {
			r.t.Error("it is resumed")
		}
		if s := r.state("a"); s != Paused {
			r.t.Errorf("it is %s, want paused", s)
		}
		r.nothingHeld("after the failure", 1)
		r.must(r.resume("a"))
		r.must(r.Destroy(r.t.Context(), "a"))
		r.nothingHeld("at the end", 0)
	})
}

// TestAPausePassesOnWhatAResumeNeeded, and the memory that is put ahead is right:
// the machine reads it.
func TestAPausePassesOnWhatAResumeNeeded(t *testing.T) {
	r := newOwnRig(t, time.Minute)
	r.must(r.create("a"))
	r.must(r.pause("a"))
	for n := range 3 {
		r.must(r.resume("a"))
		r.must(r.pause("a"))
		m, err := r.opts.Store.Manifest(r.sandboxes["a"].journal().Manifest)
		r.must(err)
		if _, err := os.Stat(filepath.Join(r.opts.Dir, "orders", m.Memory.ID.String()+".order")); err != nil {
			t.Errorf("pause %d passes nothing on: %v", n, err)
		}
	}
	r.must(r.Destroy(t.Context(), "a"))
	r.nothingHeld("at the end", 0)
}

// sayer is a pager that notes when it is said that a VM runs, and does not hear it.
type sayer struct {
	pagerv1connect.PagerServiceClient
	calls func() []string
	said  chan string
}

func (p *sayer) ReadAhead(_ context.Context, req *connect.Request[pagerv1.ReadAheadRequest]) (*connect.Response[pagerv1.ReadAheadResponse], error) {
	calls := p.calls()
	p.said <- req.Msg.SandboxId + " after " + calls[len(calls)-1]
	return nil, connect.NewError(connect.CodeUnavailable, errors.New("the pager is ending"))
}

// TestThePagerIsToldThatAMachineRuns, when it does, beside everything else, and
// where it copies pages only: not of one that boots or maps its memory whole. A
// pager that does not hear it costs nobody the resume.
func TestThePagerIsToldThatAMachineRuns(t *testing.T) {
	r := newOwnRig(t, time.Minute)
	p := &sayer{r.opts.Pager, func() []string { return r.program.Calls(t) }, make(chan string, 16)}
	r.opts.Pager = p
	r.restart()
	r.importBase(t.TempDir(), BaseFiles{})
	r.must(r.create("a"))
	r.must(r.pause("a"))
	r.must(r.resume("a"))
	select {
	case got := <-p.said:
		if !strings.HasPrefix(got, "a after PATCH /vm ") || !strings.Contains(got, "Resumed") {
			t.Errorf("it was told of %s", got)
		}
	case <-time.After(time.Minute):
		t.Error("it is not told")
	}
	_, _, err := r.Snapshot(t.Context(), "a", "s")
	r.must(err)
	r.must(r.spawn("b"))
	if got := r.backends(); got != "Uffd File" {
		t.Fatalf("memory came from %s", got)
	}
	r.restart() // the calls of the engine before this one are over
	for _, id := range []string{"a", "b"} {
		r.must(r.Destroy(t.Context(), id))
	}
	if n := len(p.said); n != 0 {
		t.Errorf("it was told of %d more, the first %s", n, <-p.said)
	}
}

// TestAStartWithoutItsDiskOrMemoryLeavesNothing: what is prepared beside the
// process's start ends that too, and says what it was.
func TestAStartWithoutItsDiskOrMemoryLeavesNothing(t *testing.T) {
	r := newOwnRig(t, time.Minute)
	none := errors.New("there is no free device")
	r.disks.fail.Store(&none)
	if err := r.create("a"); !errors.Is(err, none) {
		t.Errorf("a create without a device: %v", err)
	}
	r.nothingHeld("after the create", 0)
	r.must(r.create("a"))
	r.must(r.pause("a"))
	r.disks.fail.Store(&none)
	if err := r.resume("a"); !errors.Is(err, none) {
		t.Errorf("a resume without a device: %v", err)
	}
	r.nothingHeld("after the resume", 1)

	m, err := r.opts.Store.Manifest(r.sandboxes["a"].journal().Manifest)
	r.must(err)
	header := filepath.Join(r.opts.Dir, "store", "images", m.Memory.ID.String(), "header")
	r.must(os.Rename(header, header+".away"))
	if err := r.resume("a"); err == nil || !strings.Contains(err.Error(), "prepare the memory") {
		t.Errorf("a resume without its memory: %v", err)
	}
	r.nothingHeld("after the resume without memory", 1)
	r.must(os.Rename(header+".away", header))
	if s := r.state("a"); s != Paused {
		t.Errorf("it is %s, want paused", s)
	}
	r.must(r.resume("a"))
	r.must(r.Destroy(t.Context(), "a"))
	r.nothingHeld("at the end", 0)
}

// TestACaptureThatFailsLeavesItRunning, a pause and a snapshot, and the next
// pause is whole: it asks for all of the memory where the list of changes went
// with the one that failed, also when the engine was restarted in between.
func TestACaptureThatFailsLeavesItRunning(t *testing.T) {
	capture := map[string]func(r *ownRig) error{
		"pause":    func(r *ownRig) error { return r.pause("a") },
		"snapshot": func(r *ownRig) error { _, _, err := r.Snapshot(r.t.Context(), "a", "s"); return err },
	}
	for name, do := range capture {
		t.Run(name, func(t *testing.T) {
			eachFailure(t, []string{"PATCH /vm", "PUT /snapshot/create"}, aliveKinds, func(r *ownRig, call, kind string) {
				r.must(r.create("a"))
				r.program.Fail(r.t, call, kind)
				err := do(r)
				if err == nil {
					r.t.Error("it is captured")
				}
				if kind == fctest.Full && !strings.Contains(err.Error(), "No space left on device") {
					r.t.Errorf("the error does not name the full disk: %v", err)
				}
				if s := r.state("a"); s != Running {
					r.t.Errorf("it is %s, want running", s)
				}
				r.restart()
				if s := r.state("a"); s != Running {
					r.t.Errorf("after a restart it is %s, want running", s)
				}
				r.must(r.pause("a"))
				r.savedWhole()
				r.nothingHeld("paused", 1)
				r.must(r.resume("a"))
				r.must(r.Destroy(r.t.Context(), "a"))
				r.nothingHeld("at the end", 0)
			})
		})
	}
}

// savedWhole looks at how the last save was asked for.
func (r *ownRig) savedWhole() {
	r.t.Helper()
	last := ""
	for _, c := range r.program.Calls(r.t) {
		if strings.HasPrefix(c, "PUT /snapshot/create ") {
			last = c
		}
	}
	if !strings.Contains(last, `"Full"`) {
		r.t.Errorf("the save after one that failed was asked for by %s, want all of the memory", last)
	}
}

// TestAFirecrackerThatDiesInACaptureIsToldAndCanBeRemoved.
func TestAFirecrackerThatDiesInACaptureIsToldAndCanBeRemoved(t *testing.T) {
	eachFailure(t, []string{"PATCH /vm", "PUT /snapshot/create"}, []string{fctest.Die}, func(r *ownRig, call, kind string) {
		r.must(r.create("a"))
		_, events := r.Watch(r.t.Context())
		r.program.Fail(r.t, call, kind)
		if err := r.pause("a"); !errors.Is(err, vmm.ErrGone) {
			r.t.Errorf("the pause says %v", err)
		}
		ev := <-events
		if ev.Sandbox.State != Failed || !strings.Contains(ev.Sandbox.Error, fctest.LastWords) {
			r.t.Errorf("it is %s: %s", ev.Sandbox.State, ev.Sandbox.Error)
		}
		r.nothingHeld("after its death", 1)
		r.must(r.Destroy(r.t.Context(), "a"))
		r.nothingHeld("at the end", 0)
	})
}

// otherHost is a driver that finds another host than its machines were made on.
type otherHost struct {
	vmm.Driver
	change func(*vmm.Info)
}

func (d otherHost) Probe(ctx context.Context) (vmm.Info, error) {
	i, err := d.Driver.Probe(ctx)
	d.change(&i)
	return i, err
}

// TestWhatAnotherHostSavedIsRefusedInOneSentence, by a create and a resume,
// which leave it where it was.
func TestWhatAnotherHostSavedIsRefusedInOneSentence(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*vmm.Info)
		want   string
	}{
		"another VMM":           {func(i *vmm.Info) { i.Kind = "qemu" }, `its VMM is "firecracker" and this host's is "qemu"`},
		"another state version": {func(i *vmm.Info) { i.MachineType = "microvm, state 7.0.0" }, `its machine type is "microvm, state 6.0.0" and this host's is "microvm, state 7.0.0"`},
		"another version":       {func(i *vmm.Info) { i.Version = "1.13.0" }, `its VMM version is "1.12" and this host's is "1.13"`},
		"another CPU vendor":    {func(i *vmm.Info) { i.CPUModel = "host Somebody" }, `and this host's is "host Somebody"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newOwnRig(t, time.Minute)
			r.must(r.create("a"))
			_, _, err := r.Snapshot(t.Context(), "a", "s")
			r.must(err)
			r.must(r.pause("a"))
			r.opts.Driver = otherHost{r.opts.Driver, c.change}
			r.restart()
			calls := len(r.program.Calls(t))
			_, _, err = r.Create(t.Context(), CreateSpec{ID: "b", Template: "s"})
			for what, err := range map[string]error{"create": err, "resume": r.resume("a")} {
				if !errors.Is(err, ErrState) || !errors.Is(err, vmm.ErrIncompatible) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
					t.Errorf("%s: %v, want one sentence with %s", what, err, c.want)
				}
			}
			if len(r.program.Calls(t)) != calls {
				t.Error("a Firecracker was started for it")
			}
			if s := r.state("a"); s != Paused {
				t.Errorf("it is %s, want paused", s)
			}
			r.nothingHeld("after the refusals", 1)
			r.must(r.Destroy(t.Context(), "a"))
			r.nothingHeld("at the end", 0)
		})
	}
}

// TestBlockDevicesOfNobodyAreTakenAwayAtTheStart, and those of the running stay.
func TestBlockDevicesOfNobodyAreTakenAwayAtTheStart(t *testing.T) {
	r := newOwnRig(t, time.Minute)
	r.must(r.create("a"))
	r.disks.set("lost", true)
	r.restart()
	if left := r.disks.list(); len(left) != 1 || left[0] != "a" {
		t.Errorf("devices of %v, want only that of a", left)
	}
	r.must(r.Destroy(t.Context(), "a"))
	r.nothingHeld("at the end", 0)
}

// TestAnEndedMachineLeavesNoFiles: the files that Firecracker ran on are gone
// when it is, while its sandbox stays.
func TestAnEndedMachineLeavesNoFiles(t *testing.T) {
	r := newOwnRig(t, time.Minute)
	r.must(r.create("a"))
	dir := filepath.Join(r.opts.Dir, "sandboxes", "a", "vm")
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("while it runs: %v", err)
	}
	r.must(r.pause("a"))
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("paused: %v", err)
	}
	// One that ends while there is no engine.
	r.must(r.resume("a"))
	r.Close()
	r.program.KillAll(t)
	r.restart()
	if s := r.state("a"); s != Failed {
		t.Errorf("it is %s, want error", s)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("ended while nobody looked: %v", err)
	}
	r.must(r.Destroy(t.Context(), "a"))
	r.nothingHeld("at the end", 0)
}
