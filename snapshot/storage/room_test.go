package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"
)

func TestFreeBelow(t *testing.T) {
	dir := t.TempDir()
	if n, err := FreeBelow(dir); err != nil || n <= 0 {
		t.Errorf("free: %d, %v", n, err)
	}
	if _, err := FreeBelow(dir + "/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no directory: %v", err)
	}
}

func TestNoRoom(t *testing.T) {
	for err, want := range map[error]bool{nil: false, syscall.ENOSPC: true, syscall.EDQUOT: true, syscall.EIO: false} {
		if err != nil {
			err = fmt.Errorf("write: %w", err)
		}
		if NoRoom(err) != want {
			t.Errorf("%v: %v", err, !want)
		}
	}
}
