package vmm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ProcessSpec is a VMM program to start.
type ProcessSpec struct {
	// Args[0] is the program's path.
	Args []string
	Env  []string
	Dir  string
	// Stderr takes both outputs where Stdout is nil; standard input is
	// /dev/null.
	Stdout, Stderr *os.File
	// Files become descriptors 3, 4, … of the process. They are borrowed.
	Files []*os.File
	// UID and GID to run as; both zero means those of the caller.
	UID, GID uint32
}

// Process is a VMM program, child of this process or not. It is held by a
// pidfd, so that a signal can never reach another process that was given the
// same number.
type Process struct {
	pid   int
	start uint64
	fd    *os.File // pidfd, non-blocking: the wait goes through Go's poller
	conn  syscall.RawConn

	done   chan struct{}
	status string // valid after done

	closing sync.Once
	closed  chan struct{}
}

// StartProcess starts a program in a session of its own. It is not bound to
// the life of this process.
func StartProcess(s ProcessSpec) (*Process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	files := []*os.File{null, s.Stderr, s.Stderr}
	if s.Stdout != nil {
		out, err := dup(s.Stdout)
		if err != nil {
			return nil, fmt.Errorf("duplicating the output of %s: %w", s.Args[0], err)
		}
		defer out.Close()
		files[1] = out
	}
	for i, f := range s.Files {
		// os.StartProcess would call Fd, which may switch the caller's file
		// to blocking mode: give it a duplicate.
		d, err := dup(f)
		if err != nil {
			return nil, fmt.Errorf("duplicating descriptor %d for %s: %w", i+3, s.Args[0], err)
		}
		defer d.Close()
		files = append(files, d)
	}
	// Go opens everything close-on-exec, but this process may itself have
	// inherited descriptors that are not: they are none of the VMM's business.
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("keeping our descriptors from %s: %w", s.Args[0], err)
	}
	pidfd := -1
	attr := &os.ProcAttr{Dir: s.Dir, Env: s.Env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}}
	if s.UID != 0 || s.GID != 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: s.UID, Gid: s.GID}
	}
	p, err := os.StartProcess(s.Args[0], s.Args, attr)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", s.Args[0], err)
	}
	pid := p.Pid
	if pidfd < 0 {
		_ = p.Kill()
		_, _ = p.Wait()
		return nil, fmt.Errorf("starting %s: this kernel has no pidfd", s.Args[0])
	}
	_ = p.Release() // the watcher reaps it
	start, err := processStart(pid)
	if err != nil {
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}
	proc, werr := watch(pid, start, pidfd)
	if werr != nil {
		return nil, werr
	}
	if err != nil {
		proc.Close()
		return nil, fmt.Errorf("starting %s: %w", s.Args[0], err)
	}
	return proc, nil
}

// AdoptProcess takes hold of a live process that an earlier life of this
// program started. ErrGone (wrapped) if it is not there any more.
func AdoptProcess(pid int, start uint64, bootID string) (*Process, error) {
	if pid <= 1 {
		return nil, fmt.Errorf("adopting process %d: not a process number", pid)
	}
	here, err := BootID()
	if err != nil {
		return nil, err
	}
	if here != bootID {
		return nil, fmt.Errorf("adopting process %d: %w: the host was booted since", pid, ErrGone)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = ErrGone
		}
		return nil, fmt.Errorf("adopting process %d: %w", pid, err)
	}
	// The pidfd first, then the comparison: whatever it names can not change
	// any more.
	got, err := processStart(pid)
	if err != nil || got != start {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("adopting process %d: %w", pid, ErrGone)
	}
	return watch(pid, start, fd)
}

func watch(pid int, start uint64, fd int) (*Process, error) {
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil { // else os.NewFile would not use the poller
		_ = unix.Close(fd)
		return nil, fmt.Errorf("watching process %d: %w", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid))
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("watching process %d: %w", pid, err)
	}
	p := &Process{pid: pid, start: start, fd: f, conn: conn, done: make(chan struct{}), closed: make(chan struct{})}
	go p.wait()
	return p, nil
}

// wait ends when the process does, or with Close.
func (p *Process) wait() {
	exited := false
	_ = p.conn.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		exited = err == nil && n == 1 && fds[0].Revents&unix.POLLIN != 0
		if exited {
			p.status = reap(int(fd))
		}
		return exited
	})
	if exited {
		close(p.done)
	}
}

// reap collects the status of a child; for others there is none to be had.
func reap(pidfd int) string {
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PIDFD, pidfd, &info, unix.WEXITED|unix.WNOHANG, nil); err != nil {
		return ""
	}
	// struct siginfo of SIGCHLD on 64-bit Linux: si_pid at 16, si_status at 24.
	raw := (*[32]byte)(unsafe.Pointer(&info))
	if binary.NativeEndian.Uint32(raw[16:]) == 0 {
		return ""
	}
	status := int(binary.NativeEndian.Uint32(raw[24:]))
	switch info.Code {
	case 1: // CLD_EXITED
		return "exit status " + strconv.Itoa(status)
	case 2, 3: // CLD_KILLED, CLD_DUMPED
		return "signal: " + syscall.Signal(status).String()
	}
	return ""
}

// PID is the process's number.
func (p *Process) PID() int { return p.pid }

// StartTime is field 22 of /proc/<pid>/stat.
func (p *Process) StartTime() uint64 { return p.start }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Status says how it ended, after Done: "exit status 1", "signal: killed", or
// nothing where it was not a child of this process.
func (p *Process) Status() string {
	if !p.ended() {
		return ""
	}
	return p.status
}

func (p *Process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Kill sends SIGKILL and waits for the end.
func (p *Process) Kill(ctx context.Context) error {
	var serr error
	err := p.conn.Control(func(fd uintptr) {
		serr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0)
	})
	if p.ended() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("killing process %d: %w", p.pid, ErrClosed)
	}
	if serr != nil && !errors.Is(serr, unix.ESRCH) {
		return fmt.Errorf("killing process %d: %w", p.pid, serr)
	}
	select {
	case <-p.done:
		return nil
	case <-p.closed:
		if p.ended() {
			return nil
		}
		return fmt.Errorf("waiting for process %d to die: %w", p.pid, ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("waiting for process %d to die: %w", p.pid, ctx.Err())
	}
}

// Close drops the handle; the process lives on.
func (p *Process) Close() {
	p.closing.Do(func() {
		close(p.closed)
		p.fd.Close() // ends wait
	})
}

// BootID tells one boot of the host from another.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("reading the host's boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// processStart reads field 22 of /proc/<pid>/stat.
func processStart(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("reading the start time of process %d: %w", pid, err)
	}
	// Field 2, the name, may hold anything: count from the last parenthesis.
	i := strings.LastIndexByte(string(b), ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, fmt.Errorf("reading the start time of process %d: malformed stat", pid)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

func dup(f *os.File) (*os.File, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	n, derr := -1, error(nil)
	if err := conn.Control(func(fd uintptr) {
		n, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
	}); err != nil {
		return nil, err
	}
	if derr != nil {
		return nil, derr
	}
	return os.NewFile(uintptr(n), f.Name()), nil
}
