package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// maxState bounds the device state: it has about 64 KiB, and if RAM slipped
// into it that should be noticed.
const maxState = 64 << 20

// cancelTime bounds the orderly end of a migration whose caller gave up.
const cancelTime = 10 * time.Second

// stateFD names the descriptor of the state within QEMU's monitor.
const stateFD = "wrenn-state"

type args map[string]any

// prepareMigration sets what both sides need: RAM stays where it is
// (x-ignore-shared), the end is told by events, nothing is slowed down, and
// the guest's network does not announce itself, since the address is new to
// nobody.
func prepareMigration(ctx context.Context, c *qmpClient) error {
	on := func(name string) args { return args{"capability": name, "state": true} }
	if err := c.execute(ctx, "migrate-set-capabilities",
		args{"capabilities": []args{on("x-ignore-shared"), on("events")}}, nil); err != nil {
		return err
	}
	return c.execute(ctx, "migrate-set-parameters",
		args{"max-bandwidth": int64(1) << 40, "announce-rounds": 0}, nil)
}

// migrationEnd reads a MIGRATION event; done is false for the states between.
func migrationEnd(e qmpEvent) (status string, done bool) {
	if e.Name != "MIGRATION" {
		return "", false
	}
	var d struct{ Status string }
	_ = json.Unmarshal(e.Data, &d)
	switch d.Status {
	case "completed", "failed", "cancelled":
		return d.Status, true
	}
	return d.Status, false
}

func expectEnd(c *qmpClient) (<-chan qmpEvent, func()) {
	return c.expect(func(e qmpEvent) bool { _, done := migrationEnd(e); return done })
}

// why is QEMU's own account of a failed migration.
func why(ctx context.Context, c *qmpClient, status string) error {
	var q struct {
		Desc string `json:"error-desc"`
	}
	if err := c.execute(ctx, "query-migrate", nil, &q); err == nil && q.Desc != "" {
		return fmt.Errorf("QEMU: migration %s: %s", status, q.Desc)
	}
	return fmt.Errorf("QEMU: migration %s", status)
}

// SaveState implements vmm.Machine.
func (m *machine) SaveState(ctx context.Context, w io.Writer) error {
	return m.run(ctx, "saving the state of", func(c *qmpClient) error {
		if err := c.execute(ctx, "stop", nil, nil); err != nil {
			return err
		}
		return save(ctx, c, w)
	})
}

func save(ctx context.Context, c *qmpClient, w io.Writer) error {
	if err := prepareMigration(ctx, c); err != nil {
		return err
	}
	r, pw, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("making a pipe: %w", err)
	}
	defer r.Close()
	err = c.execute(ctx, "getfd", args{"fdname": stateFD}, nil, pw)
	pw.Close()
	if err != nil {
		return err
	}
	ended, forget := expectEnd(c)
	defer forget()
	copied := make(chan error, 1)
	go func() { copied <- copyState(w, r) }()
	if err := c.execute(ctx, "migrate", args{"uri": "fd:" + stateFD}, nil); err != nil {
		abort(ctx, c, ended)
		r.Close()
		<-copied
		return err
	}
	var end string
	select {
	case e := <-ended:
		end, _ = migrationEnd(e)
	case <-c.done:
		err = c.err
	case <-ctx.Done():
		err = ctx.Err()
		abort(ctx, c, ended)
	}
	if err != nil {
		r.Close()
		<-copied
		return err
	}
	cerr := <-copied // QEMU closes its end right after the event
	if cerr != nil {
		return fmt.Errorf("writing the state: %w", cerr)
	}
	if end != "completed" {
		return why(ctx, c, end)
	}
	return nil
}

// copyState ends when QEMU closes the pipe, and closes it itself on an error,
// which QEMU takes for the end of the other side.
func copyState(w io.Writer, r *os.File) error {
	n, err := io.Copy(w, io.LimitReader(r, maxState+1))
	if err == nil && n > maxState {
		err = fmt.Errorf("more than %d bytes", maxState)
	}
	if err == nil && n == 0 {
		err = errors.New("it is empty")
	}
	r.Close()
	return err
}

// abort gives up a migration, begun or not, so that the machine can continue.
// The caller's context may be over.
func abort(ctx context.Context, c *qmpClient, ended <-chan qmpEvent) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer cancel()
	var q struct{ Status string }
	if c.execute(ctx, "query-migrate", nil, &q) != nil {
		return
	}
	_ = c.execute(ctx, "closefd", args{"fdname": stateFD}, nil) // gone if migrate took it
	switch q.Status {
	case "", "none", "completed", "failed", "cancelled":
		return
	}
	if c.execute(ctx, "migrate_cancel", nil, nil) != nil {
		return
	}
	select {
	case <-ended:
	case <-c.done:
	case <-ctx.Done():
	}
}

// Restore implements vmm.Driver.
func (d *Driver) Restore(ctx context.Context, a vmm.RestoreArgs) (vmm.Machine, error) {
	fail := func(err error) (vmm.Machine, error) {
		return nil, fmt.Errorf("restoring sandbox %s: %w", a.ID, err)
	}
	if err := errors.Join(a.Validate(), a.NeedMemory()); err != nil {
		return fail(err)
	}
	info, binary, err := d.ready(ctx)
	if err != nil {
		return fail(err)
	}
	if err := info.Fits(a.State.Info); err != nil {
		return fail(err)
	}
	l := newLaunch(d.o, info, binary, a.HostArgs, a.State.Spec)
	l.args = append(l.args, "-S", "-incoming", "defer")
	m, err := l.start(ctx)
	if err != nil {
		return fail(err)
	}
	if err := m.load(ctx, a); err != nil {
		return fail(m.abandon(err))
	}
	return m, nil
}

// load attaches the pager and reads the state. QEMU ends itself when a state
// does not suit it; the reason is then on its standard error.
func (m *machine) load(ctx context.Context, a vmm.RestoreArgs) error {
	if a.Attach != nil {
		if err := a.Attach(ctx, m.rec.PID); err != nil {
			return fmt.Errorf("attaching memory: %w", err)
		}
	}
	f, err := os.Open(a.State.File)
	if err != nil {
		return fmt.Errorf("opening the state: %w", err)
	}
	defer f.Close()
	return m.run(ctx, "loading the state of", func(c *qmpClient) error {
		if err := prepareMigration(ctx, c); err != nil {
			return err
		}
		if err := c.execute(ctx, "getfd", args{"fdname": stateFD}, nil, f); err != nil {
			return err
		}
		ended, forget := expectEnd(c)
		defer forget()
		if err := c.execute(ctx, "migrate-incoming", args{"uri": "fd:" + stateFD}, nil); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, qmpFallback)
		defer cancel()
		select {
		case e := <-ended:
			if end, _ := migrationEnd(e); end != "completed" {
				return why(ctx, c, end)
			}
		case <-c.done:
			return c.err
		case <-ctx.Done():
			return ctx.Err()
		}
		return status(ctx, c, "paused", "prelaunch")
	})
}
