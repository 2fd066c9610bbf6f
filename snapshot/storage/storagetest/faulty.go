package storagetest

import (
	"context"
	"io"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// A Fault is what happens to one call.
type Fault struct {
	// Err is what the call returns. With After it is done all the same, as when
	// the answer was lost.
	Err   error
	After bool
	// Short lets a read return only so many bytes, and a transient failure.
	Short int
	// Corrupt changes one bit of what a read returns.
	Corrupt bool
	// Wait holds the call until it is closed, or its context ends.
	Wait <-chan struct{}
}

// Faulty passes calls to another store and fails those that it is told to.
type Faulty struct {
	storage.Objects

	mu    sync.Mutex
	calls int
	log   []string
	plan  func(n int, call string) *Fault
}

// NewFaulty wraps a store.
func NewFaulty(o storage.Objects) *Faulty { return &Faulty{Objects: o} }

// FailWith has f called before each call ("put KEY", "read KEY", …), numbered
// from 0 since FailWith; nil lets the call pass. A nil f ends it.
func (f *Faulty) FailWith(plan func(n int, call string) *Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls, f.log, f.plan = 0, nil, plan
}

// Calls returns the calls since FailWith or the start.
func (f *Faulty) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.log...)
}

func (f *Faulty) begin(op, key string) Fault {
	f.mu.Lock()
	call := op + " " + key
	n, plan := f.calls, f.plan
	f.calls++
	f.log = append(f.log, call)
	f.mu.Unlock()
	if plan == nil {
		return Fault{}
	}
	if ft := plan(n, call); ft != nil {
		return *ft
	}
	return Fault{}
}

// do runs a call as its fault says.
func (f *Faulty) do(ctx context.Context, op, key string, call func(Fault) error) error {
	ft := f.begin(op, key)
	if ft.Wait != nil {
		select {
		case <-ft.Wait:
		case <-ctx.Done():
			return failed(op, key, nil, ctx.Err())
		}
	}
	if ft.Err != nil && !ft.After {
		return ft.Err
	}
	if err := call(ft); err != nil {
		return err
	}
	return ft.Err
}

// Put implements storage.Objects.
func (f *Faulty) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	return f.do(ctx, "put", key, func(Fault) error { return f.Objects.Put(ctx, key, body, size) })
}

// ReadAt implements storage.Objects.
func (f *Faulty) ReadAt(ctx context.Context, key string, p []byte, off int64) (n int, err error) {
	err = f.do(ctx, "read", key, func(ft Fault) error {
		if ft.Short > 0 && ft.Short < len(p) {
			if n, err = f.Objects.ReadAt(ctx, key, p[:ft.Short], off); err != nil {
				return err
			}
			return failed("read", key, storage.ErrTransient, io.ErrUnexpectedEOF)
		}
		n, err = f.Objects.ReadAt(ctx, key, p, off)
		if ft.Corrupt && n > 0 {
			p[n/2] ^= 0x10
		}
		return err
	})
	return n, err
}

// Head implements storage.Objects.
func (f *Faulty) Head(ctx context.Context, key string) (info storage.ObjectInfo, err error) {
	err = f.do(ctx, "head", key, func(Fault) error {
		info, err = f.Objects.Head(ctx, key)
		return err
	})
	return info, err
}

// List implements storage.Objects.
func (f *Faulty) List(ctx context.Context, prefix, after string) (page []storage.ObjectInfo, more bool, err error) {
	err = f.do(ctx, "list", prefix, func(Fault) error {
		page, more, err = f.Objects.List(ctx, prefix, after)
		return err
	})
	return page, more, err
}

// Delete implements storage.Objects.
func (f *Faulty) Delete(ctx context.Context, key string) error {
	return f.do(ctx, "delete", key, func(Fault) error { return f.Objects.Delete(ctx, key) })
}
