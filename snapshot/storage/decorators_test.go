package storage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/storagetest"
)

// calls runs each call of Objects once and returns the errors by name.
func calls(ctx context.Context, o storage.Objects) map[string]error {
	_, herr := o.Head(ctx, "k")
	_, _, lerr := o.List(ctx, "", "")
	p := make([]byte, 7)
	n, rerr := o.ReadAt(ctx, "k", p, 0)
	if rerr == nil && string(p[:n]) != "content" {
		rerr = fmt.Errorf("read %q", p[:n])
	}
	return map[string]error{
		"head": herr, "list": lerr, "read": rerr,
		"put":    o.Put(ctx, "new", strings.NewReader("x"), 1),
		"delete": o.Delete(ctx, "gone"),
	}
}

func transient() error {
	return &storage.ObjectError{Op: "any", Key: "k", Class: storage.ErrTransient, Err: io.ErrUnexpectedEOF}
}

func newFaulty(t *testing.T) *storagetest.Faulty {
	t.Helper()
	m := storagetest.NewMemory()
	must(t, putString(m, "k", "content"))
	return storagetest.NewFaulty(m)
}

func TestRetryTriesAgainWhatMayPass(t *testing.T) {
	for name, fault := range map[string]*storagetest.Fault{
		"before":    {Err: transient()},
		"after":     {Err: transient(), After: true}, // done, but the answer was lost
		"throttled": {Err: &storage.ObjectError{Op: "any", Class: storage.ErrThrottled}},
		"short":     {Short: 3},
	} {
		f := newFaulty(t)
		var pauses []time.Duration
		o := storage.Retry(f, storage.RetryOptions{
			Attempts: 3, Sleep: func(_ context.Context, d time.Duration) error { pauses = append(pauses, d); return nil },
		})
		f.FailWith(func(n int, _ string) *storagetest.Fault {
			if n%3 < 2 {
				return fault // twice, then it passes
			}
			return nil
		})
		for op, err := range calls(bg, o) {
			if err != nil && name != "short" {
				t.Errorf("%s: %s: %v", name, op, err)
			}
		}
		if name == "short" {
			f.FailWith(func(n int, _ string) *storagetest.Fault {
				if n < 2 {
					return fault
				}
				return nil
			})
			if got, err := getString(o, "k"); got != "content" || err != nil {
				t.Errorf("after short reads: %q, %v", got, err)
			}
			continue
		}
		if len(pauses) != 10 || len(f.Calls()) != 15 {
			t.Errorf("%s: %d pauses and %d calls, want 10 and 15", name, len(pauses), len(f.Calls()))
		}
	}
}

func TestRetryLeavesAloneWhatWillNotPass(t *testing.T) {
	denied := &storage.ObjectError{Op: "any", Err: errors.New("access denied")}
	missing := &storage.ObjectError{Op: "any", Class: fs.ErrNotExist, Err: fs.ErrNotExist}
	for _, want := range []error{denied, missing} {
		f := newFaulty(t)
		f.FailWith(func(int, string) *storagetest.Fault { return &storagetest.Fault{Err: want} })
		o := storage.Retry(f, storage.RetryOptions{Sleep: func(context.Context, time.Duration) error {
			t.Error("it paused")
			return nil
		}})
		for op, err := range calls(bg, o) {
			if !errors.Is(err, want) {
				t.Errorf("%s: %v", op, err)
			}
		}
		if n := len(f.Calls()); n != 5 {
			t.Errorf("%d calls, want 5", n)
		}
	}
}

func TestRetryGivesUp(t *testing.T) {
	f := newFaulty(t)
	f.FailWith(func(int, string) *storagetest.Fault { return &storagetest.Fault{Err: transient()} })
	var pauses []time.Duration
	o := storage.Retry(f, storage.RetryOptions{
		Attempts: 5, Base: time.Second, Max: 6 * time.Second, Rand: func() float64 { return 0.5 },
		Sleep: func(_ context.Context, d time.Duration) error { pauses = append(pauses, d); return nil },
	})
	_, err := o.Head(bg, "k")
	isErr(t, err, storage.ErrTransient)
	if want := []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, 3 * time.Second}; !slices.Equal(pauses, want) {
		t.Errorf("pauses %v, want %v", pauses, want)
	}
	// What the store asks for counts, up to the limit.
	for ask, want := range map[time.Duration]time.Duration{2 * time.Second: 2 * time.Second, time.Hour: 6 * time.Second} {
		pauses = nil
		f.FailWith(func(n int, _ string) *storagetest.Fault {
			if n == 0 {
				return &storagetest.Fault{Err: &storage.ObjectError{Class: storage.ErrThrottled, RetryAfter: ask}}
			}
			return nil
		})
		_, err = o.Head(bg, "k")
		must(t, err)
		if !slices.Equal(pauses, []time.Duration{want}) {
			t.Errorf("asked for %v it paused %v, want %v", ask, pauses, want)
		}
	}
}

