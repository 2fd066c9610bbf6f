package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockName = ".lock"
	// tmpPrefix marks what is under construction. Only the holder of the lock
	// makes such names, so whoever has just got the lock may remove all of them.
	tmpPrefix = ".tmp-"
	lockPoll  = 100 * time.Millisecond
)

// lockDir takes the build lock of dir, making dir if it is missing. It waits
// for whoever has it; waiting is told once. The lock lives until every
// descriptor of the returned file is closed, those of child processes included.
func lockDir(ctx context.Context, dir string, waiting func()) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making %s: %w", dir, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the build lock: %w", err)
	}
	// flock has no form that waits and can be cancelled, so it is polled.
	ticker := time.NewTicker(lockPoll)
	defer ticker.Stop()
	for told := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("locking %s: %w", f.Name(), err), f.Close())
		}
		if !told {
			told = true
			waiting()
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("waiting for another build in %s: %w", dir, context.Cause(ctx)), f.Close())
		case <-ticker.C:
		}
	}
}

// sweep removes what earlier builds left half made in dir. The caller has the
// lock of dir.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("reading %s: %w", dir, err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("removing the rest of an earlier build: %w", err)
		}
	}
	return nil
}

// removeTree removes a directory in which a root file system was built. If
// anything is still mounted in it, that is unmounted first, and if that fails
// nothing is removed: it could be the host's /dev or /sys.
func removeTree(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmounting %s: %w", m, err)
		}
	}
	return os.RemoveAll(dir)
}

// mountsBelow lists the mount points below dir, the last mounted first.
func mountsBelow(dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("reading the mount table: %w", err)
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if p := unescapeMount(f[4]); strings.HasPrefix(p, dir+"/") {
			found = append(found, p)
		}
	}
	slices.Reverse(found)
	return found, nil
}

// unescapeMount undoes the octal escapes of the mount table.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// publish makes the finished directory tmp visible as dst, replacing what is
// there. Everything in it is on disk before the name is.
func publish(tmp, dst string) error {
	if err := syncTree(tmp); err != nil {
		return err
	}
	parent := filepath.Dir(dst)
	if _, err := os.Lstat(dst); err == nil {
		// A crash between the two renames loses the old one, which was to go.
		old := filepath.Join(parent, tmpPrefix+"old-"+filepath.Base(dst))
		if err := errors.Join(os.RemoveAll(old), os.Rename(dst, old)); err != nil {
			return fmt.Errorf("replacing %s: %w", dst, err)
		}
		defer os.RemoveAll(old)
	}
	if err := os.Rename(tmp, dst); err != nil {
		return fmt.Errorf("publishing %s: %w", dst, err)
	}
	return syncPath(parent)
}

func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !e.IsDir() && !e.Type().IsRegular() {
			return nil
		}
		return syncPath(path)
	})
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("opening to sync: %w", err)
	}
	if err := f.Sync(); err != nil {
		return errors.Join(fmt.Errorf("syncing %s: %w", path, err), f.Close())
	}
	return f.Close()
}
