package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

// quietTime is how long a process's children that outlive it may still write
// to its output before the end is told.
const quietTime = 200 * time.Millisecond

// proc is one process that was started by a call. It belongs to nobody: no
// client's disconnect ends it.
type proc struct {
	pid    int
	config *pb.ProcessConfig
	tag    *string
	out    *output
	in     *input   // nil: its standard input is empty
	term   *os.File // nil: it has no terminal
	// gone is closed when the process has been collected.
	gone chan struct{}
	// started orders processes that share a tag.
	started time.Time
	// registered belongs to processes.mu.
	registered bool

	mu       sync.Mutex
	exited   bool
	timedOut bool
	lifetime *time.Timer
}

// startOptions is what a start says beyond the command.
type startOptions struct {
	tag   *string
	stdin bool
	pty   bool
	cols  uint16
	rows  uint16
	// lifetime ends the process; 0 is no limit.
	lifetime time.Duration
}

// files are the ends of a new process's pipes or terminal.
type files struct {
	child  []*os.File // closed when the process has them
	parent []*os.File // closed where it could not be started
	reads  map[channel]*os.File
	in     *input
	term   *os.File
}

func (f *files) closeAll(list []*os.File) {
	for _, x := range list {
		_ = x.Close()
	}
}

// spawn starts a command with its first client attached, so that not a byte is
// dropped before that client reads. ended is called when the process is over
// and its output complete.
func spawn(c *command, o startOptions, ended func(*proc)) (*proc, *reader, error) {
	cmd := c.build()
	pidfd := -1
	cmd.SysProcAttr.PidFD = &pidfd
	var fl files
	var err error
	if o.pty {
		err = fl.openTerminal(cmd, c.user, o)
	} else {
		err = fl.openPipes(cmd, c.user, o.stdin)
	}
	defer func() { fl.closeAll(fl.child) }()
	if err != nil {
		fl.closeAll(fl.parent)
		return nil, nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("starting '%s': %w", clip(c.config.GetCmd()), err))
	}
	if err := cmd.Start(); err != nil {
		fl.closeAll(fl.parent)
		return nil, nil, c.startError(err)
	}
	ordinary(cmd.Process.Pid)
	p := &proc{
		pid: cmd.Process.Pid, config: c.config, tag: o.tag, started: time.Now(),
		out: newOutput(), in: fl.in, term: fl.term, gone: make(chan struct{}),
	}
	r := p.out.attach()
	if o.lifetime > 0 {
		p.lifetime = time.AfterFunc(o.lifetime, p.expire)
	}
	quiet := make(chan struct{}, len(fl.reads))
	for from, f := range fl.reads {
		go p.pump(f, from, func() { quiet <- struct{}{} })
	}
	go func() {
		p.reap(cmd, pidfd)
		close(p.gone)
		if p.in != nil {
			p.in.abandon()
		}
		for _, f := range fl.reads {
			_ = f.SetReadDeadline(time.Now().Add(quietTime))
		}
		for range fl.reads {
			<-quiet
		}
		p.out.finish(p.endState(cmd))
		ended(p)
	}()
	return p, r, nil
}

// ordinary takes from a new program, the leader of its group, what priority the
// agent itself has before others. It comes after the start: until its program
// runs it is part of the agent's own work.
func ordinary(pid int) {
	// The system call gives 20 less the nice value.
	if prio, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil && prio > 20 {
		_ = unix.Setpriority(unix.PRIO_PGRP, pid, 0) // one that has ended has none
	}
}

// openPipes gives cmd pipes of its user's: a program may open /dev/stdout.
func (f *files) openPipes(cmd *exec.Cmd, u account, stdin bool) error {
	f.reads = map[channel]*os.File{}
	pipe := func() (r, w *os.File, err error) {
		if r, w, err = os.Pipe(); err != nil {
			return nil, nil, fmt.Errorf("making a pipe: %w", err)
		}
		if os.Geteuid() == 0 {
			err = r.Chown(int(u.uid), int(u.gid))
		}
		return r, w, err
	}
	for from, dst := range map[channel]*io.Writer{chanStdout: &cmd.Stdout, chanStderr: &cmd.Stderr} {
		r, w, err := pipe()
		if err != nil {
			return err
		}
		f.child, f.parent = append(f.child, w), append(f.parent, r)
		*dst, f.reads[from] = w, r
	}
	if stdin {
		r, w, err := pipe()
		if err != nil {
			return err
		}
		f.child, f.parent = append(f.child, r), append(f.parent, w)
		cmd.Stdin, f.in = r, newInput(w, false)
	}
	return nil
}

