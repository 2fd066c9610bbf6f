package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// killLimit bounds the wait for a killed process.
const killLimit = 10 * time.Second

// endLimit is how long after its connection broke a process may take to end.
const endLimit = 2 * time.Second

// tailBytes of each log go into an ExitError.
const tailBytes = 8 << 10

// machine implements vmm.Machine and vmm.MemorySaver.
type machine struct {
	rec   vmm.Record
	proc  *vmm.Process
	api   *api
	pumps []*console // the guest's console and Firecracker's log
	log   *slog.Logger

	turn chan struct{} // token of whoever talks to Firecracker

	mu      sync.Mutex
	killed  bool
	exit    *vmm.ExitError
	closed  bool
	closing chan struct{}
	done    chan struct{}
}

var _ vmm.MemorySaver = (*machine)(nil)

func newMachine(r vmm.Record, p *vmm.Process, pumps []*console, o Options) *machine {
	m := &machine{
		rec: r, proc: p, api: newAPI(r.Control, r.PID, o.limits()), pumps: pumps, log: o.Logger.With("sandbox", r.ID, "pid", r.PID),
		turn: make(chan struct{}, 1), closing: make(chan struct{}), done: make(chan struct{}),
	}
	for _, c := range pumps {
		go c.run()
	}
	go m.watch()
	return m
}

func (m *machine) PID() int              { return m.rec.PID }
func (m *machine) Record() vmm.Record    { return m.rec }
func (m *machine) MemoryFD() int         { return -1 }
func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.exit == nil {
		return nil
	}
	return m.exit
}

// watch ends with the process or the handle.
func (m *machine) watch() {
	select {
	case <-m.proc.Done():
	case <-m.closing:
		return
	}
	for _, c := range m.pumps {
		c.drain()
	}
	m.api.close()
	removeCgroup(m.jailID())
	m.removeRoot()
	e := &vmm.ExitError{
		ID: m.rec.ID, Status: m.proc.Status(), At: time.Now(),
		Stderr:  vmm.Tail(m.rec.StderrPath, tailBytes),
		Console: vmm.Tail(m.rec.ConsolePath, tailBytes),
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e.Reason = reason(m.killed, e.Status, e.Console)
	m.exit = e
	m.proc.Close()
	close(m.done)
}

// reason: an orderly end is always the guest's restart to Firecracker; only the
// console tells why it restarted.
func reason(killed bool, status, console string) vmm.Reason {
	switch {
	case killed:
		return vmm.ReasonKilled
	case status != "exit status 0" && status != "":
		return vmm.ReasonProcess
	case strings.Contains(console, "Kernel panic - not syncing"):
		return vmm.ReasonPanic
	case status == "":
		return vmm.ReasonProcess
	}
	return vmm.ReasonReset
}

// openPumps opens what carries the guest's console and Firecracker's log.
func openPumps(dir, root, consolePath, logPath string) ([]*console, error) {
	con, err := openConsole(filepath.Join(dir, fifoName), consolePath)
	if err != nil {
		return nil, err
	}
	log, err := openConsole(filepath.Join(root, logFifoName), logPath)
	if err != nil {
		con.abort()
		return nil, err
	}
	return []*console{con, log}, nil
}

// run gives f the turn. what names the call in its error: "pausing".
func (m *machine) run(ctx context.Context, what string, f func() error) error {
	wrap := func(err error) error { return fmt.Errorf("%s sandbox %s: %w", what, m.rec.ID, err) }
	select {
	case <-m.done:
		return wrap(m.Err())
	default:
	}
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-m.done:
		return wrap(m.Err())
	case <-ctx.Done():
		return wrap(ctx.Err())
	}
	if m.isClosed() {
		return wrap(vmm.ErrClosed)
	}
	err := f()
	if err == nil {
		return nil
	}
	if m.isClosed() {
		return wrap(vmm.ErrClosed)
	}
	if !m.endedBy(err) {
		return wrap(err)
	}
	<-m.done
	return wrap(fmt.Errorf("%w: %w", err, m.Err()))
}

