//go:build linux && amd64

package uffd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

func TestFaultsAreServedFromTheImage(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name  string
		o     victimOptions
		devFD int
	}{
		{"system call", victimOptions{}, -1},
		{"inherited device", victimOptions{devFD: true}, 4},
		{"inherited device, unprivileged", victimOptions{devFD: true, uid: 65534}, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			img := newTestImage(16)
			shared := newTestShared(t, img)
			srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
			v := startVictim(t, shared, tc.o)
			mustAdd(t, srv, "v", mustInject(t, v, shared, tc.devFD))
			v.do("touch 4")
			v.wantSum(img.content())
			st, err := srv.Stats("v")
			if err != nil {
				t.Fatal(err)
			}
			var data int64
			for off := int64(0); off < img.size; off += pageSize {
				if !img.zero(off) {
					data += pageSize
				}
			}
			if int64(st.BytesFilled) != data || shared.Resident() != data {
				t.Errorf("filled %d, resident %d, image has %d bytes of data", st.BytesFilled, shared.Resident(), data)
			}
			if got, want := st.ZeroFaults, uint64(1); got < want {
				t.Errorf("%d faults in zeros", got)
			}
			if n := sum(st.ServiceTime[:]); n == 0 || n > st.Faults {
				t.Errorf("histogram counts %d of %d faults", n, st.Faults)
			}
		})
	}
}

func sum(v []uint64) (n uint64) {
	for _, x := range v {
		n += x
	}
	return n
}

func TestSecondCloneTakesNoDataFault(t *testing.T) {
	needRoot(t)
	img := newTestImage(8)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	want := img.content()
	a, b := startVictim(t, shared, victimOptions{}), startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "a", mustInject(t, a, shared, -1))
	mustAdd(t, srv, "b", mustInject(t, b, shared, -1))
	a.wantSum(want)
	reads := img.reads.Load()
	b.wantSum(want)
	st, _ := srv.Stats("b")
	if st.DataFaults != 0 || st.Hits != 0 || img.reads.Load() != reads {
		t.Errorf("second clone: %+v, %d more reads of the image", st, img.reads.Load()-reads)
	}
	// What one writes the other does not see, nor the next clone.
	a.do("poke 0 77")
	a.do("poke %d 78", img.zeroFrom)
	if got := b.do("peek 0"); got != fmt.Sprint(want[0]) {
		t.Errorf("a write of one clone shows in another")
	}
	c := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "c", mustInject(t, c, shared, -1))
	c.wantSum(want)
	changed := slices.Clone(want)
	changed[0], changed[img.zeroFrom] = 77, 78
	a.wantSum(changed)
	order, err := srv.Touched("a")
	if err != nil || len(order) != 8<<20/DefaultClusterSize*3/4 || !slices.IsSorted(order) {
		t.Errorf("%d clusters recorded of a read from start to end, %v", len(order), err)
	}
	if order, _ := srv.Touched("b"); len(order) != 0 {
		t.Errorf("second clone recorded %d clusters", len(order))
	}
}

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

func TestTouchBeforeAttachDoesNotPoisonTheImage(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	// Reading a hole makes a page of zeros: right for a page of zeros.
	harmless := startVictim(t, shared, victimOptions{})
	harmless.do("peek %d", img.zeroFrom)
	if shared.Resident() != pageSize {
		t.Fatalf("%d bytes resident after a read through the shared mapping", shared.Resident())
	}
	mustAdd(t, srv, "harmless", mustInject(t, harmless, shared, -1))
	harmless.wantSum(img.content())

	for name, cmd := range map[string]string{"read": "peek %d", "write": "poke %d 1"} {
		v := startVictim(t, shared, victimOptions{})
		if err := shared.Punch(0, 2*pageSize); err != nil {
			t.Fatal(err)
		}
		v.do(cmd, pageSize)
		if _, err := Inject(context.Background(), v.pid(), shared, -1); !errors.Is(err, ErrPoisoned) {
			t.Errorf("%s: attach gives %v", name, err)
		}
		if there, err := shared.present(pageSize); err != nil || there {
			t.Errorf("%s: the wrong page is still in the image, %v", name, err)
		}
		if _, err := findMapping(v.pid(), shared.File(), shared.Size(), "rw-s"); err != nil {
			t.Errorf("%s: mapping was not put back: %v", name, err)
		}
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", v.pid()))
		for _, fd := range fds {
			if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", v.pid(), fd.Name())); strings.Contains(link, "userfaultfd") {
				t.Errorf("%s: userfaultfd %s left in the process", name, fd.Name())
			}
		}
		if got := v.do("ping"); err != nil || got != "ok" {
			t.Errorf("%s: victim says %q, %v", name, got, err)
		}
		v.cmd.Process.Kill()
		v.wantDead()
	}
	next := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "next", mustInject(t, next, shared, -1))
	next.wantSum(img.content())
}

