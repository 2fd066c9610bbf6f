// Package engine runs the life cycle of the sandboxes of one host: boot,
// pause, resume, snapshot, spawn, destroy. It owns every resource that a
// sandbox has (VMM process, network slot, overlay, page-fault service) and is
// the truth for what exists.
//
// The engine composes what it is given (store, VMM driver, network pool, pager
// client, guest client) and knows nothing of who calls it. internal/agent and
// cmd/wrenn may import it.
//
// Invariants:
//   - one operation at a time changes a sandbox; a second is refused;
//   - the journal on disk is ahead of every step that a crash would strand;
//   - a capture becomes real at one point, the commit of its manifest; before
//     it the VM can go on, after it the VM is not needed;
//   - a sandbox is running only when its guest has confirmed its identity;
//   - what an operation acquired is released by one LIFO closer.
package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/localca"
	"git.omukk.dev/wrenn/sandbox/internal/pager"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Kinds of error, for errors.Is. The text of an error that wraps
// ErrInvalid, ErrNotFound, ErrExists, ErrState or ErrNoRoom is meant for the
// user; all others are for the log.
var (
	ErrInvalid  = errors.New("invalid")
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("exists already")
	ErrState    = errors.New("wrong state")
	ErrNoRoom   = errors.New("no room")
)

// State is where a sandbox stands on this host.
type State string

// The states of a sandbox. A sandbox whose VM ended unasked is in Failed.
const (
	Starting State = "starting"
	Running  State = "running"
	Pausing  State = "pausing"
	Paused   State = "paused"
	Resuming State = "resuming"
	Stopping State = "stopping"
	Failed   State = "error"
)

// Network lends network slots.
type Network interface {
	Acquire(ctx context.Context, sandboxID string) (Slot, error)
	Adopt(ctx context.Context, sandboxID string, index int) (Slot, error)
}

// Slot is one sandbox's network. Release gives it back.
type Slot interface {
	Index() int
	OpenTap() (*os.File, error)
	Dial(ctx context.Context, port int) (net.Conn, error)
	// SetEgress says what the guest may reach; nil is the default.
	SetEgress(ctx context.Context, e *Egress) error
	Release(ctx context.Context) error
}

// Options are what an Engine is made of. Logger, Now and AfterStep may be nil.
type Options struct {
	// Dir is the state directory; sandboxes live in Dir/sandboxes.
	Dir     string
	Store   *snapshot.Store
	Driver  vmm.Driver
	Network Network
	Pager   pager.Client
	// Authority certifies hosts to guests whose requests are completed; nil is
	// for tests without any.
	Authority *localca.Authority
	// Disks is needed where the driver keeps memory to itself.
	Disks Disks
	// MemoryLimitMB bounds the RAM, and VCPULimit the virtual CPUs, of all
	// running sandboxes together; 0 is no bound.
	MemoryLimitMB, VCPULimit int
	// MinFreeDisk is the low-water mark: with fewer bytes free below Dir, no
	// sandbox is started and no snapshot made, so that what runs can still be
	// paused. 0 is no bound.
	MinFreeDisk int64
	// DiskFree tells the bytes free below Dir; nil asks the file system.
	DiskFree func() (int64, error)
	// Cmdline is added to the guest kernel's command line.
	Cmdline string
	Logger  *slog.Logger
	Now     func() time.Time
	// RetryAfter is the first pause before what could not be released is tried
	// again; 0 is a second. It grows to a minute.
	RetryAfter time.Duration
	// AfterStep is for tests: it is called when a step has been done, and an
	// error of it makes the step one that fails. Nil in earnest.
	AfterStep func(op Op, step string) error
}

// Engine runs sandboxes.
type Engine struct {
	opts Options
	log  *slog.Logger
	info vmm.Info

	// ctx ends with the engine; it bounds the watches, not the operations.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// storeUse is held for reading by whatever relies on images that no
	// manifest or journal names yet, and for writing by the sweep.
	storeUse  sync.RWMutex
	compactor compactor

	mu        sync.Mutex
	sandboxes map[string]*sandbox
	names     map[string]format.ID // manifests by name, bases included
	reserved  map[string]bool      // names that a capture is about to commit
	bases     map[string]Base
	watchers  map[chan Event]bool
	tidying   map[*sandbox]bool
	starting  map[*sandbox]bool // admitted, and not in the state yet

	clocks chan struct{} // one for each guest that is being told the time beside everything else
}

// Base is a template that boots.
type Base struct {
	Name         string
	Disk         format.ID
	Kernel       string
	Initrd       string
	KernelDigest string
}

// Event says that a sandbox changed on its own or was removed.
type Event struct {
	Sandbox Info
	Removed bool
}

// Info describes a sandbox.
type Info struct {
	ID          string
	State       State
	Template    string
	VCPUs       int
	MemoryMB    int
	Error       string
	CreatedAt   time.Time
	StartedAt   *time.Time
	Generation  uint64
	Annotations []byte
	// Waiting says why it stands still although it runs; else empty.
	Waiting string
}

// Stats are the figures of one operation.
type Stats struct {
	Duration    time.Duration
	MemoryBytes int64
	DiskBytes   int64
	StateBytes  int64
	Phases      map[string]time.Duration
}

