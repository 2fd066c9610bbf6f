package control

import (
	"context"
	"sync"
)

// keyLocks is a set of locks by key: one operation at a time on each thing.
// An entry exists while somebody holds or awaits it.
type keyLocks struct {
	mu sync.Mutex
	m  map[string]*keyLock
}

type keyLock struct {
	// slot holds one token while the lock is free.
	slot chan struct{}
	refs int
}

func newKeyLocks() *keyLocks { return &keyLocks{m: map[string]*keyLock{}} }

func (l *keyLocks) ref(key string) *keyLock {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.m[key]
	if k == nil {
		k = &keyLock{slot: make(chan struct{}, 1)}
		k.slot <- struct{}{}
		l.m[key] = k
	}
	k.refs++
	return k
}

func (l *keyLocks) unref(key string, k *keyLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.refs--; k.refs == 0 {
		delete(l.m, key)
	}
}

// try takes the lock if it is free; release is nil when it is not.
func (l *keyLocks) try(key string) (release func()) {
	k := l.ref(key)
	select {
	case <-k.slot:
		return func() { k.slot <- struct{}{}; l.unref(key, k) }
	default:
		l.unref(key, k)
		return nil
	}
}

// busy tells whether somebody holds the lock.
func (l *keyLocks) busy(key string) bool {
	release := l.try(key)
	if release != nil {
		release()
	}
	return release == nil
}

// take waits for the lock until ctx ends.
func (l *keyLocks) take(ctx context.Context, key string) (release func(), err error) {
	k := l.ref(key)
	select {
	case <-k.slot:
		return func() { k.slot <- struct{}{}; l.unref(key, k) }, nil
	case <-ctx.Done():
		l.unref(key, k)
		return nil, ctx.Err()
	}
}
