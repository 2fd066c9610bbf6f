//go:build linux

package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PageMap remembers which pages of a VM in copy mode were removed from its
// memory, by a balloon for example: they are zeros from then on, whatever the
// image holds. The kernel cannot be asked later, a removed page looks to it
// like one that was never there.
//
// It is a file that is mapped, so that it survives the death of the server.
// The kernel tells of a removal once, in a read of the userfaultfd; a server
// killed between that read and its note of it would lose the removal. So the
// read goes right into the mapped file: what the kernel has handed out is in
// the file, and whoever opens it next applies it again. Removed pages stay
// removed, so applying twice does no harm.
//
// The file outlives no boot of the host, as the VM does not, so it is never
// synced. It is written whole before it is mapped and locked into memory,
// because a store into the mapping cannot report a full disk.
type PageMap struct {
	file    *os.File
	mem     []byte
	touched *atomic.Uint32
	events  []byte
	words   []atomic.Uint64 // a bit per page of the image
	pages   int64
	count   atomic.Int64 // of bits set
}

// The file: magic, pages (8 bytes), a counter that is touched before each
// read; events from eventsAt; bits from one page on.
const (
	mapMagic  = "WRNPGM01"
	touchedAt = 16
	eventsAt  = pageSize - batch*msgSize
)

func mapBytes(size int64) int64 {
	return pageSize + (size/pageSize/8+pageSize)&^(pageSize-1)
}

// CreatePageMap makes the map of an image of size bytes at path, in place of
// one that may be there.
func CreatePageMap(path string, size int64) (*PageMap, error) {
	if size <= 0 || size%pageSize != 0 {
		return nil, fmt.Errorf("uffd: page map of %d bytes, want a positive multiple of %d", size, pageSize)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("uffd: replace page map: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("uffd: create page map: %w", err)
	}
	head := make([]byte, pageSize)
	copy(head, mapMagic)
	binary.NativeEndian.PutUint64(head[8:], uint64(size/pageSize))
	zeros := make([]byte, 64<<10)
	_, err = f.WriteAt(head, 0)
	for off, end := int64(pageSize), mapBytes(size); off < end && err == nil; off += int64(len(zeros)) {
		_, err = f.WriteAt(zeros[:min(int64(len(zeros)), end-off)], off)
	}
	if err != nil {
		f.Close()
		os.Remove(path)
		return nil, fmt.Errorf("uffd: write page map: %w", err)
	}
	return mapPages(f, size)
}

// OpenPageMap opens the map that a server before this one made for an image of
// size bytes. A damaged one is an error: without it nobody knows what the VM's
// memory holds.
func OpenPageMap(path string, size int64) (*PageMap, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("uffd: open page map: %w", err)
	}
	st, err := f.Stat()
	if err == nil && st.Size() != mapBytes(size) {
		err = fmt.Errorf("it has %d bytes, %d expected", st.Size(), mapBytes(size))
	}
	var head [16]byte
	if err == nil {
		_, err = f.ReadAt(head[:], 0)
	}
	if err == nil && string(head[:8]) != mapMagic {
		err = fmt.Errorf("magic is %q", head[:8])
	}
	if n := binary.NativeEndian.Uint64(head[8:]); err == nil && n != uint64(size/pageSize) {
		err = fmt.Errorf("it is of %d pages, the image has %d", n, size/pageSize)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("uffd: page map %s: %w", path, err)
	}
	return mapPages(f, size)
}

func mapPages(f *os.File, size int64) (*PageMap, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, int(mapBytes(size)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("uffd: map page map: %w", err)
	}
	// As far as the limits let us: without it a read error of the disk could
	// reach us as a signal.
	_ = unix.Mlock(mem)
	words := (size/pageSize + 63) / 64
	m := &PageMap{
		file: f, mem: mem, pages: size / pageSize,
		touched: (*atomic.Uint32)(unsafe.Pointer(&mem[touchedAt])),
		events:  mem[eventsAt:pageSize],
		words:   unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&mem[pageSize])), words),
	}
	for i := range m.words {
		m.count.Add(int64(bits.OnesCount64(m.words[i].Load())))
	}
	return m, nil
}

// Close unmaps the file and leaves it where it is.
func (m *PageMap) Close() error {
	if m.mem == nil {
		return nil
	}
	err := errors.Join(unix.Munmap(m.mem), m.file.Close())
	m.mem = nil
	return err
}

// Removed is how many bytes of the image were removed.
func (m *PageMap) Removed() int64 { return m.count.Load() * pageSize }

// touch makes the page that events are read into writable before the read, so
// that the kernel's copy into it meets no fault that could fail.
func (m *PageMap) touch() { m.touched.Add(1) }

// remove notes that [off, off+n) of the image is zeros from now on.
func (m *PageMap) remove(off, n int64) {
	for p, end := off/pageSize, (off+n)/pageSize; p < end; {
		mask := ^uint64(0) << (p % 64)
		if left := end - p/64*64; left < 64 {
			mask &= 1<<left - 1
		}
		old := m.words[p/64].Or(mask)
		m.count.Add(int64(bits.OnesCount64(mask &^ old)))
		p = p/64*64 + 64
	}
}

// has tells whether the page at off was removed.
func (m *PageMap) has(off int64) bool {
	p := off / pageSize
	return m.words[p/64].Load()&(1<<(p%64)) != 0
}

// run is for how many bytes from off, at most up to end, pages are removed or
// not as the one at off is.
func (m *PageMap) run(off, end int64) (removed bool, n int64) {
	if m.count.Load() == 0 {
		return false, end - off
	}
	removed = m.has(off)
	p, last := off/pageSize, end/pageSize
	for p < last {
		w := m.words[p/64].Load()
		if removed {
			w = ^w
		}
		if w >>= p % 64; w != 0 {
			p += int64(bits.TrailingZeros64(w))
			break
		}
		p = p/64*64 + 64
	}
	return removed, min(p, last)*pageSize - off
}
