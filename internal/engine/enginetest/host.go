// Package enginetest is a host made of fakes on which a real engine runs: VMs
// (vmmtest.Fake, with real processes), a pager, a network and guests. They go
// on living when the engine is abandoned, as their real counterparts do when
// its process is killed, and they note what no engine may do: take the pages
// or the disk of a VM that lives, or serve the overlay of an earlier run.
//
// Tests of internal/engine and of what lies above may import it; production
// code must not.
package enginetest

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/localca"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// BaseName is the base template of a Host, DiskSize the bytes of its disk.
const (
	BaseName = "base"
	DiskSize = 1 << 20
)

// Host is everything outside of the engine.
type Host struct {
	Dir     string
	Driver  *vmmtest.Fake
	Network *Network
	Pager   *Pager
	// Guest answers what is asked of the guests' agents beside /init and
	// /sync; nil knows nothing more. Set it before the first sandbox.
	Guest http.Handler
	// FS is where the store lives; nil is the disk.
	FS storage.FS
	// Policy bounds what compaction lets an image be made of.
	Policy snapshot.CompactionPolicy

	t      testing.TB
	guests *guests
	// authority is one for all engines of a host.
	authority *localca.Authority

	mu    sync.Mutex
	wrong []string
}

// New makes a host with nothing on it. What is wrong on it in the end fails t.
func New(t testing.TB) *Host {
	t.Helper()
	h := &Host{Dir: stateDir(t), Driver: vmmtest.NewFake(), t: t}
	h.Network = newNetwork(h)
	h.Pager = newPager(t, h)
	h.guests = newGuests(t, h)
	var err error
	if h.authority, err = localca.OpenEgress(t.TempDir(), time.Now); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, m := range h.Driver.Machines() {
			_ = h.Driver.End(m.ID, "the test is over")
		}
		for _, w := range h.Wrong() {
			t.Error(w)
		}
	})
	return h
}

// stateDir is in RAM where there is such a place: every step syncs files.
func stateDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "wrenn-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// OpenStore opens the host's snapshot store for writing. A process that is
// being started by another test may hold the lock of the one before for as
// long as it takes to be what it will be.
func (h *Host) OpenStore() *snapshot.Store {
	h.t.Helper()
	s, err := snapshot.Open(filepath.Join(h.Dir, "store"), snapshot.Options{Compaction: h.Policy, FS: h.FS})
	if err != nil {
		h.t.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	end := time.After(30 * time.Second)
	for {
		txn, err := s.Begin()
		if err == nil {
			err = txn.Abort()
		}
		if err == nil {
			return s
		}
		select {
		case <-tick.C:
		case <-end:
			h.t.Fatalf("the store cannot be written: %v", err)
		}
	}
}

// Options are an engine's on this host.
func (h *Host) Options(store *snapshot.Store) engine.Options {
	return engine.Options{Dir: h.Dir, Store: store, Driver: h.Driver, Network: h.Network, Pager: h.Pager.Client, RetryAfter: time.Millisecond, Authority: h.authority}
}

// BaseFiles writes a base template's disk of pages that begin with digest.
func (h *Host) BaseFiles(digest string) engine.BaseFiles {
	h.t.Helper()
	path := filepath.Join(h.Dir, "rootfs-"+digest)
	disk := make([]byte, DiskSize)
	copy(disk, digest)
	if err := os.WriteFile(path, disk, 0o600); err != nil {
		h.t.Fatal(err)
	}
	return engine.BaseFiles{Name: BaseName, Digest: digest, Rootfs: path, Kernel: "/dev/null", Initrd: "/dev/null", KernelDigest: digest}
}

// Start opens an engine on the host with the base template imported. It is
// closed with the test.
func (h *Host) Start(change func(*engine.Options)) *engine.Engine {
	h.t.Helper()
	store := h.OpenStore()
	o := h.Options(store)
	if change != nil {
		change(&o)
	}
	e, err := engine.New(h.t.Context(), o)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := e.ImportBase(h.t.Context(), h.BaseFiles("one"), nil); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { e.Close(); store.Close() })
	return e
}

// VM returns the live machine of a sandbox.
func (h *Host) VM(id string) (vmmtest.FakeStatus, bool) {
	for _, m := range h.Driver.Machines() {
		if m.ID == id {
			return m, true
		}
	}
	return vmmtest.FakeStatus{}, false
}

// WriteMemory is what a guest does to its RAM.
func (h *Host) WriteMemory(id string, b []byte, off int64) error {
	return h.memory(id, func(fd int) error { _, err := unix.Pwrite(fd, b, off); return err })
}

// ReadMemory reads a guest's RAM.
func (h *Host) ReadMemory(id string, b []byte, off int64) error {
	return h.memory(id, func(fd int) error { _, err := unix.Pread(fd, b, off); return err })
}

func (h *Host) memory(id string, f func(fd int) error) error {
	vm, ok := h.VM(id)
	if !ok {
		return fmt.Errorf("sandbox %s has no live VM", id)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/fd/3", vm.PID), unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return f(fd)
}

func (h *Host) note(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wrong = append(h.wrong, fmt.Sprintf(format, args...))
}

// Wrong returns what was done that must not be.
func (h *Host) Wrong() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.wrong...)
}
