package block

import (
	"fmt"
	"io"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Size implements Source.
func (z Zeros) Size() int64 { return int64(z) }

// ReadAt implements Source.
func (z Zeros) ReadAt(p []byte, off int64) (int, error) {
	n, err := Clip(z.Size(), p, off)
	clear(p[:n])
	return n, err
}

// Span implements Source.
func (z Zeros) Span(off int64) (format.Kind, int64) {
	if off < 0 || off >= int64(z) {
		return format.Absent, 0
	}
	return format.Zero, int64(z) - off
}

// Clip returns how many bytes of a read of p at off lie inside a source of
// size bytes, and the error that the read ends with when they are fewer than
// len(p): io.EOF, or another one for a negative offset.
func Clip(size int64, p []byte, off int64) (int, error) {
	switch {
	case off < 0:
		return 0, fmt.Errorf("read at negative offset %d", off)
	case off >= size:
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	case int64(len(p)) > size-off:
		return int(size - off), io.EOF
	}
	return len(p), nil
}
