package nested

import (
	"strings"
	"testing"
	"time"
)

// TestStepsRunHereAndAreParsed: what a step prints here is read as what one in
// the machine prints, with its verdict.
func TestStepsRunHereAndAreParsed(t *testing.T) {
	script := func(name, text string) Step { return Step{Name: name, Args: []string{"/bin/sh", "-c", text}, Dir: "/"} }
	out := Here(t, []Step{
		script("good", `echo "=== RUN   TestA"; echo "    a.go:1: said $WORD"; echo "--- PASS: TestA (0.00s)"; echo PASS`),
		script("bad", `echo "=== RUN   TestB"; echo "--- FAIL: TestB (0.00s)"; exit 1`),
		script("cut", `echo "=== RUN   TestC"; kill -9 $$`),
	}, time.Minute)
	for i, want := range []struct{ name, verdict, step string }{
		{"TestA", "PASS", "ok"}, {"TestB", "FAIL", "exit status 1"}, {"TestC", "it did not end", "signal: killed"},
	} {
		parts := strings.Split(string(out), "=== STEP  ")
		_, body, _ := strings.Cut(parts[i+1], "\n")
		results, _, verdict := parse([]byte(body))
		if len(results) != 1 || results[0].name != want.name || results[0].verdict != want.verdict || verdict != want.step {
			t.Errorf("step %d: %+v, verdict %q, want %+v", i, results, verdict, want)
		}
	}
}

func TestWrongDigestIsRefused(t *testing.T) {
	for name, want := range digests {
		if err := checkDigest(name, want, []byte("another program")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkDigest("nothing", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", nil); err != nil {
		t.Error(err)
	}
}
