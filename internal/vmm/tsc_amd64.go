package vmm

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

func rdtsc() int64

// tscWindow is the time between the two readings. A reading errs by a
// microsecond at the worst, so the result is right to a few ppm.
const tscWindow = 200 * time.Millisecond

var hostTSC struct {
	sync.Mutex
	khz int64
}

// HostTSCKHz measures the frequency of the host's time stamp counter against
// CLOCK_MONOTONIC_RAW, which does not follow NTP. It takes tscWindow once in
// the life of the process, on a busy host a little more.
func HostTSCKHz(ctx context.Context) (int64, error) {
	hostTSC.Lock()
	defer hostTSC.Unlock()
	if hostTSC.khz != 0 {
		return hostTSC.khz, nil
	}
	tsc0, ns0, err := readTSC()
	if err != nil {
		return 0, err
	}
	select {
	case <-time.After(tscWindow):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	tsc1, ns1, err := readTSC()
	if err != nil {
		return 0, err
	}
	if tsc1 <= tsc0 || ns1 <= ns0 {
		return 0, fmt.Errorf("measuring the time stamp counter: it or the clock went backwards")
	}
	khz := int64(float64(tsc1-tsc0) * 1e6 / float64(ns1-ns0))
	if khz < 100_000 || khz > 20_000_000 {
		return 0, fmt.Errorf("measuring the time stamp counter: %d kHz is not plausible", khz)
	}
	hostTSC.khz = khz
	return khz, nil
}

// readTSC pairs the counter with the clock. Of several tries the one counts
// whose clock was read in the fewest ticks: nothing interrupted that one.
func readTSC() (tsc, ns int64, err error) {
	best := int64(1) << 62
	for range 32 {
		var ts unix.Timespec
		a := rdtsc()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
			return 0, 0, fmt.Errorf("reading CLOCK_MONOTONIC_RAW: %w", err)
		}
		b := rdtsc()
		if d := b - a; d >= 0 && d < best {
			best, tsc, ns = d, a+d/2, ts.Nano()
		}
	}
	if best == int64(1)<<62 {
		return 0, 0, fmt.Errorf("reading the time stamp counter: it goes backwards")
	}
	return tsc, ns, nil
}
