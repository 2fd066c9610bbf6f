package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// bufferSize is how many bytes of small writes are joined into one. It is a
// power of two: see put.
const bufferSize = 512 << 10

// Writer makes an image. Methods are safe for concurrent use.
type Writer struct {
	store *Store
	id    format.ID
	size  int64
	base  *format.Header // nil: zeros
	// relayout: the image is base in another layout, not a generation after it.
	relayout bool

	mu      sync.Mutex
	state   writerState
	err     error // the first failure; nothing can be finished after it
	file    storage.File
	blocks  uint64 // data blocks accepted
	stored  int64  // bytes of them in the file
	buf     []byte // the others
	sums    []byte
	seen    []uint64 // bit per block: already given
	extents []format.Extent

	headerDigest [32]byte // set by Finish
	bytes        int64    // size of both files, set by Finish
}

type writerState uint8

const (
	writing writerState = iota
	finished
	committing // a Txn decides; nobody may abort
	committed
	aborted
)

// NewImage begins an image of size bytes. With a parent it is the parent,
// changed by what is written, and one generation older; the sizes must be the
// same. Where the parent has been compacted, the new layout is built upon.
// Without a parent it is all zeros and of generation 0. The parent's handle
// may be closed after the call; what it needs stays until the writer is done.
// The caller always calls Abort in the end; after a commit it does nothing.
func (s *Store) NewImage(size int64, parent *Image) (*Writer, error) {
	if size < 0 || size%blockSize != 0 || size/blockSize > format.MaxBlocks {
		return nil, fmt.Errorf("new image: size %d is not a whole number of blocks, or too large", size)
	}
	w := &Writer{store: s, id: format.NewID(), size: size, seen: make([]uint64, (size/blockSize+63)/64)}
	if parent != nil {
		if parent.core.store != s {
			return nil, errors.New("new image: the parent belongs to another store")
		}
		if parent.Size() != size {
			return nil, fmt.Errorf("new image: size %d differs from the parent's %d", size, parent.Size())
		}
		w.base = s.compacted(parent.Header())
	}
	if err := s.forWriting(); err != nil {
		return nil, fmt.Errorf("new image: %w", err)
	}
	s.mu.Lock()
	s.pending[w.id] = w // before the directory exists: GC must not take it
	s.mu.Unlock()
	if err := w.create(); err != nil {
		return nil, errors.Join(fmt.Errorf("new image: %w", err), w.Abort())
	}
	return w, nil
}

func (w *Writer) create() error {
	if err := w.store.fs.Mkdir(w.store.imageDir(w.id)); err != nil {
		return err
	}
	var err error
	w.file, err = w.store.fs.Create(w.store.dataPath(w.id))
	return err
}

// ID returns the ID that the image will have.
func (w *Writer) ID() format.ID { return w.id }

// BytesWritten returns the bytes of data blocks taken so far: what the image
// adds to the store, but for checksums and header.
func (w *Writer) BytesWritten() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int64(w.blocks) * blockSize
}

// WriteAt gives the content of whole blocks. Each block may be given once, in
// any order. A block of zeros is stored as Zero, or not at all where the
// parent is zero too.
func (w *Writer) WriteAt(p []byte, off int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.claim("write", off, int64(len(p))); err != nil {
		return err
	}
	for at := 0; at < len(p); {
		zero := isZero(p[at : at+blockSize])
		end := at + blockSize
		for end < len(p) && isZero(p[end:end+blockSize]) == zero {
			end += blockSize
		}
		first := uint64(off+int64(at)) / blockSize
		if zero {
			w.zero(first, uint64(end-at)/blockSize)
		} else if err := w.append(p[at:end], first); err != nil {
			w.err = fmt.Errorf("write image %s: %w", w.id, err)
			return w.err
		}
		at = end
	}
	return nil
}

// Zero says that n bytes at off, whole blocks, are zeros now. It counts as
// giving these blocks.
func (w *Writer) Zero(off, n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.claim("zero", off, n); err != nil {
		return err
	}
	w.zero(uint64(off)/blockSize, uint64(n)/blockSize)
	return nil
}

// claim checks a range and marks its blocks as given.
func (w *Writer) claim(what string, off, n int64) error {
	if w.err != nil {
		return w.err
	}
	if w.state != writing {
		return fmt.Errorf("%s image %s: %w", what, w.id, ErrClosed)
	}
	if off < 0 || n < 0 || off%blockSize != 0 || n%blockSize != 0 || off > w.size || n > w.size-off {
		return fmt.Errorf("%s image %s: %d bytes at %d are not whole blocks inside of %d", what, w.id, n, off, w.size)
	}
	first, last := uint64(off)/blockSize, uint64(off+n)/blockSize
	for b := first; b < last; b++ {
		if w.seen[b/64]&(1<<(b%64)) != 0 {
			return fmt.Errorf("%s image %s: block %d was given before", what, w.id, b)
		}
	}
	for b := first; b < last; b++ {
		w.seen[b/64] |= 1 << (b % 64)
	}
	return nil
}

var zeroBlock [blockSize]byte

func isZero(p []byte) bool {
	// The first word decides for nearly all data.
	return binary.LittleEndian.Uint64(p) == 0 && bytes.Equal(p, zeroBlock[:])
}

// zero records zeros where the parent has data; elsewhere nothing changes.
func (w *Writer) zero(first, n uint64) {
	if w.base == nil {
		return
	}
	for n > 0 {
		_, kind, run := w.base.Lookup(first)
		run = min(run, n)
		if kind == format.Data {
			w.extend(format.Extent{Start: first, Length: run, Kind: format.Zero})
		}
		first += run
		n -= run
	}
}

