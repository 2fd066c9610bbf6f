package control

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Options configure a Service. Store and Host are required; nil or zero in the
// others means what the field says.
type Options struct {
	Store Store
	Host  Host
	// Clock: nil is the real one.
	Clock Clock
	// Logger: nil discards.
	Logger *slog.Logger
	// OpTimeout bounds one operation on the host; 0 is 15 minutes.
	OpTimeout time.Duration
	// ReconcileEvery is the longest time between two looks at the host; 0 is
	// 30 seconds. Reports of the host lead to a look at once.
	ReconcileEvery time.Duration
	// KeepStopped is how long deleted sandboxes stay in the history; 0 is a
	// week.
	KeepStopped time.Duration
	// Resolve gives the snapshot that a name and tag stand for where no template
	// has the name itself; ErrNotFound where there is none. nil: there are no
	// such names.
	Resolve func(ctx context.Context, name, tag string) (string, error)
	// Observe is called at the end of every operation; nil is nobody.
	Observe func(op string, took time.Duration, err error)
}

// Service does the operations. Methods are safe for concurrent use; errors are
// *Error, or faults of the store or the host that are to be shown as
// CodeInternal.
type Service struct {
	store Store
	host  Host
	clock Clock
	log   *slog.Logger
	opt   Options

	ops       *keyLocks // by sandbox ID
	names     *keyLocks // by snapshot name
	deleting  *keyLocks // by sandbox ID: one delete at a time
	active    activity
	deadlines *deadlines
	answering answering // requests with idempotency keys under way
	tokens    tokens
	traffic   touched
	// snapshots counts operations on snapshots, so that a list of the host's
	// that was read beside one is not taken for the present.
	snapshots atomic.Int64

	// waiting says why sandboxes stand still, as noted last; recalled, by an
	// earlier process too.
	waitingMu sync.Mutex
	waiting   map[string]string
	recalled  bool

	// kick asks for a look at the host.
	kick chan struct{}
	// reconciled is set by the first look that came to its end.
	reconciled atomic.Bool
}

// New makes a Service. It does nothing by itself until Run.
func New(o Options) *Service {
	if o.Clock == nil {
		o.Clock = realClock{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OpTimeout == 0 {
		o.OpTimeout = 15 * time.Minute
	}
	if o.ReconcileEvery == 0 {
		o.ReconcileEvery = 30 * time.Second
	}
	if o.KeepStopped == 0 {
		o.KeepStopped = 7 * 24 * time.Hour
	}
	if o.Observe == nil {
		o.Observe = func(string, time.Duration, error) {}
	}
	return &Service{
		store: o.Store, host: o.Host, clock: o.Clock, log: o.Logger, opt: o,
		ops: newKeyLocks(), names: newKeyLocks(), deleting: newKeyLocks(),
		active:    activity{n: map[string]int{}},
		deadlines: newDeadlines(o.Clock),
		answering: answering{m: map[[2]string]chan struct{}{}},
		kick:      make(chan struct{}, 1),
		waiting:   map[string]string{},
	}
}

// Run reconciles with the host and acts on time limits until ctx ends, and
// returns when what it began is done.
func (s *Service) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.watch(ctx) })
	wg.Go(func() { s.runReconciler(ctx) })
	s.runReaper(ctx)
	wg.Wait()
	return nil
}

// Count gives the number of sandboxes by status.
func (s *Service) Count(ctx context.Context) (map[Status]int, error) {
	return s.store.CountSandboxes(ctx)
}

// detach gives the context of an accepted operation: it does not end with the
// caller's, but has a deadline.
func (s *Service) detach(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), s.opt.OpTimeout)
}

// observe reports an operation; use: defer s.observe("pause")(&err).
func (s *Service) observe(op string) func(*error) {
	start := s.clock.Mono()
	return func(err *error) { s.opt.Observe(op, s.clock.Mono()-start, *err) }
}

func (s *Service) now() time.Time { return stamp(s.clock.Now()) }

func (s *Service) wake() {
	select {
	case s.kick <- struct{}{}:
	default: // One is asked for already.
	}
}

func noSandbox(id string) *Error {
	return errorf(CodeNotFound, "there is no sandbox %s", id)
}

func wrongState(sb Sandbox, op, want string) *Error {
	return errorf(CodeInvalidState, "sandbox %s is %s; %s needs it to be %s", sb.ID, sb.Status, op, want)
}

func busy(id, op string) *Error {
	return errorf(CodeInvalidState, "sandbox %s has another operation under way; %s can be tried again when it has ended", id, op)
}

// row reads a sandbox in any state.
func (s *Service) row(ctx context.Context, id string) (Sandbox, error) {
	if err := ValidateID("id", id); err != nil {
		return Sandbox{}, err
	}
	sb, err := s.store.GetSandbox(ctx, id)
	if errors.Is(err, ErrNotFound) || (err == nil && sb.Status == StatusStopped) {
		return sb, noSandbox(id)
	}
	if err != nil {
		return sb, fmt.Errorf("read sandbox %s: %w", id, err)
	}
	return sb, nil
}

// mutate changes a row by compare-and-set. f gets the present row and may be
// called again when another change came between; its error ends the attempt.
// Each repetition means that somebody else got on, and ctx bounds them.
func (s *Service) mutate(ctx context.Context, id string, may func(from, to Status) bool, f func(*Sandbox) error) (Sandbox, error) {
	for {
		cur, err := s.row(ctx, id)
		if err != nil {
			return cur, err
		}
		next := cur.clone()
		if err := f(&next); err != nil {
			return cur, err
		}
		if next.Status != cur.Status && !may(cur.Status, next.Status) {
			return cur, errorf(CodeInvalidState, "sandbox %s is %s and cannot become %s", id, cur.Status, next.Status)
		}
		next.ChangedAt = s.now()
		err = s.store.UpdateSandbox(ctx, next)
		if errors.Is(err, ErrStale) {
			continue
		}
		if err != nil {
			return cur, fmt.Errorf("write sandbox %s: %w", id, err)
		}
		next.Version++
		s.deadlines.set(next)
		return next, nil
	}
}

// Get reads one sandbox.
func (s *Service) Get(ctx context.Context, id string) (Sandbox, error) {
	sb, err := s.row(ctx, id)
	if err != nil {
		return sb, err
	}
	return s.seen(sb), nil
}

// List reads sandboxes, newest first.
func (s *Service) List(ctx context.Context, f SandboxFilter) ([]Sandbox, error) {
	if err := ValidateMetadata(f.Metadata); err != nil {
		return nil, err
	}
	list, err := s.store.ListSandboxes(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	for i := range list {
		list[i] = s.seen(list[i])
	}
	return list, nil
}

// seen puts in what the row does not hold: a sandbox in which a command runs is
// active now.
func (s *Service) seen(sb Sandbox) Sandbox {
	if s.active.running(sb.ID) && sb.Status == StatusRunning {
		sb.LastActiveAt = s.now()
	}
	return sb
}

// idLength is how long the ids are that the server gives.
const idLength = 20

// newID makes an ID of 100 random bits; it becomes a host name.
func newID() string {
	var b [13]byte
	rand.Read(b[:]) // never fails
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))[:idLength]
}

// activity counts the commands and transfers under way, by sandbox.
type activity struct {
	mu sync.Mutex
	n  map[string]int
}

func (a *activity) running(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.n[id] > 0
}

func (a *activity) add(id string, d int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.n[id] += d; a.n[id] == 0 {
		delete(a.n, id)
	}
}
