package controltest

import (
	"sync"
	"time"
)

// Clock is a control.Clock that moves only by Advance; Jump moves its wall clock
// alone.
type Clock struct {
	mu     sync.Mutex
	now    time.Time
	mono   time.Duration
	timers map[*timer]bool
	// added tells Wait of a new timer.
	added *sync.Cond
}

type timer struct {
	at time.Duration
	c  chan time.Time
}

// NewClock makes a clock that stands at a round time.
func NewClock() *Clock {
	c := &Clock{now: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC), timers: map[*timer]bool{}}
	c.added = sync.NewCond(&c.mu)
	return c
}

// Now implements control.Clock.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Mono implements control.Clock.
func (c *Clock) Mono() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mono
}

// Jump sets the wall clock forward or, with a negative d, back.
func (c *Clock) Jump(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// NewTimer implements control.Clock.
func (c *Clock) NewTimer(d time.Duration) (<-chan time.Time, func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &timer{at: c.mono + d, c: make(chan time.Time, 1)}
	if d <= 0 {
		t.c <- c.now
	} else {
		c.timers[t] = true
	}
	c.added.Broadcast()
	return t.c, func() { c.mu.Lock(); delete(c.timers, t); c.mu.Unlock() }
}

// Advance moves the clock and fires what is due.
func (c *Clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	c.mono += d
	for t := range c.timers {
		if t.at <= c.mono {
			t.c <- c.now
			delete(c.timers, t)
		}
	}
}

// WaitTimer waits until a timer stands that fires at now+d exactly.
func (c *Clock) WaitTimer(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		for t := range c.timers {
			if t.at == c.mono+d {
				return
			}
		}
		c.added.Wait()
	}
}
