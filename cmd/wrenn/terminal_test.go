package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/client/clienttest"
)

// patience bounds every wait; a passing test waits for none of it.
const patience = 2 * time.Minute

// screen collects what a process writes, and waits for parts of it.
type screen struct {
	mu     sync.Mutex
	buf    bytes.Buffer
	change chan struct{}
}

func watch(r io.Reader) *screen {
	s := &screen{change: make(chan struct{}, 1)}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			s.mu.Lock()
			s.buf.Write(buf[:n])
			s.mu.Unlock()
			select {
			case s.change <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func (s *screen) wait(t *testing.T, part string) {
	t.Helper()
	limit := time.After(patience)
	for !strings.Contains(s.text(), part) {
		select {
		case <-s.change:
		case <-limit:
			t.Fatalf("%q did not appear in %q", part, s.text())
		}
	}
}

// process is wrenn as a process of its own.
func process(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Env = append(os.Environ(), asWrenn+"=1", "TERM=test-term",
		// The race detector would wait a second at each exit with 0.
		"GORACE=atexit_sleep_ms=0")
	return cmd
}

func exitOf(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	select {
	case <-done:
		return cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		_ = cmd.Process.Kill()
		<-done
		t.Fatal("the process did not end")
		return -1
	}
}

// terminal is wrenn on a terminal of its own.
type terminal struct {
	*screen
	cmd     *exec.Cmd
	ptm     *os.File
	initial unix.Termios
}

func onTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	ptm, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	// The far end stays open, so that its state can be read after the process.
	t.Cleanup(func() { tty.Close(); ptm.Close() })
	tm := &terminal{ptm: ptm, cmd: process(t, args...)}
	if err := pty.Setsize(ptm, &pty.Winsize{Cols: 80, Rows: 24}); err != nil {
		t.Fatal(err)
	}
	tm.initial = tm.state(t)
	tm.cmd.Stdin, tm.cmd.Stdout, tm.cmd.Stderr = tty, tty, tty
	tm.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := tm.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tm.screen = watch(ptm)
	return tm
}

func (tm *terminal) state(t *testing.T) unix.Termios {
	t.Helper()
	st, err := unix.IoctlGetTermios(int(tm.ptm.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *st
}

func (tm *terminal) typed(t *testing.T, s string) {
	t.Helper()
	if _, err := tm.ptm.WriteString(s); err != nil {
		t.Fatal(err)
	}
}

// restored checks that the terminal is as it was before wrenn.
func (tm *terminal) restored(t *testing.T) {
	t.Helper()
	if d := cmp.Diff(tm.initial, tm.state(t)); d != "" {
		t.Errorf("the terminal is not as before:\n%s", d)
	}
}

func startShell(t *testing.T, args ...string) (*clienttest.Server, *terminal) {
	t.Helper()
	s := startServer(t)
	s.Add(client.Sandbox{})
	tm := onTerminal(t, append([]string{"sandbox", "shell", "sb1"}, args...)...)
	tm.wait(t, "size 80x24\r\n")
	if st := tm.state(t); st.Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) != 0 {
		t.Errorf("the terminal is not raw: %+v", st)
	}
	return s, tm
}

func TestShell(t *testing.T) {
	s, tm := startShell(t)
	if !s.Wait("start /bin/bash -l 80x24 TERM=test-term", patience) {
		t.Errorf("started as %q", s.Log())
	}
	// Ctrl-C and Ctrl-Z are the sandbox's.
	tm.typed(t, "hi\x03\x1aü")
	tm.wait(t, "hi\x03\x1aü")
	if err := pty.Setsize(tm.ptm, &pty.Winsize{Cols: 132, Rows: 43}); err != nil {
		t.Fatal(err)
	}
	tm.wait(t, "size 132x43\r\n")
	tm.typed(t, "\x04")
	if code := exitOf(t, tm.cmd); code != 7 {
		t.Errorf("exit code %d, want the shell's 7; %q", code, tm.text())
	}
	tm.restored(t)
}

func TestShellRestoresTheTerminal(t *testing.T) {
	t.Run("when the connection breaks", func(t *testing.T) {
		_, tm := startShell(t, "drop")
		tm.typed(t, "\x04")
		if code := exitOf(t, tm.cmd); code != 125 {
			t.Errorf("exit code %d, want 125", code)
		}
		tm.wait(t, "wrenn: the stream broke")
		tm.restored(t)
	})
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT} {
		t.Run("at "+sig.String(), func(t *testing.T) {
			_, tm := startShell(t)
			if err := tm.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if code := exitOf(t, tm.cmd); code != 130 {
				t.Errorf("exit code %d, want 130", code)
			}
			tm.restored(t)
		})
	}
	t.Run("when it never began", func(t *testing.T) {
		startServer(t)
		tm := onTerminal(t, "sandbox", "shell", "nobody")
		if code := exitOf(t, tm.cmd); code != 125 {
			t.Errorf("exit code %d, want 125", code)
		}
		tm.wait(t, "no sandbox nobody")
		tm.restored(t)
	})
}

func TestExecOnATerminal(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	tm := onTerminal(t, "sandbox", "exec", "sb1", "cat")
	if code := exitOf(t, tm.cmd); code != 0 {
		t.Errorf("without -i: exit code %d; a terminal's input must not be waited for", code)
	}
	tm = onTerminal(t, "sandbox", "exec", "-i", "sb1", "cat")
	tm.typed(t, "a line\n\x04")
	if code := exitOf(t, tm.cmd); code != 0 {
		t.Errorf("-i: exit code %d", code)
	}
	if !s.Wait("stdin a line", patience) {
		t.Errorf("-i did not send: %v", s.Log())
	}
}

func TestInterruptedExec(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	start := func(command ...string) (*exec.Cmd, *screen, *screen) {
		cmd := process(t, append([]string{"sandbox", "exec", "-n", "sb1"}, command...)...)
		outR, outW := io.Pipe()
		errR, errW := io.Pipe()
		cmd.Stdout, cmd.Stderr = outW, errW
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, watch(outR), watch(errR)
	}
	cmd, out, _ := start("wait")
	out.wait(t, "waiting")
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := exitOf(t, cmd); code != 143 {
		t.Errorf("exit code %d, want 143 of the stopped command", code)
	}
	if !s.Wait("stop", 0) {
		t.Errorf("no stop was sent: %v", s.Log())
	}

	cmd, out, stderr := start("drop", "deaf")
	out.wait(t, "half")
	_ = cmd.Process.Signal(os.Interrupt)
	stderr.wait(t, "Ctrl-C again")
	_ = cmd.Process.Signal(os.Interrupt)
	if code := exitOf(t, cmd); code != 130 {
		t.Errorf("exit code %d after two, want 130; %s", code, stderr.text())
	}
}

// Ctrl-C ends a copy that waits for its input, and leaves nothing behind.
func TestInterruptedCp(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	cmd := process(t, "sandbox", "cp", "-", "sb1:/half")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if !s.Wait("PUT ", patience) {
		t.Fatal("the copy did not begin")
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := exitOf(t, cmd); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
	if got, _, ok := s.Content("sb1", "/half"); ok {
		t.Errorf("half a file arrived: %q", got)
	}
}

func TestProgressIsForTerminals(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	tm := onTerminal(t, "sandbox", "cp", "sb1:/big/30000000", "/dev/null")
	if code := exitOf(t, tm.cmd); code != 0 {
		t.Fatalf("exit code %d: %s", code, tm.text())
	}
	tm.wait(t, "100%")
	dir := t.TempDir()
	write(t, dir, map[string]string{"a": strings.Repeat("x", 1<<20), "sub/b": strings.Repeat("y", 1<<20)})
	tm = onTerminal(t, "sandbox", "cp", dir, "sb1:/up")
	if code := exitOf(t, tm.cmd); code != 0 {
		t.Fatalf("exit code %d: %s", code, tm.text())
	}
	tm.wait(t, "100%") // of the whole directory
	tm = onTerminal(t, "sandbox", "cp", "-q", "sb1:/big/30000000", "/dev/null")
	if code := exitOf(t, tm.cmd); code != 0 || tm.text() != "" {
		t.Errorf("-q: exit code %d, printed %q", code, tm.text())
	}
}
