package guest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// parseMode reads permission bits in octal; empty is 0.
func parseMode(s string) (fs.FileMode, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o7777 {
		return 0, invalidf("mode: %q is not a number from 0 to 7777 in octal", clip(s))
	}
	return fs.FileMode(n), nil
}

// replace writes the file beside its place and renames it there, so that an
// upload that breaks off leaves the file as it was. What is no regular file
// (a device, a pipe) is written in place: it has no content to keep.
func (up *upload) replace() (writtenFile, error) {
	if target, err := filepath.EvalSymlinks(up.path); err == nil {
		up.path = target // the file that a link leads to, not the link
	}
	mode := up.mode
	switch fi, err := os.Lstat(up.path); {
	case err == nil && fi.IsDir():
		return writtenFile{}, invalidf("path '%s' is a directory", clip(up.path))
	case err == nil && !fi.Mode().IsRegular():
		return up.write()
	case err == nil && mode == 0:
		mode = fi.Mode().Perm()
	case mode == 0:
		mode = 0o644
	}
	if err := makeDirs(filepath.Dir(up.path), up.user); err != nil {
		return writtenFile{}, err
	}
	f, err := os.CreateTemp(filepath.Dir(up.path), ".wrenn-upload-*")
	if err != nil {
		return up.write() // as in /proc, where files cannot be made
	}
	err = up.fill(f)
	if err == nil {
		// By the call itself: os.FileMode has its set-user bits elsewhere.
		if err = unix.Fchmod(int(f.Fd()), uint32(mode)); err != nil {
			err = pathError(up.path, err)
		}
	}
	if cerr := f.Close(); err == nil && cerr != nil {
		err = pathError(up.path, cerr)
	}
	if err == nil {
		if err = os.Rename(f.Name(), up.path); err != nil {
			err = pathError(up.path, err)
		}
	}
	if err != nil {
		return writtenFile{}, errors.Join(err, os.Remove(f.Name()))
	}
	return writtenFile{Name: filepath.Base(up.path), Path: up.path, Type: "file", Metadata: up.metadata}, nil
}