// append takes blocks of data.
func (w *Writer) append(p []byte, first uint64) error {
	for at := 0; at < len(p); at += blockSize {
		w.sums = binary.LittleEndian.AppendUint32(w.sums, crc32.Checksum(p[at:at+blockSize], castagnoli))
	}
	n := uint64(len(p)) / blockSize
	w.extend(format.Extent{Start: first, Length: n, Kind: format.Data, Offset: w.blocks})
	w.blocks += n
	return w.put(p)
}

// put writes blocks behind those before, in whole buffers: the kernel keeps what
// is written at once, at a multiple of its size, in one piece of its cache, and
// reads from pieces cost half of what they cost page by page.
func (w *Writer) put(p []byte) error {
	for len(p) > 0 {
		if whole := len(p) / bufferSize * bufferSize; len(w.buf) == 0 && whole > 0 {
			if err := w.write(p[:whole]); err != nil {
				return err
			}
			p = p[whole:]
			continue
		}
		n := min(len(p), bufferSize-len(w.buf))
		w.buf = append(w.buf, p[:n]...)
		p = p[n:]
		if len(w.buf) == bufferSize {
			if err := w.spill(); err != nil {
				return err
			}
		}
	}
	return nil
}

// spill writes the buffered blocks to the file.
func (w *Writer) spill() error {
	if len(w.buf) == 0 {
		return nil
	}
	err := w.write(w.buf)
	w.buf = w.buf[:0]
	return err
}

func (w *Writer) write(p []byte) error {
	_, err := w.file.WriteAt(p, w.stored)
	w.stored += int64(len(p))
	return err
}

// extend adds an extent, joined to the last one where both continue it.
func (w *Writer) extend(e format.Extent) {
	if n := len(w.extents); n > 0 {
		l := &w.extents[n-1]
		if l.Kind == e.Kind && l.End() == e.Start && (e.Kind == format.Zero || l.Offset+l.Length == e.Offset) {
			l.Length += e.Length
			return
		}
	}
	w.extents = append(w.extents, e)
}

// Finish makes the image durable and returns its ID. Nothing names it yet: a
// Txn does that, and Abort still removes it.
func (w *Writer) Finish(ctx context.Context) (format.ID, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return format.ID{}, w.err
	}
	if w.state != writing {
		return format.ID{}, fmt.Errorf("finish image %s: %w", w.id, ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return format.ID{}, fmt.Errorf("finish image %s: %w", w.id, err)
	}
	if err := w.finish(ctx); err != nil {
		w.err = fmt.Errorf("finish image %s: %w", w.id, err)
		return format.ID{}, w.err
	}
	w.state = finished
	return w.id, nil
}

// finish writes in the order of the commit protocol.
func (w *Writer) finish(ctx context.Context) error {
	ref := format.BuildRef{ID: w.id, Blocks: w.blocks, Digest: sha256.Sum256(w.sums)}
	header, err := w.encodeHeader(ref)
	if err != nil {
		return err
	}
	if err := w.spill(); err != nil {
		return err
	}
	end := append(w.sums, encodeTrailer(ref)...)
	if _, err := w.file.WriteAt(end, int64(w.blocks)*blockSize); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	f := w.file
	w.file = nil
	if err := f.Close(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s := w.store
	if err := s.writeFile(s.headerPath(w.id), header); err != nil {
		return err
	}
	if err := s.fs.SyncDir(s.imageDir(w.id)); err != nil {
		return err
	}
	if err := s.fs.SyncDir(s.imagesDir()); err != nil {
		return err
	}
	w.headerDigest = sha256.Sum256(header)
	w.bytes = int64(w.blocks)*blockSize + int64(len(end)) + int64(len(header))
	w.buf, w.sums, w.seen, w.extents = nil, nil, nil, nil
	return nil
}

func (w *Writer) encodeHeader(ref format.BuildRef) ([]byte, error) {
	slices.SortFunc(w.extents, func(a, b format.Extent) int {
		if a.Start < b.Start {
			return -1
		}
		return 1
	})
	var h *format.Header
	var err error
	if w.base == nil {
		h, err = format.New(w.size, ref, w.extents)
	} else {
		h, err = format.Merge(w.base, ref, w.extents)
	}
	if err != nil {
		return nil, err
	}
	if w.relayout {
		h.Generation, h.Parent = w.base.Generation, w.base.Parent
	}
	return format.Encode(h)
}

// Abort removes the image, finished or not, unless a manifest names it. It may
// be called again.
func (w *Writer) Abort() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch w.state {
	case committed, aborted:
		return nil
	case committing:
		return fmt.Errorf("abort image %s: it is being committed", w.id)
	}
	w.state = aborted
	w.buf, w.sums, w.seen, w.extents = nil, nil, nil, nil
	var errs []error
	if w.file != nil {
		errs = append(errs, w.file.Close())
		w.file = nil
	}
	s := w.store
	errs = append(errs, s.removeAll(s.imageDir(w.id), compactionName+".tmp", compactionName, "header", "data"))
	s.mu.Lock()
	delete(s.pending, w.id)
	s.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("abort image %s: %w", w.id, err) // GC takes the rest
	}
	return nil
}

// writeFile makes a file with content, durably but for its name.
func (s *Store) writeFile(name string, content []byte) error {
	f, err := s.fs.Create(name)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
