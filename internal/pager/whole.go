package pager

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// wholes keeps memory images whole in RAM: each a file, written once, on a
// memory file system that is mounted while there are any. A VMM that maps one
// privately needs no server of pages, and shares them with its clones.
//
// A file has its name when every byte of it was verified, and is not written to
// again. Nothing is taken out of it while the image has a user: a hole would
// read as zeros. It outlives the pager; the next one finds it by its name.
type wholes struct {
	dir string // empty: none are kept
	low int64  // of the host's memory stays available
	// available tells how much of it is.
	available func() (int64, error)
	// wait is how much data may be read before the first clone starts; of a
	// larger image it is read beside it, and clones copy until it is whole.
	wait int64
	log  *slog.Logger

	mu sync.Mutex // of what is mounted
}

// wholeWait takes less time to read than the faults that it saves.
const wholeWait = 128 << 20

// whole is one image's file.
type whole struct {
	path   string
	data   int64 // bytes that are no zeros
	cancel context.CancelFunc
	done   chan struct{} // closed when it is whole, or cannot be
	err    error         // then why not
}

// failed tells that there will be no file.
func (w *whole) failed() bool {
	select {
	case <-w.done:
		return w.err != nil
	default:
		return false
	}
}

// resident is the RAM that the file takes, or will take.
func (w *whole) resident() int64 {
	if w.failed() {
		return 0
	}
	var st unix.Stat_t
	if err := unix.Stat(w.path, &st); err != nil {
		return w.data
	}
	return max(st.Blocks*512, w.data)
}

func (ws *wholes) path(id format.ID) string { return filepath.Join(ws.dir, id.String()) }

// begin starts to make an image whole, where there is room for it.
func (ws *wholes) begin(i *image) (*whole, error) {
	var data int64
	for off := int64(0); off < i.source.Size(); {
		kind, n := i.source.Span(off)
		if n <= 0 {
			return nil, fmt.Errorf("the image gives a run of %d bytes at %d", n, off)
		}
		if kind == format.Data {
			data += n
		}
		off += n
	}
	if ws.low > 0 {
		free, err := ws.available()
		if err != nil {
			return nil, err
		}
		// Zeros take RAM too when guests have touched them.
		if size := i.source.Size(); free-size < 2*ws.low {
			return nil, fmt.Errorf("it may take %d MiB and %d are available", size>>20, free>>20)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &whole{path: ws.path(i.id), data: data, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		if w.err = ws.fill(ctx, w.path, i.source); w.err != nil {
			w.err = errors.Join(w.err, ws.unlink(w.path+".tmp"))
			if ctx.Err() == nil {
				ws.log.Warn("an image cannot be had whole; its clones copy pages", "image", i.id, "err", w.err)
			}
		}
	}()
	return w, nil
}

// fill writes the image to a new file. Source verifies what it reads.
func (ws *wholes) fill(ctx context.Context, path string, src *snapshot.Image) (err error) {
	f, err := ws.create(path + ".tmp")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(src.Size()); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < src.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		kind, n := src.Span(off)
		if kind != format.Data {
			off += n
			continue
		}
		b := buf[:min(n, int64(len(buf)))]
		if _, err := src.ReadAt(b, off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(b), off, err)
		}
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	if err := f.Chmod(0o444); err != nil { // VMMs have users of their own
		return err
	}
	return os.Rename(path+".tmp", path)
}

// create makes a file, and mounts the file system for the first one.
func (ws *wholes) create(path string) (*os.File, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if err := os.MkdirAll(ws.dir, 0o700); err != nil {
		return nil, err
	}
	mounted, err := isMounted(ws.dir)
	if err == nil && !mounted {
		// No bound of its own: what may be taken is decided before.
		err = unix.Mount("wrenn-memory", ws.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700,size=0")
	}
	if err != nil {
		return nil, fmt.Errorf("mount a memory file system on %s: %w", ws.dir, err)
	}
	return os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
}

// unlink removes a file, and with the last one the file system. VMs that map it
// keep its pages.
func (ws *wholes) unlink(path string) error {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a whole image: %w", err)
	}
	return ws.unmountEmpty()
}

func (ws *wholes) unmountEmpty() error {
	mounted, err := isMounted(ws.dir)
	if err != nil || !mounted {
		return err
	}
	entries, err := os.ReadDir(ws.dir)
	if err != nil || len(entries) > 0 {
		return err
	}
	if err := unix.Unmount(ws.dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", ws.dir, err)
	}
	return nil
}

// adopt finds the file that a pager before this one made.
func (ws *wholes) adopt(i *image) (*whole, error) {
	st, err := os.Stat(ws.path(i.id))
	if err == nil && (!st.Mode().IsRegular() || st.Size() != i.source.Size()) {
		err = fmt.Errorf("%s has %d bytes, the image %d", ws.path(i.id), st.Size(), i.source.Size())
	}
	if err != nil {
		return nil, fmt.Errorf("look for the whole image: %w", err)
	}
	w := &whole{path: ws.path(i.id), cancel: func() {}, done: make(chan struct{})}
	close(w.done)
	return w, nil
}

// sweep removes the files but those of the names given.
func (ws *wholes) sweep(but map[string]bool) error {
	if ws.dir == "" {
		return nil
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if mounted, err := isMounted(ws.dir); err != nil || !mounted {
		return err
	}
	entries, err := os.ReadDir(ws.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if but[e.Name()] {
			continue
		}
		if err := os.Remove(filepath.Join(ws.dir, e.Name())); err != nil {
			return err
		}
	}
	return ws.unmountEmpty()
}

// isMounted tells whether a file system begins at dir; one that is not there
// has none.
func isMounted(dir string) (bool, error) {
	var at, above unix.Stat_t
	if err := unix.Stat(dir, &at); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	if err := unix.Stat(filepath.Dir(dir), &above); err != nil {
		return false, err
	}
	return at.Dev != above.Dev, nil
}

// wholeOf returns the file of an image that the caller uses, or nothing where
// pages have to be copied.
func (im *images) wholeOf(ctx context.Context, i *image) string {
	im.mu.Lock()
	if i.whole == nil && im.wholes.dir != "" {
		w, err := im.wholes.begin(i)
		if err != nil {
			im.wholes.log.Info("an image is not made whole; its clones copy pages", "image", i.id, "err", err)
		}
		i.whole = w
	}
	w := i.whole
	im.mu.Unlock()
	if w == nil {
		return ""
	}
	if w.data > im.wholes.wait {
		select {
		case <-w.done:
		default:
			return ""
		}
	}
	select {
	case <-w.done:
	case <-ctx.Done():
		return ""
	}
	if w.err != nil {
		return ""
	}
	return w.path
}

// keepWhole takes up a sandbox that maps a whole image. It needs nothing of us
// but that the image stays.
func (s *Server) keepWhole(r record) (*memory, error) {
	i, err := s.images.acquire(r.Memory.ImageID, acquireOptions{keep: r.Memory.KeepWarm})
	if err != nil {
		return nil, err
	}
	s.images.mu.Lock()
	defer s.images.mu.Unlock()
	if i.whole == nil {
		if i.whole, err = s.images.wholes.adopt(i); err != nil {
			// The VM has its pages mapped all the same.
			s.log.Warn("a whole image has lost its name; new clones will not share it", "sandbox", r.SandboxID, "err", err)
		}
	}
	return &memory{image: i, keep: r.Memory.KeepWarm, whole: s.images.wholes.path(i.id)}, nil
}
