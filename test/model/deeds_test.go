package model

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// deed is one operation, drawn and ready to be done.
type deed struct {
	what string
	// do asks the server. It changes nothing in the oracle.
	do func(ctx context.Context) error
	// done enters into the oracle that it happened.
	done func()
	// settle is called instead of done when a fault came between: it sees from
	// what there is whether it happened, and enters that.
	settle func(sc scene)
	// after are the sandboxes to look into when it happened.
	after func() []*box
	// span is about how long it takes.
	span time.Duration
}

// kind is one kind of operation.
type kind struct {
	name   string
	weight int
	can    func(w *world) bool
	draw   func(w *world, r *rand.Rand) deed
}

var kinds = []kind{
	{"memory", 6, hasRunning, drawMemory},
	{"file", 6, hasRunning, drawFile},
	{"remove file", 1, hasRunning, drawRemoveFile},
	{"pause", 5, hasRunning, drawPause},
	{"resume", 6, func(w *world) bool { return len(w.paused()) > 0 && mayRun(w, 1) }, drawResume},
	{"snapshot", 3, func(w *world) bool { return len(w.boxes) > 0 && len(w.snaps) < maxSnaps }, drawSnapshot},
	{"spawn", 4, func(w *world) bool { return len(w.snaps) > 0 && mayRun(w, 1) }, drawSpawn},
	{"fork", 2, func(w *world) bool { return len(w.boxes) > 0 && mayRun(w, 1) }, drawFork},
	{"delete", 2, func(w *world) bool { return len(w.boxes) > 2 }, drawDelete},
	{"delete snapshot", 2, func(w *world) bool { return len(w.snaps) > 1 }, drawDeleteSnapshot},
	{"time limit", 2, hasRunning, drawTimeLimit},
}

func hasRunning(w *world) bool { return len(w.running()) > 0 }

func mayRun(w *world, n int) bool {
	return len(w.running())+n <= maxRunning && len(w.boxes)+n <= maxBoxes
}

// draw chooses an operation that is possible now.
func (w *world) draw(r *rand.Rand) (kind, deed) {
	total := 0
	for _, k := range kinds {
		if k.can(w) {
			total += k.weight
		}
	}
	n := r.IntN(total)
	for _, k := range kinds {
		if !k.can(w) {
			continue
		}
		if n -= k.weight; n < 0 {
			return k, k.draw(w, r)
		}
	}
	panic("not reached: the weights add up to the total")
}

// changeDeed has a ledger change something.
func changeDeed(w *world, b *box, c change) deed {
	done := func() { b.holds.apply(c) }
	return deed{
		what: fmt.Sprintf("%s: %v", b.label, c),
		do:   func(ctx context.Context) error { return w.change(ctx, b, c) },
		done: done,
		settle: func(scene) {
			// Whether it happened or not, asking again makes it so.
			ctx, cancel := within(2 * time.Minute)
			defer cancel()
			if err := w.change(ctx, b, c); err != nil {
				w.fail("again after the fault: %s: %v", b.label, err)
			}
			done()
		},
		span: 300 * time.Millisecond,
	}
}

func (w *world) newChange(do string) change {
	w.next++
	return change{Do: do, Number: uint64(w.next), At: []span{}}
}

// seedOr0 draws new content; now and then it is zeros.
func seedOr0(r *rand.Rand) uint64 {
	if r.IntN(5) == 0 {
		return 0
	}
	return r.Uint64N(1 << 40)
}

func drawMemory(w *world, r *rand.Rand) deed {
	c := w.newChange("memory")
	c.Seed, c.Drop, c.At = seedOr0(r), r.IntN(2) == 0, spansIn(r, ledgerBlocks, 400)
	return changeDeed(w, pick(r, w.running()), c)
}

func drawFile(w *world, r *rand.Rand) deed {
	b := pick(r, w.running())
	c := w.newChange("file")
	c.Name, c.Seed, c.Sync = fmt.Sprintf("f%d", r.IntN(6)), seedOr0(r), r.IntN(2) == 0
	c.Blocks = 1 + r.IntN(512)
	if old := len(b.holds.files[c.Name]); old > 0 && r.IntN(2) == 0 {
		c.Blocks = old // written over in place
	}
	c.At = spansIn(r, c.Blocks, 256)
	return changeDeed(w, b, c)
}

