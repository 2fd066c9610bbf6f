package qemu

import (
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// TestVMBootsOnBusyHost: with every core of the host taken by something else,
// each boot reaches user space, on the TSC, and the guest's clock runs as fast
// as the host's. WRENN_TEST_BOOTS sets the number of boots (2).
func TestVMBootsOnBusyHost(t *testing.T) {
	s := subject(t, Options{Accel: AccelTCG})
	boots := 2
	if n, err := strconv.Atoi(os.Getenv("WRENN_TEST_BOOTS")); err == nil {
		boots = n
	}
	for range runtime.NumCPU() {
		busy := exec.Command("/bin/sh", "-c", "while :; do :; done")
		if err := busy.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = busy.Process.Kill(); _ = busy.Wait() }()
	}
	for i := range boots {
		s.Boot.VCPUs = 1 + i%2
		bootBusy(t, s, i)
	}
}

func bootBusy(t *testing.T, s vmmtest.Subject, i int) {
	ctx, a := limited(t, s.Patience), s.Args(t)
	start := time.Now()
	m, err := s.Driver.Boot(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Kill(ctx) }()
	s.WaitTicks(t, m, 3)
	took := time.Since(start)

	// Two points far enough apart that the console's delay does not count: a
	// busy host may hold up either, but not a longer time by more.
	first, at := last(t, m), time.Now()
	rate := 0.0
	for n := 40; n <= 640 && (rate < 0.9 || rate > 1.1); n *= 2 {
		s.WaitTicks(t, m, first.N+n)
		second, elapsed := last(t, m), time.Since(at)
		rate = float64(second.Mono-first.Mono) / float64(elapsed)
	}
	if rate < 0.9 || rate > 1.1 {
		t.Errorf("boot %d: the guest's clock runs %.2f times as fast as the host's", i, rate)
	}
	b, err := os.ReadFile(m.Record().ConsolePath)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "clocksource=tsc") {
		t.Errorf("boot %d: not on the TSC: %s", i, b)
	}
	t.Logf("boot %d, %d CPUs: user space after %s, clock rate %.3f", i, a.VCPUs, took.Round(10*time.Millisecond), rate)
}

func last(t *testing.T, m vmm.Machine) vmmtest.Tick {
	ticks := vmmtest.Ticks(t, m.Record().ConsolePath)
	return ticks[len(ticks)-1]
}
