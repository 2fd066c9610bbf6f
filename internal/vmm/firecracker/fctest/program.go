package fctest

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Kinds of failure.
const (
	Die    = "die"    // the process ends, with last words
	Hang   = "hang"   // no answer, ever
	Refuse = "refuse" // an error that says so
	Full   = "full"   // the error of a full disk
	Lie    = "lie"    // a save that is answered, and left links to a file of the host
)

// LastWords are what a process says that dies.
const LastWords = "fake firecracker: told to die"

const programEnv = "WRENN_FAKE_FIRECRACKER"

// Program stands for Firecracker's, and for all processes that were started
// from it.
type Program struct {
	// Path is the program, named as the driver wants it.
	Path string
	dir  string
}

// NewProgram makes a program that is this test binary again; its TestMain must
// call Main first.
func NewProgram(t testing.TB) *Program {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &Program{dir: t.TempDir()}
	p.Path = filepath.Join(p.dir, "firecracker")
	// The two questions of a probe are answered without starting us.
	script := fmt.Sprintf(`#!/bin/sh
case $1 in
--version) echo Firecracker v1.12.1 ;;
--snapshot-version) echo v6.0.0 ;;
*) %s='%s' exec '%s' "$@" ;;
esac
`, programEnv, p.dir, self)
	if err := os.WriteFile(p.Path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.KillAll(t) }) // of a test that went wrong
	return p
}

// KillAll ends all processes that run from the program.
func (p *Program) KillAll(t testing.TB) {
	t.Helper()
	for _, pid := range p.Living(t) {
		p.kill(pid)
	}
}

// kill ends a process, if it is still one of ours, and waits for its end.
func (p *Program) kill(pid string) {
	n, err := strconv.Atoi(pid)
	if err != nil {
		return
	}
	fd, err := unix.PidfdOpen(n, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if p.runs(pid) { // asked after it was opened: it cannot be another any more
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000)
	}
}

type fault struct{ Call, Kind string }

// Fail makes the next call of that kind, "PUT /actions", fail, in whatever
// process it comes to.
func (p *Program) Fail(t testing.TB, call, kind string) {
	t.Helper()
	b, err := json.Marshal(fault{call, kind})
	if err == nil {
		err = os.WriteFile(filepath.Join(p.dir, "fault"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Pending tells whether a failure still waits for its call.
func (p *Program) Pending() bool {
	_, err := os.Stat(filepath.Join(p.dir, "fault"))
	return err == nil
}

// Calls returns what was called so far, each with its body.
func (p *Program) Calls(t testing.TB) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.dir, "calls"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// Living returns the processes that run from the program.
func (p *Program) Living(t testing.TB) (pids []string) {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		if pid := filepath.Base(filepath.Dir(f)); p.runs(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (p *Program) runs(pid string) bool {
	b, err := os.ReadFile(filepath.Join("/proc", pid, "environ"))
	return err == nil && strings.Contains(string(b), programEnv+"="+p.dir+"\x00")
}

// Main is the program, where this process is to be one; else it returns at once.
func Main() {
	dir := os.Getenv(programEnv)
	if dir == "" {
		return
	}
	if err := run(dir, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fake firecracker:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(dir string, args []string) error {
	f := flag.NewFlagSet("firecracker", flag.ContinueOnError)
	socket := f.String("api-sock", "", "")
	for _, name := range []string{"id", "log-path", "level"} {
		f.String(name, "", "")
	}
	if err := f.Parse(args); err != nil {
		return err
	}
	l, err := net.Listen("unix", *socket)
	if err != nil {
		return err
	}
	s := &Server{Version: "1.12.1", Before: func(call string, body []byte) error { return before(dir, call, body) }}
	return http.Serve(l, s)
}

// LieTarget is what the files of a save that lied lead to.
const LieTarget = "/etc/passwd"

func lie(body []byte) error {
	var c struct {
		State  string `json:"snapshot_path"`
		Memory string `json:"mem_file_path"`
	}
	if err := json.Unmarshal(body, &c); err != nil {
		return err
	}
	if err := errors.Join(os.Symlink(LieTarget, c.State), os.Symlink(LieTarget, c.Memory)); err != nil {
		return err
	}
	return errDone
}

// before writes the call down and fails it, if that is its fate.
func before(dir, call string, body []byte) error {
	log, err := os.OpenFile(filepath.Join(dir, "calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	if _, err := fmt.Fprintf(log, "%s %s\n", call, body); err != nil {
		return err
	}
	path := filepath.Join(dir, "fault")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var next fault
	if err == nil {
		err = json.Unmarshal(b, &next)
	}
	if err != nil || next.Call != call {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	switch next.Kind {
	case Die:
		fmt.Fprintln(os.Stderr, LastWords)
		os.Exit(1)
	case Hang:
		select {}
	case Lie:
		return lie(body)
	case Full:
		return errors.New("Cannot write memory file: No space left on device (os error 28)")
	}
	return errors.New("told to refuse")
}
