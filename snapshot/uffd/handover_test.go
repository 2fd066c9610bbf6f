//go:build linux

package uffd

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParseRegions(t *testing.T) {
	const mib = 1 << 20
	region := func(base, size, offset int64) string {
		return fmt.Sprintf(`{"base_host_virt_addr":%d,"size":%d,"offset":%d,"page_size":4096,"page_size_kib":4096}`, base, size, offset)
	}
	good := map[string][]Region{
		"[" + region(8*mib, mib, 0) + "]":                                        {{8 * mib, mib, 0}},
		" [" + region(8*mib, mib/2, mib/2) + "," + region(mib, mib/2, 0) + "]\n": {{mib, mib / 2, 0}, {8 * mib, mib / 2, mib / 2}},
		`[{"base_host_virt_addr":4096,"size":1048576,"offset":0,"new":true}]`:    {{4096, mib, 0}},
	}
	for text, want := range good {
		if got, err := ParseRegions([]byte(text), mib); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	bad := map[string]string{
		"":       "no list",
		"[":      "no list",
		"null":   "0 regions",
		"[] []":  "after the list",
		"[null]": "missing",
		`[{"base_host_virt_addr":4096,"size":1048576}]`:                                   "missing",
		`[{"base_host_virt_addr":4096,"size":1048576,"offset":-1}]`:                       "no list",
		"[" + region(mib+1, mib, 0) + "]":                                                 "no page of user space",
		"[" + region(0, mib, 0) + "]":                                                     "no page of user space",
		`[{"base_host_virt_addr":18446744073709547520,"size":1048576,"offset":0}]`:        "no page of user space",
		`[{"base_host_virt_addr":4096,"size":18446744073709551615,"offset":0}]`:           "outside the image",
		"[" + region(mib, mib, 4096) + "]":                                                "offset 4096",
		"[" + region(mib, 2*mib, 0) + "]":                                                 "outside the image",
		"[" + region(mib, mib-1, 0) + "]":                                                 "size 1048575",
		"[" + region(mib, 0, 0) + "]":                                                     "size 0",
		"[" + region(mib, mib/2, 0) + "]":                                                 "regions hold 524288",
		"[" + region(mib, mib/2, 0) + "," + region(mib+4096, mib/2, mib/2) + "]":          "overlap in memory",
		"[" + region(mib, mib/2, 0) + "," + region(8*mib, mib/2, 0) + "]":                 "ends at",
		"[" + region(mib, mib/2, 0) + "," + region(8*mib, mib/2-4096, mib/2+4096) + "]":   "ends at",
		"[" + strings.Repeat(region(mib, mib, 0)+",", maxRegions) + region(1, 1, 1) + "]": "65 regions",
		"[" + strings.Repeat(" ", maxHandoverBytes) + "]":                                 "allowed",
		strings.Replace("["+region(mib, mib, 0)+"]", `_kib":4096`, `_kib":2097152`, 1):    "page_size_kib is 2097152",
	}
	for text, want := range bad {
		if got, err := ParseRegions([]byte(text), mib); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s: %v, %v, want %q", text, got, err, want)
		}
	}
}