// openTerminal gives cmd a terminal of its user's as its controlling one.
func (f *files) openTerminal(cmd *exec.Cmd, u account, o startOptions) error {
	master, slave, err := pty.Open()
	if err != nil {
		return fmt.Errorf("opening a terminal: %w", err)
	}
	f.child = append(f.child, slave)
	// The library leaves the master in blocking mode, where neither deadlines
	// nor Close work: take a descriptor of our own.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = master.Close()
	if err != nil {
		return fmt.Errorf("opening a terminal: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("opening a terminal: %w", err)
	}
	f.term = os.NewFile(uintptr(fd), "terminal")
	f.parent = append(f.parent, f.term)
	if err := resize(f.term, o.cols, o.rows); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		if err := slave.Chown(int(u.uid), -1); err != nil {
			return fmt.Errorf("giving the terminal to %s: %w", u.name, err)
		}
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr.Setctty = true
	f.reads = map[channel]*os.File{chanPTY: f.term}
	f.in = newInput(f.term, true)
	return nil
}

func resize(term *os.File, cols, rows uint16) error {
	rc, err := term.SyscallConn()
	if err != nil {
		return fmt.Errorf("resizing the terminal: %w", err)
	}
	var ierr error
	err = rc.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
	if err = errors.Join(err, ierr); err != nil {
		return fmt.Errorf("resizing the terminal: %w", err)
	}
	return nil
}

// pump moves one pipe's data into the output. After the process's exit a read
// deadline tells it to take what is there and report quiet; from then on it
// only keeps the pipe empty, so that a child left behind (a server started
// with &) neither blocks nor dies by SIGPIPE.
func (p *proc) pump(f *os.File, from channel, quiet func()) {
	defer func() {
		// A program that is about to exit closes its terminal first. Closing
		// our side then would hang it up before it can say how it exits.
		<-p.gone
		_ = f.Close()
	}()
	buf := make([]byte, pieceSize)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			p.out.write(from, buf[:n])
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil { // EOF, or EIO from a terminal
			quiet()
			return
		}
	}
	_ = f.SetReadDeadline(time.Time{})
	open := p.drain(f, from, buf)
	quiet()
	if open {
		_, _ = io.Copy(io.Discard, f)
	}
}

// drain takes what is in the pipe now and reports whether it is still open.
func (p *proc) drain(f *os.File, from channel, buf []byte) (open bool) {
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	for {
		var n int
		var rerr error
		err := rc.Read(func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), buf)
			return true
		})
		switch {
		case err != nil:
			return false
		case rerr == unix.EINTR:
		case rerr == unix.EAGAIN:
			return true
		case rerr != nil || n <= 0:
			return false
		default:
			p.out.write(from, buf[:n])
		}
	}
}

// reap waits for the process to exit. It learns of it through the pidfd and
// the poller, which costs no thread, and collects it under the lock that
// guards signals: a process id that is free again is never signalled.
func (p *proc) reap(cmd *exec.Cmd, pidfd int) {
	if pidfd >= 0 {
		waitExit(pidfd)
	}
	if pidfd >= 0 {
		p.mu.Lock()
		defer p.mu.Unlock()
		_ = cmd.Wait() // the state says it all
	} else {
		_ = cmd.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
	}
	p.exited = true
	if p.lifetime != nil {
		p.lifetime.Stop()
	}
}

// waitExit returns when the process of pidfd can be collected, and closes it.
func waitExit(pidfd int) {
	_ = unix.SetNonblock(pidfd, true)
	f := os.NewFile(uintptr(pidfd), "pidfd")
	defer f.Close()
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Read(func(fd uintptr) bool {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PIDFD, int(fd), &info, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil)
		return (err != nil && err != unix.EAGAIN && err != unix.EINTR) || info.Signo != 0
	})
}

func (p *proc) endState(cmd *exec.Cmd) endState {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := cmd.ProcessState
	if st == nil {
		return endState{code: -1, status: "unknown", timedOut: p.timedOut}
	}
	return endState{code: st.ExitCode(), exited: st.Exited(), status: st.String(), timedOut: p.timedOut}
}

// expire ends a process whose lifetime is over.
func (p *proc) expire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.exited {
		p.timedOut = true
		_ = unix.Kill(-p.pid, unix.SIGKILL)
	}
}

// signal reaches the process and what it started in its group.
func (p *proc) signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exited {
		return errNoProcess(fmt.Sprintf("pid %d", p.pid))
	}
	if err := unix.Kill(-p.pid, sig); err != nil {
		return connect.NewError(connect.CodeInternal, fmt.Errorf("signalling process %d: %w", p.pid, err))
	}
	return nil
}

func errNoProcess(who string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with %s not found", who))
}
