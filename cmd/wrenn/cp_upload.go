package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"git.omukk.dev/wrenn/sandbox/client"
)

// upload copies a local file, directory or standard input into the sandbox.
func (cp *copier) upload(src, dst string) error {
	if src == stream {
		cp.bar.name(dst)
		return cp.put(dst, cancellable(cp.ctx, cp.in), client.PutOptions{})
	}
	info, err := os.Stat(src)
	if err != nil {
		return err // names the path
	}
	if info.IsDir() {
		return cp.uploadDir(src, dst)
	}
	if dst, err = cp.within(src, dst); err != nil {
		return err
	}
	cp.bar.total(info.Size())
	return cp.uploadFile(src, dst)
}

// cancellable makes reads of r end with ctx: the HTTP transport waits for a
// read that it began. The goroutine may wait in one (of standard input) until
// the process exits, which is right after.
func cancellable(ctx context.Context, r io.Reader) io.Reader {
	pr, pw := io.Pipe()
	go func() {
		_, err := io.Copy(pw, r)
		pw.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { pr.CloseWithError(ctx.Err()) })
	return pr
}

// within adds the source's own name to a destination that is a directory.
func (cp *copier) within(src, dst string) (string, error) {
	isDir := strings.HasSuffix(dst, "/")
	if !isDir {
		var err error
		if _, isDir, err = cp.remoteDir(dst); err != nil {
			return "", err
		}
	}
	if isDir {
		return path.Join(dst, filepath.Base(src)), nil
	}
	return dst, nil
}

func (cp *copier) uploadDir(src, dst string) error {
	if !contents(filepath.ToSlash(src)) {
		var err error
		if dst, err = cp.within(src, dst); err != nil {
			return err
		}
	}
	if cp.bar != nil { // a walk more, only for somebody who looks
		cp.bar.total(treeSize(src))
	}
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := cp.ctx.Err(); err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		to := path.Join(dst, filepath.ToSlash(rel))
		if d.IsDir() || p == src { // src itself may be a link to a directory
			return cp.mkdir(to)
		}
		info, err := os.Stat(p) // follows a link
		switch {
		case errors.Is(err, fs.ErrNotExist) && d.Type()&fs.ModeSymlink != 0:
			cp.skip(p, "the link leads nowhere")
			return nil
		case err != nil:
			return err
		case info.IsDir():
			cp.skip(p, "a link to a directory")
			return nil
		case !info.Mode().IsRegular():
			cp.skip(p, "not a regular file")
			return nil
		}
		return cp.uploadFile(p, to)
	})
}

func (cp *copier) mkdir(dir string) error {
	err := cp.c.MakeDir(cp.ctx, cp.id, dir, cp.user)
	if client.IsConflict(err) {
		// It exists. If it is no directory, the first file in it says so.
		return nil
	}
	if err != nil {
		return fmt.Errorf("creating %s: %w", dir, err)
	}
	return nil
}

func (cp *copier) uploadFile(src, dst string) error {
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	o := client.PutOptions{Mode: uint32(info.Mode().Perm())}
	if info.Mode().IsRegular() {
		o.Size = info.Size() // a pipe's size is not known
	}
	cp.bar.name(filepath.Base(src))
	return cp.put(dst, f, o)
}

func (cp *copier) put(dst string, r io.Reader, o client.PutOptions) error {
	o.User = cp.user
	if err := cp.c.PutFile(cp.ctx, cp.id, dst, cp.bar.reader(r), o); err != nil {
		return fmt.Errorf("writing %s: %w", dst, err)
	}
	return nil
}

// treeSize adds up the regular files under dir; what cannot be read counts 0.
func treeSize(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if info, serr := os.Stat(p); err == nil && serr == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return nil
	})
	return n
}
