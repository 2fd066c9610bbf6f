package hostnet

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// DefaultPrefix is used when Options.Prefix is empty.
	DefaultPrefix = "10.213.0.0/16"

	// More builders than this only wait for each other: the kernel changes
	// links under one lock.
	maxBuilders = 2
	// maxThreads bounds the OS threads that make sockets for Dial.
	maxThreads = 8

	minRetry, maxRetry = time.Second, 30 * time.Second
)

// Options of a Pool.
type Options struct {
	Size   int    // slots to keep prepared, 0 to Max
	Max    int    // slots at most, prepared and used together; 0: all that Prefix holds
	Prefix string // addresses of the veth pairs, a /30 each; default DefaultPrefix
	// StateDir is whose slots these are: a pool finds those of an earlier
	// process by it. One process at a time may have a pool with it.
	StateDir string
	// Lookup gives a name's IPv4 addresses for guests that may reach names; nil
	// asks as the host's own programs do.
	Lookup func(ctx context.Context, name string) ([]netip.Addr, error)
	// Prepare, if not nil, is called with the namespace of a slot that is kept
	// prepared, before anybody has it, and Vacate before a slot is taken apart
	// that a sandbox had. Close does not call it.
	Prepare func(netns string, index int)
	Vacate  func(index int)
	Logger  *slog.Logger
}

// Pool owns the slots of one state directory. Life cycle: NewPool, then Adopt
// for every sandbox that lives on, then Sweep for what is left of the process
// before; Acquire at any time; Close.
type Pool struct {
	layout layout
	max    int
	size   int
	owner  string
	home   *os.File
	lock   *os.File
	log    *slog.Logger
	lookup func(ctx context.Context, name string) ([]netip.Addr, error)

	prepare func(netns string, index int)
	vacate  func(index int)

	threads chan struct{}
	wg      sync.WaitGroup // builds and reclaims

	mu       sync.Mutex
	closed   bool
	free     []int // first in, first out: a number rests before it is used again
	foreign  []int // claimed by another pool of this host
	ready    []*Slot
	used     map[int]*Slot
	orphans  map[int]bool // exist, ours, nobody's: of an earlier process or a failed clean-up
	pending  map[int]bool // being adopted, or swept
	cleaning int
	building int
	waiters  []chan result // capacity 1 each
	backoff  time.Duration // before the stock is filled again, after a failed build
	resting  bool          // timer runs, or Sweep is to come; only builds that somebody waits for
	timer    *time.Timer
}

type result struct {
	slot *Slot
	err  error
}

// NewPool takes possession of StateDir's slots and starts to prepare new ones.
// Slots of an earlier process stay as they are until Adopt or Sweep; where there
// are any, the stock is filled after Sweep.
func NewPool(ctx context.Context, o Options) (_ *Pool, err error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	p, err := newPool(o)
	if err != nil {
		return nil, fmt.Errorf("network pool: %w", err)
	}
	defer func() {
		if err != nil {
			p.home.Close()
			p.lock.Close()
		}
	}()
	err = withHostLock(func() error {
		err := p.enter()
		if err != nil {
			return errors.Join(err, leaveHost())
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("network pool: %w", err)
	}
	p.mu.Lock()
	// Sandboxes that live on are waited for, and get their slots before the stock
	// is filled.
	p.resting = len(p.orphans) > 0
	p.schedule()
	p.mu.Unlock()
	return p, nil
}

func newPool(o Options) (*Pool, error) {
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Lookup == nil {
		o.Lookup = lookupAsHost
	}
	if o.Prepare == nil {
		o.Prepare = func(string, int) {}
	}
	if o.Vacate == nil {
		o.Vacate = func(int) {}
	}
	l, err := newLayout(o.Prefix)
	if err != nil {
		return nil, err
	}
	if o.Max == 0 {
		o.Max = l.slots()
	}
	if o.Max < 0 || o.Max > l.slots() {
		return nil, fmt.Errorf("max %d: %v holds 1 to %d slots", o.Max, l.prefix, l.slots())
	}
	if o.Size < 0 || o.Size > o.Max {
		return nil, fmt.Errorf("size %d: want 0 to max (%d)", o.Size, o.Max)
	}
	if o.StateDir == "" {
		return nil, errors.New("state directory is empty")
	}
	p := &Pool{layout: l, max: o.Max, size: o.Size, log: o.Logger, lookup: o.Lookup,
		prepare: o.Prepare, vacate: o.Vacate,
		threads: make(chan struct{}, maxThreads), used: map[int]*Slot{},
		orphans: map[int]bool{}, pending: map[int]bool{}}
	if p.owner, p.lock, err = lockStateDir(o.StateDir); err != nil {
		return nil, err
	}
	if p.home, err = openHome(); err != nil {
		p.lock.Close()
		return nil, err
	}
	return p, nil
}

func lockStateDir(dir string) (owner string, lock *os.File, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, fmt.Errorf("make the state directory: %w", err)
	}
	// One directory, one owner, by whatever path it is named.
	if dir, err = filepath.Abs(dir); err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return "", nil, fmt.Errorf("resolve the state directory: %w", err)
	}
	lock, err = flock(filepath.Join(dir, "hostnet.lock"), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return "", nil, fmt.Errorf("another process has the network of %s: %w", dir, err)
	}
	if err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256([]byte(dir))
	return hex.EncodeToString(sum[:8]), lock, nil
}

