package block

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Overlay is the copy-on-write layer of a running disk over a base. Its two
// files, path+".data" (sparse, blocks at their own offsets) and path+".map",
// hold all of its state, so that another process can open it again. It is a
// Source itself. Methods are safe for concurrent use, as those of a disk:
// writes that overlap in time and place end in one order or the other, block
// by block.
type Overlay struct {
	base Source
	size int64
	data storage.File
	m    *dirtyMap
	// ranges serialises writes to the same place: data, map and the reading
	// part of a sub-block write belong together. Reads take none of them.
	ranges rangeLock
	// flushing admits one Flush at a time.
	flushing sync.Mutex
	// failed is the first fsync error. The kernel forgets what it could not
	// write, so no later fsync may be believed. Guarded by flushing.
	failed error
}

var _ Source = (*Overlay)(nil)

// OpenOverlay opens the overlay at path, or creates it when it does not exist
// yet. Another open handle on it, in any process, is storage.ErrLocked. The
// base must be the same one each time; its size is checked.
func OpenOverlay(fsys storage.FS, path string, base Source) (*Overlay, error) {
	if base.Size()%BlockSize != 0 || base.Size() < 0 || base.Size()/BlockSize > format.MaxBlocks {
		return nil, fmt.Errorf("open overlay %s: size %d of the base is not a whole number of blocks", path, base.Size())
	}
	data, err := openData(fsys, path)
	if err != nil {
		return nil, fmt.Errorf("open overlay %s: %w", path, err)
	}
	m, err := openMap(fsys, path+".map", base.Size()/BlockSize)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open overlay %s: %w", path, err), data.Close())
	}
	return &Overlay{base: base, size: base.Size(), data: data, m: m}, nil
}

// openData opens the data file and takes its lock. It is created only where
// there is no map: a lost data file must not become a disk of zeros, and a
// lost map must not become an untouched disk.
func openData(fsys storage.FS, path string) (storage.File, error) {
	haveMap, err := exists(fsys, path+".map")
	if err != nil {
		return nil, err
	}
	data, err := fsys.OpenRW(path + ".data")
	if errors.Is(err, fs.ErrNotExist) && !haveMap {
		data, err = fsys.Create(path + ".data")
	}
	if err != nil {
		return nil, fmt.Errorf("data file: %w", err)
	}
	err = data.Lock()
	if err == nil && !haveMap {
		var n int64
		if n, err = data.Size(); err == nil && n != 0 {
			err = fmt.Errorf("there are %d bytes of data but no map", n)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("data file: %w", err), data.Close())
	}
	return data, nil
}

func exists(fsys storage.FS, name string) (bool, error) {
	f, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Close()
}

// RemoveOverlay removes the files of a closed overlay. The map goes last: a
// map without data is an error to OpenOverlay, never an empty disk. What is
// already gone is not an error.
func RemoveOverlay(fsys storage.FS, name string) error {
	for _, ext := range []string{".data", ".map.tmp", ".map"} {
		if err := fsys.Remove(name + ext); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove overlay %s: %w", name, err)
		}
	}
	return fsys.SyncDir(path.Dir(name))
}

// Size implements Source.
func (o *Overlay) Size() int64 { return o.size }

// Span implements Source.
func (o *Overlay) Span(off int64) (format.Kind, int64) {
	if off < 0 || off >= o.size {
		return format.Absent, 0
	}
	kind, blocks := o.m.run(off/BlockSize, maxSpan)
	n := blocks * BlockSize
	if kind == format.Inherited {
		k, bn := o.base.Span(off)
		return k, min(n, bn)
	}
	return kind, n
}

// maxSpan bounds the map bytes that one Span looks at.
const maxSpan = 1 << 18

// ReadAt implements Source.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	n, end := Clip(o.size, p, off)
	p = p[:n]
	done := 0
	for done < len(p) {
		at := off + int64(done)
		kind, blocks := o.m.run(at/BlockSize, int64(len(p)-done)/BlockSize+2)
		run := p[done:]
		if left := (at/BlockSize+blocks)*BlockSize - at; int64(len(run)) > left {
			run = run[:left]
		}
		r, err := o.readRun(run, at, kind)
		done += r
		if err != nil {
			return done, err
		}
	}
	return done, end
}

func (o *Overlay) readRun(p []byte, off int64, kind format.Kind) (int, error) {
	switch kind {
	case format.Zero:
		clear(p)
		return len(p), nil
	case format.Inherited:
		n, err := o.base.ReadAt(p, off)
		if n == len(p) {
			err = nil
		}
		return n, err
	}
	n, err := o.data.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		// The map says data, so the file cannot end here.
		err = io.ErrUnexpectedEOF
	}
	return n, fmt.Errorf("read overlay %s at %d: %w", o.data.Name(), off+int64(n), err)
}

// check refuses a range that is not inside the disk.
func (o *Overlay) check(what string, off, n int64) error {
	if off < 0 || n < 0 || off > o.size || n > o.size-off {
		return fmt.Errorf("%s overlay %s: %d bytes at %d are outside of %d", what, o.data.Name(), n, off, o.size)
	}
	return nil
}

