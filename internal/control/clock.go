package control

import "time"

// Clock is the time source; nil in Options is the real one. Now should carry a
// monotonic reading, so that a wall clock that jumps moves no limit.
type Clock interface {
	Now() time.Time
	// NewTimer gives a channel that receives once after d, and a stop.
	NewTimer(d time.Duration) (c <-chan time.Time, stop func())
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

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
