package engine_test

import (
	"context"
	"errors"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// slowClocks has guests answer nothing to those who tell them the time until
// open is called, and counts who was asked and who has answered.
type slowClocks struct {
	mu          sync.Mutex
	asked, told map[string]int
	opened      chan struct{}
}

func (c *slowClocks) ask(ctx context.Context, id string) {
	c.mu.Lock()
	c.asked[id]++
	c.mu.Unlock()
	select {
	case <-c.opened:
	case <-ctx.Done():
		return
	}
	c.mu.Lock()
	c.told[id]++
	c.mu.Unlock()
}

func (c *slowClocks) count(m map[string]int, id string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return m[id]
}

func slow(w *world) *slowClocks {
	c := &slowClocks{asked: map[string]int{}, told: map[string]int{}, opened: make(chan struct{})}
	w.BeforeInit(c.ask)
	return c
}

// TestAStartWaitsForNoGuest: who stood still when the last engine ended is told
// the time, beside everything else; who did not is not even asked.
func TestAStartWaitsForNoGuest(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"record_pending", "vm_stop", "commit", "record_captured", "vm_continue"} {
		t.Run(step, func(t *testing.T) {
			w := newWorld(t, snapshot.CompactionPolicy{})
			w.create("other", "base")
			w.create("a", "base")
			w.mark("a")
			w.crashIn(engine.OpSnapshot, step, func() error { return w.snapshot("a", "s") })
			c := slow(w)
			w.must(w.open()) // no guest has answered
			if _, err := w.e.Guest("a"); err != nil || w.state("a") != engine.Running {
				t.Fatalf("a is %s: %v", w.state("a"), err)
			}
			w.until("a is told the time", func() bool { return c.count(c.asked, "a") > 0 })
			// Nothing waits for that, nor is refused: a pause tells the time at its end.
			w.must(w.pause("a"))
			close(c.opened)
			w.must(w.resume("a", false))
			w.same("a")
			if n := c.count(c.asked, "other"); n != 0 {
				t.Errorf("the other, which never stood still, was asked %d times", n)
			}
		})
	}
}

func TestAGuestThatStoodStillIsToldTheTimeInTheEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	w.crashIn(engine.OpPause, "device_state", func() error { return w.pause("a") })
	c := slow(w)
	w.must(w.open())
	w.until("it is asked", func() bool { return c.count(c.asked, "a") > 0 })
	w.must(w.open()) // and again by the next engine, as nobody had an answer
	before := c.count(c.asked, "a")
	w.until("it is asked again", func() bool { return c.count(c.asked, "a") > before })
	close(c.opened)
	w.until("it is told", func() bool { return c.count(c.told, "a") > 0 })
}

// TestARefusedPauseTellsTheTime: the VM stood still for as long as it took to
// find out.
func TestARefusedPauseTellsTheTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t, snapshot.CompactionPolicy{})
	w.create("a", "base")
	c := slow(w)
	full := errors.New("told to fail")
	w.failOnce(engine.OpPause, "memory", full)
	if err := w.pause("a"); !errors.Is(err, full) {
		t.Fatal(err)
	}
	w.until("it is asked", func() bool { return c.count(c.asked, "a") > 0 })
	close(c.opened)
	w.until("it is told", func() bool { return c.count(c.told, "a") > 0 })
	w.hook(nil)
	w.must(w.pause("a"))
}
