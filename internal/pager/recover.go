package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// recover takes up what the pager before this one served. A VM that died
// meanwhile loses its record. One that lives but cannot be served again is
// killed, with the reason kept for the engine: it would stand still for ever.
func (s *Server) recover() {
	records, err := readRecords(s.opts.Dir)
	if err != nil {
		s.log.Error("some records of the last pager are lost", "err", err)
	}
	for _, r := range records {
		log := s.log.With("sandbox", r.SandboxID)
		g := &guest{}
		g.mu.Lock()
		if err := s.recoverOne(r, g); err != nil {
			s.log.Error("a sandbox cannot be served again", "sandbox", r.SandboxID, "err", err)
			s.mu.Lock()
			s.fatal[r.SandboxID] = err.Error()
			s.mu.Unlock()
		}
		if err := s.settle(r.SandboxID, g); err != nil {
			log.Error("the record of the last pager stays", "err", err)
		}
		if g.disk != nil || g.memory != nil {
			s.mu.Lock()
			s.guests[r.SandboxID] = g
			s.mu.Unlock()
			log.Info("taken up again", "memory", g.memory != nil, "disk", g.disk != nil)
		}
		g.mu.Unlock()
	}
}

func (s *Server) recoverOne(r record, g *guest) (err error) {
	if r.Disk != nil {
		if g.disk, err = s.openDisk(r.SandboxID, *r.Disk); err != nil {
			// Its VM waits for the disk to come back; the engine ends it.
			return fmt.Errorf("serve the disk again: %w", err)
		}
	}
	switch {
	case r.Memory == nil:
		return nil
	case r.Memory.Whole:
		// What fails here costs later clones their sharing, not this VM.
		if g.memory, err = s.keepWhole(r); err != nil {
			s.log.Warn("a whole image is not looked after any more", "sandbox", r.SandboxID, "err", err)
		}
		return nil
	case r.Memory.Copy != nil && r.Memory.Attachment == nil:
		return s.expectAgain(r, g)
	case r.Memory.Attachment == nil:
		return nil
	case r.Memory.Copy != nil:
		g.memory, err = s.reattachCopy(r)
	default:
		g.memory, err = s.reattach(r)
	}
	if err == nil || errors.Is(err, uffd.ErrGone) {
		return nil
	}
	rec := r.Memory.Attachment
	return errors.Join(fmt.Errorf("serve the memory again: %w", err), killProcess(rec.PID, rec.StartTime))
}

func (s *Server) reattach(r record) (*memory, error) {
	rec := *r.Memory.Attachment
	i, err := s.images.acquire(r.Memory.ImageID, acquireOptions{keep: r.Memory.KeepWarm, share: true, adopt: func() (*os.File, error) {
		return findMemfd(rec.PID, sharedName(r.Memory.ImageID))
	}})
	if err != nil {
		return nil, err
	}
	a, err := uffd.Reattach(context.Background(), rec, i.shared)
	if err == nil {
		err = s.faults.Add(r.SandboxID, a)
	}
	if err != nil {
		return nil, errors.Join(err, s.images.release(i))
	}
	return &memory{image: i, keep: r.Memory.KeepWarm, attached: a}, nil
}

// findMemfd opens the memfd of that name which a process holds.
func findMemfd(pid int, name string) (*os.File, error) {
	fd, err := findFD(pid, "/memfd:"+name+" ")
	if err != nil {
		return nil, fmt.Errorf("look for the shared pages: %w", err)
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", pid, fd), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open the shared pages: %w", err)
	}
	return f, nil
}

// userfaultfdDev returns the number of the descriptor of /dev/userfaultfd that
// a VM process was started with, -1 where it has none.
func userfaultfdDev(pid int) int {
	fd, err := findFD(pid, "/dev/userfaultfd")
	if err != nil {
		return -1
	}
	return fd
}

// findFD returns the first descriptor of a process whose target begins so.
func findFD(pid int, prefix string) (int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return -1, err
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && strings.HasPrefix(target, prefix) {
			return strconv.Atoi(e.Name())
		}
	}
	return -1, fmt.Errorf("process %d has no descriptor of %q", pid, prefix)
}

// killProcess ends a VM process if it is still the one that was attached.
func killProcess(pid int, start uint64) error {
	boot, err := vmm.BootID()
	if err != nil {
		return err
	}
	p, err := vmm.AdoptProcess(pid, start, boot)
	if errors.Is(err, vmm.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return p.Kill(ctx)
}