func TestUnreadablePageKills(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	broken := int64(3 << 20)
	reason := errors.New("checksum does not match")
	img.fail = func(off, n int64) error {
		if off <= broken && broken < off+n {
			return reason
		}
		return nil
	}
	shared := newTestShared(t, img)
	type report struct {
		id  string
		err error
	}
	reports := make(chan report, 4)
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { reports <- report{id, err} }})
	v, other := startVictim(t, shared, victimOptions{}), startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "v", mustInject(t, v, shared, -1))
	mustAdd(t, srv, "other", mustInject(t, other, shared, -1))
	// Its neighbours in the cluster can still be had.
	want := img.content()
	if got := v.do("peek %d", broken+pageSize); got != fmt.Sprint(want[broken+pageSize]) {
		t.Errorf("page beside the broken one reads %s", got)
	}
	v.send(fmt.Sprintf("peek %d", broken))
	if s, err := v.answer(); err == nil {
		t.Fatalf("the unreadable page was read as %q", s)
	}
	v.wantDead()
	select {
	case r := <-reports:
		if r.id != "v" || !errors.Is(r.err, reason) {
			t.Errorf("reported %q: %v", r.id, r.err)
		}
	case <-time.After(5 * time.Second):
		t.Error("nothing reported")
	}
	if got := other.do("sum 0 4096"); got == "" {
		t.Error("other VM does not answer")
	}
	if err := srv.Remove("v"); err != nil {
		t.Error(err)
	}
	if len(reports) != 0 {
		t.Errorf("%d more reports", len(reports))
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
	f.SetReadDeadline(time.Now().Add(10 * time.Second))
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

func TestServersTakeTurnsUnderLoad(t *testing.T) {
	needRoot(t)
	img := newTestImage(16)
	img.delay = 300 * time.Microsecond
	shared := newTestShared(t, img)
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	v.send("touch 4")
	for i := range 10 {
		srv := newTestServer(t, Options{ClusterSize: 4096 << (i % 3), Workers: 2})
		mustAdd(t, srv, "v", a)
		for range 10000 { // let it do something; it may have seen everything
			if st, _ := srv.Stats("v"); st.Faults >= 8 {
				break
			}
			time.Sleep(100 * time.Microsecond)
		}
		if i%2 == 0 {
			if err := srv.Remove("v"); err != nil {
				t.Fatal(err)
			}
		}
		srv.Close()
		if err := srv.Add("v", a); err == nil {
			t.Error("closed server took an attachment")
		}
		rec := a.Record()
		var err error
		if a, err = Reattach(context.Background(), rec, shared); err != nil {
			t.Fatal(err)
		}
	}
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", a)
	if err := srv.Add("v", a); err == nil {
		t.Error("one name added twice")
	}
	if s, err := v.answer(); s != "ok" {
		t.Fatalf("victim says %q, %v", s, err)
	}
	v.wantSum(img.content())
}

func TestPunchedPagesComeBack(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	vs := []*victimProc{startVictim(t, shared, victimOptions{}), startVictim(t, shared, victimOptions{})}
	for i, v := range vs {
		mustAdd(t, srv, fmt.Sprint(i), mustInject(t, v, shared, -1))
	}
	vs[0].do("poke 4096 9")
	want := img.content()
	changed := slices.Clone(want)
	changed[4096] = 9
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Microsecond):
				if err := shared.Punch(i*333333%img.size, 1<<20-1); err != nil && i*333333%img.size+1<<20-1 <= img.size {
					t.Error(err)
				}
			}
		}
	})
	for range 5 {
		vs[0].wantSum(changed)
		vs[1].wantSum(want)
	}
	close(stop)
	wg.Wait()
	if err := shared.Punch(0, img.size); err != nil || shared.Resident() != 0 || shared.count.Load() != 0 {
		t.Errorf("after punching all: %v, %d resident, %d counted", err, shared.Resident(), shared.count.Load())
	}
	vs[0].wantSum(changed)
}

