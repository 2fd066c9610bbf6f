package nested

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"
)

// Here runs the steps on this machine, which has KVM, in place of one that
// emulates it, and returns what they printed in the same form.
func Here(t testing.TB, steps []Step, limit time.Duration) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var out bytes.Buffer
	for _, s := range steps {
		began := time.Now()
		fmt.Fprintf(&out, "=== STEP  %s\n", s.Name)
		cmd := exec.CommandContext(ctx, s.Args[0], s.Args[1:]...)
		cmd.Env = append(os.Environ(), s.Env...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = s.Dir, &out, &out
		verdict := "ok"
		if err := cmd.Run(); err != nil {
			verdict = err.Error()
		}
		fmt.Fprintf(&out, "\n--- STEP  %s %.1fs %s\n", s.Name, time.Since(began).Seconds(), verdict)
	}
	return out.Bytes()
}