func drawRemoveFile(w *world, r *rand.Rand) deed {
	b := pick(r, w.running())
	for i := range 6 {
		if name := fmt.Sprintf("f%d", i); b.holds.files[name] != nil {
			c := w.newChange("remove")
			c.Name = name
			return changeDeed(w, b, c)
		}
	}
	return drawFile(w, r)
}

// stateDeed moves a sandbox from one resting state to the other.
func stateDeed(w *world, b *box, op string, running bool, do func(ctx context.Context, id string) (*client.Sandbox, error)) deed {
	return deed{
		what: op + " " + b.label,
		do:   func(ctx context.Context) error { _, err := do(ctx, b.id); return err },
		done: func() { b.running = running },
		settle: func(sc scene) {
			sb, ok := sc.boxes[b.id]
			if !ok {
				w.fail("%s (%s) is gone", b.label, b.id)
			}
			b.running = sb.Status == client.StatusRunning // verify refuses all but paused besides
		},
		after: func() []*box { return []*box{b} },
		span:  600 * time.Millisecond,
	}
}

func drawPause(w *world, r *rand.Rand) deed {
	return stateDeed(w, pick(r, w.running()), "pause", false, func(ctx context.Context, id string) (*client.Sandbox, error) {
		return w.s.PauseSandbox(ctx, id)
	})
}

func drawResume(w *world, r *rand.Rand) deed {
	return stateDeed(w, pick(r, w.paused()), "resume", true, func(ctx context.Context, id string) (*client.Sandbox, error) {
		return w.s.ResumeSandbox(ctx, id)
	})
}

func drawSnapshot(w *world, r *rand.Rand) deed {
	b := pick(r, w.boxes)
	w.next++
	s := &snap{name: fmt.Sprintf("snap%d", w.next), holds: b.holds.clone()}
	done := func() { w.snaps = append(w.snaps, s) }
	return deed{
		what: fmt.Sprintf("snapshot %s as %s", b.label, s.name),
		do:   func(ctx context.Context) error { _, err := w.s.CreateSnapshot(ctx, b.id, s.name); return err },
		done: done,
		settle: func(sc scene) {
			if sc.snaps[s.name] {
				done()
			}
		},
		after: func() []*box { return []*box{b} },
		span:  400 * time.Millisecond,
	}
}

// strangers enters sandboxes that an interrupted operation made of known
// content, and looks into each.
func (w *world) strangers(sc scene, holds holding) {
	known := map[string]bool{}
	for _, b := range w.boxes {
		known[b.id] = true
	}
	for id, sb := range sc.boxes {
		if known[id] || sb.Status != client.StatusRunning {
			continue // verify refuses what is neither
		}
		b := w.adopt(sb, holds)
		w.note("     found %s (%s), made before the fault", b.label, b.id)
	}
}

func drawSpawn(w *world, r *rand.Rand) deed {
	from, auto := pick(r, w.snaps), r.IntN(2) == 0
	var made *client.Sandbox
	var b *box
	return deed{
		what: fmt.Sprintf("spawn from %s, auto_pause %v", from.name, auto),
		do: func(ctx context.Context) (err error) {
			made, err = w.s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: from.name, AutoPause: auto})
			return err
		},
		done:   func() { b = w.adopt(*made, from.holds) },
		settle: func(sc scene) { w.strangers(sc, from.holds) },
		after:  func() []*box { return []*box{b} },
		span:   700 * time.Millisecond,
	}
}