// endedBy tells whether the process has ended. A connection that broke is most
// likely its end, of which the kernel tells a moment later.
func (m *machine) endedBy(err error) bool {
	if errors.Is(err, errBroken) {
		late := time.NewTimer(endLimit)
		defer late.Stop()
		select {
		case <-m.proc.Done():
		case <-late.C:
		}
	}
	select {
	case <-m.proc.Done():
		return true
	default:
		return false
	}
}

func (m *machine) isClosed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closed
}

func (m *machine) Pause(ctx context.Context) error {
	return m.run(ctx, "pausing", func() error { return m.api.become(ctx, statePaused) })
}

func (m *machine) Continue(ctx context.Context) error {
	return m.run(ctx, "continuing", func() error { return m.api.become(ctx, stateRunning) })
}

// SaveState implements vmm.Machine: see MemorySaver.
func (m *machine) SaveState(ctx context.Context, _ io.Writer) error {
	return m.run(ctx, "saving the state of", func() error { return vmm.ErrTogether })
}

// Save implements vmm.MemorySaver.
func (m *machine) Save(ctx context.Context, w io.Writer, whole bool) (memory *os.File, err error) {
	err = m.run(ctx, "saving", func() error {
		if err := m.api.become(ctx, statePaused); err != nil {
			return err
		}
		memory, err = m.save(ctx, w, whole)
		return err
	})
	return memory, err
}

func (m *machine) save(ctx context.Context, w io.Writer, whole bool) (_ *os.File, err error) {
	const stateName, memoryName = "state.new", "memory.new"
	root, inside := m.root()
	for _, n := range []string{stateName, memoryName} {
		if err := os.Remove(filepath.Join(root, n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("removing what an earlier save left: %w", err)
		}
		defer os.Remove(filepath.Join(root, n))
	}
	kind := "Diff"
	if whole {
		kind = "Full"
	}
	if err := m.api.save(ctx, kind, filepath.Join(inside, stateName), filepath.Join(inside, memoryName)); err != nil {
		return nil, err
	}
	state, err := openRegular(filepath.Join(root, stateName), 1, maxState)
	if err != nil {
		return nil, fmt.Errorf("the device state: %w", err)
	}
	defer state.Close()
	if _, err := io.Copy(w, state); err != nil {
		return nil, fmt.Errorf("writing the device state: %w", err)
	}
	memory, err := openRegular(filepath.Join(root, memoryName), m.rec.Spec.MemoryBytes(), m.rec.Spec.MemoryBytes())
	if err != nil {
		return nil, fmt.Errorf("the memory: %w", err)
	}
	return memory, nil
}

// maxState bounds the device state: it has some 16 KiB.
const maxState = 16 << 20

func (m *machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return fmt.Errorf("killing sandbox %s: %w", m.rec.ID, vmm.ErrClosed)
	}
	m.killed = m.killed || m.exit == nil
	m.mu.Unlock()
	if err := m.proc.Kill(ctx); err != nil {
		return fmt.Errorf("killing sandbox %s: %w", m.rec.ID, err)
	}
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("killing sandbox %s: %w", m.rec.ID, ctx.Err())
	}
}

func (m *machine) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.closed = true
	close(m.closing)
	for _, c := range m.pumps {
		c.stop()
	}
	m.proc.Close()
	m.api.close()
}

// abandon ends a machine that was not handed out, because of err, and returns
// err with what Firecracker said.
func (m *machine) abandon(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	kerr := m.Kill(ctx)
	said := vmm.Tail(m.rec.StderrPath, tailBytes)
	m.Close()
	if said != "" && !errors.Is(err, vmm.ErrGone) {
		err = fmt.Errorf("%w; firecracker said: %s", err, said)
	}
	return errors.Join(err, kerr)
}
