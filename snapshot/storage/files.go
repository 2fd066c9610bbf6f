package storage

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
)

// tempMark begins the name of a file that is being written; no part of a key
// begins with a dot.
const tempMark = ".tmp-"

// copyBuffer bounds what a Put of Files holds in memory.
const copyBuffer = 1 << 20

// Files keeps objects as files of a directory, one for each, under their keys.
// Several processes may use one directory. A Put is durable when it returns:
// the content is synced, then renamed into its place, then the names are synced.
type Files struct {
	fs  FS
	dir string
}

var _ Objects = (*Files)(nil)

// NewFiles keeps objects in dir, which the first Put makes if its parent
// exists. A nil FS is OS.
func NewFiles(fsys FS, dir string) (*Files, error) {
	if dir == "" {
		return nil, errors.New("objects in files: the directory is empty")
	}
	if fsys == nil {
		fsys = OS{}
	}
	return &Files{fs: fsys, dir: path.Clean(dir)}, nil
}

func (f *Files) path(key string) string { return path.Join(f.dir, key) }

// errIsDir: the key names a directory of other keys.
var errIsDir = errors.New("other objects lie below this key")

// open opens the file of a key; a directory there is errIsDir.
func (f *Files) open(name string) (File, error) {
	h, err := f.fs.Open(name)
	switch {
	case errors.Is(err, fs.ErrInvalid):
		return nil, errIsDir
	case errors.Is(err, syscall.ENOTDIR):
		return nil, fs.ErrNotExist // the key goes on below an object
	case err != nil:
		return nil, err
	}
	// The operating system opens directories too, and does not let them be read.
	if _, err := h.ReadAt(make([]byte, 1), 0); errors.Is(err, syscall.EISDIR) {
		return nil, errors.Join(errIsDir, h.Close())
	}
	return h, nil
}

func fileError(op, key string, err error) error {
	var class error
	if errors.Is(err, fs.ErrNotExist) || op != "put" && errors.Is(err, errIsDir) {
		class = fs.ErrNotExist
	}
	return NewObjectError(op, key, class, err)
}

// Put implements Objects.
func (f *Files) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	if err := checkPut(ctx, key, size); err != nil {
		return err
	}
	return fileError("put", key, f.put(ctx, key, body, size))
}

func (f *Files) put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	name := f.path(key)
	if err := f.mkdirs(path.Dir(key)); err != nil {
		return err
	}
	h, err := f.open(name)
	if err == nil {
		err = h.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp := path.Join(path.Dir(name), tempMark+strings.ToLower(rand.Text()))
	h, err = f.fs.Create(tmp)
	if err != nil {
		return err
	}
	err = copyInto(ctx, h, body, size)
	if err == nil {
		err = h.Sync()
	}
	err = errors.Join(err, h.Close())
	if err == nil {
		err = ctx.Err() // the last moment: nothing is visible yet
	}
	if err == nil {
		err = f.fs.Rename(tmp, name)
	}
	if err != nil {
		if rerr := f.fs.Remove(tmp); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr) // Clean takes it
		}
		return err
	}
	return f.fs.SyncDir(path.Dir(name))
}

// copyInto writes exactly size bytes of body.
func copyInto(ctx context.Context, h File, body io.ReaderAt, size int64) error {
	buf := make([]byte, min(size, copyBuffer))
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), size-off)]
		if n, err := body.ReadAt(p, off); n < len(p) {
			return fmt.Errorf("read the body at %d: %w", off, unexpectedEOF(err))
		}
		if _, err := h.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

func unexpectedEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// mkdirs makes the directories down to dir, a part of a key, and makes their
// names durable. One that is there may be without a durable name still.
func (f *Files) mkdirs(dir string) error {
	at := f.dir
	todo := []string{at}
	if dir != "." {
		for part := range strings.SplitSeq(dir, "/") {
			at = path.Join(at, part)
			todo = append(todo, at)
		}
	}
	for _, d := range todo {
		if err := f.fs.Mkdir(d); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := f.fs.SyncDir(path.Dir(d)); err != nil {
			return err
		}
	}
	return nil
}

