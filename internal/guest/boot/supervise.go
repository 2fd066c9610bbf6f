package boot

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Restart back-off: doubles from min to max, starts over after the service
	// lived for stable.
	backoffMin    = 50 * time.Millisecond
	backoffMax    = 5 * time.Second
	backoffStable = 10 * time.Second
	// stopGrace is how long processes get between SIGTERM and SIGKILL.
	stopGrace = 2 * time.Second
)

type serviceSpec struct {
	path string
	argv []string
	env  []string
	warn func(doing string, err error)
}

// supervisor keeps one service running and reaps every orphan of the machine.
// All of it happens in one goroutine, so a child that ends before its PID is
// noted is still recognised: nobody waits for children but run.
type supervisor struct {
	spec    serviceSpec
	spawn   func(serviceSpec) (pid int, err error)
	wait    func() (pid int, status syscall.WaitStatus, err error)
	now     func() time.Time
	end     func(powerAction) // ends the machine
	pid     int               // 0: not running
	started time.Time
	backoff backoff
}

func newSupervisor(spec serviceSpec) *supervisor {
	return &supervisor{spec: spec, spawn: spawn, wait: waitAny, now: time.Now, end: func(a powerAction) {
		closeRoot()
		endMachine(a)
	}}
}

// start runs the service. It must not be called while it runs.
func (s *supervisor) start() error {
	pid, err := s.spawn(s.spec)
	if err != nil {
		return err
	}
	s.pid, s.started = pid, s.now()
	return nil
}

// run supervises until the machine is told to end.
func (s *supervisor) run() error {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, unix.SIGCHLD, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPWR)
	restart := time.NewTimer(0)
	if !restart.Stop() {
		<-restart.C
	}
	for {
		// Before the first signal too: a child may have ended before Notify.
		if s.reap(); s.pid == 0 && s.backoff.pending == 0 {
			restart.Reset(s.backoff.next(s.now().Sub(s.started)))
		}
		select {
		case sig := <-signals:
			if action, ok := powerSignals[sig]; ok {
				stopAll(s.reap, stopGrace)
				s.end(action)
				return errors.New("the kernel refused to end the machine")
			}
		case <-restart.C:
			s.backoff.pending = 0
			if err := s.start(); err != nil {
				s.spec.warn("restarting "+s.spec.path, err)
				s.started = s.now()
			}
		}
	}
}

// reap collects every child that has ended and reports whether children are
// left. An ended service leaves pid 0.
func (s *supervisor) reap() (left bool) {
	for {
		pid, status, err := s.wait()
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil: // ECHILD
			return false
		case pid == 0:
			return true
		case pid == s.pid:
			s.pid = 0
			s.spec.warn(s.spec.path, fmt.Errorf("ended after %v (%s)", s.now().Sub(s.started).Round(time.Millisecond), describe(status)))
		}
	}
}

func describe(status syscall.WaitStatus) string {
	if status.Signaled() {
		return "signal " + status.Signal().String()
	}
	return fmt.Sprintf("exit status %d", status.ExitStatus())
}

// backoff is the pause before the next restart.
type backoff struct {
	last    time.Duration
	pending time.Duration // != 0: a restart is due
}

// next is the pause after the service lived for lived.
func (b *backoff) next(lived time.Duration) time.Duration {
	switch {
	case b.last == 0 || lived >= backoffStable:
		b.last = backoffMin
	default:
		b.last = min(2*b.last, backoffMax)
	}
	b.pending = b.last
	return b.last
}

// serviceNice puts the service before the programs that it starts: it must
// answer its host, and start the next program, however many keep the processor
// busy. As far as it goes: against hundreds even this is a third of one.
const serviceNice = -20

// spawn starts the service in a session of its own, its output on the console.
// syscall.ForkExec and not os/exec: nobody but reap may wait for it.
func spawn(spec serviceSpec) (int, error) {
	// A child has the priority of the thread that makes it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, serviceNice); err != nil {
		spec.warn("going before other programs", err)
	}
	defer func() { _ = unix.Setpriority(unix.PRIO_PROCESS, 0, 0) }() // what we may raise we may lower
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	return syscall.ForkExec(spec.path, spec.argv, &syscall.ProcAttr{
		Dir:   "/",
		Env:   spec.env,
		Files: []uintptr{null.Fd(), os.Stdout.Fd(), os.Stderr.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

func waitAny() (int, syscall.WaitStatus, error) {
	var status syscall.WaitStatus
	pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
	return pid, status, err
}
