package engine_test

import (
	"errors"
	"strings"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/engine/enginetest"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// TestNoRoomNamesWhatIsShort: create, spawn and resume are refused when the
// host has no room, say what is short and what helps, and leave nothing; when
// room is made they work.
func TestNoRoomNamesWhatIsShort(t *testing.T) {
	free := int64(100 << 20)
	for name, c := range map[string]struct {
		limit func(h *enginetest.Host, o *engine.Options)
		names []string
	}{
		"memory": {func(_ *enginetest.Host, o *engine.Options) { o.MemoryLimitMB = vmm.MinMemoryMB + 10 }, []string{"memory", "--memory-limit", "64 of 74 MiB"}},
		"CPU":    {func(_ *enginetest.Host, o *engine.Options) { o.VCPULimit = 1 }, []string{"CPU", "--vcpu-limit", "1 of 1"}},
		"slots":  {func(h *enginetest.Host, _ *engine.Options) { h.Network.Max = 1 }, []string{"network", "--network-prefix"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := enginetest.New(t)
			e := h.Start(func(o *engine.Options) { c.limit(h, o) })
			ctx := t.Context()
			create := func(id, from string) error {
				spec := engine.CreateSpec{ID: id, Template: from}
				if from == enginetest.BaseName {
					spec.MemoryMB = vmm.MinMemoryMB
				}
				_, _, err := e.Create(ctx, spec)
				return err
			}
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			must(create("a", enginetest.BaseName))
			_, _, err := e.Snapshot(ctx, "a", "s")
			must(err)
			_, _, err = e.Pause(ctx, "a")
			must(err)
			must(create("b", "s"))
			_, _, resume := e.Resume(ctx, "a", false)
			for what, err := range map[string]error{"create": create("c", enginetest.BaseName), "spawn": create("c", "s"), "resume": resume} {
				if !errors.Is(err, engine.ErrNoRoom) {
					t.Errorf("%s: %v, want no room", what, err)
				}
				for _, n := range c.names {
					if err == nil || !strings.Contains(err.Error(), n) {
						t.Errorf("%s: %v does not name %q", what, err, n)
					}
				}
			}
			if i, _ := e.Get("a"); i.State != engine.Paused {
				t.Errorf("a is %s, want paused", i.State)
			}
			if _, err := e.Get("c"); !errors.Is(err, engine.ErrNotFound) {
				t.Errorf("c: %v", err)
			}
			_, _, err = e.Pause(ctx, "b")
			must(err)
			_, _, err = e.Resume(ctx, "a", false)
			must(err)
		})
	}
	t.Run("disk", func(t *testing.T) {
		h := enginetest.New(t)
		e := h.Start(func(o *engine.Options) {
			o.MinFreeDisk = 50 << 20
			o.DiskFree = func() (int64, error) { return free, nil }
		})
		ctx := t.Context()
		if _, _, err := e.Create(ctx, engine.CreateSpec{ID: "a", Template: enginetest.BaseName, MemoryMB: vmm.MinMemoryMB}); err != nil {
			t.Fatal(err)
		}
		free = 49 << 20
		_, _, create := e.Create(ctx, engine.CreateSpec{ID: "b", Template: enginetest.BaseName, MemoryMB: vmm.MinMemoryMB})
		_, _, snap := e.Snapshot(ctx, "a", "s")
		if _, _, err := e.Pause(ctx, "a"); err != nil {
			t.Errorf("below the low-water mark a pause must still work: %v", err)
		}
		_, _, resume := e.Resume(ctx, "a", false)
		for what, err := range map[string]error{"create": create, "snapshot": snap, "resume": resume} {
			if !errors.Is(err, engine.ErrNoRoom) || !strings.Contains(err.Error(), "49 MiB are free") || !strings.Contains(err.Error(), "--min-free-disk") {
				t.Errorf("%s: %v", what, err)
			}
		}
		free = 50 << 20
		if _, _, err := e.Resume(ctx, "a", false); err != nil {
			t.Errorf("with room again: %v", err)
		}
	})
}

// TestManyAtOnceDoNotOutgrowTheHost: the room is taken before the start, not
// after it.
func TestManyAtOnceDoNotOutgrowTheHost(t *testing.T) {
	h := enginetest.New(t)
	e := h.Start(func(o *engine.Options) { o.MemoryLimitMB = 3 * vmm.MinMemoryMB })
	ctx := t.Context()
	const n = 8
	for i := range n {
		id := string(rune('a' + i))
		if _, _, err := e.Create(ctx, engine.CreateSpec{ID: id, Template: enginetest.BaseName, MemoryMB: vmm.MinMemoryMB}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := e.Pause(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() { _, _, errs[i] = e.Resume(ctx, string(rune('a'+i)), false) })
	}
	wg.Wait()
	ran := 0
	for _, err := range errs {
		switch {
		case err == nil:
			ran++
		case !errors.Is(err, engine.ErrNoRoom):
			t.Error(err)
		}
	}
	if ran != 3 {
		t.Errorf("%d were resumed, want the 3 that there is room for", ran)
	}
}
