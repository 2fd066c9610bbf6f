package storage

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// ErrLocked is returned by File.Lock when another handle holds the lock.
var ErrLocked = errors.New("locked by another process or handle")

// OS is the operating system's file system.
type OS struct{}

var _ FS = OS{}

// Create implements FS.
func (OS) Create(name string) (File, error) {
	return osOpen(name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

// Open implements FS.
func (OS) Open(name string) (File, error) { return osOpen(name, os.O_RDONLY) }

// OpenRW implements FS.
func (OS) OpenRW(name string) (File, error) { return osOpen(name, os.O_RDWR) }

func osOpen(name string, flag int) (File, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f}, nil
}

// Mkdir implements FS.
func (OS) Mkdir(name string) error { return os.Mkdir(name, 0o700) }

// Rename implements FS.
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// Remove implements FS.
func (OS) Remove(name string) error { return os.Remove(name) }

// ReadDir implements FS.
func (OS) ReadDir(name string) ([]string, error) {
	entries, err := os.ReadDir(name)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// SyncDir implements FS.
func (OS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// BootID implements FS with the kernel's boot ID.
func (OS) BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the kernel's boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

type osFile struct{ *os.File }

func (f *osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// Flags of fallocate(2) that package syscall does not name.
const (
	fallocKeepSize  = 0x1
	fallocPunchHole = 0x2
)

func (f *osFile) PunchHole(off, n int64) error {
	err := f.retry(func(fd int) error {
		return syscall.Fallocate(fd, fallocKeepSize|fallocPunchHole, off, n)
	})
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return f.writeZeros(off, n)
	}
	if err != nil {
		return &os.PathError{Op: "punch hole", Path: f.Name(), Err: err}
	}
	return nil
}

// writeZeros stands in for holes where the file system has none. It does not
// lengthen the file, as a hole would not.
func (f *osFile) writeZeros(off, n int64) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	n = min(n, size-off)
	zeros := make([]byte, 64<<10)
	for n > 0 {
		w, err := f.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off += int64(w)
		n -= int64(w)
	}
	return nil
}

func (f *osFile) Lock() error {
	err := f.retry(func(fd int) error { return syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB) })
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return &os.PathError{Op: "lock", Path: f.Name(), Err: ErrLocked}
	}
	if err != nil {
		return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return nil
}

// retry runs a system call on the descriptor, held open meanwhile, again while
// signals interrupt it.
func (f *osFile) retry(call func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = c.Control(func(fd uintptr) {
		for {
			if callErr = call(int(fd)); !errors.Is(callErr, syscall.EINTR) {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return callErr
}
