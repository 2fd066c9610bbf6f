package snapshot

import (
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

var (
	// ErrNotFound: the store has no such snapshot or image.
	ErrNotFound = errors.New("not found")
	// ErrReadOnly: a changing call on a store opened with Options.ReadOnly.
	ErrReadOnly = errors.New("the store is open for reading only")
	// ErrClosed: a call on something that was closed, committed or aborted.
	ErrClosed = errors.New("already closed")
)

// A CorruptError reports stored bytes that are not what was written.
type CorruptError struct {
	Image  format.ID // the image, build or snapshot that was read
	File   string    // path of the damaged file
	Offset int64     // byte in File; the first of the damaged part
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("corrupt store: image %s: %s at byte %d: %s", e.Image, e.File, e.Offset, e.Reason)
}
