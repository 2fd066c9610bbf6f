package zstd

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"runtime"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Options are the knobs of New. The zero value is usable.
type Options struct {
	// FrameSize is how many bytes of content a frame has: a power of two from
	// 4 KiB to 1 MiB; 0: 128 KiB. Larger ones compress better, and cost a small
	// read more.
	FrameSize int
	// TempDir is where an object is compressed before it is stored; empty: the
	// system's.
	TempDir string
	// Immutable says which keys never change their content, so that their
	// indexes may be kept; nil: none.
	Immutable func(key string) bool
	// Indexes is how many bytes of indexes are kept in memory; 0: 8 MiB.
	Indexes int
}

// New returns a store that keeps its objects in o, compressed.
//
// A listing reads the index of each object for its size.
func New(o storage.Objects, options Options) (storage.Objects, error) {
	if o == nil {
		return nil, errors.New("zstd: the object store is nil")
	}
	if options.FrameSize == 0 {
		options.FrameSize = 128 << 10
	}
	if f := options.FrameSize; f < minFrame || f > maxFrame || f&(f-1) != 0 {
		return nil, fmt.Errorf("zstd: FrameSize: %d is no power of two from %d to %d", f, minFrame, maxFrame)
	}
	if options.Immutable == nil {
		options.Immutable = func(string) bool { return false }
	}
	if options.Indexes <= 0 {
		options.Indexes = 8 << 20
	}
	// Both run for as many callers at a time as there are processors.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(true), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: make a compressor: %w", err)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(maxFrame), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: make a decompressor: %w", err)
	}
	return &objects{next: o, Options: options, enc: enc, dec: dec, kept: newKept(options.Indexes)}, nil
}

type objects struct {
	next storage.Objects
	Options
	enc  *zstd.Encoder
	dec  *zstd.Decoder
	kept *kept
}

// Put implements storage.Objects. How long the object is has to be known before
// it is stored, so it is compressed into a file first.
func (o *objects) Put(ctx context.Context, key string, body io.ReaderAt, size int64) (err error) {
	fail := func(err error) error { return storage.NewObjectError("put", key, nil, err) }
	if err := errors.Join(storage.ValidKey(key), ctx.Err()); err != nil {
		return fail(err)
	}
	frame := int64(o.FrameSize)
	if size < 0 || size > frame*maxFrames {
		return fail(fmt.Errorf("size %d: an object has from 0 to %d bytes: %w", size, frame*maxFrames, fs.ErrInvalid))
	}
	f, err := os.CreateTemp(o.TempDir, "wrenn-zstd-")
	if err != nil {
		return fail(fmt.Errorf("make a file to compress into: %w", err))
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil { // it ends with its descriptor
		return fail(err)
	}
	x := &index{frame: frame, size: size}
	if err := o.compress(ctx, x, body, f); err != nil {
		return fail(err)
	}
	o.kept.drop(key)
	err = o.next.Put(ctx, key, f, x.end())
	o.kept.drop(key) // what a reader kept meanwhile
	return err
}

// compress writes the object of a body to f, and fills in its index.
func (o *objects) compress(ctx context.Context, x *index, body io.ReaderAt, f *os.File) error {
	n := int(framesOf(x.size, x.frame))
	x.entries = make([]entry, n)
	in, out := make([]byte, x.frame), []byte(nil)
	off := int64(indexLen(n))
	for i := range x.entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := in[:x.frameLen(i)]
		if got, err := body.ReadAt(b, int64(i)*x.frame); got < len(b) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read the body at %d: %w", int64(i)*x.frame, err)
		}
		out = o.enc.EncodeAll(b, out[:0])
		if _, err := f.WriteAt(out, off); err != nil {
			return fmt.Errorf("write what was compressed: %w", err)
		}
		x.entries[i] = entry{off: off, len: uint32(len(out)), crc: crc32.Checksum(out, castagnoli)}
		off += int64(len(out))
	}
	if _, err := f.WriteAt(x.encode(), 0); err != nil {
		return fmt.Errorf("write the index: %w", err)
	}
	return nil
}

// Head implements storage.Objects.
func (o *objects) Head(ctx context.Context, key string) (storage.ObjectInfo, error) {
	x, _, err := o.index(ctx, "head", key)
	if err != nil {
		return storage.ObjectInfo{}, err
	}
	if x.plain {
		return o.next.Head(ctx, key)
	}
	return storage.ObjectInfo{Key: key, Size: x.size}, nil
}

// List implements storage.Objects.
func (o *objects) List(ctx context.Context, prefix, after string) ([]storage.ObjectInfo, bool, error) {
	for {
		page, more, err := o.next.List(ctx, prefix, after)
		if err != nil || len(page) == 0 {
			return nil, more, err
		}
		after = page[len(page)-1].Key
		if page, err = o.sizes(ctx, page); err != nil {
			return nil, false, err
		}
		if len(page) > 0 || !more { // else all were deleted meanwhile
			return page, more, nil
		}
	}
}

// sizes gives the objects of a page with the sizes of their contents, without
// those that are gone.
func (o *objects) sizes(ctx context.Context, page []storage.ObjectInfo) ([]storage.ObjectInfo, error) {
	there := make([]bool, len(page))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range page {
		g.Go(func() error {
			info, err := o.Head(ctx, page[i].Key)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			page[i], there[i] = info, err == nil
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []storage.ObjectInfo
	for i, info := range page {
		if there[i] {
			out = append(out, info)
		}
	}
	return out, nil
}

// Delete implements storage.Objects.
func (o *objects) Delete(ctx context.Context, key string) error {
	err := o.next.Delete(ctx, key)
	o.kept.drop(key)
	return err
}
