package control

import "time"

// Clock is the time source; nil in Options is the real one. What is told and
// stored is of the wall clock, which may jump; what is waited for is measured by
// the other one, which does not.
type Clock interface {
	Now() time.Time
	// Mono is the time since some moment, by a clock that only goes forward.
	Mono() time.Duration
	// NewTimer gives a channel that receives once after d, and a stop.
	NewTimer(d time.Duration) (c <-chan time.Time, stop func())
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

// started is the moment that Mono counts from.
var started = time.Now()

func (realClock) Mono() time.Duration { return time.Since(started) }

func (realClock) NewTimer(d time.Duration) (<-chan time.Time, func()) {
	t := time.NewTimer(d)
	return t.C, func() { t.Stop() }
}

// stamp makes a time fit for the store: UTC, microseconds, no monotonic part.
func stamp(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.Round(0).UTC().Truncate(time.Microsecond)
}