func TestPrefetch(t *testing.T) {
	needRoot(t)
	img := newTestImage(8)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "v", mustInject(t, v, shared, -1))
	var order []uint32
	for i := range uint32(8 << 20 / DefaultClusterSize) {
		order = append(order, i)
	}
	n, err := srv.Prefetch(context.Background(), shared, order)
	if err != nil || n != shared.Resident() || n == 0 {
		t.Fatalf("prefetched %d of %d bytes, %v", n, shared.Resident(), err)
	}
	if n, err = srv.Prefetch(context.Background(), shared, order); err != nil || n != 0 {
		t.Errorf("second prefetch brought %d bytes, %v", n, err)
	}
	v.wantSum(img.content())
	if st, _ := srv.Stats("v"); st.DataFaults+st.Hits != 0 {
		t.Errorf("faults on prefetched data: %+v", st)
	}
	if _, err := srv.Prefetch(context.Background(), shared, []uint32{8 << 20 / DefaultClusterSize}); err == nil {
		t.Error("prefetched beyond the image")
	}
}

func TestScanDirtyIsExact(t *testing.T) {
	needRoot(t)
	img := newTestImage(8)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	rec := a.Record()
	mustAdd(t, srv, "v", a)
	want := img.content()
	v.wantSum(want) // everything mapped, nothing written, zeros included
	var pages []int64
	for _, p := range []int64{0, 1, 2, 5, 17, 700, 701, 1024, 2047} {
		v.do("poke %d %d", p*pageSize+100, p%251+1)
		want[p*pageSize+100] = byte(p%251 + 1)
		pages = append(pages, p)
	}
	scans := map[string][]scanFunc{
		"as exported":         {scanKernel, scanPagemap},
		"PAGEMAP_SCAN":        {scanKernel},
		"/proc/<pid>/pagemap": {scanPagemap},
	}
	for name, methods := range scans {
		var got []int64
		last := int64(-1)
		err := scanDirty(rec.PID, rec.Addr, rec.Length, func(off, n int64) error {
			if off <= last {
				t.Errorf("%s: run at %d touches or precedes the one before, which ends at %d", name, off, last)
			}
			last = off + n
			for ; n > 0; off, n = off+pageSize, n-pageSize {
				got = append(got, off/pageSize)
			}
			return nil
		}, methods...)
		if errors.Is(err, errNoScan) {
			t.Logf("%s: not tested, %v", name, err)
			continue
		}
		if err != nil || !slices.Equal(got, pages) {
			t.Errorf("%s: pages %v, %v, want %v", name, got, err, pages)
		}
	}
	// Without the right to know the frame, zeros may be reported, never lost.
	mem, err := ReadMemory(rec.PID, rec.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	restored := img.content()
	err = ScanDirty(rec.PID, rec.Addr, rec.Length, func(off, n int64) error {
		_, err := mem.ReadAt(restored[off:off+n], off)
		return err
	})
	if err != nil || !bytes.Equal(restored, want) {
		t.Errorf("image and dirty pages do not give the memory, %v", err)
	}
	stop := errors.New("enough")
	if err := ScanDirty(rec.PID, rec.Addr, rec.Length, func(int64, int64) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("error of yield: %v", err)
	}
	if err := ScanDirty(rec.PID, rec.Addr+1, rec.Length, nil); err == nil {
		t.Error("unaligned scan accepted")
	}
	if _, err := mem.ReadAt(make([]byte, 1), -1); err == nil {
		t.Error("read before the base address")
	}
}

// swapped counts the pages that a process has in swap, by /proc/<pid>/status.
func swapped(t *testing.T, pid int) (kib int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "VmSwap:")
	if _, err := fmt.Sscan(rest, &kib); !ok || err != nil {
		t.Fatalf("VmSwap: %v", err)
	}
	return kib
}

