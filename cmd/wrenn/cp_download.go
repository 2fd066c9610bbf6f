package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
)

// maxDepth bounds how deep a sandbox can make us go: it may claim any tree.
const maxDepth = 256

// download copies a file or directory of the sandbox to this machine.
func (cp *copier) download(src, dst string) error {
	if dst == stream {
		return cp.downloadStream(src)
	}
	entries, isDir, err := cp.remoteDir(src)
	if err != nil {
		return err
	}
	info, err := os.Stat(dst)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	into := err == nil && info.IsDir() || strings.HasSuffix(dst, "/")
	if isDir {
		if into && !contents(src) {
			dst = filepath.Join(dst, path.Base(src))
		}
		return cp.downloadDir(src, dst, entries)
	}
	name := path.Base(src)
	if into {
		if contents(src) {
			return fmt.Errorf("%s: not a directory", src)
		}
		dst = filepath.Join(dst, name)
	}
	return cp.downloadFile(src, dst)
}

func (cp *copier) downloadStream(src string) error {
	f, err := cp.open(src)
	if err != nil {
		if client.IsInvalidRequest(err) || client.IsConflict(err) {
			if _, isDir, lerr := cp.remoteDir(src); lerr == nil && isDir {
				return errDirToStream
			}
		}
		return err
	}
	defer f.Close()
	return cp.transfer(cp.out, f, src)
}

func (cp *copier) open(src string) (*client.File, error) {
	f, err := cp.c.GetFile(cp.ctx, cp.id, src, cp.user)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", src, err)
	}
	return f, nil
}

func (cp *copier) transfer(w io.Writer, f *client.File, src string) error {
	cp.bar.total(f.Size)
	cp.bar.name(path.Base(src))
	return cp.copy(w, f, src)
}

func (cp *copier) copy(w io.Writer, f *client.File, src string) error {
	n, err := io.Copy(w, cp.bar.reader(f))
	if err != nil {
		return fmt.Errorf("copying %s after %d bytes: %w", src, n, err)
	}
	return nil
}

// downloadFile copies one file to a path that the caller chose.
func (cp *copier) downloadFile(src, dst string) error {
	f, err := cp.open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	if real, err := filepath.EvalSymlinks(dst); err == nil {
		dst = real // write through a link, do not replace it
	}
	if info, err := os.Stat(dst); err == nil && !info.Mode().IsRegular() {
		w, err := os.OpenFile(dst, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(cp.transfer(w, f, src), w.Close())
	}
	root, err := os.OpenRoot(filepath.Dir(dst))
	if err != nil {
		return err
	}
	defer root.Close()
	cp.bar.total(f.Size)
	return cp.save(root, filepath.Base(dst), f, src, f.Mode)
}

// downloadDir copies a directory. Its names and links come from the sandbox,
// which is not trusted: all writing is confined to dst by os.Root.
func (cp *copier) downloadDir(src, dst string, entries []client.FileEntry) error {
	if err := os.MkdirAll(dst, 0o777); err != nil {
		return err
	}
	root, err := os.OpenRoot(dst)
	if err != nil {
		return err
	}
	defer root.Close()
	return cp.downloadTree(root, src, entries, 0)
}

func (cp *copier) downloadTree(root *os.Root, src string, entries []client.FileEntry, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d directories deep", src, maxDepth)
	}
	for _, e := range entries {
		if err := cp.ctx.Err(); err != nil {
			return err
		}
		if e.Name == "" || e.Name == "." || e.Name == ".." || strings.ContainsAny(e.Name, "/\x00") || !filepath.IsLocal(e.Name) {
			return fmt.Errorf("%s: the sandbox gave the file name %q, which is none", src, e.Name)
		}
		if err := cp.downloadEntry(root, path.Join(src, e.Name), e, depth); err != nil {
			return err
		}
	}
	return nil
}

func (cp *copier) downloadEntry(root *os.Root, from string, e client.FileEntry, depth int) error {
	switch {
	case e.Type == client.FileTypeFile:
		f, err := cp.open(from)
		if err != nil {
			return err
		}
		defer f.Close()
		return cp.save(root, e.Name, f, from, e.Mode)
	case e.Type == client.FileTypeSymlink || e.SymlinkTarget != "":
		// Following links to directories could go round in circles.
		cp.skip(from, "the link leads to no file: "+e.SymlinkTarget)
	case e.Type == client.FileTypeDir:
		return cp.downloadSub(root, from, e, depth)
	default:
		cp.skip(from, "not a regular file")
	}
	return nil
}

func (cp *copier) downloadSub(root *os.Root, from string, e client.FileEntry, depth int) error {
	entries, isDir, err := cp.remoteDir(from)
	if err != nil {
		return err
	}
	if !isDir {
		cp.skip(from, "it has gone or changed while copying")
		return nil
	}
	// Writable for us until it is full, whatever it was over there.
	if err := root.Mkdir(e.Name, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	sub, err := root.OpenRoot(e.Name)
	if err != nil {
		return err
	}
	defer sub.Close()
	return cp.downloadTree(sub, from, entries, depth+1)
}

// save writes a file beside its name and renames it when it is whole.
func (cp *copier) save(root *os.Root, name string, f *client.File, src string, mode uint32) (err error) {
	tmp := ".wrenn-cp-" + strconv.FormatInt(int64(os.Getpid()), 36) + "-" + strconv.FormatInt(time.Now().UnixNano(), 36)
	perm := fs.FileMode(mode) & 0o777 // never set-user-ID from a sandbox
	if perm == 0 {
		perm = 0o644
	}
	w, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm|0o200)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.Remove(tmp)
		}
	}()
	cp.bar.name(path.Base(src))
	err = cp.copy(w, f, src)
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if perm&0o200 == 0 {
		if err := root.Chmod(tmp, perm); err != nil {
			return err
		}
	}
	return root.Rename(tmp, name)
}
