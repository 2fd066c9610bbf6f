//go:build linux && amd64

package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// injectInto runs an injection on a thread that dies with it, because ptrace
// belongs to a thread and its death is what lets go of a tracee in any case.
func injectInto(ctx context.Context, proc *process, s *Shared, devFD int) (*Attachment, error) {
	tids, err := threads(proc.pid)
	if err != nil {
		return nil, err
	}
	var failed error
	for _, tid := range tids {
		var a *Attachment
		var changed bool
		onDyingThread(func() { a, changed, err = injectThread(ctx, proc, tid, s, devFD) })
		if err == nil {
			return a, nil
		}
		if failed = errors.Join(failed, err); changed || ctx.Err() != nil || proc.exited() {
			return nil, failed
		}
	}
	return nil, failed
}

// onDyingThread runs f on an OS thread of its own that ends with it. The main
// thread never ends, so it is held until another one has been found.
func onDyingThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with us
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			onDyingThread(f)
			return
		}
		f()
	}()
	<-done
}

// injectThread tries it with one thread. changed means that the calls began,
// so that a failure is not this thread's and another is not tried.
func injectThread(ctx context.Context, proc *process, tid int, s *Shared, devFD int) (a *Attachment, changed bool, err error) {
	t, err := seize(ctx, proc, tid)
	if err != nil {
		return nil, false, err
	}
	if err = ctx.Err(); err == nil {
		// From here to the release nothing is cut short.
		a, err = exchange(t, s, devFD)
	}
	if rerr := t.release(); rerr != nil && !errors.Is(rerr, ErrGone) {
		// The thread did not get its state back: it must not run on.
		rerr = errors.Join(rerr, proc.kill())
		if a != nil {
			a.closeFDs()
		}
		return nil, true, errors.Join(err, rerr)
	}
	return a, true, err
}

// exchange has the thread make a userfaultfd and replace the shared mapping of
// the memfd by a private one; on error it has the mapping put back.
func exchange(t *tracee, s *Shared, devFD int) (*Attachment, error) {
	pid := t.proc.pid
	addr, err := findMapping(pid, s.file, s.size, "rw-s")
	if err != nil {
		return nil, err
	}
	memFD, err := findFD(pid, s.file)
	if err != nil {
		return nil, err
	}
	remote, err := makeRemote(t, devFD)
	if err != nil {
		return nil, err
	}
	local, err := unix.PidfdGetfd(t.proc.pidfd, remote, 0)
	if err != nil {
		err = fmt.Errorf("get descriptor %d of process %d: %w", remote, pid, err)
	} else if err = handshake(local); err == nil {
		err = replaceMapping(t, s, local, addr, memFD)
	}
	if err != nil {
		if local >= 0 {
			unix.Close(local)
		}
		_, cerr := t.call(unix.SYS_CLOSE, uintptr(remote))
		return nil, errors.Join(err, cerr)
	}
	rec := AttachmentRecord{PID: pid, StartTime: t.proc.start, RemoteFD: remote, Addr: addr, Length: s.size}
	return newSharedAttachment(rec, s, t.proc, local), nil
}

func makeRemote(t *tracee, devFD int) (int, error) {
	var fd uintptr
	var err error
	if devFD >= 0 {
		fd, err = t.call(unix.SYS_IOCTL, uintptr(devFD), ioctlNew, unix.O_CLOEXEC|unix.O_NONBLOCK)
	} else {
		fd, err = t.call(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK)
	}
	if err == unix.EPERM && devFD < 0 {
		err = fmt.Errorf("%w (an unprivileged process needs an inherited descriptor of /dev/userfaultfd)", err)
	}
	if err != nil {
		return -1, fmt.Errorf("have process %d make a userfaultfd: %w", t.proc.pid, err)
	}
	return int(fd), nil
}

func replaceMapping(t *tracee, s *Shared, local int, addr uintptr, memFD int) error {
	const prot = unix.PROT_READ | unix.PROT_WRITE
	// MAP_NORESERVE: clones share most pages, so the host may be overcommitted.
	_, err := t.call(unix.SYS_MMAP, addr, uintptr(s.size), prot, unix.MAP_PRIVATE|unix.MAP_FIXED|unix.MAP_NORESERVE, uintptr(memFD), 0)
	if err != nil {
		err = fmt.Errorf("map guest memory privately: %w", err)
	} else {
		err = register(local, addr, s.size, canWake|canZeropage)
	}
	if err == nil {
		// The new mapping lost what was advised for the old one. A child that
		// inherited it would have no userfaultfd and read zeros; a core dump
		// would fault in the whole image.
		for _, advice := range []uintptr{unix.MADV_DONTFORK, unix.MADV_DONTDUMP} {
			if _, aerr := t.call(unix.SYS_MADVISE, addr, uintptr(s.size), advice); aerr != nil {
				err = errors.Join(err, fmt.Errorf("advise %d for guest memory: %w", advice, aerr))
			}
		}
	}
	if err == nil {
		err = s.expel()
	}
	if err == nil {
		return nil
	}
	if _, rerr := t.call(unix.SYS_MMAP, addr, uintptr(s.size), prot, unix.MAP_SHARED|unix.MAP_FIXED, uintptr(memFD), 0); rerr != nil {
		// Half a change is worse than none: it would run on memory of zeros.
		return errors.Join(err, fmt.Errorf("put the mapping back: %w", rerr), t.proc.kill())
	}
	return err
}
