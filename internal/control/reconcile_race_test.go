package control_test

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
)

// quickHost has somebody else finish the delete while the host is asked.
type quickHost struct {
	*controltest.Host
	meanwhile func(id string)
}

func (h quickHost) DestroySandbox(ctx context.Context, id string) error {
	h.meanwhile(id)
	return h.Host.DestroySandbox(ctx, id)
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// TestADeleteThatWasFinishedMeanwhileIsNoWarning: a look that finds a stopping
// row and comes second has nothing to do, nothing to repeat and nothing to say.
func TestADeleteThatWasFinishedMeanwhileIsNoWarning(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	row, err := f.store.GetSandbox(t.Context(), sb.ID)
	if err != nil {
		t.Fatal(err)
	}
	row.Status = control.StatusStopping
	if err := f.store.UpdateSandbox(t.Context(), row); err != nil {
		t.Fatal(err)
	}
	asked := false
	var log logBuffer
	s := control.New(control.Options{
		Store: f.store, Clock: f.clock, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Host: quickHost{f.host, func(id string) {
			asked = true
			if err := f.store.DeleteSandbox(t.Context(), id, row.Version+1); err != nil {
				t.Error(err)
			}
		}},
	})
	again, err := s.Reconcile(t.Context())
	if err != nil || again || !asked {
		t.Errorf("again %v, asked %v, %v", again, asked, err)
	}
	if log.b.Len() > 0 {
		t.Errorf("it says: %s", log.b.String())
	}
}
