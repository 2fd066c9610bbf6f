package zstd

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

const (
	// firstRead is what is read of an object to find its index: all of a small
	// one, and of most others the index and something to go on with.
	firstRead = 32 << 10
	// maxFetch bounds how much of an object is in memory for one read.
	maxFetch = 4 << 20
	// maxTries bounds how often a read begins anew because the object was
	// replaced under it.
	maxTries = 8
)

// damage is what is wrong with bytes that were stored, unless they belong to
// another content than the index.
type damage struct{ err error }

func (d damage) Error() string { return d.err.Error() }
func (d damage) Unwrap() error { return d.err }

// ReadAt implements storage.Objects.
func (o *objects) ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, storage.NewObjectError("read", key, nil, fmt.Errorf("offset %d: %w", off, fs.ErrInvalid))
	}
	for range maxTries {
		x, first, err := o.index(ctx, "read", key)
		if err != nil {
			return 0, err
		}
		read := o.readAt
		if x.plain {
			read = o.readPlain
		}
		n, err := read(ctx, key, x, first, p, off)
		if d := (damage{}); !errors.As(err, &d) {
			return n, err
		}
		// Is it damaged, or another content by now?
		o.kept.drop(key)
		now, _, ierr := o.index(ctx, "read", key)
		if ierr != nil {
			return 0, ierr
		}
		if now.plain == x.plain && now.sum == x.sum {
			return 0, storage.NewObjectError("read", key, nil, err)
		}
	}
	return 0, storage.NewObjectError("read", key, storage.ErrTransient, errors.New("it is replaced all the time"))
}

// readPlain reads an object that was stored as it is.
func (o *objects) readPlain(ctx context.Context, key string, x *index, first, p []byte, off int64) (int, error) {
	if x.size >= 0 && first != nil { // it was read whole
		n := copy(p, first[min(off, x.size):])
		if n < len(p) {
			return n, io.EOF
		}
		return n, nil
	}
	n, err := o.next.ReadAt(ctx, key, p, off)
	if o.Immutable(key) || n == 0 {
		return n, err
	}
	if now, _, ierr := o.index(ctx, "read", key); ierr != nil {
		return 0, ierr
	} else if !now.plain {
		return 0, damage{errors.New("it was replaced")}
	}
	return n, err
}

// readAt reads by an index; first is how the object begins.
func (o *objects) readAt(ctx context.Context, key string, x *index, first, p []byte, off int64) (int, error) {
	var eof error
	if rest := max(x.size-off, 0); int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	done := 0
	for done < len(p) {
		from := int((off + int64(done)) / x.frame)
		to, bytes := from, int64(0)
		for to < len(x.entries) && int64(to)*x.frame < off+int64(len(p)) && (to == from || bytes+int64(x.entries[to].len) <= maxFetch) {
			bytes += int64(x.entries[to].len)
			to++
		}
		stored, err := o.fetch(ctx, key, first, x.entries[from].off, bytes)
		if err != nil {
			return done, err
		}
		for i := from; i < to; i++ {
			n, err := o.frame(x, i, stored[x.entries[i].off-x.entries[from].off:], p[done:], off+int64(done))
			if err != nil {
				return done, err
			}
			done += n
		}
	}
	return done, eof
}

// frame gives what p wants from off on of frame i, which b begins with.
func (o *objects) frame(x *index, i int, b, p []byte, off int64) (int, error) {
	e := x.entries[i]
	b = b[:e.len]
	if got := crc32.Checksum(b, castagnoli); got != e.crc {
		return 0, damage{fmt.Errorf("frame %d, at byte %d: its checksum is %08x, its bytes have %08x", i, e.off, e.crc, got)}
	}
	size, begin := x.frameLen(i), off-int64(i)*x.frame
	if begin == 0 && int64(len(p)) >= size {
		return int(size), o.decompress(i, b, p[:0:size])
	}
	content := make([]byte, 0, size)
	if err := o.decompress(i, b, content); err != nil {
		return 0, err
	}
	return copy(p, content[begin:size]), nil
}

// decompress fills into, which has just the room that it must take.
func (o *objects) decompress(i int, b, into []byte) error {
	out, err := o.dec.DecodeAll(b, into)
	if err == nil && len(out) != cap(into) {
		err = fmt.Errorf("it has %d bytes, not %d", len(out), cap(into))
	}
	if err != nil {
		return damage{fmt.Errorf("decompress frame %d: %w", i, err)}
	}
	return nil
}

// fetch gives n bytes of an object as it is stored.
func (o *objects) fetch(ctx context.Context, key string, first []byte, off, n int64) ([]byte, error) {
	if off+n <= int64(len(first)) {
		return first[off : off+n], nil
	}
	b := make([]byte, n)
	got, err := o.next.ReadAt(ctx, key, b, off)
	switch {
	case int64(got) == n:
		return b, nil
	case err == io.EOF:
		return nil, damage{fmt.Errorf("at byte %d: %w", off+int64(got), errCut)}
	}
	return nil, err
}

// index finds out what an object is. first is how it begins, if it was read.
func (o *objects) index(ctx context.Context, op, key string) (x *index, first []byte, err error) {
	if err := errors.Join(storage.ValidKey(key), ctx.Err()); err != nil {
		return nil, nil, storage.NewObjectError(op, key, nil, err)
	}
	if x := o.kept.get(key); x != nil {
		return x, nil, nil
	}
	// What is missing is not read on but anew: it may have been replaced.
	for want := firstRead; x == nil; {
		first = make([]byte, want)
		n, err := o.next.ReadAt(ctx, key, first, 0)
		if n < want && err != io.EOF {
			return nil, nil, err
		}
		first = first[:n]
		if x, want, err = indexOf(first, n == want); err != nil {
			return nil, nil, storage.NewObjectError(op, key, nil, err)
		}
	}
	if o.Immutable(key) {
		o.kept.put(key, x)
	}
	return x, first, nil
}

// indexOf decodes the index of an object that begins with first, and has more if
// more. Without an index it gives how much of the object it wants.
func indexOf(first []byte, more bool) (*index, int, error) {
	if !ours(first) {
		x := &index{plain: true, size: -1}
		if !more {
			x.size = int64(len(first))
		}
		return x, 0, nil
	}
	n, err := lengthOf(first)
	if err != nil {
		return nil, 0, err
	}
	if n > len(first) {
		if !more {
			return nil, 0, fmt.Errorf("index: %w", errCut)
		}
		return nil, n, nil
	}
	x, err := decode(first[:n])
	if err != nil {
		return nil, 0, err
	}
	if int64(len(first)) > x.end() {
		return nil, 0, fmt.Errorf("index: more follows than the %d bytes that it tells of", x.end())
	}
	return x, 0, nil
}
