//go:build linux && amd64

package uffd

import (
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
	if touched, err := srv.Touched("v"); err != nil || len(touched) != 0 {
		t.Errorf("faults on prefetched data: %v, %v", touched, err)
	}
	if _, err := srv.Prefetch(context.Background(), shared, []uint32{8 << 20 / DefaultClusterSize}); err == nil {
		t.Error("prefetched beyond the image")
	}
}

// TestPrefetchDoesNotHideATouch: a VMM that read a hole has seen zeros, also
// when the page is right by the time it is attached.
func TestPrefetchDoesNotHideATouch(t *testing.T) {
	needRoot(t)
	shared := newTestShared(t, newTestImage(4))
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{})
	v.do("peek 4096")
	if _, err := srv.Prefetch(context.Background(), shared, []uint32{0}); !errors.Is(err, ErrPoisoned) {
		t.Errorf("prefetch over it: %v", err)
	}
	if _, err := Inject(context.Background(), v.pid(), shared, -1); !errors.Is(err, ErrPoisoned) {
		t.Errorf("attach: %v", err)
	}
	next := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "next", mustInject(t, next, shared, -1))
	next.wantSum(newTestImage(4).content())
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
