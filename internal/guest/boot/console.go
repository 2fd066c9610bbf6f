package boot

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// trace times the steps of a boot phase. One line at the end of the phase
// carries all of them: each console character costs an exit from the VM.
type trace struct {
	out   io.Writer
	name  string
	now   func() time.Time
	start time.Time
	last  time.Time
	line  strings.Builder
}

func newTrace(out io.Writer, name string, now func() time.Time) *trace {
	t := now()
	return &trace{out: out, name: name, now: now, start: t, last: t}
}

// step ends the step that began at the previous call (or at newTrace).
func (t *trace) step(name string) {
	now := t.now()
	fmt.Fprintf(&t.line, " %s=%.1f", name, millis(now.Sub(t.last)))
	t.last = now
}

// warn reports something boot goes on without.
func (t *trace) warn(doing string, err error) {
	fmt.Fprintf(t.out, "wrenn %s: warning: %s: %v\n", t.name, doing, err)
}

// done prints the steps in milliseconds, and the kernel's uptime when it is
// known, so that the part before us is seen too.
func (t *trace) done() {
	fmt.Fprintf(t.out, "wrenn %s: %.1f ms:%s (uptime %s s)\n",
		t.name, millis(t.now().Sub(t.start)), t.line.String(), uptime())
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// uptime is the seconds since the kernel started, as /proc/uptime has it.
func uptime() string {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return "?"
	}
	s, _, _ := strings.Cut(string(b), " ")
	return s
}
