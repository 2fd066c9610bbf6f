package model

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

const (
	// prefix is where the server under test has its links.
	prefix = "10.218.0.0/16"
	// ledgerBlocks is the memory that each ledger holds: 16 MiB.
	ledgerBlocks = 4096
	maxRunning   = 3
	maxBoxes     = 5
	maxSnaps     = 3
	// diskMiB is the size of the file system with the state. Some hundred are
	// the base template's.
	diskMiB = 2048
)

// box is a sandbox that must exist.
type box struct {
	label, id string
	running   bool
	autoPause bool
	holds     holding
}

// snap is a snapshot that must exist.
type snap struct {
	name  string
	holds holding
}

// world is the server under test and the oracle.
type world struct {
	t     *testing.T
	s     *harness.Server
	seed  uint64
	born  string
	boxes []*box // in the order in which they came to be
	snaps []*snap
	// next numbers labels, names and changes.
	next    int
	history []string
	tally   tally
}

// tally counts what the run did.
type tally struct {
	steps, checks      int
	injected, survived map[string]int
	lost               int
}

func (c tally) String() string {
	var kinds []string
	injected, survived := 0, 0
	for _, kind := range slices.Sorted(mapKeys(c.injected)) {
		kinds = append(kinds, fmt.Sprintf("%s %d", kind, c.injected[kind]))
		injected += c.injected[kind]
		survived += c.survived[kind]
	}
	return fmt.Sprintf("%d steps, %d checks of memory and disk; faults injected %d (%s), survived %d, lost %d",
		c.steps, c.checks, injected, strings.Join(kinds, ", "), survived, c.lost)
}

func mapKeys[K comparable, V any](m map[K]V) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// number reads a figure from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		t.Fatalf("%s=%q: want a number", name, v)
	}
	return n
}

func (w *world) note(format string, a ...any) {
	line := fmt.Sprintf(format, a...)
	w.history = append(w.history, line)
	w.t.Log(line)
}

// fail ends the run and says how to have it again.
func (w *world) fail(format string, a ...any) {
	w.t.Helper()
	w.tally.lost++
	w.t.Logf("the steps so far:\n  %s", strings.Join(w.history, "\n  "))
	w.t.Logf("again with WRENN_MODEL_SEED=%d WRENN_MODEL_STEPS=%d make model", w.seed, w.tally.steps)
	w.t.Fatalf(format, a...)
}

func (w *world) running() []*box { return w.boxesThat(func(b *box) bool { return b.running }) }
func (w *world) paused() []*box  { return w.boxesThat(func(b *box) bool { return !b.running }) }

func (w *world) boxesThat(is func(*box) bool) []*box {
	var out []*box
	for _, b := range w.boxes {
		if is(b) {
			out = append(out, b)
		}
	}
	return out
}

func (w *world) remove(b *box) {
	w.boxes = slices.DeleteFunc(w.boxes, func(x *box) bool { return x == b })
}

func (w *world) removeSnap(s *snap) {
	w.snaps = slices.DeleteFunc(w.snaps, func(x *snap) bool { return x == s })
}

func (w *world) label() string {
	w.next++
	return fmt.Sprintf("s%d", w.next)
}

// adopt enters a sandbox that was just made of known content.
func (w *world) adopt(sb client.Sandbox, holds holding) *box {
	b := &box{label: w.label(), id: sb.ID, running: true, autoPause: sb.AutoPause, holds: holds.clone()}
	w.boxes = append(w.boxes, b)
	return b
}

// check makes checksums in a running sandbox.
func (w *world) check(b *box) {
	w.t.Helper()
	ctx, cancel := within(2 * time.Minute)
	defer cancel()
	w.tally.checks++
	if err := compare(ctx, w.s, b.id, w.born, b.holds, w.seeds()); err != nil {
		w.fail("%s (%s): %v", b.label, b.id, err)
	}
}

// seeds are all that occur anywhere: what a wrong block may hold instead.
func (w *world) seeds() map[uint64]bool {
	out := map[uint64]bool{}
	for _, b := range w.boxes {
		b.holds.seeds(out)
	}
	for _, s := range w.snaps {
		s.holds.seeds(out)
	}
	return out
}

// scene is what the server says there is.
type scene struct {
	boxes map[string]client.Sandbox
	snaps map[string]bool
}

// look waits until no sandbox is on its way from one state to another.
func (w *world) look() scene {
	w.t.Helper()
	sc := scene{map[string]client.Sandbox{}, map[string]bool{}}
	ctx, cancel := within(time.Minute)
	defer cancel()
	var last error
	resting := func() bool {
		page, err := w.s.ListSandboxes(ctx, client.ListSandboxesOptions{Limit: 100})
		if last = err; err != nil {
			return false
		}
		clear(sc.boxes)
		for _, sb := range page.Sandboxes {
			sc.boxes[sb.ID] = sb
			switch sb.Status {
			case client.StatusRunning, client.StatusPaused, client.StatusError:
			default:
				last = fmt.Errorf("sandbox %s is %s", sb.ID, sb.Status)
			}
		}
		return last == nil
	}
	if !harness.Eventually(time.Minute, resting) {
		w.fail("the sandboxes do not come to rest: %v", last)
	}
	for sn, err := range w.s.Snapshots(ctx, client.ListSnapshotsOptions{Type: client.SnapshotTypeSnapshot}) {
		if err != nil {
			w.fail("list snapshots: %v", err)
		}
		sc.snaps[sn.Name] = true
	}
	return sc
}

// verify holds the server against the oracle: states and names of everything,
// and the content of what runs.
func (w *world) verify() {
	w.t.Helper()
	sc := w.look()
	for _, b := range w.boxes {
		sb, ok := sc.boxes[b.id]
		if !ok {
			w.fail("%s (%s) is gone", b.label, b.id)
		}
		want := client.StatusPaused
		if b.running {
			want = client.StatusRunning
		}
		if sb.Status != want {
			w.fail("%s (%s) is %s (%s), want %s", b.label, b.id, sb.Status, sb.Error, want)
		}
		delete(sc.boxes, b.id)
	}
	for id, sb := range sc.boxes {
		w.fail("there is a sandbox that nobody made: %s, %s", id, sb.Status)
	}
	for _, s := range w.snaps {
		if !sc.snaps[s.name] {
			w.fail("the snapshot %s is gone", s.name)
		}
		delete(sc.snaps, s.name)
	}
	for name := range sc.snaps {
		w.fail("there is a snapshot that nobody made: %s", name)
	}
	for _, b := range w.running() {
		w.check(b)
	}
}

// pick draws one of several.
func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// spansIn draws some runs of blocks, none beyond the size.
func spansIn(r *rand.Rand, size, most int) []span {
	var out []span
	for range 1 + r.IntN(4) {
		start := r.IntN(size)
		out = append(out, span{start, min(1+r.IntN(most), size-start)})
	}
	return out
}

// change has a ledger do something. It is sent again until it is answered: the
// ledger does it once.
func (w *world) change(ctx context.Context, b *box, c change) error {
	_, err := askLedger(ctx, w.s, b.id, c)
	return err
}
