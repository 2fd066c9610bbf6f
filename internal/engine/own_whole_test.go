package engine

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func (r *ownRig) spawn(id string) error {
	_, _, err := r.Create(r.t.Context(), CreateSpec{ID: id, Template: "s"})
	return err
}

// backends are what Firecracker was told to take memory from, in order.
func (r *ownRig) backends() (kinds string) {
	r.t.Helper()
	for _, c := range r.program.Calls(r.t) {
		body, ok := strings.CutPrefix(c, "PUT /snapshot/load ")
		if !ok {
			continue
		}
		var l struct {
			Backend struct {
				Type string `json:"backend_type"`
			} `json:"mem_backend"`
		}
		r.must(json.Unmarshal([]byte(body), &l))
		kinds += l.Backend.Type + " "
	}
	return strings.TrimSpace(kinds)
}

// frozen makes the snapshot s of a sandbox that is gone, and another engine if
// the memory of all is limited.
func (r *ownRig) frozen(limitMB int) {
	r.t.Helper()
	r.must(r.create("a"))
	_, _, err := r.Snapshot(r.t.Context(), "a", "s")
	r.must(err)
	r.must(r.Destroy(r.t.Context(), "a"))
	r.opts.MemoryLimitMB = limitMB
	r.restart()
}

// TestClonesOfASnapshotShareItsMemory: they map it whole; what a clone is paused
// to is nobody else's and is copied.
func TestClonesOfASnapshotShareItsMemory(t *testing.T) {
	r := newOwnRig(t, time.Minute)
	r.frozen(0)
	r.must(r.spawn("b"))
	r.must(r.spawn("c"))
	r.must(r.pause("b"))
	r.must(r.resume("b"))
	if got := r.backends(); got != "File File Uffd" {
		t.Errorf("memory came from %s", got)
	}
	for id, want := range map[string]bool{"b": false, "c": true} {
		if got := r.sandboxes[id].journal().Run.WholeImage; got != want {
			t.Errorf("%s has its image whole: %v", id, got)
		}
	}
	r.must(r.DeleteSnapshot(t.Context(), "s"))
	r.must(r.pause("c"))
	r.must(r.resume("c"))
	for _, id := range []string{"b", "c"} {
		r.must(r.Destroy(t.Context(), id))
	}
	r.nothingHeld("at the end", 0)
}

// TestAWholeImageCountsAsMemory of the host, once for all clones, also for the
// next engine; where there is no room for it clones copy.
func TestAWholeImageCountsAsMemory(t *testing.T) {
	t.Run("room", func(t *testing.T) {
		r := newOwnRig(t, time.Minute)
		r.frozen(3 * 64)
		r.must(r.spawn("b"))
		r.must(r.spawn("c"))
		if got := r.backends(); got != "File File" {
			t.Errorf("memory came from %s", got)
		}
		for range 2 {
			if err := r.spawn("d"); !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "192 of 192 MiB") {
				t.Errorf("a third sandbox beside two and their image: %v", err)
			}
			r.restart()
		}
		r.must(r.Destroy(t.Context(), "b"))
		r.must(r.Destroy(t.Context(), "c"))
		r.importBase(t.TempDir(), BaseFiles{})
		for _, id := range []string{"d", "e", "f"} { // nobody uses the image now
			r.must(r.create(id))
			defer r.Destroy(t.Context(), id)
		}
	})
	t.Run("no room", func(t *testing.T) {
		r := newOwnRig(t, time.Minute)
		r.frozen(2*64 - 1)
		r.must(r.spawn("b"))
		if got := r.backends(); got != "Uffd" {
			t.Errorf("memory came from %s", got)
		}
		r.must(r.Destroy(t.Context(), "b"))
	})
}