// ReadAt implements Objects.
func (f *Files) ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := checkRead(ctx, key, off); err != nil {
		return 0, err
	}
	h, err := f.open(f.path(key))
	if err != nil {
		return 0, fileError("read", key, err)
	}
	defer h.Close()
	if len(p) == 0 {
		return 0, nil
	}
	n, err := h.ReadAt(p, off)
	if err != nil && err != io.EOF {
		err = fileError("read", key, err)
	}
	return n, err
}

// Head implements Objects.
func (f *Files) Head(ctx context.Context, key string) (ObjectInfo, error) {
	if err := checkCall(ctx, "head", key); err != nil {
		return ObjectInfo{}, err
	}
	info, err := f.head(key)
	return info, fileError("head", key, err)
}

func (f *Files) head(key string) (ObjectInfo, error) {
	h, err := f.open(f.path(key))
	if err != nil {
		return ObjectInfo{}, err
	}
	size, err := h.Size()
	return ObjectInfo{Key: key, Size: size}, errors.Join(err, h.Close())
}

// List implements Objects. It looks at every file under the prefix for each
// page.
func (f *Files) List(ctx context.Context, prefix, after string) ([]ObjectInfo, bool, error) {
	if err := checkList(ctx, prefix); err != nil {
		return nil, false, err
	}
	keys, err := f.walk(ctx, strings.TrimSuffix(prefix, "/"), nil)
	if err != nil {
		return nil, false, fileError("list", prefix, err)
	}
	keys = slices.DeleteFunc(keys, func(o ObjectInfo) bool { return o.Key <= after })
	slices.SortFunc(keys, func(a, b ObjectInfo) int { return strings.Compare(a.Key, b.Key) })
	more := len(keys) > MaxList
	return keys[:min(len(keys), MaxList)], more, nil
}

func (f *Files) walk(ctx context.Context, dir string, out []ObjectInfo) ([]ObjectInfo, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	names, err := f.fs.ReadDir(f.path(dir))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return out, nil // deleted meanwhile, or not there at all
	}
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		key := path.Join(dir, n)
		if ValidKey(key) != nil {
			continue // being written, or not ours
		}
		info, err := f.head(key)
		switch {
		case errors.Is(err, errIsDir):
			if out, err = f.walk(ctx, key, out); err != nil {
				return nil, err
			}
		case errors.Is(err, fs.ErrNotExist): // deleted meanwhile
		case err != nil:
			return nil, err
		default:
			out = append(out, info)
		}
	}
	return out, nil
}

// Delete implements Objects. Directories stay: another process may be putting
// something there.
func (f *Files) Delete(ctx context.Context, key string) error {
	if err := checkCall(ctx, "delete", key); err != nil {
		return err
	}
	return fileError("delete", key, f.delete(key))
}

func (f *Files) delete(key string) error {
	h, err := f.open(f.path(key))
	if errors.Is(err, errIsDir) {
		return nil // there is no such object
	}
	if err == nil {
		err = h.Close()
	}
	if err == nil {
		err = f.fs.Remove(f.path(key))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Also when it was gone: the call that removed it may have failed to sync.
	err = f.fs.SyncDir(path.Dir(f.path(key)))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return err
}

// Clean removes what Puts that a crash cut off have left, and returns how many
// files that were. Nobody may be putting anything meanwhile.
func (f *Files) Clean(ctx context.Context) (int, error) {
	n, err := f.clean(ctx, f.dir)
	if err != nil {
		return n, fmt.Errorf("clean the objects in %s: %w", f.dir, err)
	}
	return n, nil
}

func (f *Files) clean(ctx context.Context, dir string) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	names, err := f.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	removed := 0
	for _, n := range names {
		name := path.Join(dir, n)
		if strings.HasPrefix(n, tempMark) {
			if err := f.fs.Remove(name); err != nil {
				return removed, err
			}
			removed++
			continue
		}
		h, err := f.open(name)
		switch {
		case errors.Is(err, errIsDir):
			sub, err := f.clean(ctx, name)
			removed += sub
			if err != nil {
				return removed, err
			}
		case err != nil:
			return removed, err
		default:
			if err := h.Close(); err != nil {
				return removed, err
			}
		}
	}
	return removed, nil
}
