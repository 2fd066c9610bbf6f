package format

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// An ID names an image (and the build that it added) or a snapshot. It is 16
// random bytes; the zero ID means "none".
type ID [16]byte

// NewID returns a random ID that is not zero.
func NewID() ID {
	var id ID
	for id.IsZero() {
		_, _ = rand.Read(id[:]) // never fails: crypto/rand ends the program instead
	}
	return id
}

// ParseID is the inverse of String. It accepts exactly 32 lower-case
// hexadecimal digits, because IDs become file names.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 2*len(id) {
		return ID{}, fmt.Errorf("id %q: want 32 hexadecimal digits", clip(s))
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ID{}, fmt.Errorf("id %q: want lower-case hexadecimal digits", clip(s))
		}
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return ID{}, fmt.Errorf("id %q: %w", clip(s), err)
	}
	return id, nil
}

// clip keeps hostile input out of error texts.
func clip(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}

// IsZero reports whether the ID is the zero ID, which names nothing.
func (id ID) IsZero() bool { return id == ID{} }

// String returns 32 lower-case hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText implements encoding.TextMarshaler; the zero ID is the empty text.
func (id ID) MarshalText() ([]byte, error) {
	if id.IsZero() {
		return []byte{}, nil
	}
	return hex.AppendEncode(nil, id[:]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*id = ID{}
		return nil
	}
	p, err := ParseID(string(b))
	if err != nil {
		return err
	}
	*id = p
	return nil
}
