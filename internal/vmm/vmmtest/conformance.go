package vmmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Subject is a driver under test.
type Subject struct {
	Driver vmm.Driver
	// Boot holds what is particular: Kernel, Initrd, Cmdline, Spec. The suite
	// adds ID, Dir and Memory.
	Boot vmm.BootArgs
	// Patience bounds the wait for anything the guest does.
	Patience time.Duration
	// Brief leaves out what another subject of the same driver has shown.
	Brief bool
}

func (s Subject) generations() int {
	if s.Brief {
		return 1
	}
	return 3
}

// Run checks every promise of package vmm on a driver whose guest is
// vmmtest/guest, or acts like it.
func Run(t *testing.T, s Subject) {
	t.Run("arguments", s.arguments)
	if !s.Brief {
		t.Run("ends", s.ends)
	}
	saved := s.life(t) // everything below is restored from what it saved
	t.Run("restore", func(t *testing.T) { s.restore(t, saved) })
	if s.Brief {
		return
	}
	t.Run("bad restores", func(t *testing.T) { s.badRestores(t, saved) })
	t.Run("adopt", func(t *testing.T) { s.adopt(t, saved) })
	t.Run("crash", func(t *testing.T) { s.crash(t, saved) })
}

// Saved is a frozen machine.
type Saved struct {
	State vmm.State
	Mem   *os.File // the RAM that belongs to it; copy it, do not use it
	Tick  Tick     // the last one before it was frozen
	At    time.Time
}

// Tick is a console line of the guest.
type Tick struct {
	N    int
	Mono time.Duration
	Sum  string
}

// Context ends well after Patience, so that a test fails by its own words.
func (s Subject) context(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*s.Patience)
	t.Cleanup(cancel)
	return ctx
}

var lastID int

// Args completes Boot with a fresh directory and fresh memory.
func (s Subject) Args(t *testing.T) vmm.BootArgs {
	t.Helper()
	a := s.Boot
	lastID++
	a.ID = "test" + strconv.Itoa(lastID)
	a.Dir = t.TempDir()
	if s.ownMemory() {
		t.Cleanup(func() { noneNamed(t, a.ID) })
		return a
	}
	a.Memory = NewMemory(t, a.MemoryBytes())
	t.Cleanup(func() { noneHolds(t, a.Memory) })
	return a
}

