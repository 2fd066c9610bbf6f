// Package storagetest has what tests of object stores need: a store in memory,
// one that fails as it is told, the conformance suite, and a real S3 server.
//
// Tests of any package may import it; production code must not.
package storagetest

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Memory keeps objects in memory.
type Memory struct {
	mu      sync.Mutex
	objects map[string][]byte
}

var _ storage.Objects = (*Memory)(nil)

// NewMemory returns an empty store.
func NewMemory() *Memory { return &Memory{objects: map[string][]byte{}} }

// Content returns the bytes of an object as they are: changing them damages it.
func (m *Memory) Content(key string) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.objects[key]
}

// Keys returns all keys, sorted.
func (m *Memory) Keys() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for k := range m.objects {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func failed(op, key string, class, err error) error {
	return storage.NewObjectError(op, key, class, err)
}

func check(ctx context.Context, op, key string) error {
	if err := storage.ValidKey(key); err != nil {
		return failed(op, key, nil, err)
	}
	return failed(op, key, nil, ctx.Err())
}

// Put implements storage.Objects.
func (m *Memory) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	if err := check(ctx, "put", key); err != nil {
		return err
	}
	if size < 0 {
		return failed("put", key, nil, fmt.Errorf("size %d: %w", size, fs.ErrInvalid))
	}
	b := make([]byte, size)
	if n, err := body.ReadAt(b, 0); n < len(b) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return failed("put", key, nil, fmt.Errorf("read the body: %w", err))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.objects[key] = b
	return nil
}

// ReadAt implements storage.Objects.
func (m *Memory) ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := check(ctx, "read", key); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.objects[key]
	switch {
	case !ok:
		return 0, failed("read", key, fs.ErrNotExist, fs.ErrNotExist)
	case off < 0:
		return 0, failed("read", key, nil, fmt.Errorf("offset %d: %w", off, fs.ErrInvalid))
	case len(p) == 0:
		return 0, nil
	case off >= int64(len(b)):
		return 0, io.EOF
	}
	n := copy(p, b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Head implements storage.Objects.
func (m *Memory) Head(ctx context.Context, key string) (storage.ObjectInfo, error) {
	if err := check(ctx, "head", key); err != nil {
		return storage.ObjectInfo{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.objects[key]
	if !ok {
		return storage.ObjectInfo{}, failed("head", key, fs.ErrNotExist, fs.ErrNotExist)
	}
	return storage.ObjectInfo{Key: key, Size: int64(len(b))}, nil
}

// List implements storage.Objects.
func (m *Memory) List(ctx context.Context, prefix, after string) ([]storage.ObjectInfo, bool, error) {
	if err := storage.ValidPrefix(prefix); err != nil {
		return nil, false, failed("list", prefix, nil, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, false, failed("list", prefix, nil, err)
	}
	var out []storage.ObjectInfo
	for _, k := range m.Keys() {
		if strings.HasPrefix(k, prefix) && k > after {
			out = append(out, storage.ObjectInfo{Key: k, Size: int64(len(m.Content(k)))})
		}
	}
	return out[:min(len(out), storage.MaxList)], len(out) > storage.MaxList, nil
}

// Delete implements storage.Objects.
func (m *Memory) Delete(ctx context.Context, key string) error {
	if err := check(ctx, "delete", key); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, key)
	return nil
}