func drawFork(w *world, r *rand.Rand) deed {
	from := pick(r, w.boxes)
	count := 1
	if mayRun(w, 2) {
		count += r.IntN(2)
	}
	holds := from.holds.clone()
	var made []client.Sandbox
	var children []*box
	return deed{
		what: fmt.Sprintf("fork %s into %d", from.label, count),
		do: func(ctx context.Context) (err error) {
			made, err = w.s.ForkSandbox(ctx, from.id, count)
			return err
		},
		done: func() {
			for _, sb := range made {
				children = append(children, w.adopt(sb, holds))
			}
		},
		settle: func(sc scene) {
			w.strangers(sc, holds)
			w.dropForkNames(sc)
		},
		after: func() []*box { return append(children, from) },
		span:  1200 * time.Millisecond,
	}
}

// dropForkNames removes the snapshot that a fork which was cut off may leave:
// it is listed, and deleted like any other.
func (w *world) dropForkNames(sc scene) {
	for name := range sc.snaps {
		if !strings.HasPrefix(name, "fork-") {
			continue
		}
		ctx, cancel := within(time.Minute)
		defer cancel()
		if err := w.s.DeleteSnapshot(ctx, name); err != nil && !client.IsNotFound(err) {
			w.fail("delete what the fork left: %v", err)
		}
		w.note("     removed %s, which the fork left", name)
	}
}

func drawDelete(w *world, r *rand.Rand) deed {
	b := pick(r, w.boxes)
	done := func() { w.remove(b) }
	return deed{
		what: "delete " + b.label,
		do:   func(ctx context.Context) error { return w.s.DeleteSandbox(ctx, b.id) },
		done: done,
		settle: func(sc scene) {
			if _, ok := sc.boxes[b.id]; !ok {
				done()
			}
		},
		span: 200 * time.Millisecond,
	}
}

func drawDeleteSnapshot(w *world, r *rand.Rand) deed {
	s := pick(r, w.snaps)
	done := func() { w.removeSnap(s) }
	return deed{
		what: "delete snapshot " + s.name,
		do:   func(ctx context.Context) error { return w.s.DeleteSnapshot(ctx, s.name) },
		done: done,
		settle: func(sc scene) {
			if !sc.snaps[s.name] {
				done()
			}
		},
		span: 100 * time.Millisecond,
	}
}

// drawTimeLimit lets a sandbox come to its time limit: it is paused or
// destroyed, as it was made.
func drawTimeLimit(w *world, r *rand.Rand) deed {
	b := pick(r, w.running())
	if !b.autoPause && len(w.boxes) <= 2 {
		return drawPause(w, r) // the last ones are kept
	}
	gone := false // the server, not the sandbox
	acted := func() bool {
		ctx, cancel := within(time.Minute)
		defer cancel()
		sb, err := w.s.GetSandbox(ctx, b.id)
		gone = client.IsUnreachable(err)
		return client.IsNotFound(err) || err == nil && sb.Status == client.StatusPaused
	}
	done := func() {
		if !b.autoPause {
			w.remove(b)
			return
		}
		b.running = false
		ctx, cancel := within(time.Minute)
		defer cancel()
		// The next run is to have no limit.
		if _, err := w.s.SetTimeout(ctx, b.id, 0); err != nil {
			w.fail("take the time limit of %s away: %v", b.label, err)
		}
	}
	return deed{
		what: fmt.Sprintf("time limit of %s, auto_pause %v", b.label, b.autoPause),
		do: func(ctx context.Context) error {
			if _, err := w.s.SetTimeout(ctx, b.id, time.Second); err != nil {
				return err
			}
			if !harness.Eventually(2*time.Minute, func() bool { return ctx.Err() != nil || acted() || gone }) {
				return fmt.Errorf("long after its time limit nothing has happened to %s", b.label)
			}
			if gone {
				return errors.New("the server is gone")
			}
			return ctx.Err()
		},
		done: done,
		settle: func(sc scene) {
			if sb, ok := sc.boxes[b.id]; ok && sb.Status == client.StatusRunning && sb.ExpiresAt.IsZero() {
				return // the limit was never set
			}
			// It was set, and acts now that the fault is over.
			if !harness.Eventually(2*time.Minute, acted) {
				w.fail("the time limit of %s is forgotten", b.label)
			}
			done()
		},
		span: 1500 * time.Millisecond,
	}
}
