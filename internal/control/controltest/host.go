// Package controltest has what tests of the control plane and its wire forms
// stand on: a Host without machines and a clock that only moves when told.
//
// Imported by tests only.
package controltest

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// Host is a control.Host in memory. Its states and errors are those of a real
// one: a call in the wrong state is invalid_state, two operations on one
// sandbox at once are a fault of the caller that Overlaps counts.
type Host struct {
	mu        sync.Mutex
	sandboxes map[string]*sandbox
	snapshots map[string]control.Template
	watchers  map[chan control.HostEvent]bool
	fail      map[string]error
	hold      map[string]chan struct{}
	calls     map[string]int
	spare     map[string]int // calls that do not fail yet
	overlaps  int
	down      bool
	dial      func(id string, port int) (net.Conn, error)
	garbage   control.Garbage
}

type sandbox struct {
	control.HostSandbox
	busy bool
	// saved: there is a pause of it, which a resume of one in error goes back to.
	saved bool
	// rebooted: the present run began from the disk alone.
	rebooted bool
	egress   *control.Egress
	files    map[string][]byte
	modes    map[string]uint32
	// over is closed when the present run ends.
	over chan struct{}
}

var _ control.Host = (*Host)(nil)

// NewHost makes a host with the base template "base".
func NewHost() *Host {
	return &Host{
		sandboxes: map[string]*sandbox{},
		snapshots: map[string]control.Template{
			"base": {Name: "base", Type: control.TemplateBase, SizeBytes: 1 << 30, CreatedAt: time.Unix(1, 0)},
		},
		watchers: map[chan control.HostEvent]bool{},
		fail:     map[string]error{}, hold: map[string]chan struct{}{}, calls: map[string]int{}, spare: map[string]int{},
	}
}

// Fail makes the next calls of op ("create", "pause", "resume", "destroy",
// "snapshot", "exec", "list" …) return err before they do anything; nil ends it.
func (h *Host) Fail(op string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail[op], h.spare[op] = err, 0
}

// FailLater is Fail for the calls after the next n.
func (h *Host) FailLater(op string, n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail[op], h.spare[op] = err, n
}

// Hold makes calls of op wait, after they were counted, until the returned
// function is called. Waiting does not end with the caller's context.
func (h *Host) Hold(op string) (release func()) {
	c := make(chan struct{})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hold[op] = c
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.hold[op] == c {
			delete(h.hold, op)
		}
		close(c)
	}
}

// Calls counts the calls of op.
func (h *Host) Calls(op string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls[op]
}

// Overlaps counts operations that began on a sandbox with one under way.
func (h *Host) Overlaps() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.overlaps
}

// SetDown makes every call fail as if nobody listened.
func (h *Host) SetDown(down bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.down = down
	if down {
		for w := range h.watchers {
			close(w)
			delete(h.watchers, w)
		}
	}
}

// Put places a sandbox as if it had been there before.
func (h *Host) Put(s control.HostSandbox) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sandboxes[s.ID] = &sandbox{HostSandbox: s, files: map[string][]byte{}, modes: map[string]uint32{}, over: make(chan struct{})}
}

// Forget loses a sandbox without a word.
func (h *Host) Forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.sandboxes, id)
}

// Crash ends a sandbox's machine by itself and reports it.
func (h *Host) Crash(id, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sandboxes[id]
	if s.State == control.HostRunning {
		close(s.over)
	}
	s.State, s.Error = control.HostError, reason
	h.report(control.HostEvent{Sandbox: s.HostSandbox})
}

// SetWaiting has a sandbox stand still for a reason, or go on, and reports it.
func (h *Host) SetWaiting(id, why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sandboxes[id]
	s.Waiting = why
	h.report(control.HostEvent{Sandbox: s.HostSandbox})
}

// Has tells a sandbox's state.
func (h *Host) Has(id string) (control.HostState, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.sandboxes[id]
	if !ok {
		return 0, false
	}
	return s.State, true
}

