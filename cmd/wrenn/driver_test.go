package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// TestFirecrackerIsNotReplacedInSilence: where it was asked for, or was chosen by
// an earlier server of this directory, and cannot run any more, that is an error
// with what to do; QEMU could not resume what it saved.
func TestFirecrackerIsNotReplacedInSilence(t *testing.T) {
	for name, c := range map[string]struct{ asked, chosen string }{
		"asked for":      {driverFirecracker, ""},
		"chosen earlier": {driverAuto, "firecracker\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("PATH", t.TempDir())
			dir := t.TempDir()
			if c.chosen != "" {
				if err := os.WriteFile(filepath.Join(dir, "driver"), []byte(c.chosen), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s := &stack{log: slog.New(slog.DiscardHandler)}
			_, _, err := s.chooseDriver(t.Context(), upOptions{dir: dir, driver: c.asked}, &template.Result{})
			if err == nil {
				t.Fatal("there is a driver")
			}
			for _, want := range []string{"firecracker is not installed", "wrenn doctor", "--driver qemu"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error is %q, want %q in it", err, want)
				}
			}
			if b, _ := os.ReadFile(filepath.Join(dir, "driver")); string(b) != c.chosen {
				t.Errorf("the choice became %q", b)
			}
		})
	}
}
