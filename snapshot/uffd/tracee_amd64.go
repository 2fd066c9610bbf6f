//go:build linux && amd64

package uffd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tracee is one stopped thread of another process that runs system calls for
// us. All methods must be called on the thread that made it; when that thread
// ends, the kernel lets go of a tracee that was not prepared yet.
//
// The thread is stopped by PTRACE_INTERRUPT, which shows it with its registers
// as the interrupted system call left them: rax one of -ERESTART…, orig_rax the
// call's number. To be put back it is stopped in the same place again, so that
// the kernel itself decides, as it would have, whether the call is restarted or
// a signal handler runs.
type tracee struct {
	proc  *process
	tid   int
	regs  unix.PtraceRegs
	mask  uint64
	insn  uintptr // of a syscall instruction
	saved bool
	// signal arrived while we held the thread and is delivered on release.
	signal int
}

const (
	allSignals  = ^uint64(0)
	stopStatus  = int(unix.SIGTRAP) | unix.PTRACE_EVENT_STOP<<8
	callStatus  = int(unix.SIGTRAP) | 0x80
	userCodeSel = 0x33 // cs of a thread in 64-bit mode
)

// stopTimeout bounds the wait for one thread; a thread in uninterruptible
// sleep is given up for the next one.
const stopTimeout = 500 * time.Millisecond

// seize stops thread tid and saves its state. On error the thread is let go
// of at the latest when the caller's thread ends.
func seize(ctx context.Context, proc *process, tid int) (*tracee, error) {
	t := &tracee{proc: proc, tid: tid}
	if err := unix.PtraceSeize(tid); err != nil {
		return nil, fmt.Errorf("seize thread %d: %w", tid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := t.interrupt(ctx); err != nil {
		return nil, err
	}
	if err := t.prepare(); err != nil {
		return nil, errors.Join(err, t.release())
	}
	return t, nil
}

// interrupt brings the running thread into the stop that PTRACE_INTERRUPT
// makes.
func (t *tracee) interrupt(ctx context.Context) error {
	if err := unix.PtraceInterrupt(t.tid); err != nil {
		return t.explain("interrupt", err)
	}
	for range 64 {
		status, err := t.wait(ctx)
		if err != nil {
			return err
		}
		if status == stopStatus {
			return nil
		}
		if status>>8 == unix.PTRACE_EVENT_STOP {
			err := fmt.Errorf("thread %d is stopped by %v", t.tid, unix.Signal(status&0x7f))
			return errors.Join(err, t.detach(0))
		}
		// A signal came first: let it through and stop again. Any stop takes back
		// what was asked before it. It is asked again while the thread stands
		// still: where it runs, it may be in the stop that was asked first, and
		// would make another one in the middle of a call of ours.
		pass := 0
		if status>>8 == 0 {
			pass = status & 0x7f
		}
		if err := unix.PtraceInterrupt(t.tid); err != nil {
			return t.explain("interrupt", err)
		}
		if err := unix.PtraceCont(t.tid, pass); err != nil {
			return t.explain("continue", err)
		}
	}
	return fmt.Errorf("thread %d gets signals faster than it can be stopped", t.tid)
}

// prepare saves what is to be restored and blocks the thread's signals.
func (t *tracee) prepare() error {
	if err := unix.PtraceGetRegs(t.tid, &t.regs); err != nil {
		return t.explain("read registers", err)
	}
	if t.regs.Cs != userCodeSel {
		return fmt.Errorf("thread %d is not in 64-bit mode", t.tid)
	}
	if err := t.findInsn(); err != nil {
		return err
	}
	// EXITKILL: should we be killed in the middle of a call, the process must
	// not run on with the call's registers. A VM being restored can be restored
	// again.
	if err := unix.PtraceSetOptions(t.tid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_EXITKILL); err != nil {
		return t.explain("set options", err)
	}
	if err := t.sigmask(unix.PTRACE_GETSIGMASK, &t.mask); err != nil {
		return err
	}
	all := allSignals
	if err := t.sigmask(unix.PTRACE_SETSIGMASK, &all); err != nil {
		return err
	}
	t.saved = true
	return nil
}

// findInsn looks for a syscall instruction: a thread that sleeps in the
// kernel has one right behind it, else the vDSO has some.
func (t *tracee) findInsn() error {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", t.proc.pid))
	if err != nil {
		return fmt.Errorf("open memory of process %d: %w", t.proc.pid, err)
	}
	defer mem.Close()
	var b [2]byte
	if _, err := mem.ReadAt(b[:], int64(t.regs.Rip)-2); err == nil && b == [2]byte{0x0f, 0x05} {
		t.insn = uintptr(t.regs.Rip) - 2
		return nil
	}
	var vdso vma
	err = readMaps(t.proc.pid, func(v vma) {
		if v.path == "[vdso]" && strings.Contains(v.perms, "x") && v.length() <= 1<<20 {
			vdso = v
		}
	})
	if err != nil {
		return fmt.Errorf("read mappings of process %d: %w", t.proc.pid, err)
	}
	code := make([]byte, vdso.length())
	if _, err := mem.ReadAt(code, int64(vdso.start)); err != nil {
		return fmt.Errorf("read the vDSO of process %d: %w", t.proc.pid, err)
	}
	i := strings.Index(string(code), "\x0f\x05")
	if i < 0 {
		return fmt.Errorf("thread %d is in no system call and process %d has no syscall instruction in its vDSO", t.tid, t.proc.pid)
	}
	t.insn = vdso.start + uintptr(i)
	return nil
}

// call has the thread carry out a system call. An error of the call itself is
// an Errno.
func (t *tracee) call(nr uintptr, args ...uintptr) (uintptr, error) {
	var a [6]uint64
	for i, v := range args {
		a[i] = uint64(v)
	}
	r := t.regs
	r.Rip, r.Rax = uint64(t.insn), uint64(nr)
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = a[0], a[1], a[2], a[3], a[4], a[5]
	r.Orig_rax = ^uint64(0) // or the kernel would rewind the call we are in
	if err := unix.PtraceSetRegs(t.tid, &r); err != nil {
		return 0, t.explain("set registers", err)
	}
	for _, edge := range []string{"enter", "leave"} {
		if err := unix.PtraceSyscall(t.tid, 0); err != nil {
			return 0, t.explain(edge+" call", err)
		}
		// No limit: the calls we make do not sleep for long, and to let go of
		// a thread in the middle of one is the one thing that cannot be undone.
		status, err := t.wait(context.Background())
		if err != nil {
			return 0, err
		}
		if status != callStatus {
			if status>>8 == 0 && status&0x80 == 0 {
				t.signal = status & 0x7f
			}
			return 0, fmt.Errorf("thread %d stopped with status %#x in an injected call", t.tid, status)
		}
	}
	if err := unix.PtraceGetRegs(t.tid, &r); err != nil {
		return 0, t.explain("read result", err)
	}
	if e := -int64(r.Rax); e > 0 && e < 4096 {
		return 0, unix.Errno(e)
	}
	return uintptr(r.Rax), nil
}

// release puts the thread back as it was and lets it run.
func (t *tracee) release() error {
	if !t.saved {
		return t.detach(0)
	}
	if t.signal == 0 {
		if err := unix.PtraceInterrupt(t.tid); err != nil {
			return t.explain("interrupt", err)
		}
		if err := unix.PtraceCont(t.tid, 0); err != nil {
			return t.explain("continue", err)
		}
		// Signals are blocked, so it is this stop, or SIGSTOP or SIGKILL.
		status, err := t.wait(context.Background())
		if err != nil {
			return err
		}
		if status>>8 == 0 {
			t.signal = status & 0x7f
		}
	}
	if err := unix.PtraceSetRegs(t.tid, &t.regs); err != nil {
		return t.explain("restore registers", err)
	}
	if err := t.sigmask(unix.PTRACE_SETSIGMASK, &t.mask); err != nil {
		return err
	}
	return t.detach(t.signal)
}

func (t *tracee) detach(sig int) error {
	if _, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, uintptr(t.tid), 0, uintptr(sig), 0, 0); e != 0 {
		return t.explain("detach", e)
	}
	return nil
}

func (t *tracee) sigmask(req int, mask *uint64) error {
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, uintptr(req), uintptr(t.tid), unsafe.Sizeof(*mask), uintptr(unsafe.Pointer(mask)), 0, 0)
	if e != 0 {
		return t.explain("signal mask", e)
	}
	return nil
}

