package firecracker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// spare is a process that was started before its machine is known: in the
// network namespace and as the user that the next machine of one number will
// have, in a directory that becomes part of that machine's. Nothing of a sandbox
// has been near it.
type spare struct {
	launch *launch
	proc   *vmm.Process // nil: a machine has it
	// held keeps the FIFOs readable until somebody reads them.
	held []*os.File
}

// Warm implements vmm.Warmer.
func (d *Driver) Warm(ctx context.Context, netns string, number int) error {
	if d.o.SpareDir == "" || !asRoot() {
		return nil
	}
	d.Cool(number)
	h, err := d.ready(ctx)
	if err != nil {
		return err
	}
	s, err := d.startSpare(ctx, h, netns, number)
	if err != nil {
		return fmt.Errorf("starting a process ahead, for number %d: %w", number, err)
	}
	d.mu.Lock()
	late := d.closed
	if !late {
		d.spares[number] = s
	}
	d.mu.Unlock()
	if late {
		s.end()
	}
	return nil
}

// startSpare returns a process that answers: jailer has made its jail by paths,
// and these may be moved now.
func (d *Driver) startSpare(ctx context.Context, h host, netns string, number int) (_ *spare, err error) {
	id := "spare" + strings.ToLower(rand.Text()[:12])
	dir := filepath.Join(d.o.SpareDir, id)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	s := &spare{}
	defer func() {
		if err != nil {
			s.end()
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	args := vmm.HostArgs{ID: id, Dir: dir, NetNS: netns, Number: number}
	if s.launch, err = newLaunch(d.o, h, args, vmm.Spec{}, nil); err != nil {
		return nil, err
	}
	s.launch.ahead = true
	for _, path := range []string{filepath.Join(dir, fifoName), filepath.Join(s.launch.root, logFifoName)} {
		f, err := makeFIFO(path)
		if err != nil {
			return nil, err
		}
		s.held = append(s.held, f)
	}
	if s.proc, err = s.launch.run(); err != nil {
		return nil, err
	}
	api := newAPI(filepath.Join(s.launch.root, apiName), s.proc.PID(), d.o.limits())
	defer api.close()
	return s, s.launch.await(ctx, api, s.proc)
}

// spareFor gives the process that was started ahead for these arguments, moved
// to their directory, or nil.
func (d *Driver) spareFor(h host, a vmm.HostArgs) *spare {
	s := d.removeSpare(a.Number)
	if s == nil {
		return nil
	}
	err := s.fits(h, a)
	if err == nil {
		err = s.move(a.Dir)
	}
	if err != nil {
		d.log.Info("a process that was started ahead is not used", "sandbox", a.ID, "why", err)
		s.end()
		return nil
	}
	return s
}

// fits tells why a machine cannot have the process.
func (s *spare) fits(h host, a vmm.HostArgs) error {
	l := s.launch
	select {
	case <-s.proc.Done():
		return fmt.Errorf("it has ended: %s", s.proc.Status())
	default:
	}
	switch {
	case h.version != l.host.version:
		return fmt.Errorf("it is version %s, not %s", l.host.version, h.version)
	case a.NetNS != l.args.NetNS:
		return fmt.Errorf("it is in the network namespace %s", l.args.NetNS)
	case a.NetNS == "":
		return nil
	}
	var own, want unix.Stat_t
	err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", s.proc.PID()), &own)
	if err == nil {
		err = unix.Stat(a.NetNS, &want)
	}
	if err == nil && (own.Dev != want.Dev || own.Ino != want.Ino) {
		err = errors.New("its network namespace is an older one of that name")
	}
	return err
}

// move makes the process's directory part of a machine's. The jail comes first:
// by it the process is found as long as nobody has a record of it.
func (s *spare) move(to string) error {
	root := plainName
	if s.launch.jailed() {
		root = jailName
	}
	from := s.launch.args.Dir
	for _, name := range []string{root, fifoName, logName} {
		if err := os.RemoveAll(filepath.Join(to, name)); err != nil {
			return fmt.Errorf("removing an old machine's files: %w", err)
		}
		if err := os.Rename(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			return fmt.Errorf("moving it to its machine: %w", err)
		}
	}
	return os.Remove(from)
}

// take gives the process away.
func (s *spare) take() *vmm.Process {
	p := s.proc
	s.proc = nil
	for _, f := range s.held {
		f.Close()
	}
	s.held = nil
	return p
}

// end ends a process that no machine has, and removes what is in its directory.
func (s *spare) end() {
	if s.proc == nil && s.held == nil {
		return
	}
	if p := s.take(); p != nil {
		_ = endProcess(p) // the next Probe finds one that would not end
	}
	if l := s.launch; l != nil {
		removeCgroup(l.args.ID)
		_ = os.RemoveAll(l.args.Dir)
	}
}

func endProcess(p *vmm.Process) error {
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	defer p.Close()
	return p.Kill(ctx)
}

// Cool implements vmm.Warmer.
func (d *Driver) Cool(number int) {
	if s := d.removeSpare(number); s != nil {
		s.end()
	}
}

// removeSpare takes a process off the list, or gives nil.
func (d *Driver) removeSpare(number int) *spare {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.spares[number]
	delete(d.spares, number)
	return s
}

// Close implements vmm.Warmer.
func (d *Driver) Close() error {
	d.mu.Lock()
	all := d.spares
	d.spares, d.closed = map[int]*spare{}, true
	d.mu.Unlock()
	for _, s := range all {
		s.end()
	}
	return nil
}

// sweepSpares ends what a driver before this one started ahead and could not end.
func (d *Driver) sweepSpares() error {
	if d.o.SpareDir == "" {
		return nil
	}
	dirs, err := os.ReadDir(d.o.SpareDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for processes that were started ahead: %w", err)
	}
	for _, e := range dirs {
		dir := filepath.Join(d.o.SpareDir, e.Name())
		err = errors.Join(err, vmm.KillHolders(dir, d.log), os.RemoveAll(dir))
	}
	if err != nil {
		return fmt.Errorf("ending processes that were started ahead: %w", err)
	}
	return nil
}
