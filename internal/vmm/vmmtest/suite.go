package vmmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// maxJump bounds the guest's own time between the last tick before a save and
// the first after the restore, but for as long as that took to come: its clock
// stands still in between.
const maxJump = 2 * time.Second

func (s Subject) arguments(t *testing.T) {
	for _, c := range []struct {
		name, field string
		change      func(*vmm.BootArgs)
	}{
		{"no id", "id:", func(a *vmm.BootArgs) { a.ID = "" }},
		{"bad id", "id:", func(a *vmm.BootArgs) { a.ID = "a/../b" }},
		{"no dir", "dir:", func(a *vmm.BootArgs) { a.Dir = "/nonexistent" }},
		{"no memory", "memory:", func(a *vmm.BootArgs) { a.Memory = nil }},
		{"wrong memory size", "memory:", func(a *vmm.BootArgs) { a.MemoryMB *= 2 }},
		{"no memory size", "memory_mb:", func(a *vmm.BootArgs) { a.MemoryMB = 0 }},
		{"no cpu", "vcpus:", func(a *vmm.BootArgs) { a.VCPUs = 0 }},
		{"too many cpus", "vcpus:", func(a *vmm.BootArgs) { a.VCPUs = 1 << 20 }},
		{"bad mac", "mac:", func(a *vmm.BootArgs) { a.MAC = "02:77" }},
		{"no kernel", "kernel:", func(a *vmm.BootArgs) { a.Kernel = "/nonexistent" }},
		{"no initrd", "initrd:", func(a *vmm.BootArgs) { a.Initrd = "/nonexistent" }},
		{"long cmdline", "cmdline:", func(a *vmm.BootArgs) { a.Cmdline = strings.Repeat("x", 4096) }},
		{"relative socket", "disk_socket:", func(a *vmm.BootArgs) { a.DiskSocket = "nbd.sock" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			if s.ownMemory() && c.field == "memory:" {
				t.Skip("skipped: this driver wants no memory")
			}
			a := s.Args(t)
			c.change(&a)
			m, err := s.Driver.Boot(s.context(t), a)
			if err == nil {
				_ = m.Kill(context.Background())
				t.Fatal("it booted")
			}
			if !strings.Contains(err.Error(), c.field) {
				t.Errorf("the error does not name the field %q: %v", c.field, err)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := s.Driver.Boot(ctx, s.Args(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("Boot with a cancelled context: %v", err)
		}
	})
}

// ends boots three machines that end by themselves, side by side.
func (s Subject) ends(t *testing.T) {
	var machines []vmm.Machine
	reasons := []vmm.Reason{vmm.ReasonShutdown, vmm.ReasonReset, vmm.ReasonPanic}
	hows := []string{"poweroff", "reboot", "panic"}
	if s.Driver.Capabilities().RestartOnly {
		reasons, hows = reasons[1:], hows[1:]
	}
	for _, how := range hows {
		a := s.Args(t)
		a.Cmdline += " vmmtest.end=" + how + "@1"
		m, err := s.Driver.Boot(s.context(t), a)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Kill(context.Background()) })
		machines = append(machines, m)
	}
	for i, m := range machines {
		e := gone(t, m, s.Patience, reasons[i])
		if !strings.Contains(e.Console, "tick 1 ") {
			t.Errorf("the end of the console is not in the error: %q", e.Console)
		}
	}
}

// life takes one machine through everything and returns what it saved.
func (s Subject) life(t *testing.T) Saved {
	ctx, a := s.context(t), s.Args(t)
	m, err := s.Driver.Boot(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Kill(context.Background()) }()
	s.WaitTicks(t, m, 5)
	checkRecord(t, m, a)
	info, err := s.Driver.Probe(ctx)
	if err != nil {
		t.Fatal(err)
	}

	for range 2 { // pausing a stopped machine is fine
		must(t, m.Pause(ctx))
	}
	still(t, m)
	n := len(Ticks(t, m.Record().ConsolePath))
	for range 2 {
		must(t, m.Continue(ctx))
	}
	s.WaitTicks(t, m, n+5)

	// A save that fails leaves a machine that continues.
	if _, err := s.save(ctx, m, failingWriter{}); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("SaveState into a writer that fails: %v", err)
	}
	still(t, m)
	must(t, m.Continue(ctx))
	n = len(Ticks(t, m.Record().ConsolePath))
	s.WaitTicks(t, m, n+5)

	saved := s.freeze(t, ctx, m, Saved{}, a.Spec, info)
	// The source of a snapshot goes on.
	must(t, m.Continue(ctx))
	n = len(Ticks(t, m.Record().ConsolePath))
	s.WaitTicks(t, m, n+3)
	must(t, m.Kill(ctx))
	gone(t, m, s.Patience, vmm.ReasonKilled)
	checkTicks(t, Ticks(t, m.Record().ConsolePath))
	return saved
}

