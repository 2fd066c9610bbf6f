//go:build linux && amd64

package uffd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestInterruptedCallsNoticeNothing(t *testing.T) {
	needRoot(t)
	shared := newTestShared(t, newTestImage(1))
	v := startVictim(t, shared, victimOptions{})
	proc, err := openProcess(v.pid())
	if err != nil {
		t.Fatal(err)
	}
	defer proc.close()
	blocked := strings.Fields(v.do("block"))
	if len(blocked) != 5 {
		t.Fatalf("victim says %q", blocked)
	}
	for round := range 3 {
		for _, b := range blocked {
			name, num, _ := strings.Cut(b, "=")
			var tid int
			fmt.Sscan(num, &tid)
			onDyingThread(func() {
				tr, err := seize(context.Background(), proc, tid)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				for range 2 {
					if got, err := tr.call(unix.SYS_GETTID); err != nil || int(got) != tid {
						t.Errorf("%s, round %d: gettid gives %d, %v", name, round, got, err)
					}
				}
				if _, err := tr.call(unix.SYS_CLOSE, 9999); err != unix.EBADF {
					t.Errorf("%s: close of no descriptor gives %v", name, err)
				}
				if err := tr.release(); err != nil {
					t.Errorf("%s: release: %v", name, err)
				}
			})
		}
	}
	got := strings.Fields(v.do("unblock"))
	slices.Sort(got)
	want := []string{"futex=0", "nanosleep=0,true,true", "ppoll=1,0", "read=4,true,data", "spin=true"}
	if !slices.Equal(got, want) {
		t.Errorf("calls ended with\n%v, want\n%v", got, want)
	}
}

func TestTracerDiesHoldingAThread(t *testing.T) {
	needRoot(t)
	shared := newTestShared(t, newTestImage(1))
	v := startVictim(t, shared, victimOptions{})
	proc, err := openProcess(v.pid())
	if err != nil {
		t.Fatal(err)
	}
	defer proc.close()
	onDyingThread(func() {
		if err := unix.PtraceSeize(v.pid()); err != nil {
			t.Error(err)
		}
	})
	if got := v.do("ping"); got != "ok" {
		t.Fatalf("seized and never changed, the victim says %q", got)
	}
	untraced(t, v.pid())
	onDyingThread(func() {
		if _, err := seize(context.Background(), proc, v.pid()); err != nil {
			t.Error(err)
		}
	})
	v.wantDead()
}

// untraced waits until a process has no tracer any more: onDyingThread returns
// before its thread has ended, which has no event.
func untraced(t *testing.T, pid int) {
	t.Helper()
	for range 60000 {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "\nTracerPid:\t0\n") {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the tracer does not end")
}

func TestInjectUnderSignals(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Kill(v.pid(), unix.SIGURG) // the Go runtime handles it and goes on
			}
		}
	})
	a := mustInject(t, v, shared, -1)
	mustAdd(t, srv, "v", a)
	v.wantSum(img.content())
	close(stop)
	wg.Wait()
}

func TestFailedInjectLeavesTheProcess(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{uid: 65534, devFD: true})
	ctx := context.Background()
	// Not the image that it maps.
	if _, err := Inject(ctx, v.pid(), newTestShared(t, newTestImage(4)), -1); err == nil {
		t.Error("attached to a process that does not map the image")
	}
	// No right to make a userfaultfd by itself, and a descriptor that is none.
	_, err := Inject(ctx, v.pid(), shared, -1)
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("unprivileged process without the device: %v", err)
	}
	if _, err = Inject(ctx, v.pid(), shared, 77); !errors.Is(err, unix.EBADF) {
		t.Errorf("wrong descriptor: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err = Inject(cancelled, v.pid(), shared, 4); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := findMapping(v.pid(), shared.File(), shared.Size(), "rw-s"); err != nil {
		t.Errorf("after failures: %v", err)
	}
	mustAdd(t, srv, "v", mustInject(t, v, shared, 4))
	v.wantSum(img.content())
	if _, err = Inject(ctx, v.pid(), shared, 4); err == nil {
		t.Error("attached twice")
	}
}

