package boot

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ended is one child that wait4 returns.
type ended struct {
	pid    int
	status syscall.WaitStatus
	err    error
}

// scripted is a supervisor whose children end as told.
func scripted(warnings *[]string, children ...ended) *supervisor {
	s := newSupervisor(serviceSpec{path: "/envd", warn: func(doing string, err error) {
		*warnings = append(*warnings, doing+": "+err.Error())
	}})
	s.now = func() time.Time { return time.Unix(100, 0) }
	s.wait = func() (int, syscall.WaitStatus, error) {
		if len(children) == 0 {
			return 0, 0, unix.ECHILD
		}
		c := children[0]
		children = children[1:]
		return c.pid, c.status, c.err
	}
	return s
}

func TestReapCollectsOrphansAndSeesTheServiceEnd(t *testing.T) {
	var warnings []string
	s := scripted(&warnings, ended{pid: 7}, ended{err: unix.EINTR}, ended{pid: 42, status: 3 << 8}, ended{pid: 8}, ended{pid: 0})
	s.pid, s.started = 42, time.Unix(98, 0)
	if !s.reap() {
		t.Error("children are left, reap says none")
	}
	if s.pid != 0 {
		t.Error("the service's end was not seen")
	}
	if len(warnings) != 1 || warnings[0] != "/envd: ended after 2s (exit status 3)" {
		t.Errorf("warnings: %q", warnings)
	}
	if s.reap() {
		t.Error("no children are left, reap says some")
	}
}

func TestReapKeepsALivingService(t *testing.T) {
	var warnings []string
	s := scripted(&warnings, ended{pid: 7, status: 9}, ended{pid: 0})
	s.pid = 42
	if !s.reap() || s.pid != 42 || len(warnings) != 0 {
		t.Errorf("pid %d, warnings %q", s.pid, warnings)
	}
}

func TestDescribe(t *testing.T) {
	for status, want := range map[syscall.WaitStatus]string{0: "exit status 0", 1 << 8: "exit status 1", 9: "signal killed"} {
		if got := describe(status); got != want {
			t.Errorf("%#x: %q, want %q", int(status), got, want)
		}
	}
}

func TestBackoffGrowsAndStartsOver(t *testing.T) {
	var b backoff
	var got []time.Duration
	for range 9 {
		got = append(got, b.next(time.Millisecond))
	}
	if got[0] != backoffMin || got[1] != 2*backoffMin || got[8] != backoffMax {
		t.Errorf("pauses are %v", got)
	}
	if d := b.next(backoffStable); d != backoffMin {
		t.Errorf("after a long life the pause is %v", d)
	}
}

func TestStartFailureIsReported(t *testing.T) {
	s := newSupervisor(serviceSpec{path: "/does/not/exist", argv: []string{"x"}})
	if err := s.start(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
	if s.pid != 0 {
		t.Errorf("pid is %d", s.pid)
	}
}

func TestPowerSignals(t *testing.T) {
	for sig, want := range map[os.Signal]powerAction{unix.SIGTERM: powerReboot, unix.SIGUSR2: powerOff, unix.SIGINT: powerReboot} {
		if got, ok := powerSignals[sig]; !ok || got != want {
			t.Errorf("%v: %v, %v", sig, got, ok)
		}
	}
	if _, ok := powerSignals[unix.SIGCHLD]; ok {
		t.Error("a child's end would end the machine")
	}
}

// pid1Dir makes the test binary a PID 1 whose service leaves its traces in the
// directory it names.
const pid1Dir = "BOOT_TEST_PID1_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(pid1Dir); dir != "" {
		pid1(dir)
	}
	os.Exit(m.Run())
}

func pid1(dir string) {
	if os.Getpid() != 1 { // it would end every process of the machine
		fmt.Println("not PID 1")
		os.Exit(1)
	}
	s := newSupervisor(serviceSpec{
		path: "/bin/sh", argv: []string{"sh", "-c", "sleep 0.02 & echo run >>" + dir + "/runs; exit 3"},
		warn: func(doing string, err error) { fmt.Println(doing, err) },
	})
	s.end = func(a powerAction) {
		fmt.Println("ending", a == powerOff)
		os.Exit(0)
	}
	if err := s.start(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(s.run())
	os.Exit(1)
}

// TestPID1 runs the supervisor as PID 1 of a namespace: it must restart a service
// that dies, reap what the service leaves, and end on a signal.
func TestPID1(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	file, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), pid1Dir+"="+dir)
	cmd.Stdout, cmd.Stderr = file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, unix.EPERM) {
			t.Skipf("PID namespaces are not allowed here: %v", err)
		}
		t.Fatal(err)
	}
	kill := time.AfterFunc(5*time.Minute, func() { cmd.Process.Kill() })
	defer kill.Stop()
	runs := func() int {
		text, _ := os.ReadFile(filepath.Join(dir, "runs"))
		return strings.Count(string(text), "run")
	}
	// Another process's progress has no event. What ends just now may still be
	// seen; what is not reaped stays, and more comes with every run.
	zombies := 0
	for range 6000 {
		zombies = zombieChildren(t, cmd.Process.Pid)
		if runs() >= 3 && zombies <= 1 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := runs(); n < 3 || zombies > 1 {
		t.Errorf("the service was started %d times, %d children are not reaped", n, zombies)
	}
	if err := cmd.Process.Signal(unix.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	err = cmd.Wait()
	text, readErr := os.ReadFile(out)
	if err := errors.Join(err, readErr); err != nil {
		t.Fatalf("PID 1: %v; it said:\n%s", err, text)
	}
	for _, want := range []string{"exit status 3", "stopping all processes", "ending true"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("PID 1 did not say %q:\n%s", want, text)
		}
	}
}

// zombieChildren counts the children of pid that nobody waited for.
func zombieChildren(t *testing.T, pid int) int {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it ended meanwhile
		}
		_, after, ok := strings.Cut(string(text), ") ")
		f := strings.Fields(after)
		if ok && len(f) > 1 && f[0] == "Z" && f[1] == strconv.Itoa(pid) {
			n++
		}
	}
	return n
}
