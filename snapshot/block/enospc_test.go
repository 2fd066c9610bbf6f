package block

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
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

// TestAFlushWithoutRoomForTheMapIsTriedAgain: nothing has been lost by it, and
// what was acknowledged before is durable once there is room.
func TestAFlushWithoutRoomForTheMapIsTriedAgain(t *testing.T) {
	fs := snaptest.NewFS()
	o := open(t, fs)
	_, err := o.WriteAt(bytes.Repeat([]byte{7}, BlockSize), 2*BlockSize)
	must(t, err)
	fs.FailWith(func(_ int, what string) error {
		if strings.HasPrefix(what, "write /o.map") {
			return syscall.ENOSPC
		}
		return nil
	})
	for range 2 {
		if err := o.Flush(); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("without room: %v, want ENOSPC", err)
		}
	}
	fs.FailWith(nil)
	must(t, o.Flush())
	after := open(t, fs.Crash(func(string) bool { return false }))
	if b := content(t, after); b[2*BlockSize] != 7 || b[0] != baseFill {
		t.Errorf("after a power failure the block holds %d, the one before it %d", b[2*BlockSize], b[0])
	}
}

// TestAnFsyncWithoutRoomIsFinal: what the kernel could not write it forgets, so
// it must not look as if waiting for room helped.
func TestAnFsyncWithoutRoomIsFinal(t *testing.T) {
	fs := snaptest.NewFS()
	o := open(t, fs)
	_, err := o.WriteAt(bytes.Repeat([]byte{7}, BlockSize), 0)
	must(t, err)
	fs.FailWith(func(_ int, what string) error {
		if strings.HasPrefix(what, "sync /o.data") {
			return syscall.ENOSPC
		}
		return nil
	})
	if err := o.Flush(); err == nil || errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v, want an error that is not ENOSPC", err)
	}
	fs.FailWith(nil)
	if err := o.Flush(); err == nil {
		t.Error("the next one is believed")
	}
}
