package control_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// death lets a number of changes happen, to the database
// and to the host, and then nothing more, for ever, as for a process that was
// killed there.
type death struct {
	mu    sync.Mutex // one change at a time: none is under way when it dies
	at, n atomic.Int64
	here  chan struct{}
	never chan struct{}
}

func newDeath(at int64) *death {
	d := &death{here: make(chan struct{}), never: make(chan struct{})}
	d.at.Store(at)
	return d
}

// change does one change, or dies right after it.
func (d *death) change(f func() error) error {
	d.mu.Lock()
	if d.n.Load() >= d.at.Load() {
		<-d.never
	}
	err := f()
	if d.n.Add(1) == d.at.Load() {
		close(d.here)
		<-d.never // the others wait for ever, too
	}
	d.mu.Unlock()
	return err
}

type dyingStore struct {
	control.Store
	d *death
}

func (s dyingStore) CreateSandbox(ctx context.Context, sb control.Sandbox) error {
	return s.d.change(func() error { return s.Store.CreateSandbox(ctx, sb) })
}
func (s dyingStore) UpdateSandbox(ctx context.Context, sb control.Sandbox) error {
	return s.d.change(func() error { return s.Store.UpdateSandbox(ctx, sb) })
}
func (s dyingStore) DeleteSandbox(ctx context.Context, id string, v int64) error {
	return s.d.change(func() error { return s.Store.DeleteSandbox(ctx, id, v) })
}
func (s dyingStore) AddEvent(ctx context.Context, e control.Event) error {
	return s.d.change(func() error { return s.Store.AddEvent(ctx, e) })
}
func (s dyingStore) PutTemplate(ctx context.Context, t control.Template) error {
	return s.d.change(func() error { return s.Store.PutTemplate(ctx, t) })
}

func (s dyingStore) CreateTemplate(ctx context.Context, t control.Template) error {
	return s.d.change(func() error { return s.Store.CreateTemplate(ctx, t) })
}
func (s dyingStore) DeleteTemplate(ctx context.Context, name string) error {
	return s.d.change(func() error { return s.Store.DeleteTemplate(ctx, name) })
}

type dyingHost struct {
	control.Host
	d *death
}

func (h dyingHost) CreateSandbox(ctx context.Context, r control.HostCreate) (sb control.HostSandbox, err error) {
	return sb, h.d.change(func() error { sb, err = h.Host.CreateSandbox(ctx, r); return err })
}
func (h dyingHost) DestroySandbox(ctx context.Context, id string) error {
	return h.d.change(func() error { return h.Host.DestroySandbox(ctx, id) })
}
func (h dyingHost) PauseSandbox(ctx context.Context, id string) (sb control.HostSandbox, err error) {
	return sb, h.d.change(func() error { sb, err = h.Host.PauseSandbox(ctx, id); return err })
}
func (h dyingHost) ResumeSandbox(ctx context.Context, id string, reboot bool) (sb control.HostSandbox, err error) {
	return sb, h.d.change(func() error { sb, err = h.Host.ResumeSandbox(ctx, id, reboot); return err })
}
func (h dyingHost) CreateSnapshot(ctx context.Context, id, name string, replace bool) (t control.Template, err error) {
	return t, h.d.change(func() error { t, err = h.Host.CreateSnapshot(ctx, id, name, replace); return err })
}
func (h dyingHost) DeleteSnapshot(ctx context.Context, name string) error {
	return h.d.change(func() error { return h.Host.DeleteSnapshot(ctx, name) })
}

