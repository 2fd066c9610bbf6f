package control

import (
	"context"
	"sync"
	"time"
)

const (
	// reapAtOnce bounds the limits acted on at the same time.
	reapAtOnce = 16
	// retryBusy and retryFailed are when a limit that could not be acted on is
	// tried again: another operation was under way, or the host refused.
	retryBusy   = time.Second
	retryFailed = 30 * time.Second
)

// deadlines holds when the present runs reach their limits, by sandbox ID. The
// moments are monotonic: they keep their distance when the wall clock jumps.
type deadlines struct {
	clock Clock
	mu    sync.Mutex
	m     map[string]deadline
	// changed has a token when the earliest one may have changed.
	changed chan struct{}
}

type deadline struct {
	at time.Duration // of Clock.Mono
	// expires is the row's expires_at this was made of.
	expires time.Time
	version int64
}

func newDeadlines(c Clock) *deadlines {
	return &deadlines{clock: c, m: map[string]deadline{}, changed: make(chan struct{}, 1)}
}

// set takes in a row that was read or written.
func (d *deadlines) set(sb Sandbox) {
	d.mu.Lock()
	defer d.mu.Unlock()
	old, ok := d.m[sb.ID]
	if ok && (old.version > sb.Version || old.expires.Equal(sb.ExpiresAt)) {
		return
	}
	if sb.Status != StatusRunning || sb.ExpiresAt.IsZero() {
		delete(d.m, sb.ID)
		return
	}
	d.m[sb.ID] = deadline{at: d.clock.Mono() + sb.ExpiresAt.Sub(d.clock.Now().Round(0)), expires: sb.ExpiresAt, version: sb.Version}
	d.signal()
}

// left is the time that a row's run has until its limit.
func (d *deadlines) left(sb Sandbox) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e, ok := d.m[sb.ID]; ok && e.expires.Equal(sb.ExpiresAt) {
		return e.at - d.clock.Mono()
	}
	return sb.ExpiresAt.Sub(d.clock.Now().Round(0)) // nothing measures it yet
}

func (d *deadlines) signal() {
	select {
	case d.changed <- struct{}{}:
	default: // The reaper looks at everything anyway.
	}
}

// wait gives the time to the earliest one.
func (d *deadlines) wait() (_ time.Duration, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var first time.Duration
	for _, e := range d.m {
		if !ok || e.at < first {
			first, ok = e.at, true
		}
	}
	return max(0, first-d.clock.Mono()), ok
}

// due takes those that are reached and puts them off, so that each is given out
// once; set, delay or drop decides what comes next.
func (d *deadlines) due() map[string]time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.clock.Mono()
	out := map[string]time.Time{}
	for id, e := range d.m {
		if e.at <= now {
			out[id] = e.expires
			e.at = now + retryFailed
			d.m[id] = e
		}
	}
	return out
}

// delay tries one again after t, unless it has been changed since.
func (d *deadlines) delay(id string, expires time.Time, t time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e, ok := d.m[id]; ok && e.expires.Equal(expires) {
		e.at = d.clock.Mono() + t
		d.m[id] = e
		d.signal()
	}
}

// drop forgets one that does not hold any more.
func (d *deadlines) drop(id string, expires time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e, ok := d.m[id]; ok && e.expires.Equal(expires) {
		delete(d.m, id)
	}
}

// runReaper acts on time limits until ctx ends. It sleeps until the earliest
// one; a change wakes it.
func (s *Service) runReaper(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, reapAtOnce)
	for {
		var fire <-chan time.Time
		stop := func() {}
		if d, ok := s.deadlines.wait(); ok {
			fire, stop = s.clock.NewTimer(d)
		}
		select {
		case <-ctx.Done():
			stop()
			return
		case <-s.deadlines.changed:
		case <-fire:
		}
		stop()
		for id, expires := range s.deadlines.due() {
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				s.expire(ctx, id, expires)
			})
		}
	}
}

// notDue ends an attempt whose limit was moved at the last moment.
var notDue = errorf(CodeInvalidState, "the time limit was changed")

// expire acts on one limit.
func (s *Service) expire(ctx context.Context, id string, expires time.Time) {
	still := func(r Sandbox) error {
		if r.Status != StatusRunning || !r.ExpiresAt.Equal(expires) {
			return notDue
		}
		return nil
	}
	sb, err := s.row(ctx, id)
	if err == nil {
		err = still(sb)
	}
	if err == nil {
		s.note(ctx, Event{SandboxID: id, Type: EventExpire, Status: sb.Status})
		if sb.AutoPause {
			_, err = s.pauseAs(ctx, id, sb.Options.AutoPauseDiskOnly, still)
		} else {
			err = s.remove(ctx, id, still)
		}
	}
	switch {
	case err == nil:
		s.log.InfoContext(ctx, "time limit reached", "sandbox", id, "paused", sb.AutoPause)
		s.deadlines.drop(id, expires)
	case err == error(notDue), CodeOf(err) == CodeNotFound:
		s.deadlines.drop(id, expires)
	case CodeOf(err) == CodeInvalidState:
		s.deadlines.delay(id, expires, retryBusy)
	default:
		s.log.WarnContext(ctx, "act on time limit; trying again", "sandbox", id, "err", err)
		s.deadlines.delay(id, expires, retryFailed)
	}
}
