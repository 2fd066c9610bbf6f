//go:build linux

package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// AttachmentRecord is what a server after this one needs to take an attachment
// over. It is stable JSON, for a journal.
type AttachmentRecord struct {
	PID       int     `json:"pid"`
	StartTime uint64  `json:"start_time"` // clock ticks after boot, /proc/<pid>/stat
	RemoteFD  int     `json:"remote_fd"`  // the userfaultfd's number in the process
	Addr      uintptr `json:"addr"`       // of guest memory in the process; 0 in copy mode
	Length    int64   `json:"length"`     // bytes
	// Regions are where guest memory lies in copy mode.
	Regions []Region `json:"regions,omitempty"`
}

// validate checks a record against the size of its image.
func (r AttachmentRecord) validate(size int64) error {
	switch {
	case r.PID <= 0:
		return fmt.Errorf("attachment record: pid %d", r.PID)
	case r.StartTime == 0:
		return errors.New("attachment record: no start time")
	case r.RemoteFD < 0:
		return fmt.Errorf("attachment record: remote_fd %d", r.RemoteFD)
	case r.Length != size:
		return fmt.Errorf("attachment record: length %d, image has %d", r.Length, size)
	case len(r.Regions) > 0:
		if _, err := checkRegions(r.Regions, size); err != nil {
			return fmt.Errorf("attachment record: %w", err)
		}
	case r.Addr == 0 || r.Addr%pageSize != 0:
		return fmt.Errorf("attachment record: addr %#x", r.Addr)
	}
	return nil
}

// Attachment is the hold on the userfaultfd of one VM. It is made by Inject,
// Peer.Accept or their Reattach, and belongs to the Server it is added to; one
// that is never added must be closed.
type Attachment struct {
	rec     AttachmentRecord
	src     Source
	regions []Region // by offset
	shared  *Shared  // nil in copy mode
	pages   *PageMap // nil in shared mode
	proc    *process
	fd      int
	once    sync.Once
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
	if err := rec.validate(shared.size); err != nil {
		return nil, fmt.Errorf("uffd: %w", err)
	}
	if len(rec.Regions) > 0 {
		return nil, errors.New("uffd: attachment record: it is of copy mode")
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
	fd, err := fetchUserfaultfd(proc, rec.RemoteFD)
	if err != nil {
		return nil, err
	}
	a := newSharedAttachment(rec, s, proc, fd)
	if err := a.wakeAll(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return a, nil
}

func newSharedAttachment(rec AttachmentRecord, s *Shared, proc *process, fd int) *Attachment {
	return &Attachment{
		rec: rec, src: s.src, shared: s, proc: proc, fd: fd,
		regions: []Region{{Addr: uint64(rec.Addr), Size: s.size}},
	}
}

// wakeAll makes all that wait for pages raise their faults again.
func (a *Attachment) wakeAll() error {
	for _, r := range a.regions {
		if err := wake(a.fd, uintptr(r.Addr), r.Size); err != nil {
			return err
		}
	}
	return nil
}

// locate gives the region that addr lies in, nil for none.
func (a *Attachment) locate(addr uint64) *Region {
	for i := range a.regions {
		if r := &a.regions[i]; addr >= r.Addr && addr-r.Addr < uint64(r.Size) {
			return r
		}
	}
	return nil
}

// regionAt gives the region that holds the byte at off of the image.
func (a *Attachment) regionAt(off int64) *Region {
	for i := range a.regions {
		if r := &a.regions[i]; off < r.end() {
			return r
		}
	}
	return nil
}

// Record is what Reattach needs.
func (a *Attachment) Record() AttachmentRecord {
	r := a.rec
	r.Regions = slices.Clone(r.Regions)
	return r
}

// Close lets go of the process without ending it: its faults wait until
// somebody attaches again. Only for an attachment that no Server has.
func (a *Attachment) Close() {
	a.once.Do(func() {
		a.closeFDs()
		a.proc.close()
		if a.shared != nil {
			a.shared.refs.Add(-1)
		}
		if a.pages != nil {
			a.pages.Close()
		}
	})
}

func (a *Attachment) closeFDs() { unix.Close(a.fd) }
