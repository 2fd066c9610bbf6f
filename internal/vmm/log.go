package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"
)

// OpenLog opens a bounded log of a VMM process for appending (0600). A file
// that is more than half full already becomes path+".old" first.
func OpenLog(path string, limit int64) (*os.File, error) {
	if fi, err := os.Stat(path); err == nil && fi.Size() > limit/2 {
		if err := os.Rename(path, path+".old"); err != nil {
			return nil, fmt.Errorf("setting the old log aside: %w", err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening a log: %w", err)
	}
	return f, nil
}

// Tail returns the last n bytes of a file from the first whole line on, fit
// to be printed: it may come from a hostile guest. A missing file has none.
func Tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return ""
	}
	off := max(fi.Size()-n, 0)
	b := make([]byte, min(n, fi.Size()))
	got, err := f.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	b = b[:got]
	if off > 0 {
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return strings.TrimSpace(strings.Map(printable, string(b)))
}

func printable(r rune) rune {
	switch {
	case r == '\n' || r == '\t':
		return r
	case r == utf8.RuneError || r < ' ' || r >= 0x7f && r < 0xa0:
		return -1
	}
	return r
}
