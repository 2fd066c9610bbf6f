package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// lastWords bounds the wait for QEMU's events after its death, or for its
// death after its connection broke.
const lastWords = 2 * time.Second

// tailBytes of each log go into an ExitError: a panic with its call trace
// has about 4 KiB.
const tailBytes = 8 << 10

// machine implements vmm.Machine.
type machine struct {
	rec  vmm.Record
	proc *vmm.Process
	log  *slog.Logger

	turn chan struct{} // token of whoever talks to QEMU
	qmp  *qmpClient    // guarded by turn; replaced when its connection broke

	mu       sync.Mutex
	current  *qmpClient // the same, for those without the turn
	killed   bool
	shutdown string // reason of the SHUTDOWN event
	exit     *vmm.ExitError
	closed   bool
	closing  chan struct{}
	done     chan struct{}
}

func newMachine(r vmm.Record, p *vmm.Process, log *slog.Logger) *machine {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m := &machine{
		rec: r, proc: p, log: log.With("sandbox", r.ID, "pid", r.PID),
		turn: make(chan struct{}, 1), closing: make(chan struct{}), done: make(chan struct{}),
	}
	go m.watch()
	return m
}

func (m *machine) PID() int              { return m.rec.PID }
func (m *machine) Record() vmm.Record    { return m.rec }
func (m *machine) MemoryFD() int         { return m.rec.MemoryFD }
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
	m.mu.Lock()
	c := m.current
	m.mu.Unlock()
	if c != nil { // what QEMU said last may still be in the socket
		select {
		case <-c.done:
		case <-time.After(lastWords):
		}
	}
	e := &vmm.ExitError{
		ID: m.rec.ID, Status: m.proc.Status(), At: time.Now(),
		Stderr:  vmm.Tail(m.rec.StderrPath, tailBytes),
		Console: vmm.Tail(m.rec.ConsolePath, tailBytes),
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e.Reason = reason(m.killed, m.shutdown, e.Console)
	m.exit = e
	m.proc.Close()
	close(m.done)
}

// reason reads QEMU's ShutdownCause. A panic arrives as a reset, because the
// kernel command line says panic=-1; only the console tells them apart.
func reason(killed bool, shutdown, console string) vmm.Reason {
	switch {
	case killed:
		return vmm.ReasonKilled
	case shutdown == "guest-panic",
		strings.HasPrefix(shutdown, "guest-") && strings.Contains(console, "Kernel panic - not syncing"):
		return vmm.ReasonPanic
	case shutdown == "guest-shutdown":
		return vmm.ReasonShutdown
	case shutdown == "guest-reset":
		return vmm.ReasonReset
	}
	return vmm.ReasonProcess
}

// event runs in the reader of the control connection.
func (m *machine) event(e qmpEvent) {
	switch e.Name {
	case "SHUTDOWN":
		var d struct{ Reason string }
		_ = json.Unmarshal(e.Data, &d)
		m.mu.Lock()
		m.shutdown = d.Reason
		m.mu.Unlock()
	case "BLOCK_IO_ERROR":
		m.log.Warn("disk error in the guest", "event", string(e.Data))
	}
}

// connect opens the control connection; the caller has the turn, or is the
// only one who knows the machine.
func (m *machine) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, qmpFallback)
	defer cancel()
	addr, done, err := vmm.SockAddr(m.rec.Control)
	if err != nil {
		return err
	}
	defer done()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", addr.Name)
	if err != nil {
		return fmt.Errorf("connecting to QEMU: %w", err)
	}
	c, err := newQMP(ctx, conn.(*net.UnixConn), m.event)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		c.close()
		return vmm.ErrClosed
	}
	m.qmp, m.current = c, c
	return nil
}

// run gives f the turn and a connection that works. what names the call in
// its error: "pausing".
func (m *machine) run(ctx context.Context, what string, f func(*qmpClient) error) error {
	wrap := func(err error) error { return fmt.Errorf("%s sandbox %s: %w", what, m.rec.ID, err) }
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
	var err error
	if m.qmp == nil || !m.qmp.alive() {
		err = m.connect(ctx)
	}
	if err == nil {
		err = f(m.qmp)
	}
	if err == nil {
		return nil
	}
	if m.isClosed() {
		return wrap(vmm.ErrClosed)
	}
	if m.qmp == nil || !m.qmp.alive() { // is it dying?
		select {
		case <-m.done:
			return wrap(fmt.Errorf("%w: %w", err, m.Err()))
		case <-time.After(lastWords):
		case <-ctx.Done():
		}
	}
	return wrap(err)
}

func (m *machine) isClosed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closed
}

func (m *machine) Pause(ctx context.Context) error {
	return m.run(ctx, "pausing", func(c *qmpClient) error { return c.execute(ctx, "stop", nil, nil) })
}

func (m *machine) Continue(ctx context.Context) error {
	return m.run(ctx, "continuing", func(c *qmpClient) error {
		if err := c.execute(ctx, "cont", nil, nil); err != nil {
			return err
		}
		return status(ctx, c, "running")
	})
}

// expectStatus asks QEMU whether it is in one of these states.
func (m *machine) expectStatus(ctx context.Context, want ...string) error {
	return m.run(ctx, "starting", func(c *qmpClient) error { return status(ctx, c, want...) })
}

func status(ctx context.Context, c *qmpClient, want ...string) error {
	var s struct{ Status string }
	if err := c.execute(ctx, "query-status", nil, &s); err != nil {
		return err
	}
	if !slices.Contains(want, s.Status) {
		return fmt.Errorf("QEMU is in state %q, not %q", s.Status, want[0])
	}
	return nil
}

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
	if m.current != nil {
		m.current.close()
	}
	m.proc.Close()
}

// abandon ends a machine that was not handed out, because of err. It returns
// err with what QEMU said on its standard error, which is why it did not
// start.
func (m *machine) abandon(err error) error {
	m.mu.Lock()
	c := m.current
	m.mu.Unlock()
	if c == nil || !c.alive() { // it may be on its way out with a message
		select {
		case <-m.proc.Done():
		case <-time.After(lastWords):
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), qmpFallback)
	defer cancel()
	kerr := m.Kill(ctx)
	said := vmm.Tail(m.rec.StderrPath, tailBytes)
	m.Close()
	if said != "" && !errors.Is(err, vmm.ErrGone) { // an ExitError has it already
		err = fmt.Errorf("%w; QEMU said: %s", err, said)
	}
	return errors.Join(err, kerr)
}
