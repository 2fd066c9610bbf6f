package storage

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

// LimitOptions are the knobs of Limit.
type LimitOptions struct {
	// Concurrent is how many calls run at a time; 0: 32.
	Concurrent int
	// BytesPerSecond bounds what Put and ReadAt move together; 0: no bound. A
	// call pays before it begins; up to a second's worth may come at once.
	BytesPerSecond int64
	// Now and Sleep are the clock; nil: the real one.
	Now   func() time.Time
	Sleep func(ctx context.Context, d time.Duration) error
}

// Limit bounds how many calls run at a time and how many bytes a second they
// move. Callers wait for their turn as long as their context allows.
func Limit(o Objects, options LimitOptions) Objects {
	if options.Concurrent <= 0 {
		options.Concurrent = 32
	}
	if options.Now == nil {
		options.Now = time.Now
	}
	if options.Sleep == nil {
		options.Sleep = sleep
	}
	return &limiter{next: o, LimitOptions: options, slots: make(chan struct{}, options.Concurrent)}
}

type limiter struct {
	next Objects
	LimitOptions
	slots chan struct{}

	mu sync.Mutex
	// paid is until when the bytes that were let through use up the rate.
	paid time.Time
}

// enter waits for the call's bytes and then for a slot; the caller leaves it.
func (l *limiter) enter(ctx context.Context, op, key string, bytes int64) error {
	if d := l.reserve(bytes); d > 0 {
		if err := l.Sleep(ctx, d); err != nil {
			l.giveBack(bytes)
			return NewObjectError(op, key, nil, fmt.Errorf("wait for the rate limit: %w", err))
		}
	}
	select {
	case l.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		l.giveBack(bytes)
		return NewObjectError(op, key, nil, fmt.Errorf("wait for one of %d slots: %w", l.Concurrent, ctx.Err()))
	}
}

func (l *limiter) leave() { <-l.slots }

// reserve takes the bytes out of the rate and returns how long to wait until
// they are there.
func (l *limiter) reserve(bytes int64) time.Duration {
	if l.BytesPerSecond <= 0 || bytes <= 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.Now()
	if full := now.Add(-time.Second); l.paid.Before(full) {
		l.paid = full // what was not used is kept for a second only
	}
	l.paid = l.paid.Add(l.cost(bytes))
	return l.paid.Sub(now)
}

func (l *limiter) giveBack(bytes int64) {
	if l.BytesPerSecond <= 0 || bytes <= 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paid = l.paid.Add(-l.cost(bytes))
}

func (l *limiter) cost(bytes int64) time.Duration {
	return time.Duration(float64(bytes) / float64(l.BytesPerSecond) * float64(time.Second))
}

func (l *limiter) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	if err := l.enter(ctx, "put", key, size); err != nil {
		return err
	}
	defer l.leave()
	return l.next.Put(ctx, key, body, size)
}

func (l *limiter) ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := l.enter(ctx, "read", key, int64(len(p))); err != nil {
		return 0, err
	}
	defer l.leave()
	return l.next.ReadAt(ctx, key, p, off)
}

func (l *limiter) Head(ctx context.Context, key string) (ObjectInfo, error) {
	if err := l.enter(ctx, "head", key, 0); err != nil {
		return ObjectInfo{}, err
	}
	defer l.leave()
	return l.next.Head(ctx, key)
}

func (l *limiter) List(ctx context.Context, prefix, after string) ([]ObjectInfo, bool, error) {
	if err := l.enter(ctx, "list", prefix, 0); err != nil {
		return nil, false, err
	}
	defer l.leave()
	return l.next.List(ctx, prefix, after)
}

func (l *limiter) Delete(ctx context.Context, key string) error {
	if err := l.enter(ctx, "delete", key, 0); err != nil {
		return err
	}
	defer l.leave()
	return l.next.Delete(ctx, key)
}
