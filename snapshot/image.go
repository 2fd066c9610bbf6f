package snapshot

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Image is an open image. It implements block.Source with verified reads.
// Several handles on one image share its header and its files.
type Image struct {
	core *imageCore
	once sync.Once
	err  error
}

var _ block.Source = (*Image)(nil)

// imageCore is what the handles on an image share.
type imageCore struct {
	store  *Store
	id     format.ID
	header *format.Header
	refs   int // guarded by Store.mu

	// builds are opened when the first block of theirs is read: a restored
	// machine touches a part of them only.
	builds []atomic.Pointer[build]
}

// OpenImage opens an image. The caller closes it.
func (s *Store) OpenImage(id format.ID) (*Image, error) {
	if c := s.shareImage(id); c != nil {
		return &Image{core: c}, nil
	}
	h, _, err := s.readHeader(id)
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.images[id]
	if c == nil {
		c = &imageCore{store: s, id: id, header: h, builds: make([]atomic.Pointer[build], len(h.Builds))}
		s.images[id] = c
	}
	c.refs++
	return &Image{core: c}, nil
}

func (s *Store) shareImage(id format.ID) *imageCore {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.images[id]
	if c != nil {
		c.refs++
	}
	return c
}

// readHeader reads and decodes the header of an image; it returns the bytes
// too, for their digest.
func (s *Store) readHeader(id format.ID) (*format.Header, []byte, error) {
	if id.IsZero() {
		return nil, nil, fmt.Errorf("the image id is zero: %w", ErrNotFound)
	}
	name := s.headerPath(id)
	b, err := s.readAll(name, format.MaxEncodedSize)
	if err != nil {
		return nil, nil, err
	}
	h, err := format.Decode(b)
	if err != nil {
		return nil, nil, &CorruptError{Image: id, File: name, Reason: err.Error()}
	}
	if h.Build != id {
		return nil, nil, &CorruptError{Image: id, File: name, Reason: fmt.Sprintf("it is the header of image %s", h.Build)}
	}
	return h, b, nil
}

// ID returns the image's ID.
func (i *Image) ID() format.ID { return i.core.id }

// Header returns the image's header. It is shared: do not change it.
func (i *Image) Header() *format.Header { return i.core.header }

// Size implements block.Source.
func (i *Image) Size() int64 { return i.core.header.Size }

// Span implements block.Source.
func (i *Image) Span(off int64) (format.Kind, int64) {
	if off < 0 {
		return format.Absent, 0
	}
	_, kind, run := i.core.header.Lookup(uint64(off) / blockSize)
	return kind, int64(run) * blockSize
}

// ReadAt implements block.Source. Every block is verified; a bad one is a
// *CorruptError and the bytes from it on are not returned. Aligned reads go
// straight into p, with one pread per run of contiguous storage, and do not
// allocate once the builds are open.
func (i *Image) ReadAt(p []byte, off int64) (int, error) {
	n, end := block.Clip(i.Size(), p, off)
	p = p[:n]
	done, err := i.core.read(p, off)
	if err != nil {
		clear(p[done:])
		return done, err
	}
	return done, end
}

// Close gives the handle back, which must not be reading any more. The files
// close with the last handle.
func (i *Image) Close() error {
	i.once.Do(func() { i.err = i.core.release() })
	return i.err
}

func (c *imageCore) release() error {
	s := c.store
	s.mu.Lock()
	c.refs--
	last := c.refs == 0
	if last {
		delete(s.images, c.id)
	}
	s.mu.Unlock()
	if !last {
		return nil
	}
	var errs []error
	for i := range c.builds {
		if b := c.builds[i].Swap(nil); b != nil {
			errs = append(errs, s.releaseBuild(b))
		}
	}
	return errors.Join(errs...)
}

// read reads p, which lies inside the image, and returns how much of it is
// good.
func (c *imageCore) read(p []byte, off int64) (int, error) {
	h := c.header
	next := h.Mappings.Seek(uint64(off) / blockSize)
	m, more := next.Next()
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if !more {
			clear(p[done:])
			break
		}
		if start := int64(m.Start) * blockSize; at < start {
			n := int(min(int64(len(p)-done), start-at))
			clear(p[done : done+n])
			done += n
			continue
		}
		run := p[done:int(min(int64(len(p)), int64(done)+int64(m.End())*blockSize-at))]
		n, err := c.readRun(run, at, &m)
		done += n
		if err != nil {
			return done, err
		}
		m, more = next.Next()
	}
	return len(p), nil
}

// readRun reads p, which lies inside one mapping.
func (c *imageCore) readRun(p []byte, off int64, m *format.Mapping) (int, error) {
	b, err := c.build(m.Build)
	if err != nil {
		return 0, err
	}
	// The byte in the build that off is at.
	at := int64(m.Offset)*blockSize + off - int64(m.Start)*blockSize
	done := 0
	if at%blockSize != 0 {
		if done, err = readPart(b, p, at); err != nil {
			return done, err
		}
	}
	if whole := (len(p) - done) / blockSize * blockSize; whole > 0 {
		n, err := b.read(p[done:done+whole], uint64(at+int64(done))/blockSize)
		done += n
		if err != nil {
			return done, err
		}
	}
	if done < len(p) {
		n, err := readPart(b, p[done:], at+int64(done))
		return done + n, err
	}
	return done, nil
}

// readPart reads what p wants from the block at byte at of the build: a block
// can be verified only as a whole.
func readPart(b *build, p []byte, at int64) (int, error) {
	buf := blockPool.Get().(*[blockSize]byte)
	defer blockPool.Put(buf)
	if _, err := b.read(buf[:], uint64(at)/blockSize); err != nil {
		return 0, err
	}
	return copy(p, buf[at%blockSize:]), nil
}

var blockPool = sync.Pool{New: func() any { return new([blockSize]byte) }}

// build returns build i of the table, opening it if it is the first use.
func (c *imageCore) build(i uint32) (*build, error) {
	if b := c.builds[i].Load(); b != nil {
		return b, nil
	}
	b, err := c.store.acquireBuild(c.header.Builds[i])
	if err != nil {
		return nil, err
	}
	if !c.builds[i].CompareAndSwap(nil, b) {
		// Another reader was faster; the image holds one use only.
		if err := c.store.releaseBuild(b); err != nil {
			return nil, err
		}
		b = c.builds[i].Load()
		if b == nil {
			return nil, fmt.Errorf("read image %s: %w", c.id, ErrClosed)
		}
	}
	return b, nil
}