// freeze saves the state and copies the memory of a running machine.
// Memory of its own is put together from that of before and what changed; the
// first time it is all asked for, since a save before it failed.
func (s Subject) freeze(t *testing.T, ctx context.Context, m vmm.Machine, before Saved, spec vmm.Spec, info vmm.Info) Saved {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := time.Now()
	if s.ownMemory() {
		changed, err := m.(vmm.MemorySaver).Save(ctx, f, before.Mem == nil)
		must(t, err)
		defer changed.Close()
		mem := before.Mem
		if mem == nil {
			mem = NewMemory(t, spec.MemoryBytes())
		} else {
			mem = CopyMemory(t, mem)
		}
		t.Logf("%d KiB of memory changed", overlayMemory(t, mem, changed)>>10)
		ticks := Ticks(t, m.Record().ConsolePath)
		return Saved{State: vmm.State{Spec: spec, Info: info, File: path}, Mem: mem, Tick: ticks[len(ticks)-1], At: at}
	}
	must(t, m.SaveState(ctx, f))
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", m.PID(), m.MemoryFD()), os.O_RDONLY, 0)
	if err != nil {
		t.Fatalf("opening the memory by MemoryFD: %v", err)
	}
	defer mem.Close()
	ticks := Ticks(t, m.Record().ConsolePath)
	return Saved{
		State: vmm.State{Spec: spec, Info: info, File: path},
		Mem:   CopyMemory(t, mem), Tick: ticks[len(ticks)-1], At: at,
	}
}

// RestoreArgs makes arguments for a clone of a frozen machine.
func (s Subject) RestoreArgs(t *testing.T, saved Saved) vmm.RestoreArgs {
	a := s.Args(t)
	if s.ownMemory() {
		a.MemorySocket = ServePages(t, saved.Mem)
		return vmm.RestoreArgs{HostArgs: a.HostArgs, State: saved.State}
	}
	a.Memory = CopyMemory(t, saved.Mem)
	t.Cleanup(func() { noneHolds(t, a.Memory) })
	return vmm.RestoreArgs{HostArgs: a.HostArgs, State: saved.State}
}

// fileArgs are RestoreArgs of a clone that maps its memory from a file, and what
// checks that nobody wrote to that, for drivers that can.
func (s Subject) fileArgs(t *testing.T, saved Saved) (a vmm.RestoreArgs, check func()) {
	if a = s.RestoreArgs(t, saved); !s.ownMemory() {
		return a, func() {}
	}
	path := filepath.Join(t.TempDir(), "memory")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o444)
	must(t, err)
	t.Cleanup(func() { file.Close() })
	must(t, file.Truncate(a.State.MemoryBytes()))
	overlayMemory(t, file, saved.Mem)
	a.MemorySocket, a.MemoryFile = "", path
	return a, func() {
		t.Helper()
		if !sameBytes(t, file, saved.Mem) {
			t.Error("a machine wrote to the file that others may map")
		}
	}
}

func (s Subject) revive(t *testing.T, saved Saved) vmm.Machine {
	t.Helper()
	m, err := s.Driver.Restore(s.context(t), s.RestoreArgs(t, saved))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Kill(context.Background()); m.Close() })
	return m
}

