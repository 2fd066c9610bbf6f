package kernelnbd

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
)

// TestOpenFindsTheKernelsClientOrSaysWhatToDo, whichever this kernel has.
func TestOpenFindsTheKernelsClientOrSaysWhatToDo(t *testing.T) {
	d, err := Open("test", slog.New(slog.DiscardHandler))
	_, missing := os.Stat("/sys/module/nbd")
	switch {
	case missing != nil:
		if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "modprobe nbd") {
			t.Errorf("without the module: %v", err)
		}
	case err != nil:
		t.Errorf("with the module: %v", err)
	}
	if d != nil {
		d.Close()
	}
}
