//go:build linux

package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// AttachmentRecord is what a server after this one needs to take an attachment
// over. It is stable JSON, for a journal.
type AttachmentRecord struct {
	PID       int     `json:"pid"`
	StartTime uint64  `json:"start_time"` // clock ticks after boot, /proc/<pid>/stat
	RemoteFD  int     `json:"remote_fd"`  // the userfaultfd's number in the process
	Addr      uintptr `json:"addr"`       // of guest memory in the process
	Length    int64   `json:"length"`     // bytes
}

func (r AttachmentRecord) validate(s *Shared) error {
	switch {
	case r.PID <= 0:
		return fmt.Errorf("attachment record: pid %d", r.PID)
	case r.StartTime == 0:
		return errors.New("attachment record: no start time")
	case r.RemoteFD < 0:
		return fmt.Errorf("attachment record: remote_fd %d", r.RemoteFD)
	case r.Addr == 0 || r.Addr%pageSize != 0:
		return fmt.Errorf("attachment record: addr %#x", r.Addr)
	case r.Length != s.size:
		return fmt.Errorf("attachment record: length %d, image has %d", r.Length, s.size)
	}
	return nil
}

// Attachment is the hold on the userfaultfd of one VM. It is made by Inject or
// Reattach and belongs to the Server it is added to; one that is never added
// must be closed.
type Attachment struct {
	rec    AttachmentRecord
	shared *Shared
	proc   *process
	fd     int
	once   sync.Once
}

// Inject makes the running process pid, which maps the memfd of shared as one
// whole range, shared and writable, have it privately with a userfaultfd on it.
// remoteDevFD is the number of a descriptor of /dev/userfaultfd in that
// process, which it needs when it is unprivileged, or -1.
//
// The process must not touch the memory before Inject returns; a virtual
// machine that waits for its state does not. It takes one to three
// milliseconds. On error the process runs on as it was, or, where that could
// not be had, is dead; both before and after, ErrPoisoned says that the process
// must not be used.
//
// The caller must be allowed to trace the process. When the process is a child
// of the caller's, nobody may be waiting for it with wait(2) (os.Process.Wait)
// meanwhile, or the kernel hands the stops of the tracing to that wait; watch
// it by pidfd and reap it when it has ended.
//
// Faults raised before a Server has the attachment wait for it.
func Inject(ctx context.Context, pid int, shared *Shared, remoteDevFD int) (*Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	a, err := attach(shared, pid, func(proc *process) (*Attachment, error) {
		if proc.pid == os.Getpid() {
			return nil, errors.New("a process cannot be attached to itself")
		}
		return injectInto(ctx, proc, shared, remoteDevFD)
	})
	if err != nil {
		return nil, fmt.Errorf("uffd: attach to process %d: %w", pid, err)
	}
	return a, nil
}

// Reattach takes over an attachment whose server is gone. Faults that it had
// read but not answered are raised again. ErrGone: the process has ended.
func Reattach(ctx context.Context, rec AttachmentRecord, shared *Shared) (*Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := rec.validate(shared); err != nil {
		return nil, fmt.Errorf("uffd: %w", err)
	}
	a, err := attach(shared, rec.PID, func(proc *process) (*Attachment, error) { return reattach(proc, rec, shared) })
	if err != nil {
		return nil, fmt.Errorf("uffd: attach again to process %d: %w", rec.PID, err)
	}
	return a, nil
}

func attach(shared *Shared, pid int, by func(*process) (*Attachment, error)) (*Attachment, error) {
	if err := shared.acquire(); err != nil {
		return nil, err
	}
	proc, err := openProcess(pid)
	if err != nil {
		shared.refs.Add(-1)
		return nil, err
	}
	a, err := by(proc)
	if err != nil {
		proc.close()
		shared.refs.Add(-1)
		return nil, err
	}
	return a, nil
}

func reattach(proc *process, rec AttachmentRecord, s *Shared) (*Attachment, error) {
	if proc.start != rec.StartTime {
		return nil, fmt.Errorf("another process has its number now: %w", ErrGone)
	}
	addr, err := findMapping(rec.PID, s.file, s.size, "rw-p")
	if err != nil {
		return nil, err
	}
	if addr != rec.Addr {
		return nil, fmt.Errorf("guest memory is at %#x, recorded at %#x", addr, rec.Addr)
	}
	fd, err := unix.PidfdGetfd(proc.pidfd, rec.RemoteFD, 0)
	if err != nil {
		return nil, fmt.Errorf("get descriptor %d: %w", rec.RemoteFD, err)
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err == nil && link != "anon_inode:[userfaultfd]" {
		err = fmt.Errorf("descriptor %d is %s, not a userfaultfd", rec.RemoteFD, link)
	}
	if err == nil {
		err = wake(fd, rec.Addr, rec.Length)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Attachment{rec: rec, shared: s, proc: proc, fd: fd}, nil
}

// Record is what Reattach needs.
func (a *Attachment) Record() AttachmentRecord { return a.rec }

// Close lets go of the process without ending it: its faults wait until
// somebody attaches again. Only for an attachment that no Server has.
func (a *Attachment) Close() {
	a.once.Do(func() {
		a.closeFDs()
		a.proc.close()
		a.shared.refs.Add(-1)
	})
}

func (a *Attachment) closeFDs() { unix.Close(a.fd) }
