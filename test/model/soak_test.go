package model

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// requireSoak skips what takes longer than anybody waits for.
func requireSoak(t *testing.T) {
	t.Helper()
	if os.Getenv("WRENN_SOAK") == "" {
		t.Skip("takes an hour or so: make soak")
	}
}

// stock is what a server holds of the host at one moment.
type stock struct {
	descriptors int // of server and pager, sockets left out: clients come and go
	sockets     int
	goroutines  int
	files       int
	rss         int64 // of server and pager; the pager's includes shared images
}

func (s stock) String() string {
	return fmt.Sprintf("%d descriptors, %d sockets, %d goroutines, %d files, %d MiB of RAM",
		s.descriptors, s.sockets, s.goroutines, s.files, s.rss>>20)
}

// most takes the larger of each.
func (s stock) most(o stock) stock {
	return stock{max(s.descriptors, o.descriptors), max(s.sockets, o.sockets), max(s.goroutines, o.goroutines), max(s.files, o.files), max(s.rss, o.rss)}
}

// takeStock counts. The VMs' processes come and go and are not counted.
func takeStock(t *testing.T, s *harness.Server) stock {
	t.Helper()
	var out stock
	for _, p := range harness.ProcessesOf(s.Dir) {
		if !strings.HasPrefix(filepath.Base(strings.Split(p.Cmdline, "\x00")[0]), "wrenn") {
			continue
		}
		out.rss += p.Memory()
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID))
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			switch target, err := os.Readlink(fd); {
			case err != nil: // closed meanwhile
			case strings.HasPrefix(target, "socket:"):
				out.sockets++
			default:
				out.descriptors++
			}
		}
	}
	out.goroutines = int(metric(t, s, "go_goroutines"))
	err := filepath.WalkDir(s.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !strings.HasPrefix(filepath.Base(path), "wrenn.db") {
			out.files++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// metric reads one figure of the server.
func metric(t *testing.T, s *harness.Server, name string) float64 {
	t.Helper()
	resp, err := http.Get(s.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			f, err := strconv.ParseFloat(v, 64)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	t.Fatalf("/metrics has no %s", name)
	return 0
}

// notGrown compares two moments at which the same is there. What is prepared or
// taken apart in the background gets a minute.
func notGrown(t *testing.T, s *harness.Server, before stock) {
	t.Helper()
	var now stock
	grown := func() string {
		now = takeStock(t, s)
		switch {
		case now.descriptors > before.descriptors+2: // the database's come and go
			return "descriptors"
		case now.sockets > before.sockets+10:
			return "sockets"
		case now.goroutines > before.goroutines+20:
			return "goroutines"
		case now.files > before.files+2:
			return "files"
		case now.rss > before.rss+before.rss/4+(32<<20):
			return "RAM"
		}
		return ""
	}
	ok := harness.Eventually(time.Minute, func() bool { return grown() == "" })
	t.Logf("before: %v", before)
	t.Logf("after:  %v", now)
	if !ok {
		t.Errorf("%s grew", grown())
	}
}

// TestSoakLifeCycles creates and destroys. Every twentieth boots the base
// template; the others are spawned from a warm snapshot, as a boot without KVM
// takes seconds of both cores.
func TestSoakLifeCycles(t *testing.T) {
	requireSoak(t)
	w := newWorld(t)
	w.begin()
	from := w.snaps[0]
	cycles := number(t, "WRENN_SOAK_CYCLES", 200)
	cycle := func(i uint64) {
		w.tally.steps++
		ctx, cancel := within(3 * time.Minute)
		defer cancel()
		req := client.CreateSandboxRequest{Template: from.name}
		if i%20 == 0 {
			req = client.CreateSandboxRequest{MemoryMB: 256}
		}
		sb, err := w.s.CreateSandbox(ctx, req)
		if err != nil {
			w.fail("cycle %d: create: %v", i, err)
		}
		if req.Template != "" && i%10 == 1 {
			w.check(&box{label: fmt.Sprint("cycle ", i), id: sb.ID, holds: from.holds})
		} else if _, err := w.s.Sh(ctx, sb.ID, "true"); err != nil {
			w.fail("cycle %d: %v", i, err)
		}
		if err := w.s.DeleteSandbox(ctx, sb.ID); err != nil {
			w.fail("cycle %d: delete: %v", i, err)
		}
	}
	warmup := min(cycles/4, 20)
	for i := range warmup {
		cycle(i)
	}
	before := takeStock(t, w.s)
	began := time.Now()
	for i := warmup; i < cycles; i++ {
		cycle(i)
	}
	t.Logf("%d creates and destroys, every 20th from base; %v each", cycles, (time.Since(began) / time.Duration(cycles-warmup)).Round(time.Millisecond))
	notGrown(t, w.s, before)
	w.end()
}

// TestSoakGenerations pauses and resumes one sandbox that changes a little each
// time, and looks for what was lost and for what grows.
func TestSoakGenerations(t *testing.T) {
	requireSoak(t)
	w := newWorld(t)
	w.begin()
	b := w.boxes[0]
	count := number(t, "WRENN_SOAK_GENERATIONS", 1000)
	var pauses, resumes []time.Duration
	timed := func(into *[]time.Duration, do func(context.Context) error) {
		ctx, cancel := within(3 * time.Minute)
		defer cancel()
		began := time.Now()
		if err := do(ctx); err != nil {
			w.fail("generation %d: %v", w.tally.steps, err)
		}
		*into = append(*into, time.Since(began))
	}
	generation := func(n uint64) {
		w.tally.steps++
		r := rand.New(rand.NewPCG(w.seed, n))
		d := drawMemory(w, r)
		if n%2 == 0 {
			d = drawFile(w, r)
		}
		var changes []time.Duration
		timed(&changes, d.do)
		d.done()
		timed(&pauses, func(ctx context.Context) error { _, err := w.s.PauseSandbox(ctx, b.id); return err })
		timed(&resumes, func(ctx context.Context) error { _, err := w.s.ResumeSandbox(ctx, b.id); return err })
		if n%10 == 0 {
			w.check(b)
		}
	}
	// Builds are brought together now and then, so that what there is goes up
	// and down: the most that was seen is what it must not grow beyond.
	warmup := min(count/2, 300)
	var before stock
	for n := range warmup {
		generation(n)
		if n%10 == 9 {
			before = before.most(takeStock(t, w.s))
		}
	}
	t.Logf("at most in %d generations: %v", warmup, before)
	for n := warmup; n < count; n++ {
		generation(n)
	}
	w.check(b)
	t.Logf("%d generations of one sandbox, %d checks, nothing lost; median of the first and last %d: pause %v and %v, resume %v and %v",
		count, w.tally.checks, warmup, median(pauses[:warmup]), median(pauses[len(pauses)-int(warmup):]),
		median(resumes[:warmup]), median(resumes[len(resumes)-int(warmup):]))
	notGrown(t, w.s, before)
	w.end()
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2].Round(time.Millisecond)
}
