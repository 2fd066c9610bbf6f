package engine

import (
	"fmt"
	"log/slog"
	"testing"
)

// TestAWatcherThatFallsBehindIsCutOff: what is kept for one is bounded, nobody
// waits for it, and it is told that it has to begin anew.
func TestAWatcherThatFallsBehindIsCutOff(t *testing.T) {
	e := &Engine{log: slog.New(slog.DiscardHandler), sandboxes: map[string]*sandbox{}, watchers: map[chan Event]bool{}}
	_, lags := e.Watch(t.Context())
	_, reads := e.Watch(t.Context())
	const n = 5000
	for i := range n {
		e.announce(Event{Sandbox: Info{ID: fmt.Sprint(i)}})
		if ev := <-reads; ev.Sandbox.ID != fmt.Sprint(i) {
			t.Fatalf("who reads is told of %s, want %d", ev.Sandbox.ID, i)
		}
	}
	got := 0
	for ev := range lags { // ends, so it was closed
		if ev.Sandbox.ID != fmt.Sprint(got) {
			t.Fatalf("who lags is told of %s after %d events", ev.Sandbox.ID, got)
		}
		got++
	}
	if got == 0 || got >= n {
		t.Errorf("%d of %d events were kept for who does not read", got, n)
	}
	if len(e.watchers) != 1 {
		t.Errorf("%d watch, want who reads alone", len(e.watchers))
	}
}
