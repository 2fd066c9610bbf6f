package e2e

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// saturate keeps two threads for each core busy until the returned function is
// called, which waits for them.
func saturate() (stop func()) {
	var ended atomic.Bool
	var wg sync.WaitGroup
	n := 2 * runtime.NumCPU()
	// The test's own goroutines need a turn, too.
	old := runtime.GOMAXPROCS(n + 2)
	for range n {
		wg.Go(func() {
			for x := uint64(1); !ended.Load(); {
				for range 1 << 16 {
					x = x*6364136223846793005 + 1
				}
			}
		})
	}
	return func() {
		ended.Store(true)
		wg.Wait()
		runtime.GOMAXPROCS(old)
	}
}