// IDs lists the sandboxes.
func (h *Host) IDs() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.sandboxes))
}

func (h *Host) report(e control.HostEvent) {
	for w := range h.watchers {
		select {
		case w <- e:
		default: // A watcher that is behind hears enough to look.
		}
	}
}

// Err makes the error of a host.
func Err(code control.Code, format string, a ...any) *control.Error {
	return &control.Error{Code: code, Message: fmt.Sprintf(format, a...)}
}

// enter counts a call and applies Fail, Hold and SetDown.
func (h *Host) enter(op string) error {
	h.mu.Lock()
	h.calls[op]++
	hold, err, down := h.hold[op], h.fail[op], h.down
	if h.spare[op] > 0 {
		h.spare[op]--
		err = nil
	}
	h.mu.Unlock()
	if down {
		return Err(control.CodeHostUnavailable, "the host agent does not answer")
	}
	if hold != nil {
		<-hold
	}
	return err
}

// begin marks a sandbox as worked on; end unmarks it.
func (h *Host) begin(id string) (s *sandbox, end func(), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s = h.sandboxes[id]
	if s == nil {
		return nil, nil, Err(control.CodeNotFound, "no sandbox %s", id)
	}
	if s.busy {
		h.overlaps++
		return nil, nil, Err(control.CodeInvalidState, "sandbox %s is busy", id)
	}
	s.busy = true
	return s, func() { h.mu.Lock(); s.busy = false; h.mu.Unlock() }, nil
}

// Info implements control.Host.
func (h *Host) Info(context.Context) (control.HostInfo, error) {
	return control.HostInfo{Driver: "fake", Accelerator: "tcg", MemoryTotalMB: 4096, MemoryFreeMB: 2048, CPUs: 2}, h.enter("info")
}