// NewMemory makes a memfd of holes.
func NewMemory(t testing.TB, size int64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("vmmtest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// CopyMemory copies the data of a memory file, holes stay holes.
func CopyMemory(t testing.TB, from *os.File) *os.File {
	t.Helper()
	fi, err := from.Stat()
	if err != nil {
		t.Fatal(err)
	}
	to := NewMemory(t, fi.Size())
	buf := make([]byte, 1<<20)
	fd := int(from.Fd())
	for off := int64(0); off < fi.Size(); {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		end, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		for off = data; off < end; {
			n, err := from.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := to.WriteAt(buf[:n], off); err != nil {
				t.Fatal(err)
			}
			off += int64(n)
		}
	}
	return to
}

// noneHolds fails the test if another process still has the file open.
func noneHolds(t *testing.T, f *os.File) {
	t.Helper()
	want, err := f.Stat()
	if err != nil {
		t.Errorf("looking for processes left behind: %v", err)
		return
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	self := fmt.Sprintf("/proc/%d/", os.Getpid())
	for _, p := range fds {
		if fi, err := os.Stat(p); err == nil && os.SameFile(fi, want) && !strings.HasPrefix(p, self) {
			t.Errorf("a process was left behind: %s is the machine's memory", p)
		}
	}
}

func (s Subject) ownMemory() bool { return s.Driver.Capabilities().OwnMemory }

// noneNamed fails the test if a process with the machine's id is left.
func noneNamed(t *testing.T, id string) {
	t.Helper()
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte("--id\x00"+id+"\x00")) {
			t.Errorf("a process was left behind: %s is machine %s", p, id)
		}
	}
}

// save saves a machine into w, the memory too where it is the VMM's own.
func (s Subject) save(ctx context.Context, m vmm.Machine, w io.Writer) (memory *os.File, err error) {
	if s.ownMemory() {
		return m.(vmm.MemorySaver).Save(ctx, w, false)
	}
	return nil, m.SaveState(ctx, w)
}

var tickLine = regexp.MustCompile(`(?m)^tick ([0-9]+) mono=([0-9]+) sum=(\w+)\r?\n`)

// Ticks reads all whole tick lines of a console.
func Ticks(t testing.TB, console string) []Tick {
	t.Helper()
	b, err := os.ReadFile(console)
	if err != nil {
		t.Fatalf("reading the console: %v", err)
	}
	var ticks []Tick
	for _, m := range tickLine.FindAllSubmatch(b, -1) {
		n, _ := strconv.Atoi(string(m[1]))
		mono, _ := strconv.ParseInt(string(m[2]), 10, 64)
		ticks = append(ticks, Tick{N: n, Mono: time.Duration(mono), Sum: string(m[3])})
	}
	return ticks
}

// WaitTicks polls until the console has n whole tick lines: the guest has no
// other way to be heard.
func (s Subject) WaitTicks(t testing.TB, m vmm.Machine, n int) []Tick {
	t.Helper()
	limit := time.After(s.Patience)
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	console := m.Record().ConsolePath
	for {
		if ticks := Ticks(t, console); len(ticks) >= n {
			return ticks
		}
		select {
		case <-poll.C:
		case <-m.Done():
			t.Fatalf("the machine ended: %v\n%s", m.Err(), vmm.Tail(console, 2000))
		case <-limit:
			t.Fatalf("no %d ticks within %s, but %d; the console ends with:\n%s\nthe threads:\n%s",
				n, s.Patience, len(Ticks(t, console)), vmm.Tail(console, 2000), threadsOf(m.PID()))
		}
	}
}

// threadsOf tells what the threads of a process do: in a guest that hangs one
// spins, or waits for an interrupt that does not come.
func threadsOf(pid int) string {
	var b strings.Builder
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, task := range tasks {
		stat, _ := os.ReadFile(filepath.Join(task, "stat"))
		wchan, _ := os.ReadFile(filepath.Join(task, "wchan"))
		name, rest, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(rest); len(f) > 12 { // fields 3, 14 and 15 of proc(5)
			fmt.Fprintf(&b, "%s): state %s, %s + %s ticks of CPU, waits in %q\n", name, f[0], f[11], f[12], wchan)
		}
	}
	return b.String()
}

// still fails if the guest does anything for a while. What its serial port
// had in flight when it was stopped may still arrive.
func still(t *testing.T, m vmm.Machine) {
	t.Helper()
	console := m.Record().ConsolePath
	before := len(Ticks(t, console))
	time.Sleep(200 * time.Millisecond) // an absence has no event
	if after := len(Ticks(t, console)); after > before+1 {
		t.Errorf("a stopped guest made %d ticks", after-before)
	}
}

func gone(t *testing.T, m vmm.Machine, patience time.Duration, want vmm.Reason) *vmm.ExitError {
	t.Helper()
	select {
	case <-m.Done():
	case <-time.After(patience):
		t.Fatalf("Done was not closed within %s; console: %s", patience, vmm.Tail(m.Record().ConsolePath, 2000))
	}
	var e *vmm.ExitError
	if !errors.As(m.Err(), &e) {
		t.Fatalf("Err is %v, not an *ExitError", m.Err())
	}
	if e.Reason != want {
		t.Errorf("it ended because: %q, want %q (%+v)", e.Reason, want, e)
	}
	if !errors.Is(e, vmm.ErrGone) {
		t.Error("an ExitError is not ErrGone")
	}
	for what, err := range map[string]error{
		"Pause": m.Pause(context.Background()), "Continue": m.Continue(context.Background()),
		"SaveState": m.SaveState(context.Background(), io.Discard),
	} {
		if !errors.Is(err, vmm.ErrGone) {
			t.Errorf("%s of an ended machine: %v, want ErrGone", what, err)
		}
	}
	if err := m.Kill(context.Background()); err != nil {
		t.Errorf("Kill of an ended machine: %v", err)
	}
	return e
}

func roundTrip(t *testing.T, r vmm.Record) vmm.Record {
	t.Helper()
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back vmm.Record
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	return back
}
