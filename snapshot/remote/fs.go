package remote

import (
	"context"
	"io/fs"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// objectFS shows objects as files that cannot be changed, so that the code that
// reads and verifies local stores reads remote ones.
type objectFS struct {
	ctx     context.Context // of the store: files outlive the call that opens them
	objects storage.Objects
}

var _ storage.FS = (*objectFS)(nil)

func key(name string) string { return strings.TrimPrefix(name, "/") }

func refuse(op, name string) error {
	return &fs.PathError{Op: op, Path: name, Err: fs.ErrPermission}
}

// Open implements storage.FS.
func (f *objectFS) Open(name string) (storage.File, error) {
	info, err := f.objects.Head(f.ctx, key(name))
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &objectFile{fs: f, name: name, size: info.Size}, nil
}

// ReadDir implements storage.FS.
func (f *objectFS) ReadDir(name string) ([]string, error) {
	prefix := key(name) + "/"
	var names []string
	err := storage.ListAll(f.ctx, f.objects, prefix, func(info storage.ObjectInfo) error {
		first, _, _ := strings.Cut(strings.TrimPrefix(info.Key, prefix), "/")
		if len(names) == 0 || names[len(names)-1] != first {
			names = append(names, first)
		}
		return nil
	})
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	if len(names) == 0 {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrNotExist}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func (f *objectFS) Create(name string) (storage.File, error) { return nil, refuse("create", name) }
func (f *objectFS) OpenRW(name string) (storage.File, error) { return nil, refuse("open", name) }
func (f *objectFS) Mkdir(name string) error                  { return refuse("mkdir", name) }
func (f *objectFS) Rename(from, _ string) error              { return refuse("rename", from) }
func (f *objectFS) Remove(name string) error                 { return refuse("remove", name) }
func (f *objectFS) SyncDir(name string) error                { return refuse("sync", name) }

// BootID implements storage.FS: nothing here is ever written and not synced.
func (f *objectFS) BootID() (string, error) { return "remote", nil }

// objectFile is an object as a file.
type objectFile struct {
	fs   *objectFS
	name string
	size int64
}

// ReadAt implements storage.File. A caller must not take a failing store for
// the end of the file: io.EOF comes from the store's own word alone.
func (h *objectFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := h.fs.objects.ReadAt(h.fs.ctx, key(h.name), p, off)
	if n == len(p) {
		return n, nil
	}
	return n, err
}

func (h *objectFile) Name() string                       { return h.name }
func (h *objectFile) Size() (int64, error)               { return h.size, nil }
func (h *objectFile) Close() error                       { return nil }
func (h *objectFile) Write([]byte) (int, error)          { return 0, refuse("write", h.name) }
func (h *objectFile) WriteAt([]byte, int64) (int, error) { return 0, refuse("write", h.name) }
func (h *objectFile) Truncate(int64) error               { return refuse("truncate", h.name) }
func (h *objectFile) PunchHole(int64, int64) error       { return refuse("punch hole", h.name) }
func (h *objectFile) Sync() error                        { return refuse("sync", h.name) }
func (h *objectFile) Lock() error                        { return refuse("lock", h.name) }
