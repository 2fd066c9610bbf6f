package qemu

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
	"git.omukk.dev/wrenn/sandbox/snapshot/nbd"
)

// ramDisk is an nbd.Device in memory.
type ramDisk struct {
	mu sync.Mutex
	b  []byte
}

func (d *ramDisk) Size() int64  { return int64(len(d.b)) }
func (d *ramDisk) Flush() error { return nil }
func (d *ramDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(p, d.b[off:]), nil
}
func (d *ramDisk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.b[off:], p), nil
}
func (d *ramDisk) Zero(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.b[off : off+n])
	return nil
}

// serve starts an NBD server; stop ends it as a crash would.
func serve(t *testing.T, sock string, d nbd.Device) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(sock, 0o666); err != nil { // QEMU may run as somebody else
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- nbd.Serve(ctx, l, d, nbd.Options{Exclusive: true}) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("NBD server: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// newTap opens a tap device in a network namespace of its own, which lives as
// long as the descriptor.
func newTap(t *testing.T) *os.File {
	t.Helper()
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- result{err: err}
			return
		}
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			ch <- result{err: err}
			return
		}
		ifr, _ := unix.NewIfreq("tap0")
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
		ch <- result{os.NewFile(uintptr(fd), "tap0"), err}
	}()
	r := <-ch
	if r.err != nil {
		t.Skipf("skipped: this test needs a tap device: %v", r.err)
	}
	t.Cleanup(func() { r.f.Close() })
	return r.f
}

var diskLine = regexp.MustCompile(`(?m)^disk (ok|read|write)[^\n]*`)

// waitDisk polls for n more good disk lines and allows no bad ones.
func waitDisk(t *testing.T, s vmmtest.Subject, m vmm.Machine, n int) {
	t.Helper()
	count := func() int {
		b, err := os.ReadFile(m.Record().ConsolePath)
		if err != nil {
			t.Fatal(err)
		}
		good := 0
		for _, l := range diskLine.FindAllString(string(b), -1) {
			if !strings.HasPrefix(l, "disk ok") {
				t.Fatalf("the guest's disk: %s", l)
			}
			good++
		}
		return good
	}
	want := count() + n
	ctx := limited(t, s.Patience)
	for count() < want {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-m.Done():
			t.Fatalf("the machine ended: %v", m.Err())
		case <-ctx.Done():
			t.Fatalf("%d of %d disk lines; the console ends with %s", count(), want, vmm.Tail(m.Record().ConsolePath, 1000))
		}
	}
}

// TestVMDevices runs QEMU as an unprivileged user with disk and network, over
// a restart of the disk's server and a restore with a new server and tap.
func TestVMDevices(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skipped: this test changes users and makes a tap device, which needs root")
	}
	const nobody = 65534
	s := subject(t, Options{Accel: AccelTCG, UID: nobody, GID: nobody})
	s.Boot.MAC = "02:77:72:00:00:02"
	s.Boot.Cmdline = "vmmtest.modules=1 vmmtest.disk=1"
	open := func(dir string) { // t.TempDir makes directories that only root enters
		for d := dir; d != filepath.Clean(os.TempDir()); d = filepath.Dir(d) {
			if err := os.Chmod(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	disk := &ramDisk{b: make([]byte, 16<<20)}
	a := s.Args(t)
	open(a.Dir)
	a.DiskSocket, a.Tap = filepath.Join(a.Dir, "nbd.sock"), newTap(t)
	stop := serve(t, a.DiskSocket, disk)
	ctx := limited(t, 2*s.Patience)
	m, err := s.Driver.Boot(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Kill(ctx) }()
	waitDisk(t, s, m, 5)
	if b, _ := os.ReadFile("/proc/" + strconv.Itoa(m.PID()) + "/status"); !strings.Contains(string(b), "\nUid:\t65534\t65534\t65534\t65534\n") ||
		!strings.Contains(string(b), "\nSeccomp:\t2\n") {
		t.Errorf("QEMU has its rights still: %s", b)
	}
	if b, _ := os.ReadFile(m.Record().ConsolePath); !strings.Contains(string(b), "NET eth0=true") {
		t.Errorf("the guest has no network card: %s", b)
	}

	stop() // requests of the guest wait now
	serve(t, a.DiskSocket, disk)
	waitDisk(t, s, m, 5)

	state := filepath.Join(t.TempDir(), "state")
	f, err := os.Create(state)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.SaveState(ctx, f); err != nil {
		t.Fatal(err)
	}
	rec := m.Record()
	if err := m.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	r := vmm.RestoreArgs{HostArgs: a.HostArgs, State: vmm.State{Spec: a.Spec, Info: rec.Info, File: state}}
	r.Tap = newTap(t)
	again, err := s.Driver.Restore(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Kill(ctx) }()
	if err := again.Continue(ctx); err != nil {
		t.Fatal(err)
	}
	waitDisk(t, s, again, 10)
	s.WaitTicks(t, again, 20)
}

// TestVMConsoleIsBounded: a guest that writes without end loses its text, not
// the host's disk, and goes on.
func TestVMConsoleIsBounded(t *testing.T) {
	s := subject(t, Options{Accel: AccelTCG})
	s.Boot.Cmdline = "vmmtest.period=0"
	ctx, a := limited(t, s.Patience), s.Args(t)
	a.ConsolePath = filepath.Join(a.Dir, "full.log")
	f, err := os.Create(a.ConsolePath)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Not yet half full, so that the file is kept: the rest fills soon.
	if err := f.Truncate(logLimit / 2); err != nil {
		t.Fatal(err)
	}
	m, err := s.Driver.Boot(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Kill(ctx) }()
	s.WaitTicks(t, m, 3)
	if err := f.Truncate(logLimit - 100); err != nil {
		t.Fatal(err)
	}
	for size := int64(0); size < logLimit; {
		fi, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		size = fi.Size()
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("the console stopped at %d bytes", size)
		}
	}
	// Room again: the guest is heard again, so it lived on.
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	s.WaitTicks(t, m, 3)
}
