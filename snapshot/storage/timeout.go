package storage

import (
	"context"
	"fmt"
	"io"
	"time"
)

// TimeoutOptions are the knobs of Timeout.
type TimeoutOptions struct {
	// Call is for a call without its bytes; default 30 s.
	Call time.Duration
	// MinRate is how many bytes a second a Put or ReadAt gets time for, beyond
	// Call; default 256 KiB/s.
	MinRate int64
}

// Timeout ends calls that hang, as ErrTransient: a connection that died without
// a word must not hold a reader for ever.
func Timeout(o Objects, options TimeoutOptions) Objects {
	if options.Call <= 0 {
		options.Call = 30 * time.Second
	}
	if options.MinRate <= 0 {
		options.MinRate = 256 << 10
	}
	return &timer{o, options}
}

type timer struct {
	next Objects
	TimeoutOptions
}

func (t *timer) do(ctx context.Context, op, key string, bytes int64, call func(context.Context) error) error {
	limit := t.Call + time.Duration(float64(bytes)/float64(t.MinRate)*float64(time.Second))
	timed, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := call(timed)
	if err != nil && err != io.EOF && timed.Err() != nil && ctx.Err() == nil {
		return &ObjectError{Op: op, Key: key, Class: ErrTransient, Err: fmt.Errorf("no answer within %v: %w", limit, causeOnly{err})}
	}
	return err
}

func (t *timer) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	return t.do(ctx, "put", key, size, func(ctx context.Context) error {
		return t.next.Put(ctx, key, body, size)
	})
}

func (t *timer) ReadAt(ctx context.Context, key string, p []byte, off int64) (n int, err error) {
	err = t.do(ctx, "read", key, int64(len(p)), func(ctx context.Context) error {
		n, err = t.next.ReadAt(ctx, key, p, off)
		return err
	})
	return n, err
}

func (t *timer) Head(ctx context.Context, key string) (info ObjectInfo, err error) {
	err = t.do(ctx, "head", key, 0, func(ctx context.Context) error {
		info, err = t.next.Head(ctx, key)
		return err
	})
	return info, err
}

func (t *timer) List(ctx context.Context, prefix, after string) (page []ObjectInfo, more bool, err error) {
	err = t.do(ctx, "list", prefix, 0, func(ctx context.Context) error {
		page, more, err = t.next.List(ctx, prefix, after)
		return err
	})
	return page, more, err
}

func (t *timer) Delete(ctx context.Context, key string) error {
	return t.do(ctx, "delete", key, 0, func(ctx context.Context) error {
		return t.next.Delete(ctx, key)
	})
}