// wait returns the next stop of the thread: signal, event<<8. It never takes
// the exit status away from the process's parent, which we may be. The kernel
// offers no descriptor for ptrace stops, hence the polling.
func (t *tracee) wait(ctx context.Context) (int, error) {
	const wnothread = 0x20000000
	for pause := 20 * time.Microsecond; ; {
		var info [128]byte
		err := unix.Waitid(unix.P_PID, t.tid, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WSTOPPED|unix.WNOHANG|unix.WALL|wnothread, nil)
		if err != nil && err != unix.EINTR {
			return 0, t.explain("wait", err)
		}
		// si_pid and si_status of struct siginfo.
		if err == nil && binary.NativeEndian.Uint32(info[16:]) != 0 {
			return int(binary.NativeEndian.Uint32(info[24:])), nil
		}
		if t.proc.exited() {
			return 0, fmt.Errorf("process %d: %w", t.proc.pid, ErrGone)
		}
		if err := unix.Tgkill(t.proc.pid, t.tid, 0); err == unix.ESRCH {
			return 0, fmt.Errorf("thread %d: %w", t.tid, ErrGone)
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("thread %d does not stop: %w", t.tid, ctx.Err())
		}
		time.Sleep(pause)
		pause = min(2*pause, time.Millisecond)
	}
}

func (t *tracee) explain(what string, err error) error {
	if err == unix.ESRCH || err == unix.ECHILD {
		err = errors.Join(ErrGone, err)
	}
	return fmt.Errorf("%s thread %d: %w", what, t.tid, err)
}
