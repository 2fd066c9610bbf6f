package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"
)

// Objects is a store of immutable pieces of content under keys, such as an S3
// bucket. An object appears whole or not at all, and Put over an existing key
// replaces it in one step. Implementations are safe for concurrent use, bound
// what they hold in memory, and end soon after the context does.
//
// Every call may be repeated with the same arguments: a Put or Delete whose
// outcome is not known is settled by doing it again.
//
// Errors are *ObjectError and match, through errors.Is, fs.ErrNotExist (there
// is no such object), ErrThrottled (slow down) and ErrTransient (trying again
// may help). An error that matches none of them will not pass by itself. The
// error of an ended context matches context.Canceled or DeadlineExceeded.
type Objects interface {
	// Put stores size bytes of body, durably when it returns. The body is read
	// at any offset, in any order, perhaps more than once.
	Put(ctx context.Context, key string, body io.ReaderAt, size int64) error
	// ReadAt reads like io.ReaderAt: fewer bytes than asked for come with an
	// error, which is io.EOF at the end of the object.
	ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error)
	// Head describes an object.
	Head(ctx context.Context, key string) (ObjectInfo, error)
	// List returns at most MaxList objects whose keys begin with prefix and are
	// greater than after, in ascending order of the keys' bytes. The prefix is
	// empty or ends in "/". more says that there are further ones; see ListAll.
	List(ctx context.Context, prefix, after string) (page []ObjectInfo, more bool, err error)
	// Delete removes an object. One that does not exist is no error.
	Delete(ctx context.Context, key string) error
}

// ObjectInfo describes an object.
type ObjectInfo struct {
	Key  string
	Size int64
}

// Limits of an object store.
const (
	// MaxList is how many objects a page of a listing holds at most.
	MaxList = 1000
	// MaxKey is the length of a key in bytes.
	MaxKey = 512
	// maxSegment is the length of a part of a key between slashes: what file
	// systems allow for a name, less the mark of a temporary file.
	maxSegment = 200
)

var (
	// ErrThrottled: the store asks its callers to slow down.
	ErrThrottled = errors.New("throttled")
	// ErrTransient: the call failed for a reason that may pass.
	ErrTransient = errors.New("transient failure")
)

// ObjectError says which call on which object failed.
type ObjectError struct {
	Op  string // "put", "read", "head", "list", "delete"
	Key string // or prefix
	// Class is fs.ErrNotExist, ErrThrottled, ErrTransient, or nil.
	Class error
	// RetryAfter is how long the store asks to wait; 0 when it does not say.
	RetryAfter time.Duration
	Err        error // the cause
}

func (e *ObjectError) Error() string {
	switch {
	case e.Err == nil:
		return fmt.Sprintf("%s object %q: %v", e.Op, e.Key, e.Class)
	case e.Class == nil || errors.Is(e.Err, e.Class):
		return fmt.Sprintf("%s object %q: %v", e.Op, e.Key, e.Err)
	}
	return fmt.Sprintf("%s object %q: %v: %v", e.Op, e.Key, e.Class, e.Err)
}

// Unwrap gives errors.Is the class and the cause.
func (e *ObjectError) Unwrap() []error {
	var out []error
	for _, err := range []error{e.Class, e.Err} {
		if err != nil {
			out = append(out, err)
		}
	}
	return out
}

// NewObjectError wraps the cause of a failed call in its class, or returns nil
// for a nil cause. An *ObjectError is not wrapped again.
func NewObjectError(op, key string, class, err error) error {
	if err == nil {
		return nil
	}
	var known *ObjectError
	if errors.As(err, &known) {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		class = nil // the caller's wish, no failure of the store
	}
	return &ObjectError{Op: op, Key: key, Class: class, Err: err}
}

// ValidKey checks that a key is one that every implementation can hold: at most
// MaxKey bytes, parts of 1 to 200 characters a–z, A–Z, 0–9, ".", "_" and "-"
// with single slashes between them, none of which begins with a dot. So a key
// can never leave a directory, whoever made it.
//
// A key must not be the directory of another one ("a" and "a/b"): a store may
// refuse it.
func ValidKey(key string) error {
	if len(key) > MaxKey {
		return fmt.Errorf("object key: %d bytes are more than the limit %d", len(key), MaxKey)
	}
	for part := range strings.SplitSeq(key, "/") {
		switch {
		case part == "":
			return fmt.Errorf("object key %.80q: a part between slashes is empty", key)
		case len(part) > maxSegment:
			return fmt.Errorf("object key %.80q: a part is longer than %d bytes", key, maxSegment)
		case part[0] == '.':
			return fmt.Errorf("object key %.80q: a part begins with a dot", key)
		}
		for i := range len(part) {
			if !keyByte(part[i]) {
				return fmt.Errorf("object key %.80q: byte %#02x is not allowed, use letters, digits, '.', '_' and '-'", key, part[i])
			}
		}
	}
	return nil
}

func keyByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}

// ValidPrefix checks a prefix for List: empty, or a valid key and a slash.
func ValidPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	dir, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fmt.Errorf("object prefix %.80q: it does not end in a slash", prefix)
	}
	return ValidKey(dir)
}

// ListAll calls f for every object under prefix, in ascending order, until f
// returns an error, which ListAll returns.
func ListAll(ctx context.Context, o Objects, prefix string, f func(ObjectInfo) error) error {
	after := ""
	for {
		page, more, err := o.List(ctx, prefix, after)
		if err != nil {
			return err
		}
		for _, info := range page {
			if info.Key <= after {
				// A store that repeats itself would keep us here for ever.
				return NewObjectError("list", prefix, nil, fmt.Errorf("the store returned %q after %q", info.Key, after))
			}
			if err := f(info); err != nil {
				return err
			}
			after = info.Key
		}
		if !more {
			return nil
		}
		if len(page) == 0 {
			return NewObjectError("list", prefix, nil, errors.New("the store returned an empty page and says that there is more"))
		}
	}
}

// retryable reports whether trying again may help.
func retryable(err error) bool {
	return errors.Is(err, ErrThrottled) || errors.Is(err, ErrTransient)
}

// checkCall checks what every call has; implementations use it first.
func checkCall(ctx context.Context, op, key string) error {
	if err := ValidKey(key); err != nil {
		return NewObjectError(op, key, nil, err)
	}
	return NewObjectError(op, key, nil, ctx.Err())
}

// checkRead also checks an offset.
func checkRead(ctx context.Context, key string, off int64) error {
	if err := checkCall(ctx, "read", key); err != nil {
		return err
	}
	if off < 0 {
		return NewObjectError("read", key, nil, fmt.Errorf("offset %d: %w", off, fs.ErrInvalid))
	}
	return nil
}

// checkPut also checks a size.
func checkPut(ctx context.Context, key string, size int64) error {
	if err := checkCall(ctx, "put", key); err != nil {
		return err
	}
	if size < 0 {
		return NewObjectError("put", key, nil, fmt.Errorf("size %d: %w", size, fs.ErrInvalid))
	}
	return nil
}

func checkList(ctx context.Context, prefix string) error {
	if err := ValidPrefix(prefix); err != nil {
		return NewObjectError("list", prefix, nil, err)
	}
	return NewObjectError("list", prefix, nil, ctx.Err())
}
