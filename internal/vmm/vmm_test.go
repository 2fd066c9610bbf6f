package vmm

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func startShell(t *testing.T, script string, files ...*os.File) (*Process, string) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	f, err := OpenLog(log, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := StartProcess(ProcessSpec{Args: []string{"/bin/sh", "-c", script}, Dir: "/", Stderr: f, Files: files})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Kill(context.Background()); p.Close() })
	return p, log
}

func waitDone(t *testing.T, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(time.Minute):
		t.Fatal("the end of the process was not noticed")
	}
}

func TestProcessStatus(t *testing.T) {
	for script, want := range map[string]string{"exit 0": "exit status 0", "exit 3": "exit status 3", "kill -TERM $$": "signal: terminated"} {
		p, _ := startShell(t, script)
		waitDone(t, p)
		if got := p.Status(); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
		if err := unix.Kill(p.PID(), 0); !errors.Is(err, unix.ESRCH) {
			t.Errorf("%s: not reaped: %v", script, err)
		}
	}
}

// TestProcessInherits: files are 3, 4, …, and nothing else comes along.
func TestProcessInherits(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, log := startShell(t, "echo hello >&3; ls /proc/self/fd; exit 0", w)
	w.Close()
	b, err := io.ReadAll(r)
	if err != nil || string(b) != "hello\n" {
		t.Errorf("through descriptor 3 came %q, %v", b, err)
	}
	waitDone(t, p)
	// 0 to 3 and the directory that ls reads.
	if got := strings.Fields(Tail(log, 1000)); len(got) != 5 {
		t.Errorf("open descriptors: %q", got)
	}
}

func TestProcessKillAndAdopt(t *testing.T) {
	p, _ := startShell(t, "sleep 100")
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	if err := p.Kill(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("Kill after Close: %v", err)
	}
	for _, wrong := range []struct {
		pid   int
		start uint64
		boot  string
	}{{p.PID(), p.StartTime() + 1, boot}, {p.PID(), p.StartTime(), "other"}, {1 << 22, 1, boot}} {
		if _, err := AdoptProcess(wrong.pid, wrong.start, wrong.boot); !errors.Is(err, ErrGone) {
			t.Errorf("adopting %+v: %v, want ErrGone", wrong, err)
		}
	}
	for _, pid := range []int{-1, 0, 1} {
		if _, err := AdoptProcess(pid, 0, boot); err == nil {
			t.Errorf("process %d was adopted", pid)
		}
	}
	q, err := AdoptProcess(p.PID(), p.StartTime(), boot)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if err := q.Kill(context.Background()); err != nil {
		t.Fatal(err)
	}
	if q.Status() != "signal: killed" {
		t.Errorf("status %q", q.Status())
	}
	if err := q.Kill(context.Background()); err != nil {
		t.Errorf("killing a dead process: %v", err)
	}
}

func TestStartMissingProgram(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, err := StartProcess(ProcessSpec{Args: []string{"/nonexistent/vmm"}, Stderr: null}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestTail(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(p, []byte("first line\nsecond\x1b[31m line\r\nthird\xff line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for n, want := range map[int64]string{1000: "first line\nsecond[31m line\nthird line", 20: "third line", 0: ""} {
		if got := Tail(p, n); got != want {
			t.Errorf("the last %d bytes: %q, want %q", n, got, want)
		}
	}
	if got := Tail("/nonexistent", 10); got != "" {
		t.Errorf("of a missing file: %q", got)
	}
}

func TestOpenLogSetsAside(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	for i, want := range []string{"", "aaaa", "aaaabbbb"} {
		f, err := OpenLog(p, 8)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(p)
		if err != nil || string(b) != want {
			t.Errorf("opened for the %d. time it holds %q, want %q", i+1, b, want)
		}
		if _, err := f.WriteString(strings.Repeat(string(rune('a'+i)), 4)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if i == 1 { // eight bytes now, more than half the limit
			f, err := OpenLog(p, 8)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			if b, _ := os.ReadFile(p + ".old"); string(b) != "aaaabbbb" {
				t.Errorf("set aside: %q", b)
			}
			return
		}
	}
}

func TestFits(t *testing.T) {
	here := Info{Kind: "qemu", Version: "7.2.22", Accel: AccelTCG, MachineType: "microvm", CPUModel: "m", TSCKHz: 2_500_000, Remarks: []string{"x"}}
	for name, c := range map[string]struct {
		change func(*Info)
		fits   bool
	}{
		"same":             {func(*Info) {}, true},
		"remarks":          {func(i *Info) { i.Remarks = nil }, true},
		"bug fix release":  {func(i *Info) { i.Version = "7.2.1" }, true},
		"another release":  {func(i *Info) { i.Version = "8.0.1" }, false},
		"another VMM":      {func(i *Info) { i.Kind = "firecracker" }, false},
		"KVM":              {func(i *Info) { i.Accel = AccelKVM }, false},
		"CPU model":        {func(i *Info) { i.CPUModel = "n" }, false},
		"CPU flags":        {func(i *Info) { i.CPUFlagsDigest = "f" }, false},
		"machine":          {func(i *Info) { i.MachineType = "q35" }, false},
		"TSC, measured":    {func(i *Info) { i.TSCKHz += 100 }, true},
		"TSC of elsewhere": {func(i *Info) { i.TSCKHz -= 1000 }, false},
	} {
		saved := here
		c.change(&saved)
		err := here.Fits(saved)
		if (err == nil) != c.fits || err != nil && !errors.Is(err, ErrIncompatible) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestHostTSC compares with the kernel's own finding where it tells.
func TestHostTSC(t *testing.T) {
	khz, err := HostTSCKHz(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("dmesg").Output()
	i := strings.Index(string(out), "tsc: Detected ")
	if err != nil || i < 0 {
		t.Skipf("skipped the comparison: the kernel log does not tell the TSC's frequency (measured %d kHz)", khz)
	}
	kernel := strings.Fields(string(out[i:]))[2]
	mhz := float64(khz) / 1000
	var want float64
	for _, c := range strings.ReplaceAll(kernel, ".", "") {
		want = want*10 + float64(c-'0')
	}
	want /= 1000
	if d := mhz/want - 1; d < -0.001 || d > 0.001 {
		t.Errorf("measured %.3f MHz, the kernel says %s", mhz, kernel)
	}
}

func TestVerdict(t *testing.T) {
	p := filepath.Join(t.TempDir(), "kvm.json")
	if _, ok := LoadVerdict(p, "k"); ok {
		t.Error("a missing file has a verdict")
	}
	if err := SaveVerdict(p, Verdict{Key: "k", Works: true, Finding: "f"}); err != nil {
		t.Fatal(err)
	}
	if v, ok := LoadVerdict(p, "k"); !ok || !v.Works || v.Finding != "f" {
		t.Errorf("%+v %t", v, ok)
	}
	if _, ok := LoadVerdict(p, "other"); ok {
		t.Error("a verdict for another key was taken")
	}
	if err := os.WriteFile(p, []byte(`{"key":"k","works":tr`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ok := LoadVerdict(p, "k"); ok {
		t.Error("a damaged verdict was taken")
	}
	if left, _ := filepath.Glob(p + ".*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