// TestACrashAfterEveryChangeIsSettled kills the control plane after each change
// that an operation makes to the database or to the host, until the operation
// comes through. The next control plane brings the two in line: every row is at
// rest in the state that the host has, nothing is without a row, and nothing
// that only the operation needed is left.
func TestACrashAfterEveryChangeIsSettled(t *testing.T) {
	t.Parallel()
	type fx = fixture
	sb := func(t *testing.T, f *fx) string { return f.create(t, control.CreateParams{}).ID }
	paused := func(t *testing.T, f *fx) string {
		id := sb(t, f)
		if _, err := f.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		return id
	}
	snapped := func(t *testing.T, f *fx) string {
		id := sb(t, f)
		if _, err := f.CreateSnapshot(t.Context(), id, "old"); err != nil {
			t.Fatal(err)
		}
		return id
	}
	ctx := context.Background()
	for name, c := range map[string]struct {
		before func(*testing.T, *fx) string
		do     func(s *control.Service, id string) error
		least  int64 // changes that it makes at the least
	}{
		"create": {func(*testing.T, *fx) string { return "" }, func(s *control.Service, _ string) error {
			_, err := s.Create(ctx, control.CreateParams{Template: "base"})
			return err
		}, 3},
		"pause":  {sb, func(s *control.Service, id string) error { _, err := s.Pause(ctx, id); return err }, 3},
		"resume": {paused, func(s *control.Service, id string) error { _, err := s.Resume(ctx, id); return err }, 3},
		"delete": {sb, func(s *control.Service, id string) error { return s.Delete(ctx, id) }, 3},
		"snapshot": {sb, func(s *control.Service, id string) error {
			_, err := s.CreateSnapshot(ctx, id, "new")
			return err
		}, 2},
		"replace snapshot": {snapped, func(s *control.Service, id string) error {
			_, err := s.ReplaceSnapshot(ctx, id, "old")
			return err
		}, 2},
		"delete snapshot": {snapped, func(s *control.Service, _ string) error { return s.DeleteSnapshot(ctx, "old") }, 2},
		"fork":            {sb, func(s *control.Service, id string) error { _, err := s.Fork(ctx, id, 2); return err }, 8},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := int64(1); ; n++ {
				f := setup(t)
				id := c.before(t, f)
				d := newDeath(n)
				doomed := f.dying(t, d)
				ended := make(chan error, 1)
				go func() { ended <- c.do(doomed, id) }()
				select {
				case <-d.here:
				case err := <-ended:
					if err != nil {
						t.Errorf("undisturbed: %v", err)
					}
					if n <= c.least {
						t.Errorf("it made %d changes, want at least %d", n-1, c.least)
					}
					return
				case <-time.After(time.Minute):
					t.Fatalf("the change %d does not come", n)
				}
				f.Service = f.again(t)
				f.inLine(t, fmt.Sprintf("killed after change %d", n))
				if t.Failed() {
					return
				}
			}
		})
	}
}

// dying is a service on the fixture's database and host that dies with d.
func (f *fixture) dying(t *testing.T, d *death) *control.Service {
	s := control.New(control.Options{
		Store: dyingStore{f.store, d}, Host: dyingHost{f.host, d}, Clock: f.clock,
	})
	t.Cleanup(func() { d.at.Store(0) }) // whatever is left of it does nothing
	return s
}

// inLine reconciles until nothing moves and compares the database with the host.
func (f *fixture) inLine(t *testing.T, when string) {
	t.Helper()
	for i := 0; ; i++ {
		again, err := f.Reconcile(t.Context())
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if !again {
			break
		}
		if i > 100 {
			t.Fatalf("%s: it does not come to rest", when)
		}
	}
	rows, err := f.store.ListSandboxes(t.Context(), control.SandboxFilter{})
	if err != nil {
		t.Fatal(err)
	}
	onHost := f.host.IDs()
	for _, r := range rows {
		state, known := f.host.Has(r.ID)
		want, rests := map[control.Status]control.HostState{control.StatusRunning: control.HostRunning, control.StatusPaused: control.HostPaused}[r.Status]
		if !known || !rests || state != want {
			t.Errorf("%s: %s is %s (%s); the host has it: %v, as %v", when, r.ID, r.Status, r.Error, known, state)
		}
		onHost = slices.DeleteFunc(onHost, func(id string) bool { return id == r.ID })
	}
	if len(onHost) > 0 {
		t.Errorf("%s: the host has %v, of which there is no row", when, onHost)
	}
	var named, have []string
	list, err := f.store.ListTemplates(t.Context(), control.TemplateFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range list {
		named = append(named, l.Name)
	}
	host, err := f.host.ListSnapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range host {
		have = append(have, h.Name)
		if len(h.Name) > 20 {
			t.Errorf("%s: a fork's snapshot is left: %s", when, h.Name)
		}
	}
	slices.Sort(named)
	slices.Sort(have)
	if !slices.Equal(named, have) {
		t.Errorf("%s: templates %v, the host has %v", when, named, have)
	}
}

// TestATimeLimitOutlivesACrashAfterEveryChange: a limit that acts while the
// control plane is killed is acted on by the next one.
func TestATimeLimitOutlivesACrashAfterEveryChange(t *testing.T) {
	t.Parallel()
	for name, pauses := range map[string]bool{"delete": false, "pause": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := int64(1); n <= 3; n++ { // intent, host, outcome
				f := setup(t)
				sb := f.create(t, control.CreateParams{TimeoutSec: 100, AutoPause: pauses})
				if _, err := f.Reconcile(t.Context()); err != nil {
					t.Fatal(err)
				}
				d := newDeath(n)
				doomed := f.dying(t, d)
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				go func() { _ = doomed.Run(ctx) }()
				f.clock.WaitTimer(100 * time.Second)
				f.clock.Advance(100 * time.Second)
				select {
				case <-d.here:
				case <-time.After(time.Minute):
					t.Fatalf("the change %d does not come", n)
				}
				f.Service = f.again(t)
				f.run(t)
				want := control.StatusStopped
				if pauses {
					want = control.StatusPaused
				}
				await(t, fmt.Sprintf("after a crash in change %d it is %s", n, want), func() bool {
					f.clock.Advance(time.Second) // for a look that is put off
					s, err := f.store.GetSandbox(t.Context(), sb.ID)
					return err == nil && s.Status == want
				})
			}
		})
	}
}