// New makes an engine and takes over what an earlier one left: running VMs
// go on, half-done operations are finished or undone.
func New(ctx context.Context, opts Options) (*Engine, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.DiskFree == nil {
		opts.DiskFree = func() (int64, error) { return storage.FreeBelow(opts.Dir) }
	}
	if opts.RetryAfter == 0 {
		opts.RetryAfter = time.Second
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	info, err := opts.Driver.Probe(ctx)
	if err != nil {
		return nil, fmt.Errorf("probe the %s driver: %w", opts.Driver.Name(), err)
	}
	if err := os.MkdirAll(filepath.Join(opts.Dir, "sandboxes"), 0o711); err != nil {
		return nil, fmt.Errorf("make the sandboxes' directory: %w", err)
	}
	e := &Engine{
		opts: opts, log: opts.Logger, info: info,
		sandboxes: map[string]*sandbox{},
		names:     map[string]format.ID{},
		reserved:  map[string]bool{},
		bases:     map[string]Base{},
		watchers:  map[chan Event]bool{},
		tidying:   map[*sandbox]bool{},
		starting:  map[*sandbox]bool{},
		clocks:    make(chan struct{}, clocksAtOnce),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	if err := e.loadNames(); err != nil {
		return nil, err
	}
	if err := e.recover(ctx); err != nil {
		return nil, err
	}
	e.compactAll()
	e.lookForWaits(ctx) // before anybody asks for the first time
	e.wg.Go(e.watchWaits)
	return e, nil
}

// loadNames indexes the named manifests. A damaged one is logged and left
// alone: it must not keep the others from being used.
func (e *Engine) loadNames() error {
	manifests, errs := e.opts.Store.Manifests()
	for _, err := range errs {
		e.log.Error("a snapshot cannot be used", "err", err)
	}
	newest := map[string]snapshot.Manifest{}
	for _, m := range manifests {
		if m.Kind == snapshot.KindPause {
			continue
		}
		// Two of a name are what is left where a base was imported, or a snapshot
		// replaced, and that was cut off before the old one was removed.
		old, twice := newest[m.Name]
		if twice && old.CreatedAt.After(m.CreatedAt) {
			old, m = m, old
		}
		newest[m.Name], e.names[m.Name] = m, m.ID
		if twice && old.Kind == m.Kind {
			if err := e.opts.Store.Delete(e.ctx, old.ID); err != nil {
				return fmt.Errorf("remove the older template %q: %w", old.Name, err)
			}
		}
	}
	return nil
}

// Driver describes what runs the VMs.
func (e *Engine) Driver() vmm.Info { return e.info }

// Close ends the watches and lets go of everything; running VMs go on.
func (e *Engine) Close() {
	e.cancel()
	e.wg.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, sb := range e.sandboxes {
		if sb.run != nil {
			sb.run.letGo()
		}
	}
}

func (e *Engine) sandboxDir(id string) string {
	return filepath.Join(e.opts.Dir, "sandboxes", id)
}

// List returns all sandboxes, in the order of their ids.
func (e *Engine) List() []Info {
	e.mu.Lock()
	out := make([]Info, 0, len(e.sandboxes))
	for _, sb := range e.sandboxes {
		out = append(out, sb.info())
	}
	e.mu.Unlock()
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

// Get returns one sandbox.
func (e *Engine) Get(id string) (Info, error) {
	sb, err := e.find(id)
	if err != nil {
		return Info{}, err
	}
	return sb.info(), nil
}

func (e *Engine) find(id string) (*sandbox, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	sb := e.sandboxes[id]
	if sb == nil {
		return nil, fmt.Errorf("sandbox %q: %w", id, ErrNotFound)
	}
	return sb, nil
}

// Watch sends the present state of all sandboxes and then every change, until
// ctx ends. A receiver that falls far behind is cut off and watches anew.
func (e *Engine) Watch(ctx context.Context) ([]Info, <-chan Event) {
	ch := make(chan Event, 1024)
	e.mu.Lock()
	e.watchers[ch] = true
	e.mu.Unlock()
	now := e.List()
	context.AfterFunc(ctx, func() { e.unwatch(ch) })
	return now, ch
}

func (e *Engine) unwatch(ch chan Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.watchers[ch] {
		delete(e.watchers, ch)
		close(ch)
	}
}

// announce tells the watchers. It never waits for one.
func (e *Engine) announce(ev Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for ch := range e.watchers {
		select {
		case ch <- ev:
		default:
			delete(e.watchers, ch)
			close(ch)
		}
	}
}

// The shapes of ids and names that cross into paths.
var (
	idPattern   = regexp.MustCompile(`^[a-z0-9]{1,32}$`)
	namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
)

func checkID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%w: id %q must be 1 to 32 of a-z and 0-9", ErrInvalid, id)
	}
	return nil
}

func checkName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("%w: name %q must be 1 to 63 of a-z, 0-9, '.', '_' and '-', the first a letter or digit", ErrInvalid, name)
	}
	return nil
}

// randomHex returns n random bytes as hex digits.
func randomHex(n int) string {
	b := make([]byte, n)
	// crypto/rand.Read never fails; it ends the program instead.
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Slots are the network slots that sandboxes of this host hold.
func (e *Engine) Slots() []int {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []int
	for _, sb := range e.sandboxes {
		if r := sb.journal().Run; r != nil {
			out = append(out, r.Slot)
		}
	}
	return out
}
