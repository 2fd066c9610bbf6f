//go:build linux && amd64

package uffd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

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
