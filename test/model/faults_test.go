package model

import (
	"math/rand/v2"
	"time"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// fault is what happens to the host while an operation is under way.
type fault struct {
	name   string
	weight int
	// strike does it, at some moment of the operation, and sees to it that the
	// host is whole again. It returns how the operation ended.
	strike func(w *world, r *rand.Rand, d deed) error
}

var faults = []fault{
	{"server killed", 4, strikeServer},
	{"pager killed", 4, strikePager},
	{"server and pager killed", 2, strikeBoth},
	{"disk full", 3, strikeDisk},
}

func (w *world) drawFault(r *rand.Rand) fault {
	total := 0
	for _, f := range faults {
		total += f.weight
	}
	n := r.IntN(total)
	for _, f := range faults {
		if n -= f.weight; n < 0 {
			return f
		}
	}
	panic("not reached: the weights add up to the total")
}

// amid starts the operation, strikes at some moment of it, and returns how the
// operation ended.
func amid(r *rand.Rand, d deed, strike func()) error {
	ctx, cancel := within(2 * time.Minute)
	defer cancel()
	ended := make(chan error, 1)
	wait := time.Duration(r.Int64N(int64(d.span)))
	go func() { ended <- d.do(ctx) }()
	time.Sleep(wait) // the moment of the fault
	strike()
	return <-ended
}

func strikeServer(w *world, r *rand.Rand, d deed) error {
	err := amid(r, d, w.s.Kill)
	w.restart()
	return err
}

func strikeBoth(w *world, r *rand.Rand, d deed) error {
	err := amid(r, d, func() {
		p := w.s.Pager()
		w.s.Kill()
		if p != nil {
			p.Kill()
		}
	})
	w.restart()
	return err
}

func strikePager(w *world, r *rand.Rand, d deed) error {
	p := w.s.Pager()
	err := amid(r, d, func() {
		if p != nil {
			p.Kill()
		}
	})
	if !harness.Eventually(2*time.Minute, func() bool { n := w.s.Pager(); return n != nil && (p == nil || n.PID != p.PID) }) {
		w.fail("no new pager comes up")
	}
	return err
}

// strikeDisk lets an operation find little room, or none; and the guests what
// they have in their caches: their writes wait for room.
func strikeDisk(w *world, r *rand.Rand, d deed) error {
	ctx, cancel := within(2 * time.Minute)
	defer cancel()
	free := pick(r, []uint64{0, 256 << 10, 2 << 20, 16 << 20})
	empty, err := harness.Fill(w.s.Dir, free)
	if err != nil {
		w.fail("%v", err)
	}
	done := make(chan error, 1)
	go func() { done <- d.do(ctx) }()
	var ended error
	select {
	case ended = <-done:
		err = empty()
	case <-time.After(5 * time.Second): // it waits for room, which there is now
		err = empty()
		ended = <-done
	}
	if err != nil {
		w.fail("make room again: %v", err)
	}
	w.note("     %d KiB were free", free>>10)
	return ended
}

func (w *world) restart() {
	ctx, cancel := within(2 * time.Minute)
	defer cancel()
	if err := w.s.Restart(ctx); err != nil {
		w.fail("restart: %v", err)
	}
}

// struck does one operation with a fault in it and verifies everything.
func (w *world) struck(r *rand.Rand, f fault, d deed) {
	w.tally.injected[f.name]++
	began := time.Now()
	err := f.strike(w, r, d)
	verdict := "done"
	if err != nil {
		verdict = "ended with: " + err.Error()
	}
	w.note("%4d %s, amid %s; %s; %v", w.tally.steps, f.name, d.what, verdict, time.Since(began).Round(time.Millisecond))
	if err == nil {
		d.done() // it was told as done, so it must be so
	} else {
		d.settle(w.look())
	}
	w.verify()
	w.tally.survived[f.name]++
}

// calm does one operation, which must succeed.
func (w *world) calm(d deed) {
	ctx, cancel := within(2 * time.Minute)
	defer cancel()
	began := time.Now()
	err := d.do(ctx)
	w.note("%4d %s; %v", w.tally.steps, d.what, time.Since(began).Round(time.Millisecond))
	if err != nil {
		w.fail("%s: %v", d.what, err)
	}
	d.done()
	if d.after == nil {
		return
	}
	for _, b := range d.after() {
		if b.running {
			w.check(b)
		}
	}
}
