package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

const (
	// drivePath is the disk's path in every machine: saved states hold it.
	driveDir  = "/tmp/fc-vm"
	drivePath = driveDir + "/rootfs"

	apiName    = "api.sock"
	pagesName  = "pages.sock"
	memoryName = "memory"
	logName    = "firecracker.log"
	plainName  = "vm" // the directory of a machine that has no jail
)

// launch is one process to be started.
type launch struct {
	o    Options
	host host
	args vmm.HostArgs
	spec vmm.Spec
	// root is the directory that Firecracker writes to, as we see it.
	root string
	// lent is a file of the host that the process gets at its memoryName.
	lent string
	// attach and disk, not nil, bring what the process is started without: see
	// vmm.RestoreArgs.
	attach func(ctx context.Context, pid int) error
	disk   func(ctx context.Context) (device string, err error)
	// ahead: it is started before its machine is known. spare, not nil, is the
	// process that was, see spare.go.
	ahead bool
	spare *spare
}

// newLaunch makes the directory that Firecracker is started in, or takes over
// that of a process that was started ahead.
func newLaunch(o Options, h host, a vmm.HostArgs, s vmm.Spec, sp *spare) (*launch, error) {
	if a.ConsolePath == "" {
		a.ConsolePath = filepath.Join(a.Dir, "console.log")
	}
	l := &launch{o: o, host: h, args: a, spec: s, root: filepath.Join(a.Dir, plainName), spare: sp}
	if sp != nil {
		if l.jailed() {
			l.root = jailRoot(a.Dir, sp.launch.args.ID)
		}
		return l, nil
	}
	if l.jailed() {
		if err := checkMount(a.Dir); err != nil {
			return nil, err
		}
		if err := os.RemoveAll(filepath.Join(a.Dir, jailName)); err != nil {
			return nil, fmt.Errorf("removing an old jail: %w", err)
		}
		l.root = jailRoot(a.Dir, a.ID)
	} else if err := os.RemoveAll(l.root); err != nil {
		return nil, fmt.Errorf("removing an old machine's files: %w", err)
	}
	if err := os.MkdirAll(l.root, 0o711); err != nil {
		return nil, fmt.Errorf("making the machine's directory: %w", err)
	}
	return l, l.own(l.root)
}

func (l *launch) jailed() bool { return l.host.jailer != "" }

// uid is this machine's own, so that one that broke out of its VMM can neither
// signal nor trace the others.
func (l *launch) uid() uint32 {
	if l.o.UID == 0 {
		return 0
	}
	return l.o.UID + uint32(l.args.Number)
}

// own gives what lies in root to Firecracker's user.
func (l *launch) own(path string) error {
	if l.o.UID == 0 && l.o.GID == 0 {
		return nil
	}
	if err := os.Lchown(path, int(l.uid()), int(l.o.GID)); err != nil {
		return fmt.Errorf("giving %s to Firecracker's user: %w", path, err)
	}
	return nil
}

// put makes a file or socket of the host reachable and returns the path by
// which Firecracker finds it. A jail gets a link, or where that cannot be, a
// copy; a socket must lie on its file system.
func (l *launch) put(name, path string) (string, error) {
	if !l.jailed() {
		return path, nil
	}
	to := filepath.Join(l.root, name)
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !st.Mode().IsRegular() {
		if err := os.Link(path, to); err != nil {
			return "", fmt.Errorf("bringing it into the jail: %w", err)
		}
		return "/" + name, nil
	}
	if err := copyFile(to, path); err != nil {
		return "", fmt.Errorf("bringing it into the jail: %w", err)
	}
	return "/" + name, l.own(to)
}

