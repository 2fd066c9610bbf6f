package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

// RetryOptions are the knobs of Retry. The zero value is usable.
type RetryOptions struct {
	// Attempts is how often a call is tried in all; default 6.
	Attempts int
	// Base and Max bound the pauses: before retry n it is a random part of
	// Base·2ⁿ, but at most Max, and at least what the store asked for (itself
	// taken as at most Max). Defaults 100 ms and 10 s.
	Base, Max time.Duration
	// OnRetry, which may be nil, is told about each failure before its pause.
	OnRetry func(err error, pause time.Duration)
	// Sleep waits, or returns the context's error; Rand returns a number in
	// [0,1). nil: the real ones.
	Sleep func(ctx context.Context, d time.Duration) error
	Rand  func() float64
}

func (o RetryOptions) withDefaults() RetryOptions {
	if o.Attempts <= 0 {
		o.Attempts = 6
	}
	if o.Base <= 0 {
		o.Base = 100 * time.Millisecond
	}
	if o.Max <= 0 {
		o.Max = 10 * time.Second
	}
	if o.OnRetry == nil {
		o.OnRetry = func(error, time.Duration) {}
	}
	if o.Sleep == nil {
		o.Sleep = sleep
	}
	if o.Rand == nil {
		o.Rand = rand.Float64
	}
	return o
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Retry repeats calls that failed as ErrThrottled or ErrTransient. Every call
// of Objects may be repeated, so that nothing else has to be known.
func Retry(o Objects, options RetryOptions) Objects {
	return &retrier{o, options.withDefaults()}
}

type retrier struct {
	next Objects
	RetryOptions
}

// do runs a call until it succeeds, fails for good or has been tried often
// enough.
func (r *retrier) do(ctx context.Context, op, key string, call func() error) error {
	for n := 0; ; n++ {
		err := call()
		if err == nil || !retryable(err) || ctx.Err() != nil {
			return err
		}
		if n+1 >= r.Attempts {
			return fmt.Errorf("%d attempts: %w", r.Attempts, err)
		}
		pause := r.pause(n, err)
		r.OnRetry(err, pause)
		if serr := r.Sleep(ctx, pause); serr != nil {
			return NewObjectError(op, key, nil, fmt.Errorf("%w, while waiting to try again after: %w", serr, causeOnly{err}))
		}
	}
}

// causeOnly is an error of which only the text counts: the class of the
// failure must not hide that the caller gave up.
type causeOnly struct{ err error }

func (c causeOnly) Error() string { return c.err.Error() }

func (r *retrier) pause(n int, err error) time.Duration {
	top := r.Max
	if n < 32 && r.Base<<n > 0 {
		top = min(top, r.Base<<n)
	}
	d := time.Duration(r.Rand() * float64(top))
	var oe *ObjectError
	if errors.As(err, &oe) {
		d = max(d, min(oe.RetryAfter, r.Max))
	}
	return d
}

func (r *retrier) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	return r.do(ctx, "put", key, func() error {
		return r.next.Put(ctx, key, body, size)
	})
}

func (r *retrier) ReadAt(ctx context.Context, key string, p []byte, off int64) (n int, err error) {
	// From the beginning, not from where it was cut off: the object may be
	// another one now.
	err = r.do(ctx, "read", key, func() error {
		n, err = r.next.ReadAt(ctx, key, p, off)
		return err
	})
	return n, err
}

func (r *retrier) Head(ctx context.Context, key string) (info ObjectInfo, err error) {
	err = r.do(ctx, "head", key, func() error {
		info, err = r.next.Head(ctx, key)
		return err
	})
	return info, err
}

func (r *retrier) List(ctx context.Context, prefix, after string) (page []ObjectInfo, more bool, err error) {
	err = r.do(ctx, "list", prefix, func() error {
		page, more, err = r.next.List(ctx, prefix, after)
		return err
	})
	return page, more, err
}

func (r *retrier) Delete(ctx context.Context, key string) error {
	return r.do(ctx, "delete", key, func() error {
		return r.next.Delete(ctx, key)
	})
}