// WriteAt writes p at off, at any alignment. When it returns, the bytes
// survive the death of the process; see Flush for more.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := o.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	unlock := o.ranges.lock(off, int64(len(p)))
	defer unlock()
	if err := o.write(p, off); err != nil {
		return 0, fmt.Errorf("write overlay: %w", err)
	}
	return len(p), nil
}

// write runs under the range's lock.
func (o *Overlay) write(p []byte, off int64) error {
	end := off + int64(len(p))
	first, last := off/BlockSize, (end-1)/BlockSize
	if off%BlockSize != 0 {
		if err := o.fill(first); err != nil {
			return err
		}
	}
	if end%BlockSize != 0 && (last != first || off%BlockSize == 0) {
		if err := o.fill(last); err != nil {
			return err
		}
	}
	if _, err := o.data.WriteAt(p, off); err != nil {
		return err
	}
	return o.m.set(first, last-first+1, format.Data)
}

// fill brings the whole of a block into the data file, for a write that covers
// only a part of it. The block is not marked yet: the caller does that when
// its own bytes are there too.
func (o *Overlay) fill(block int64) error {
	kind, _ := o.m.run(block, 1)
	if kind == format.Data {
		return nil
	}
	buf := blockPool.Get().(*[BlockSize]byte)
	defer blockPool.Put(buf)
	if _, err := o.readRun(buf[:], block*BlockSize, kind); err != nil {
		return err
	}
	_, err := o.data.WriteAt(buf[:], block*BlockSize)
	return err
}

var blockPool = sync.Pool{New: func() any { return new([BlockSize]byte) }}

// Zero makes n bytes at off zero, at any alignment, and frees the storage of
// whole blocks. It is as durable as a WriteAt.
func (o *Overlay) Zero(off, n int64) error {
	if err := o.check("zero", off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	unlock := o.ranges.lock(off, n)
	defer unlock()
	end := off + n
	first := (off + BlockSize - 1) / BlockSize
	last := end / BlockSize
	var zeros []byte
	if first > last || off%BlockSize != 0 || end%BlockSize != 0 {
		buf := blockPool.Get().(*[BlockSize]byte)
		defer blockPool.Put(buf)
		clear(buf[:])
		zeros = buf[:]
	}
	if first > last { // inside one block
		return o.zeroErr(o.write(zeros[:n], off))
	}
	if head := first*BlockSize - off; head > 0 {
		if err := o.write(zeros[:head], off); err != nil {
			return o.zeroErr(err)
		}
	}
	if tail := end - last*BlockSize; tail > 0 {
		if err := o.write(zeros[:tail], last*BlockSize); err != nil {
			return o.zeroErr(err)
		}
	}
	return o.zeroErr(o.zeroBlocks(first, last-first))
}

func (o *Overlay) zeroErr(err error) error {
	if err != nil {
		return fmt.Errorf("zero overlay: %w", err)
	}
	return nil
}

// zeroBlocks marks first and punches then: the holes are not needed for the
// content to be right.
func (o *Overlay) zeroBlocks(first, n int64) error {
	if n == 0 {
		return nil
	}
	if err := o.m.set(first, n, format.Zero); err != nil {
		return err
	}
	return o.data.PunchHole(first*BlockSize, n*BlockSize)
}

// Flush makes everything durable that was acknowledged before it was called:
// the data first, then the map that points to it. After it has failed once it
// fails always, because what the disk holds is then not known; but for a map that
// there was no room to write: nothing is lost, and the next Flush tries again. Only
// that one error wraps ENOSPC.
func (o *Overlay) Flush() error {
	o.flushing.Lock()
	defer o.flushing.Unlock()
	if o.failed != nil {
		return o.failed
	}
	pages := o.m.takeDirty()
	err := o.data.Sync()
	if err == nil {
		if err = o.m.write(pages); storage.NoRoom(err) {
			o.m.putBack(pages)
			return fmt.Errorf("flush overlay: %w", err)
		}
	}
	if err == nil && len(pages) > 0 {
		err = o.m.file.Sync()
	}
	if err != nil {
		o.failed = fmt.Errorf("flush overlay: %w", err)
		if storage.NoRoom(err) {
			o.failed = fmt.Errorf("flush overlay: %v", err) // not wrapped: see above
		}
	}
	return o.failed
}

// Close closes the files without flushing them: what was acknowledged is in
// the operating system's hands and survives the process.
func (o *Overlay) Close() error {
	return errors.Join(o.m.close(), o.data.Close())
}

// Owned tells whether the overlay has room of its own for all of a range: a
// write to it takes no more, on a file system that writes in place.
func (o *Overlay) Owned(off, n int64) bool {
	if n <= 0 || o.check("look at", off, n) != nil {
		return n == 0
	}
	first, last := off/BlockSize, (off+n-1)/BlockSize
	return o.m.all(first, last-first+1, stateData)
}

// Dirty yields the runs that were changed over the base, ascending, with their
// kind (Data or Zero), in bytes. It is exact while nobody writes.
func (o *Overlay) Dirty(yield func(off, n int64, kind format.Kind) bool) {
	blocks := o.size / BlockSize
	for b := int64(0); b < blocks; {
		kind, n := o.m.run(b, maxSpan)
		if kind != format.Inherited && !yield(b*BlockSize, n*BlockSize, kind) {
			return
		}
		b += n
	}
}