// CreateSandbox implements control.Host.
func (h *Host) CreateSandbox(_ context.Context, r control.HostCreate) (control.HostSandbox, error) {
	if err := h.enter("create"); err != nil {
		return control.HostSandbox{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sandboxes[r.ID] != nil {
		return control.HostSandbox{}, Err(control.CodeConflict, "sandbox %s exists", r.ID)
	}
	if _, ok := h.snapshots[r.Template]; !ok {
		return control.HostSandbox{}, Err(control.CodeNotFound, "no template %s", r.Template)
	}
	now := time.Now()
	s := &sandbox{
		HostSandbox: control.HostSandbox{
			ID: r.ID, State: control.HostRunning, Template: r.Template, VCPUs: r.VCPUs, MemoryMB: r.MemoryMB,
			CreatedAt: now, StartedAt: now, Annotations: r.Annotations,
		},
		files: map[string][]byte{}, modes: map[string]uint32{}, over: make(chan struct{}), egress: r.Egress,
	}
	h.sandboxes[r.ID] = s
	return s.HostSandbox, nil
}

// DestroySandbox implements control.Host.
func (h *Host) DestroySandbox(_ context.Context, id string) error {
	if err := h.enter("destroy"); err != nil {
		return err
	}
	s, end, err := h.begin(id)
	if err != nil {
		return err
	}
	defer end()
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.State == control.HostRunning {
		close(s.over)
	}
	delete(h.sandboxes, id)
	return nil
}

// PauseSandbox implements control.Host.
func (h *Host) PauseSandbox(_ context.Context, id string) (control.HostSandbox, error) {
	return h.move(id, "pause", control.HostRunning, control.HostPaused, func(s *sandbox) {
		close(s.over)
		s.saved = true
	})
}

// ResumeSandbox implements control.Host.
func (h *Host) ResumeSandbox(_ context.Context, id string, reboot bool) (control.HostSandbox, error) {
	return h.move(id, "resume", control.HostPaused, control.HostRunning, func(s *sandbox) {
		s.over, s.Error = make(chan struct{}), ""
		s.StartedAt = time.Now()
		s.rebooted = reboot
	})
}

func (h *Host) move(id, op string, from, to control.HostState, change func(*sandbox)) (control.HostSandbox, error) {
	s, end, err := h.begin(id)
	if err != nil {
		return control.HostSandbox{}, err
	}
	defer end()
	if err := h.enter(op); err != nil {
		return control.HostSandbox{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	backToPause := op == "resume" && s.State == control.HostError && s.saved
	if s.State != from && !backToPause {
		return control.HostSandbox{}, Err(control.CodeInvalidState, "sandbox %s cannot %s", id, op)
	}
	change(s)
	s.State = to
	return s.HostSandbox, nil
}

// ListSandboxes implements control.Host.
func (h *Host) ListSandboxes(context.Context) ([]control.HostSandbox, error) {
	if err := h.enter("list"); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []control.HostSandbox
	for _, s := range h.sandboxes {
		out = append(out, s.HostSandbox)
	}
	return out, nil
}

// WatchSandboxes implements control.Host.
func (h *Host) WatchSandboxes(ctx context.Context, changed func(control.HostEvent)) error {
	if err := h.enter("watch"); err != nil {
		return err
	}
	c := make(chan control.HostEvent, 64)
	h.mu.Lock()
	h.watchers[c] = true
	var now []control.HostEvent
	for _, s := range h.sandboxes {
		now = append(now, control.HostEvent{Sandbox: s.HostSandbox})
	}
	h.mu.Unlock()
	defer func() { h.mu.Lock(); delete(h.watchers, c); h.mu.Unlock() }()
	for _, e := range now {
		changed(e)
	}
	changed(control.HostEvent{Synced: true})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-c:
			if !ok {
				return Err(control.CodeHostUnavailable, "the host agent ended the watch")
			}
			changed(e)
		}
	}
}

// CreateSnapshot implements control.Host.
func (h *Host) CreateSnapshot(_ context.Context, id, name string, replace bool) (control.Template, error) {
	s, end, err := h.begin(id)
	if err != nil {
		return control.Template{}, err
	}
	defer end()
	if err := h.enter("snapshot"); err != nil {
		return control.Template{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.snapshots[name]; ok && !replace {
		return control.Template{}, Err(control.CodeConflict, "name: %s is taken", name)
	}
	t := control.Template{
		Name: name, Type: control.TemplateSnapshot, VCPUs: s.VCPUs, MemoryMB: s.MemoryMB,
		SizeBytes: 4096, Generation: 1, Parent: s.Template, CreatedAt: time.Now(), SourceID: s.ID,
	}
	h.snapshots[name] = t
	return t, nil
}

// DeleteSnapshot implements control.Host.
func (h *Host) DeleteSnapshot(_ context.Context, name string) error {
	if err := h.enter("delete_snapshot"); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.snapshots[name]; !ok {
		return Err(control.CodeNotFound, "no snapshot %s", name)
	}
	delete(h.snapshots, name)
	return nil
}

// ListSnapshots implements control.Host.
func (h *Host) ListSnapshots(context.Context) ([]control.Template, error) {
	if err := h.enter("list_snapshots"); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Values(h.snapshots)), nil
}

// Metrics implements control.Host.
func (h *Host) Metrics(_ context.Context, id string) (control.Metrics, error) {
	if err := h.enter("metrics"); err != nil {
		return control.Metrics{}, err
	}
	if _, err := h.live(id); err != nil {
		return control.Metrics{}, err
	}
	return control.Metrics{At: time.Now(), CPUCount: 1, MemTotal: 1 << 29, PrivateMemory: 1 << 20, Faults: 7}, nil
}

// live finds a sandbox that runs.
func (h *Host) live(id string) (*sandbox, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sandboxes[id]
	if s == nil {
		return nil, Err(control.CodeNotFound, "no sandbox %s", id)
	}
	if s.State != control.HostRunning {
		return nil, Err(control.CodeInvalidState, "sandbox %s does not run", id)
	}
	return s, nil
}
