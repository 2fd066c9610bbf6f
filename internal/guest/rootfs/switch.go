package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"syscall"
)

// stays are entries that belong to the disk, not to a root.
var stays = map[string]bool{"lost+found": true, path.Base(stage): true, path.Base(oldRoot): true}

// Switch puts a root that is ready in place of the one on the disk mounted at
// top, before anything runs from it. Without one it does nothing.
func Switch(top string) (switched bool, err error) {
	marks := path.Join(top, stage)
	ready, moved := path.Join(marks, readyMark), path.Join(marks, movedMark)
	if _, err := os.Lstat(moved); err != nil {
		if _, err := os.Lstat(ready); err != nil {
			return false, nil
		}
		if err := os.MkdirAll(path.Join(top, oldRoot), 0o700); err != nil {
			return false, err
		}
		if err := moveAll(top, path.Join(top, oldRoot)); err != nil {
			return false, fmt.Errorf("move the old root aside: %w", err)
		}
		if err := os.Rename(ready, moved); err != nil {
			return false, err
		}
	}
	if err := moveAll(path.Join(top, NewRoot), top); err != nil {
		return false, fmt.Errorf("move the new root to its place: %w", err)
	}
	return true, os.RemoveAll(moved)
}

func moveAll(from, to string) error {
	list, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range list {
		if stays[e.Name()] {
			continue
		}
		if err := os.Rename(path.Join(from, e.Name()), path.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// Drop removes what a switch has left.
func Drop() error {
	return errors.Join(os.RemoveAll(oldRoot), os.RemoveAll(stage))
}

func groupOf(fi fs.FileInfo) (int, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, errors.New("a file's group is not known")
	}
	return int(st.Gid), nil
}