func TestScanDirtyFindsSwappedPages(t *testing.T) {
	needRoot(t)
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil || info.Freeswap == 0 {
		t.Skipf("needs swap space, there is none (%v)", err)
	}
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	rec := a.Record()
	mustAdd(t, srv, "v", a)
	want := img.content()
	var pages []int64
	for p := int64(100); p < 164; p++ {
		v.do("poke %d 1", p*pageSize)
		want[p*pageSize] = 1
		pages = append(pages, p)
	}
	v.do("sum 0 %d", img.size)
	v.do("pageout 0 %d", img.size)
	if n := swapped(t, v.pid()); n < 64*4 {
		t.Skipf("needs a kernel that swaps out on demand: %d of %d KiB are", n, 64*4)
	}
	for name, scan := range map[string]scanFunc{"PAGEMAP_SCAN": scanKernel, "/proc/<pid>/pagemap": scanPagemap} {
		var got []int64
		err := scanDirty(rec.PID, rec.Addr, rec.Length, func(off, n int64) error {
			for ; n > 0; off, n = off+pageSize, n-pageSize {
				got = append(got, off/pageSize)
			}
			return nil
		}, scan)
		if !errors.Is(err, errNoScan) && (err != nil || !slices.Equal(got, pages)) {
			t.Errorf("%s: pages %v, %v, want %v", name, got, err, pages)
		}
	}
	// Swapped pages of the shared image come back from swap, not by fault.
	if there, err := shared.present(0); err != nil || !there {
		t.Errorf("a page of the shared image that was swapped out is gone, %v", err)
	}
	v.wantSum(want)
}

func TestAdoptDropsZeros(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	if _, err := srv.Prefetch(context.Background(), shared, []uint32{0, 1}); err != nil {
		t.Fatal(err)
	}
	filled := shared.Resident()
	for _, off := range []int64{img.zeroFrom, img.size - pageSize} { // zeros and data by the image
		if _, err := shared.File().WriteAt(make([]byte, pageSize), off); err != nil {
			t.Fatal(err)
		}
	}
	dup, err := unix.FcntlInt(shared.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	adopted, err := AdoptShared("adopted", os.NewFile(uintptr(dup), "memfd"), img)
	if err != nil {
		t.Fatal(err)
	}
	defer adopted.Close()
	if adopted.Resident() != filled || adopted.count.Load()*pageSize != filled {
		t.Errorf("%d bytes resident, %d pages counted, %d bytes were filled", adopted.Resident(), adopted.count.Load(), filled)
	}
	if _, err := AdoptShared("wrong size", shared.File(), newTestImage(8)); err == nil {
		t.Error("adopted a memfd of another size")
	}
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

func TestServingAllocatesNothing(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	mustAdd(t, srv, "v", a)
	sv := srv.served["v"]
	buf := make([]byte, DefaultClusterSize)
	off := int64(0)
	for name, advance := range map[string]func(){
		"data": func() {
			off = (off + DefaultClusterSize) % img.zeroFrom
			if err := shared.Punch(off, DefaultClusterSize); err != nil {
				t.Fatal(err)
			}
		},
		"zero":  func() { off = img.zeroFrom },
		"there": func() { off = 0 },
	} {
		n := testing.AllocsPerRun(50, func() {
			advance()
			if err := srv.serve(sv, buf, off); err != nil {
				t.Fatal(err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations per fault", name, n)
		}
	}
	msgs := make([]byte, 2*msgSize)
	for i := range 2 {
		msgs[i*msgSize] = eventPagefault
		binary.NativeEndian.PutUint64(msgs[i*msgSize+16:], uint64(a.rec.Addr)+uint64(i)*pageSize)
	}
	if n := testing.AllocsPerRun(50, func() { srv.enqueue(sv, msgs) }); n != 0 {
		t.Errorf("%v allocations per batch of events", n)
	}
}

// BenchmarkFault measures what a guest waits for a page: a fault of a process
// through the kernel, the poller, a worker and back, image in RAM. One
// operation touches 64 MiB in one thread.
func BenchmarkFault(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: it attaches to a process by ptrace")
	}
	for _, cluster := range []int{4 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("%dKiB", cluster>>10), func(b *testing.B) {
			img := &testImage{size: 64 << 20}
			// From memory, so that the image costs nothing.
			content := img.content()
			shared := newTestShared(b, &memImage{testImage: img, content: content})
			srv := newTestServer(b, Options{ClusterSize: cluster})
			v := startVictim(b, shared, victimOptions{})
			mustAdd(b, srv, "v", mustInject(b, v, shared, -1))
			b.SetBytes(img.size)
			for b.Loop() {
				if err := shared.Punch(0, img.size); err != nil {
					b.Fatal(err)
				}
				v.do("touch 1")
			}
			st, _ := srv.Stats("v")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(st.Faults), "µs/fault")
			b.ReportMetric(float64(st.Faults)/float64(b.N), "faults/op")
		})
	}
}

// memImage is a testImage whose content has been computed.
type memImage struct {
	*testImage
	content []byte
}

func (m *memImage) Span(off int64) (format.Kind, int64) { return format.Data, m.size - off }

func (m *memImage) ReadAt(p []byte, off int64) (int, error) { return copy(p, m.content[off:]), nil }