// FuzzHandover: whatever a peer says, it is refused or the regions are whole.
func FuzzHandover(f *testing.F) {
	f.Add([]byte(`[{"base_host_virt_addr":140000000000000,"size":1048576,"offset":0,"page_size":4096,"page_size_kib":4096}]`))
	f.Add([]byte(`[{"base_host_virt_addr":4096,"size":524288,"offset":524288},{"base_host_virt_addr":8388608,"size":524288,"offset":0}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		const size = 1 << 20
		regions, err := ParseRegions(b, size)
		if err != nil {
			return
		}
		a := &Attachment{regions: regions}
		var covered int64
		for off := int64(0); off < size; off += pageSize {
			r := a.regionAt(off)
			if r == nil || off < r.Offset {
				t.Fatalf("no region holds the page at %d: %v", off, regions)
			}
			addr := r.Addr + uint64(off-r.Offset)
			if l := a.locate(addr); l != r {
				t.Fatalf("address %#x of the page at %d is in %v", addr, off, l)
			}
			covered += pageSize
		}
		if covered != size {
			t.Fatalf("%d bytes covered", covered)
		}
	})
}

// FuzzEvents feeds bytes as events: only pages of the regions are removed, and
// a fault is a page of the image or an error.
func FuzzEvents(f *testing.F) {
	msg := func(event byte, a, b uint64) []byte {
		m := make([]byte, msgSize)
		m[0] = event
		binary.NativeEndian.PutUint64(m[8:], a)
		binary.NativeEndian.PutUint64(m[16:], b)
		return m
	}
	f.Add(msg(eventPagefault, 0, 0x10000))
	f.Add(append(msg(eventRemove, 0x11000, 0x13000), msg(eventRemove, 0, ^uint64(0))...))
	f.Add(msg(eventRemove, 0x12345, 0x12346))
	f.Add(msg(0x14, 1, 2))
	path := filepath.Join(f.TempDir(), "map")
	f.Fuzz(func(t *testing.T, b []byte) {
		const size = 64 * pageSize
		m, err := CreatePageMap(path, size)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		a := &Attachment{regions: []Region{{0x90000, 32 * pageSize, 0}, {0x10000, 32 * pageSize, 32 * pageSize}}, pages: m}
		v := &served{Attachment: a}
		a.noteRemovals(b)
		for rest := b; len(rest) >= msgSize; rest = rest[msgSize:] {
			switch rest[0] {
			case eventFork: // would close a descriptor of ours
			case eventRemove:
				for addr := max(msgStart(rest), 0x10000); addr < min(msgEnd(rest), 0x10000+32*pageSize); addr += pageSize {
					if off := 32*pageSize + int64(addr-0x10000)&^(pageSize-1); !m.has(off) {
						t.Fatalf("page at %d is not removed by %x", off, rest[:msgSize])
					}
				}
			default:
				if off, err := v.fault(rest[:msgSize]); err == nil && (off < 0 || off >= size || off%pageSize != 0) {
					t.Fatalf("fault at %d", off)
				}
			}
		}
	})
}

func TestPageMapAgainstAModel(t *testing.T) {
	for _, pages := range []int{1, 63, 64, 65, 1000, 40000} {
		path := filepath.Join(t.TempDir(), "m")
		size := int64(pages) * pageSize
		m, err := CreatePageMap(path, size)
		if err != nil {
			t.Fatal(err)
		}
		model := make([]bool, pages)
		rng := rand.New(rand.NewPCG(1, uint64(pages)))
		for round := range 60 {
			if round > 0 {
				p := rng.IntN(pages)
				n := 1 + rng.IntN(min(pages-p, 1+rng.IntN(300)))
				m.remove(int64(p)*pageSize, int64(n)*pageSize)
				for q := p; q < p+n; q++ {
					model[q] = true
				}
			}
			var count int64
			for _, b := range model {
				if b {
					count += pageSize
				}
			}
			if m.Removed() != count {
				t.Fatalf("%d pages: %d bytes removed, want %d", pages, m.Removed(), count)
			}
			for range 50 {
				p := rng.IntN(pages)
				end := p + 1 + rng.IntN(pages-p)
				q := p
				for q < end && model[q] == model[p] {
					q++
				}
				removed, n := m.run(int64(p)*pageSize, int64(end)*pageSize)
				if removed != model[p] || n != int64(q-p)*pageSize || m.has(int64(p)*pageSize) != model[p] {
					t.Fatalf("%d pages: run from %d to %d is %v, %d; want %v, %d", pages, p, end, removed, n/pageSize, model[p], q-p)
				}
			}
			if round%20 == 19 { // as after a restart
				if err := m.Close(); err != nil {
					t.Fatal(err)
				}
				if m, err = OpenPageMap(path, size); err != nil {
					t.Fatal(err)
				}
			}
		}
		m.Close()
	}
}

func TestDamagedPageMapIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	m, err := CreatePageMap(path, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"cut":   good[:len(good)-1],
		"empty": nil,
		"magic": append([]byte("XRNPGM01"), good[8:]...),
		"pages": append([]byte("WRNPGM01\x01"), good[9:]...),
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if m, err := OpenPageMap(path, 1<<20); err == nil {
			m.Close()
			t.Errorf("%s: opened", name)
		}
	}
	os.Remove(path)
	if _, err := OpenPageMap(path, 1<<20); err == nil {
		t.Error("opened a missing one")
	}
	for _, size := range []int64{0, -4096, 100} {
		if _, err := CreatePageMap(path, size); err == nil {
			t.Errorf("made one of %d bytes", size)
		}
	}
}
