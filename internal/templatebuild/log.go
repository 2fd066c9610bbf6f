package templatebuild

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"time"
)

// Bounds of one build's log.
const (
	maxEntries = 8000
	maxLog     = 1 << 20
	maxLine    = 2 << 10
	// tailLines are repeated in the reason of a failure.
	tailLines = 20
)

// Entry is one line of a build's log.
type Entry struct {
	Time    time.Time `json:"timestamp"`
	Level   string    `json:"level"` // debug, info, warn or error
	Message string    `json:"message"`
	Step    string    `json:"step,omitempty"`
}

// buildLog takes a build's lines while readers poll. It keeps the beginning;
// what comes after its bound is counted, but for what our own code says.
type buildLog struct {
	mu      sync.Mutex
	now     func() time.Time
	entries []Entry
	size    int
	dropped int
	tail    []Entry // the last lines of the step under way
	step    string
}

func (l *buildLog) setStep(step string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.step, l.tail = step, nil
}

// say logs a sentence of our own.
func (l *buildLog) say(level, format string, a ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := fmt.Sprintf(format, a...)
	if len(text) > maxLine {
		text = strings.ToValidUTF8(text[:maxLine], "") + "…"
	}
	l.entries = append(l.entries, Entry{l.now(), level, text, l.step})
}

// line logs what a guest printed.
func (l *buildLog) line(level, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := Entry{l.now(), level, text, l.step}
	if l.tail = append(l.tail, e); len(l.tail) > tailLines {
		l.tail = l.tail[1:]
	}
	if len(l.entries) >= maxEntries || l.size+len(text) > maxLog {
		if l.dropped++; l.dropped == 1 {
			l.entries = append(l.entries, Entry{l.now(), "warn", "the log is full; further output is left out", l.step})
		}
		return
	}
	l.size += len(text)
	l.entries = append(l.entries, e)
}

func (l *buildLog) lastLines() []Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Entry(nil), l.tail...)
}

// from gives at most n entries from an offset on.
func (l *buildLog) from(offset, n int) []Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return page(l.entries, offset, n)
}

func (l *buildLog) all() []Entry { return l.from(0, maxEntries*2) }

func page(all []Entry, offset, n int) []Entry {
	offset = min(max(offset, 0), len(all))
	return append([]Entry{}, all[offset:min(offset+n, len(all))]...)
}

// lines cuts one output stream into lines of bounded length.
type lines struct {
	log   *buildLog
	level string
	rest  []byte
}

func (w *lines) write(p []byte) {
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		end := i >= 0
		if !end {
			i = len(p)
		}
		if n := min(i, maxLine-len(w.rest)); n > 0 {
			w.rest = append(w.rest, p[:n]...)
		}
		if p = p[i:]; end {
			p = p[1:]
			w.flush()
		}
	}
}

func (w *lines) flush() {
	text := strings.TrimRight(strings.ToValidUTF8(string(w.rest), "\uFFFD"), "\r")
	if w.rest = w.rest[:0]; strings.TrimSpace(text) != "" {
		w.log.line(w.level, text)
	}
}