// memory makes what a restore finds its memory by reachable: Firecracker's
// name for the kind of it, and the path.
func (l *launch) memory() (backend, path string, err error) {
	file := l.args.MemoryFile
	if file == "" {
		path, err = l.put(pagesName, l.args.MemorySocket)
		if err != nil {
			err = fmt.Errorf("memory_socket: %w", err)
		}
		return "Uffd", path, err
	}
	st, err := os.Stat(file)
	if err == nil && (!st.Mode().IsRegular() || st.Size() != l.spec.MemoryBytes()) {
		err = fmt.Errorf("%s is no regular file of %d MiB", file, l.spec.MemoryMB)
	}
	switch {
	case err != nil:
	case l.jailed():
		// It lies on another file system: it is mounted over this one.
		err = os.WriteFile(filepath.Join(l.root, memoryName), nil, 0o400)
		l.lent, file = file, "/"+memoryName
	case l.spare != nil: // which does not see what was mounted since it started
		l.lent, file = file, driveDir+"/"+memoryName
	}
	if err != nil {
		err = fmt.Errorf("memory_file: %w", err)
	}
	return "File", file, err
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// forget removes what put brought and the machine does not need any more.
func (l *launch) forget(names ...string) {
	if !l.jailed() {
		return
	}
	for _, n := range names {
		_ = os.Remove(filepath.Join(l.root, n)) // it goes with the jail at the latest
	}
}

// start runs Firecracker, unless a process was started ahead, and shakes hands.
// On failure no process is left.
func (l *launch) start(ctx context.Context) (_ *machine, err error) {
	pumps, err := openPumps(l.args.Dir, l.root, l.args.ConsolePath, l.stderrPath())
	if err != nil {
		return nil, err
	}
	running := false
	defer func() {
		if !running {
			for _, c := range pumps {
				c.abort()
			}
		}
	}()
	boot, err := vmm.BootID()
	if err != nil {
		return nil, err
	}
	answers := l.args.Begin("vmm_process")
	p, err := l.run()
	if err != nil {
		return nil, err
	}
	running = true
	m := newMachine(vmm.Record{
		ID: l.args.ID, Kind: Name, PID: p.PID(), StartTime: p.StartTime(), BootID: boot,
		Control: filepath.Join(l.root, apiName), ConsolePath: l.args.ConsolePath, StderrPath: l.stderrPath(),
		MemoryFD: -1, UffdDevFD: -1, Spec: l.spec, Info: l.host.info,
	}, p, pumps, l.o)
	late, cancel := context.WithCancel(ctx)
	defer cancel()
	brought := make(chan error, 1)
	go func() { brought <- l.bring(late, p.PID()) }()
	err = l.await(ctx, m.api, p)
	answers()
	if err != nil {
		cancel() // what is brought would be for nobody
		<-brought
	} else {
		err = <-brought
	}
	if err == nil && l.lent != "" { // it answers, so that jailer has made its mounts
		err = l.lend(p.PID())
	}
	if err != nil {
		return nil, m.abandon(err)
	}
	return m, nil
}

func (l *launch) stderrPath() string { return filepath.Join(l.args.Dir, logName) }

// undo ends what newLaunch took over, where a failure came before a machine had it.
func (l *launch) undo(err error) error {
	if l.spare != nil {
		l.spare.end()
	}
	return err
}

// await returns when the process answers as the program that was probed.
func (l *launch) await(ctx context.Context, a *api, p *vmm.Process) error {
	v, err := a.await(ctx, p.Done())
	if err == nil && v != l.host.version {
		err = fmt.Errorf("firecracker %s answers, %s was probed", v, l.host.version)
	}
	return err
}

// run starts the process where none was started ahead. The FIFOs are there.
func (l *launch) run() (*vmm.Process, error) {
	if l.spare != nil {
		p := l.spare.take()
		if err := l.place(p.PID(), l.args.DiskDevice); err != nil {
			return nil, errors.Join(err, endProcess(p))
		}
		return p, nil
	}
	if err := os.Remove(l.stderrPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing an old log: %w", err)
	}
	if err := l.own(filepath.Join(l.root, logFifoName)); err != nil {
		return nil, err
	}
	stderr, err := vmm.OpenLog(l.stderrPath(), logLimit)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	out, err := openFIFO(filepath.Join(l.args.Dir, fifoName))
	if err != nil {
		return nil, err
	}
	defer out.Close()
	return l.process(out, stderr)
}

// bring has brought what the process is started without: who serves its memory
// knows it, and its disk is there.
func (l *launch) bring(ctx context.Context, pid int) error {
	var attached, placed error
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if l.attach != nil {
		wg.Go(func() {
			if attached = l.attach(ctx, pid); attached != nil {
				cancel()
				attached = fmt.Errorf("attaching the memory: %w", attached)
			}
		})
	}
	if l.disk != nil {
		wg.Go(func() {
			device, err := l.disk(ctx)
			if err == nil {
				err = l.place(pid, device)
			}
			if err != nil {
				cancel()
				placed = fmt.Errorf("bringing the disk: %w", err)
			}
		})
	}
	wg.Wait()
	return errors.Join(attached, placed)
}

// process starts the program, jailed or not.
func (l *launch) process(stdout, stderr *os.File) (*vmm.Process, error) {
	inside := "/"
	if !l.jailed() {
		inside = l.root
	}
	own := []string{"--api-sock", filepath.Join(inside, apiName), "--log-path", filepath.Join(inside, logFifoName), "--level", "Warn"}
	if l.jailed() {
		if l.args.DiskDevice != "" {
			if err := l.node(l.args.DiskDevice); err != nil {
				return nil, err
			}
		}
		args, err := l.jailArgs()
		if err != nil {
			return nil, err
		}
		return vmm.StartProcess(vmm.ProcessSpec{
			Args: append(append(args, "--"), own...), Env: environment(), Dir: "/", Stdout: stdout, Stderr: stderr,
		})
	}
	return l.apart(func() (*vmm.Process, error) {
		return vmm.StartProcess(vmm.ProcessSpec{
			Args: append([]string{l.host.binary, "--id", l.args.ID}, own...), Env: environment(), Dir: "/",
			Stdout: stdout, Stderr: stderr, UID: l.uid(), GID: l.o.GID,
		})
	})
}

// root is the directory that Firecracker writes to: as we see it, and as it
// does.
func (m *machine) root() (here, inside string) {
	here = filepath.Dir(m.rec.Control)
	if filepath.Base(here) == "root" { // a jail's
		return here, "/"
	}
	return here, here
}

// openRegular opens a file that the jailed process wrote, for reading, if it
// is what it should be.
func openRegular(path string, least, most int64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && (!fi.Mode().IsRegular() || fi.Size() < least || fi.Size() > most) {
		err = fmt.Errorf("%s is no regular file of %d to %d bytes (%s, %d)", filepath.Base(path), least, most, fi.Mode(), fi.Size())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