// restore goes through several generations, and makes two clones of each.
func (s Subject) restore(t *testing.T, saved Saved) {
	ctx := s.context(t)
	for gen := range s.generations() {
		began := time.Now()
		args := s.RestoreArgs(t, saved)
		attached := 0
		args.Attach = func(_ context.Context, pid int) error { attached = pid; return nil }
		m, err := s.Driver.Restore(ctx, args)
		if err != nil {
			t.Fatalf("generation %d: %v", gen, err)
		}
		t.Cleanup(func() { _ = m.Kill(context.Background()) })
		if attached != m.PID() {
			t.Errorf("generation %d: Attach was called with process %d, the machine is %d", gen, attached, m.PID())
		}
		still(t, m)
		args, unwritten := s.fileArgs(t, saved)
		clone, err := s.Driver.Restore(ctx, args)
		if err != nil {
			t.Fatalf("generation %d, the clone: %v", gen, err)
		}
		t.Cleanup(func() { _ = clone.Kill(context.Background()) })
		for _, m := range []vmm.Machine{m, clone} {
			t.Logf("generation %d: after %s it goes on", gen, time.Since(began).Round(time.Millisecond))
			resumed := time.Now()
			must(t, m.Continue(ctx))
			s.WaitTicks(t, m, 1)
			ran := time.Since(resumed)
			t.Logf("generation %d: after %s it has ticked", gen, time.Since(began).Round(time.Millisecond))
			ticks := s.WaitTicks(t, m, 12)
			checkTicks(t, ticks)
			// The line that was being written when the machine was frozen may
			// have come out before and be cut in two.
			if d := ticks[0].N - saved.Tick.N; d < 1 || d > 2 {
				t.Errorf("generation %d: frozen after tick %d, went on with %d", gen, saved.Tick.N, ticks[0].N)
			}
			jump := maxJump + ran
			if s.Driver.Capabilities().ClockRuns { // but not faster than ours
				jump += time.Since(saved.At)
			}
			if d := ticks[0].Mono - saved.Tick.Mono; d < 0 || d > jump {
				t.Errorf("generation %d: the monotonic clock jumped by %s", gen, d)
			}
		}
		unwritten()
		next := m
		if gen%2 == 0 { // both have changes to tell of
			next = clone
		}
		saved = s.freeze(t, ctx, next, saved, saved.State.Spec, saved.State.Info)
		must(t, m.Kill(ctx))
		must(t, clone.Kill(ctx))
	}
}

func (s Subject) badRestores(t *testing.T, saved Saved) {
	good, err := os.ReadFile(saved.State.File)
	if err != nil {
		t.Fatal(err)
	}
	file := func(t *testing.T, b []byte) string {
		p := filepath.Join(t.TempDir(), "state")
		must(t, os.WriteFile(p, b, 0o600))
		return p
	}
	errAttach := errors.New("no pages today")
	for _, c := range []struct {
		name   string
		change func(*testing.T, *vmm.RestoreArgs)
		want   error
	}{
		{"garbage", func(t *testing.T, a *vmm.RestoreArgs) { a.State.File = file(t, bytes.Repeat([]byte("garbage "), 999)) }, nil},
		{"truncated", func(t *testing.T, a *vmm.RestoreArgs) { a.State.File = file(t, good[:len(good)/2]) }, nil},
		{"empty", func(t *testing.T, a *vmm.RestoreArgs) { a.State.File = file(t, nil) }, nil},
		{"missing", func(t *testing.T, a *vmm.RestoreArgs) { a.State.File = "/nonexistent" }, nil},
		{"memory size of another machine", func(t *testing.T, a *vmm.RestoreArgs) {
			a.State.MemoryMB += 64
			if !s.ownMemory() {
				a.Memory = NewMemory(t, a.State.MemoryBytes())
			}
		}, nil},
		{"memory file too small", func(t *testing.T, a *vmm.RestoreArgs) { a.Memory = NewMemory(t, 1<<20) }, nil},
		{"file of own memory too small", func(t *testing.T, a *vmm.RestoreArgs) {
			a.MemorySocket, a.MemoryFile = "", file(t, make([]byte, 1<<20))
		}, nil},
		{"file of own memory missing", func(_ *testing.T, a *vmm.RestoreArgs) {
			a.MemorySocket, a.MemoryFile = "", "/nonexistent"
		}, nil},
		{"own memory twice", func(t *testing.T, a *vmm.RestoreArgs) { a.MemoryFile = file(t, nil) }, nil},
		{"attach fails", func(t *testing.T, a *vmm.RestoreArgs) {
			a.Attach = func(context.Context, int) error { return errAttach }
		}, errAttach},
		{"another CPU", func(t *testing.T, a *vmm.RestoreArgs) { a.State.Info.CPUModel = "other" }, vmm.ErrIncompatible},
		{"another TSC", func(t *testing.T, a *vmm.RestoreArgs) { a.State.Info.TSCKHz *= 2 }, vmm.ErrIncompatible},
	} {
		t.Run(c.name, func(t *testing.T) {
			if s.ownMemory() && strings.HasPrefix(c.name, "memory file") {
				t.Skip("skipped: this driver wants no memory")
			}
			if !s.ownMemory() && strings.Contains(c.name, "own memory") {
				t.Skip("skipped: this driver has no memory of its own")
			}
			a := s.RestoreArgs(t, saved)
			c.change(t, &a)
			m, err := s.Driver.Restore(s.context(t), a)
			if err == nil {
				_ = m.Kill(context.Background())
				t.Fatal("it was restored")
			}
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			t.Logf("error: %v", err)
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		a := s.RestoreArgs(t, saved)
		a.Attach = func(context.Context, int) error { cancel(); return nil }
		if _, err := s.Driver.Restore(ctx, a); !errors.Is(err, context.Canceled) {
			t.Errorf("Restore cancelled within Attach: %v", err)
		}
	})
}

func (s Subject) adopt(t *testing.T, saved Saved) {
	ctx := s.context(t)
	m := s.revive(t, saved)
	must(t, m.Continue(ctx))
	s.WaitTicks(t, m, 2)
	rec := roundTrip(t, m.Record())
	m.Close()
	for what, err := range map[string]error{
		"Pause": m.Pause(ctx), "SaveState": s.saveOnly(ctx, m), "Kill": m.Kill(ctx),
	} {
		if !errors.Is(err, vmm.ErrClosed) {
			t.Errorf("%s on a closed handle: %v, want ErrClosed", what, err)
		}
	}

	wrong := rec
	wrong.StartTime++
	if _, err := s.Driver.Adopt(ctx, wrong); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("adopting a process with another start time: %v, want ErrGone", err)
	}
	wrong = rec
	wrong.BootID = "another"
	if _, err := s.Driver.Adopt(ctx, wrong); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("adopting a process of another boot: %v, want ErrGone", err)
	}
	wrong = rec
	wrong.Kind = "another"
	if _, err := s.Driver.Adopt(ctx, wrong); err == nil {
		t.Error("a machine of another kind was adopted")
	}

	again, err := s.Driver.Adopt(ctx, rec)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if !reflect.DeepEqual(again.Record(), rec) {
		t.Errorf("the adopted machine's record is %+v, was %+v", again.Record(), rec)
	}
	s.WaitTicks(t, again, len(Ticks(t, rec.ConsolePath))+3)
	must(t, again.Pause(ctx))
	must(t, s.saveOnly(ctx, again))
	must(t, again.Continue(ctx))
	must(t, again.Kill(ctx))
	gone(t, again, s.Patience, vmm.ReasonKilled)
	if _, err := s.Driver.Adopt(ctx, rec); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("adopting a dead machine: %v, want ErrGone", err)
	}
}

