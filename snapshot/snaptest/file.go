package snaptest

import (
	"errors"
	"io"
	"io/fs"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// file is a handle on a node. Everything is guarded by FS.mu.
type file struct {
	fs     *FS
	n      *node
	name   string
	rw     bool
	pos    int64
	closed bool
}

func (h *file) err(op string, err error) error {
	return &fs.PathError{Op: op, Path: h.name, Err: err}
}

// check refuses what a real descriptor would.
func (h *file) check(op string, write bool, off int64) error {
	switch {
	case h.closed:
		return h.err(op, fs.ErrClosed)
	case write && !h.rw:
		return h.err(op, fs.ErrPermission)
	case off < 0:
		return h.err(op, fs.ErrInvalid)
	}
	return nil
}

func (h *file) Name() string { return h.name }

func (h *file) ReadAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.check("read", false, off); err != nil {
		return 0, err
	}
	if off >= int64(len(h.n.data)) {
		return 0, io.EOF
	}
	n := copy(p, h.n.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *file) Write(p []byte) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	n, err := h.writeAt(p, h.pos)
	h.pos += int64(n)
	return n, err
}

func (h *file) WriteAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	return h.writeAt(p, off)
}

func (h *file) writeAt(p []byte, off int64) (int, error) {
	if err := h.check("write", true, off); err != nil {
		return 0, err
	}
	err := h.fs.begin("write", h.name, off, len(p))
	if err != nil {
		p = p[:len(p)/2] // a failing disk may have taken a part
	}
	if end := off + int64(len(p)); end > int64(len(h.n.data)) && len(p) > 0 {
		h.resize(end)
	}
	n := 0
	if len(p) > 0 {
		n = copy(h.n.data[off:], p)
	}
	return n, err
}

func (h *file) resize(size int64) {
	if size <= int64(len(h.n.data)) {
		h.n.data = h.n.data[:size]
		return
	}
	if size > int64(cap(h.n.data)) {
		b := make([]byte, len(h.n.data), max(size, 2*int64(cap(h.n.data))))
		copy(b, h.n.data)
		h.n.data = b
	}
	old := len(h.n.data)
	h.n.data = h.n.data[:size]
	clear(h.n.data[old:])
}

func (h *file) Size() (int64, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.check("size", false, 0); err != nil {
		return 0, err
	}
	return int64(len(h.n.data)), nil
}

func (h *file) Truncate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.check("truncate", true, size); err != nil {
		return err
	}
	if err := h.fs.begin("truncate", h.name, size); err != nil {
		return err
	}
	h.resize(size)
	return nil
}

func (h *file) PunchHole(off, n int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.check("punch", true, off); err != nil {
		return err
	}
	if n <= 0 {
		return h.err("punch", fs.ErrInvalid)
	}
	if err := h.fs.begin("punch", h.name, off, n); err != nil {
		return err
	}
	if size := int64(len(h.n.data)); off < size {
		clear(h.n.data[off:min(size, off+n)])
	}
	return nil
}

func (h *file) Sync() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.check("sync", false, 0); err != nil {
		return err
	}
	if err := h.fs.begin("sync", h.name); err != nil {
		return err
	}
	h.n.synced = append([]byte(nil), h.n.data...)
	return nil
}

func (h *file) Lock() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.check("lock", false, 0); err != nil {
		return err
	}
	if o := h.fs.locks[h.n]; o != nil && o != h {
		return h.err("lock", storage.ErrLocked)
	}
	h.fs.locks[h.n] = h
	return nil
}

func (h *file) Close() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return h.err("close", errors.New("closed twice"))
	}
	h.closed = true
	if h.fs.locks[h.n] == h {
		delete(h.fs.locks, h.n)
	}
	return nil
}
