package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
)

// maxWatchedDirs bounds the directories below one recursive watch.
const maxWatchedDirs = 8192

// watch is one watched directory. Its events come in the order of the changes;
// next must be called by one goroutine at a time.
type watch struct {
	s         *Server
	root      string // what the caller named
	real      string // where it leads
	recursive bool
	entries   bool
	fs        *fsnotify.Watcher
	dirs      int
	// pending are events that next has yet to return.
	pending []*pb.FilesystemEvent
}

func (s *Server) newWatch(path string, recursive, entries, network bool) (*watch, error) {
	real, err := checkDir(path)
	if err != nil {
		return nil, err
	}
	if !network && onNetwork(real) {
		return nil, invalidf("path '%s' is on a network file system, where changes made elsewhere are not seen", clip(path))
	}
	fw, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, watchError(path, err)
	}
	w := &watch{s: s, root: path, real: real, recursive: recursive, entries: entries, fs: fw}
	if err := w.add(real, false); err != nil {
		_ = fw.Close()
		return nil, err
	}
	return w, nil
}

// add watches a directory, and those below it. Where it is new, what is in it
// already may have come before the watch: announce makes events of it.
func (w *watch) add(dir string, announce bool) error {
	if !w.recursive {
		return w.addOne(dir)
	}
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if p == w.real {
				return watchError(w.root, err)
			}
			return nil // gone again
		}
		if announce && p != dir {
			w.queue(p, pb.EventType_EVENT_TYPE_CREATE)
		}
		if !d.IsDir() {
			return nil
		}
		err = w.addOne(p)
		if p != w.real && codeOf(err) == connect.CodeNotFound {
			return nil
		}
		return err
	})
}

func (w *watch) addOne(dir string) error {
	if w.dirs++; w.dirs > maxWatchedDirs {
		return connect.NewError(connect.CodeResourceExhausted,
			fmt.Errorf("path '%s' has more than %d directories", clip(w.root), maxWatchedDirs))
	}
	if err := w.fs.Add(dir); err != nil {
		return watchError(dir, err)
	}
	return nil
}

func watchError(path string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EMFILE) {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("path '%s': the kernel's limit of watches is reached", clip(path)))
	}
	return pathError(path, err)
}

// next waits for the next event. It returns nil, nil at done or tick, and
// an error when the watch is over.
func (w *watch) next(done <-chan struct{}, tick <-chan time.Time) (*pb.FilesystemEvent, error) {
	for len(w.pending) == 0 {
		select {
		case <-done:
			return nil, nil
		case <-tick:
			return nil, nil
		case ev, ok := <-w.fs.Events:
			if !ok {
				return nil, connect.NewError(connect.CodeCanceled, errors.New("the watch was removed"))
			}
			if err := w.take(ev); err != nil {
				return nil, err
			}
		case err, ok := <-w.fs.Errors:
			switch {
			case !ok:
				return nil, connect.NewError(connect.CodeCanceled, errors.New("the watch was removed"))
			case errors.Is(err, fsnotify.ErrEventOverflow):
				return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("changes came faster than they were read, and some are lost"))
			default:
				return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("watching '%s': %w", clip(w.root), err))
			}
		}
	}
	ev := w.pending[0]
	w.pending = w.pending[1:]
	return ev, nil
}

// take turns one notification into events.
func (w *watch) take(ev fsnotify.Event) error {
	if ev.Name == w.real {
		if ev.Has(fsnotify.Remove) || ev.Has(fsnotify.Rename) {
			return connect.NewError(connect.CodeNotFound, fmt.Errorf("the watched directory '%s' is gone", clip(w.root)))
		}
		return nil // of the directory itself, not of what is in it
	}
	for _, k := range []struct {
		op fsnotify.Op
		t  pb.EventType
	}{
		{fsnotify.Create, pb.EventType_EVENT_TYPE_CREATE},
		{fsnotify.Write, pb.EventType_EVENT_TYPE_WRITE},
		{fsnotify.Remove, pb.EventType_EVENT_TYPE_REMOVE},
		{fsnotify.Rename, pb.EventType_EVENT_TYPE_RENAME},
		{fsnotify.Chmod, pb.EventType_EVENT_TYPE_CHMOD},
	} {
		if ev.Has(k.op) {
			w.queue(ev.Name, k.t)
		}
	}
	if w.recursive && ev.Has(fsnotify.Create) {
		if fi, err := os.Lstat(ev.Name); err == nil && fi.IsDir() {
			return w.add(ev.Name, true)
		}
	}
	return nil
}

func (w *watch) queue(path string, t pb.EventType) {
	name := strings.TrimPrefix(strings.TrimPrefix(path, w.real), "/")
	ev := &pb.FilesystemEvent{Name: strings.ToValidUTF8(name, "�"), Type: t}
	if w.entries {
		// What is gone by now has no entry.
		if e, err := w.s.newLister().entry(filepath.Join(w.root, name)); err == nil {
			ev.Entry = e
		}
	}
	w.pending = append(w.pending, ev)
}

func (w *watch) close() { _ = w.fs.Close() }

// onNetwork tells of file systems that other machines change.
func onNetwork(path string) bool {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, unix.V9FS_MAGIC:
		return true
	}
	return false
}