// crash kills the process behind the driver's back.
func (s Subject) crash(t *testing.T, saved Saved) {
	m := s.revive(t, saved)
	must(t, unix.Kill(m.PID(), unix.SIGKILL))
	gone(t, m, s.Patience, vmm.ReasonProcess)
}

func checkRecord(t *testing.T, m vmm.Machine, a vmm.BootArgs) {
	t.Helper()
	r := m.Record()
	if r.ID != a.ID || r.PID != m.PID() || r.MemoryFD != m.MemoryFD() || r.Spec != a.Spec || r.StartTime == 0 || r.BootID == "" {
		t.Errorf("the record does not describe the machine: %+v", r)
	}
	if sid, err := unix.Getsid(r.PID); err != nil || sid != r.PID {
		t.Errorf("process %d is in session %d (%v), not its own", r.PID, sid, err)
	}
	if a.Memory == nil {
		return
	}
	want, err := a.Memory.Stat()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.Stat(fmt.Sprintf("/proc/%d/fd/%d", r.PID, r.MemoryFD))
	if err != nil || !os.SameFile(want, got) {
		t.Errorf("descriptor %d of process %d is not the memory (%v)", r.MemoryFD, r.PID, err)
	}
}

// checkTicks wants every tick once, memory whole, and time going forward.
func checkTicks(t *testing.T, ticks []Tick) {
	t.Helper()
	for i, k := range ticks {
		if k.Sum != "ok" {
			t.Fatalf("tick %d: the guest's memory is %s", k.N, k.Sum)
		}
		if i > 0 && (k.N != ticks[i-1].N+1 || k.Mono < ticks[i-1].Mono) {
			t.Fatalf("tick %+v follows %+v", k, ticks[i-1])
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func (s Subject) saveOnly(ctx context.Context, m vmm.Machine) error {
	memory, err := s.save(ctx, m, io.Discard)
	if memory != nil {
		memory.Close()
	}
	return err
}