// enter finds out what there is. Held: the host lock.
func (p *Pool) enter() error {
	if err := prepareNetnsDir(); err != nil {
		return err
	}
	if err := checkPrefix(p.layout); err != nil {
		return err
	}
	if err := enterHost(true); err != nil {
		return err
	}
	// A firewall that cannot be read is no reason not to serve.
	if drops, err := foreignDrops(); err != nil || len(drops) > 0 {
		p.log.Warn("other forward rules drop by policy; unless they accept wrn*, sandboxes have no internet "+
			"(Docker: iptables -I DOCKER-USER -i wrn+ -j ACCEPT; iptables -I DOCKER-USER -o wrn+ -j ACCEPT)",
			"chains", drops, "error", err)
	}
	names, err := listNetns()
	if err != nil {
		return err
	}
	taken := map[int]bool{}
	for _, n := range names {
		owner, err := p.ownerOf(n)
		if errors.Is(err, errNoNetns) {
			// Nobody is creating it, we hold the lock: it was cut off.
			if err := removeNetns(n); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		taken[n] = true
		if owner == p.owner {
			p.orphans[n] = true
		} else if n < p.max {
			p.foreign = append(p.foreign, n)
		}
	}
	for n := range p.max {
		if !taken[n] {
			p.free = append(p.free, n)
		}
	}
	return nil
}

func (p *Pool) ownerOf(n int) (string, error) {
	ns, err := openNetns(n)
	if err != nil {
		return "", err
	}
	defer ns.Close()
	return netnsOwner(p.home, ns)
}

// Levels are the numbers of a pool's slots, by what they are doing.
type Levels struct {
	Ready, Used, Building, Cleaning int
	// Waiting are callers of Acquire for whom no slot is ready.
	Waiting int
}

// Levels counts the slots now.
func (p *Pool) Levels() Levels {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Levels{len(p.ready), len(p.used), p.building, p.cleaning, len(p.waiters)}
}

var sandboxIDs = regexp.MustCompile(`^[a-z0-9]{1,64}$`)

// Acquire returns a slot for the sandbox: a prepared one at once, or else one
// that is made now. ErrNoSlot when all Max are in use.
func (p *Pool) Acquire(ctx context.Context, sandboxID string) (*Slot, error) {
	if !sandboxIDs.MatchString(sandboxID) {
		return nil, fmt.Errorf("sandbox id %q: want 1 to 64 of a-z0-9", sandboxID)
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, ErrClosed
	}
	ch := make(chan result, 1)
	p.waiters = append(p.waiters, ch)
	p.schedule()
	p.mu.Unlock()

	var r result
	select {
	case r = <-ch:
	case <-ctx.Done():
		p.abandon(ch)
		r.err = context.Cause(ctx)
	}
	if r.err != nil {
		return nil, fmt.Errorf("acquire a network slot: %w", r.err)
	}
	r.slot.SandboxID = sandboxID
	return r.slot, nil
}

// abandon takes a waiter off the list. A slot that it was given meanwhile goes
// back: nobody has touched it.
func (p *Pool) abandon(ch chan result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, w := range p.waiters {
		if w == ch {
			p.waiters = append(p.waiters[:i], p.waiters[i+1:]...)
			return
		}
	}
	if r := <-ch; r.slot != nil && !p.closed {
		delete(p.used, r.slot.Index)
		p.ready = append(p.ready, r.slot)
		p.schedule()
	}
}

// schedule hands prepared slots to those who wait, starts builds for those who
// have to wait and for the stock, and turns away those for whom there is
// nothing. Held: mu. Called after every change.
func (p *Pool) schedule() {
	if p.closed {
		return
	}
	for len(p.waiters) > 0 && len(p.ready) > 0 {
		s := p.ready[0]
		p.ready = p.ready[1:]
		p.give(s)
	}
	if len(p.free) == 0 && len(p.foreign) > 0 {
		p.recheckForeign()
	}
	want := len(p.waiters)
	if !p.resting {
		want += p.size - len(p.ready)
	}
	for p.building < min(want, maxBuilders) && len(p.free) > 0 {
		n := p.free[0]
		p.free = p.free[1:]
		p.building++
		p.wg.Add(1)
		go p.build(n)
	}
	for len(p.waiters) > p.building+p.cleaning+len(p.free) {
		last := len(p.waiters) - 1
		p.waiters[last] <- result{err: fmt.Errorf("%w: %d in use, at most %d", ErrNoSlot, len(p.used), p.max)}
		p.waiters = p.waiters[:last]
	}
}

// give hands s to the first who waits. Held: mu.
func (p *Pool) give(s *Slot) {
	p.used[s.Index] = s
	p.waiters[0] <- result{slot: s}
	p.waiters = p.waiters[1:]
}

// recheckForeign frees the numbers that other pools gave up. Held: mu.
func (p *Pool) recheckForeign() {
	keep := p.foreign[:0]
	for _, n := range p.foreign {
		if _, err := os.Stat(netnsPath(n)); errors.Is(err, os.ErrNotExist) {
			p.free = append(p.free, n)
		} else {
			keep = append(keep, n)
		}
	}
	p.foreign = keep
}

// build makes slot n. It runs at most maxBuilders times at once.
func (p *Pool) build(n int) {
	defer p.wg.Done()
	start := time.Now()
	s, err := p.create(n)
	if err == nil && !p.awaited() {
		p.prepare(netnsPath(n), n)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.building--
	switch {
	case err == nil:
		p.backoff = 0
		p.ready = append(p.ready, s)
		p.log.Debug("network slot made", "slot", n, "took", time.Since(start))
	case errors.Is(err, errForeign):
		p.foreign = append(p.foreign, n)
	case errors.Is(err, errLeftover):
		p.orphans[n] = true
		p.failed(n, err)
	default:
		p.free = append(p.free, n)
		p.failed(n, err)
	}
	p.schedule()
}

// awaited tells whether somebody waits for a slot, and would for its preparation.
func (p *Pool) awaited() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiters) > 0
}

// failed tells the first who waits, or tries again later. Held: mu.
func (p *Pool) failed(n int, err error) {
	p.log.Error("network slot cannot be made", "slot", n, "error", err)
	if len(p.waiters) > 0 {
		p.waiters[0] <- result{err: err}
		p.waiters = p.waiters[1:]
	}
	if p.timer != nil {
		p.timer.Stop()
	}
	p.resting = true
	p.backoff = min(max(minRetry, 2*p.backoff), maxRetry)
	p.timer = time.AfterFunc(p.backoff, p.rested)
}

func (p *Pool) rested() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resting = false
	p.schedule()
}