func TestRetryEndsWithItsContext(t *testing.T) {
	f := newFaulty(t)
	f.FailWith(func(int, string) *storagetest.Fault { return &storagetest.Fault{Err: transient()} })
	ctx, cancel := context.WithCancel(bg)
	o := storage.Retry(f, storage.RetryOptions{Base: time.Hour, Max: time.Hour, OnRetry: func(error, time.Duration) { cancel() }})
	err := o.Put(ctx, "k", strings.NewReader("x"), 1)
	isErr(t, err, context.Canceled)
	if errors.Is(err, storage.ErrTransient) || !strings.Contains(err.Error(), "unexpected EOF") {
		t.Errorf("the error is %v", err)
	}
}

func TestTimeoutEndsCallsThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFaulty(t)
		never := make(chan struct{})
		f.FailWith(func(int, string) *storagetest.Fault { return &storagetest.Fault{Wait: never} })
		o := storage.Timeout(f, storage.TimeoutOptions{Call: time.Second, MinRate: 1})
		start := time.Now()
		for op, err := range calls(bg, o) {
			if !errors.Is(err, storage.ErrTransient) || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", op, err)
			}
		}
		// Head, List and Delete one second; the read of 7 bytes 8; the Put of one 2.
		if d := time.Since(start); d != 13*time.Second {
			t.Errorf("it took %v, want 13s", d)
		}
		// The caller's own limit is the caller's.
		ctx, cancel := context.WithTimeout(bg, time.Millisecond)
		defer cancel()
		_, err := o.Head(ctx, "k")
		isErr(t, err, context.DeadlineExceeded)
		if errors.Is(err, storage.ErrTransient) {
			t.Errorf("the caller's limit is called transient: %v", err)
		}
	})
}

func TestLimitBoundsConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFaulty(t)
		gate := make(chan struct{})
		f.FailWith(func(int, string) *storagetest.Fault { return &storagetest.Fault{Wait: gate} })
		o := storage.Limit(f, storage.LimitOptions{Concurrent: 3})
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for op, err := range calls(bg, o) {
					if err != nil {
						t.Errorf("%s: %v", op, err)
					}
				}
			})
		}
		for range 4 {
			wg.Go(func() { _, _ = o.Head(bg, "k") })
		}
		synctest.Wait()
		if n := len(f.Calls()); n != 3 {
			t.Errorf("%d calls at once, want 3", n)
		}
		ctx, cancel := context.WithCancel(bg)
		cancel()
		_, err := o.Head(ctx, "k") // waits for a slot
		isErr(t, err, context.Canceled)
		close(gate)
		wg.Wait()
		if n := len(f.Calls()); n != 14 {
			t.Errorf("%d calls in all, want 14", n)
		}
	})
}

func TestLimitBoundsBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := storage.Limit(newFaulty(t), storage.LimitOptions{BytesPerSecond: 1000})
		start := time.Now()
		p := make([]byte, 500)
		for range 10 {
			_, err := o.ReadAt(bg, "k", p, 0)
			isErr(t, err, io.EOF)
		}
		must(t, o.Put(bg, "big", bytes.NewReader(make([]byte, 3000)), 3000))
		// 8,000 bytes, of which a second's worth came at once.
		if d := time.Since(start); d != 7*time.Second {
			t.Errorf("it took %v, want 7s", d)
		}
		// Who gives up waiting gives the bytes back.
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		isErr(t, o.Put(ctx, "big", bytes.NewReader(make([]byte, 1<<20)), 1<<20), context.DeadlineExceeded)
		before := time.Now()
		must(t, o.Put(bg, "small", bytes.NewReader(p), 500))
		if d := time.Since(before); d != 0 {
			t.Errorf("the bytes of a Put that was given up cost the next one %v", d)
		}
	})
}
