package mcpserver

import (
	"fmt"
	"strings"
)

// excerpt keeps the beginning and the end of an output, limit bytes together:
// what a program says first and last tells most.
type excerpt struct {
	limit int
	head  []byte
	tail  []byte // a ring once it is full; at is the place of the oldest byte
	at    int
	left  int64 // bytes that were dropped
}

func (e *excerpt) write(p []byte) {
	if n := min(e.limit/2-len(e.head), len(p)); n > 0 {
		e.head = append(e.head, p[:n]...)
		p = p[n:]
	}
	room := e.limit - e.limit/2
	if skip := len(p) - room; skip > 0 {
		// All of the ring and the beginning of p are overwritten.
		e.left += int64(len(e.tail) + skip)
		e.tail, e.at, p = e.tail[:0], 0, p[skip:]
	}
	if n := min(room-len(e.tail), len(p)); n > 0 {
		e.tail = append(e.tail, p[:n]...)
		p = p[n:]
	}
	e.left += int64(len(p))
	for len(p) > 0 {
		n := copy(e.tail[e.at:], p)
		e.at, p = (e.at+n)%room, p[n:]
	}
}

// String gives what was kept as valid UTF-8, with a note where bytes are
// missing.
func (e *excerpt) String() string {
	var b strings.Builder
	b.Write(e.head)
	if e.left > 0 {
		fmt.Fprintf(&b, "\n[… %d bytes left out …]\n", e.left)
	}
	b.Write(e.tail[e.at:])
	b.Write(e.tail[:e.at])
	return strings.ToValidUTF8(b.String(), "\uFFFD")
}