func TestInjectIntoStoppedOrDeadProcess(t *testing.T) {
	needRoot(t)
	shared := newTestShared(t, newTestImage(1))
	v := startVictim(t, shared, victimOptions{})
	if err := unix.Kill(v.pid(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ { // until the kernel has stopped it: no event tells
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", v.pid()))
		if bytes.Contains(b, []byte(") T ")) {
			break
		}
		if i > 1000 {
			t.Fatal("victim does not stop")
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := Inject(context.Background(), v.pid(), shared, -1); err == nil {
		t.Error("attached to a stopped process")
	}
	unix.Kill(v.pid(), unix.SIGCONT)
	if got := v.do("ping"); got != "ok" {
		t.Errorf("victim says %q", got)
	}
	v.cmd.Process.Kill()
	v.wantDead()
	if _, err := Inject(context.Background(), v.pid(), shared, -1); !errors.Is(err, ErrGone) {
		t.Errorf("dead process: %v", err)
	}
	if _, err := Inject(context.Background(), 0, shared, -1); err == nil {
		t.Error("attached to process 0")
	}
}

func TestReattachRaisesLostFaultsAgain(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	v.send("touch 4")
	// Read events and answer none, as a server that dies does.
	f, err := pollable(a.fd)
	if err != nil {
		t.Fatal(err)
	}
	f.SetReadDeadline(time.Now().Add(time.Minute))
	b := make([]byte, 64*msgSize)
	if n, err := f.Read(b); err != nil || n < msgSize {
		t.Fatalf("read %d bytes of events, %v", n, err)
	}
	f.Close()
	rec := a.Record()
	a.Close()

	dup, err := unix.FcntlInt(shared.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	adopted, err := AdoptShared("adopted", os.NewFile(uintptr(dup), "memfd"), img)
	if err != nil {
		t.Fatal(err)
	}
	defer adopted.Close()
	srv := newTestServer(t, Options{})
	defer srv.Close()
	for name, bad := range map[string]func(*AttachmentRecord){
		"start time": func(r *AttachmentRecord) { r.StartTime++ },
		"descriptor": func(r *AttachmentRecord) { r.RemoteFD = 3 },
		"address":    func(r *AttachmentRecord) { r.Addr += pageSize },
		"length":     func(r *AttachmentRecord) { r.Length -= pageSize },
		"no address": func(r *AttachmentRecord) { r.Addr = 0 },
		"pid":        func(r *AttachmentRecord) { r.PID = -1 },
	} {
		r := rec
		bad(&r)
		if _, err := Reattach(context.Background(), r, adopted); err == nil {
			t.Errorf("attached again with a wrong %s", name)
		}
	}
	a, err = Reattach(context.Background(), rec, adopted)
	if err != nil {
		t.Fatal(err)
	}
	mustAdd(t, srv, "v", a)
	if s, err := v.answer(); s != "ok" {
		t.Fatalf("victim says %q, %v", s, err)
	}
	v.wantSum(img.content())
}

func TestBadArguments(t *testing.T) {
	for _, size := range []int64{0, -4096, 4095} {
		if _, err := NewShared("uffd-test-bad", &testImage{size: size}); err == nil {
			t.Errorf("image of %d bytes accepted", size)
		}
	}
	for _, name := range []string{"", strings.Repeat("x", 201)} {
		if _, err := NewShared(name, newTestImage(1)); err == nil {
			t.Errorf("name of %d bytes accepted", len(name))
		}
	}
	for _, size := range []int{1, 4095, 12288, 4 << 20, -4096} {
		if _, err := NewServer(Options{ClusterSize: size}); err == nil {
			t.Errorf("cluster size %d accepted", size)
		}
	}
	for _, line := range []string{"", "1-2", "zz-2 rw-s 0 0:1 5", "2-1 rw-s 0 0:1 5", "1-2 rw-s x 0:1 5", "1-2 rw-s 0 01 5", "1-2 rw-s 0 0:1 x", "1 rw-s 0 0:1 5"} {
		if v, err := parseVMA(line); err == nil {
			t.Errorf("maps line %q parsed as %+v", line, v)
		}
	}
	v, err := parseVMA("7f0000000000-7f0000002000 rw-s 00001000 00:01 1034                       /memfd:a b (deleted)")
	if err != nil || v.start != 0x7f0000000000 || v.length() != 0x2000 || v.offset != 0x1000 || v.inode != 1034 || v.dev != unix.Mkdev(0, 1) || v.path != "/memfd:a b (deleted)" {
		t.Errorf("parsed %+v, %v", v, err)
	}
}
