package block

import "sync"

const (
	stripes    = 64 // bits of a mask
	stripeSize = 256 << 10
)

// rangeLock locks ranges of bytes by stripes: stripe i covers the 256 KiB
// pieces whose number is i modulo 64. A range takes its stripes in ascending
// order, so two ranges cannot wait for each other.
type rangeLock struct {
	mu [stripes]sync.Mutex
}

// lock locks n > 0 bytes at off and returns what unlocks them.
func (r *rangeLock) lock(off, n int64) (unlock func()) {
	mask := stripeMask(off, n)
	for i := range stripes {
		if mask&(1<<i) != 0 {
			r.mu[i].Lock()
		}
	}
	return func() {
		for i := range stripes {
			if mask&(1<<i) != 0 {
				r.mu[i].Unlock()
			}
		}
	}
}

func stripeMask(off, n int64) uint64 {
	first, last := off/stripeSize, (off+n-1)/stripeSize
	if last-first >= stripes-1 {
		return ^uint64(0)
	}
	var mask uint64
	for i := first; i <= last; i++ {
		mask |= 1 << (i % stripes)
	}
	return mask
}
