package block

import (
	"bytes"
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// On a real disk that is full, writes fail and what was written before stays.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("a small file system cannot be mounted here: %v", err)
	}
	t.Cleanup(func() { must(t, syscall.Unmount(dir, 0)) })
	base := filled{4 << 20, baseFill}
	o, err := OpenOverlay(storage.OS{}, filepath.Join(dir, "o"), base)
	must(t, err)
	defer func() { must(t, o.Close()) }()
	const chunk = 64 << 10
	full := int64(0)
	for ; full < base.size; full += chunk {
		if _, err = o.WriteAt(bytes.Repeat([]byte{7}, chunk), full); err != nil {
			break
		}
	}
	if !errors.Is(err, syscall.ENOSPC) || full == 0 {
		t.Fatalf("after %d bytes: %v, want ENOSPC", full, err)
	}
	for i, b := range content(t, o) {
		want := byte(baseFill)
		if int64(i) < full {
			want = 7
		}
		if b != want {
			t.Fatalf("byte %d is %d, want %d", i, b, want)
		}
	}
	// Freed space can be used again, by the same handle.
	must(t, o.Zero(0, full))
	_, err = o.WriteAt(bytes.Repeat([]byte{8}, chunk), full)
	must(t, err)
	must(t, o.Flush())
}
