package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// An engineFigure is a row that a Go benchmark of the snapshot engine gives.
type engineFigure struct {
	figure string
	bench  string // the benchmark's name, with its parts
	unit   string // of the metric
	show   func(v float64) string
	limit  string // the promise, as text; empty: none
	holds  func(v float64) bool
}

// enginePackages are the packages with the benchmarks, and how each is run.
var enginePackages = []struct {
	path, time string
	figures    []engineFigure
}{
	{"./snapshot/format", "1s", []engineFigure{
		{"decode of a header of 483,000 mappings, processor time", "BenchmarkDecode", "cpu-ns/op", milliseconds, "≤ 30 ms", atMost(30e6)},
		{"header, bytes for a mapping", "BenchmarkDecode", "B/mapping", number("%.1f"), "≤ 8", atMost(8)},
		{"merge of a 2,000-page diff into it, processor time", "BenchmarkMerge2000", "cpu-ns/op", milliseconds, "≤ 5 ms", atMost(5e6)},
		{"bytes allocated for that, where mappings take 2.5 MB", "BenchmarkMerge2000", "B/op", number("%.0f"), "for the diff, not for the whole", atMost(2.5e6 / 2)},
		{"look-up in it, at random, processor time", "BenchmarkLookup/of=any", "cpu-ns/op", number("%.0f ns"), "≤ 100 ns", atMost(100)},
		{"the same by binary search in a plain slice", "BenchmarkLookup/of=search", "cpu-ns/op", number("%.0f ns"), "", nil},
		{"a look-up that has to wait for the one before, processor time", "BenchmarkLookup/of=waiting", "cpu-ns/op", number("%.0f ns"), "", nil},
		{"the same against one read of memory that no near cache holds", "BenchmarkLookup/of=waiting", "lookup/miss", ratioOf, "", nil},
		{"memory for a mapping", "BenchmarkLookup/of=any", "memory-B/mapping", number("%.1f B"), "", nil},
	}},
	{"./snapshot", "30x", []engineFigure{
		{"reading generation 1,000 against generation 1", "BenchmarkReadAfterPauses", "gen1000/gen1", ratioOf, "≤ 1.1×", atMost(1.1)},
		{"speed of a pause of 2,048 pages against a plain write and fsync", "BenchmarkPauseAgainstPlainWrite/pages=2048", "ratio", ratioOf, "≥ 0.6×", atLeast(0.6)},
		{"speed of a pause of 16,384 pages against a plain write and fsync", "BenchmarkPauseAgainstPlainWrite/pages=16384", "ratio", ratioOf, "≥ 0.6×", atLeast(0.6)},
	}},
	{"./snapshot/uffd", "1s", []engineFigure{
		{"faults of one thread against a bare fault-copy loop, 4 KiB", "BenchmarkServiceAgainstBareLoop/cluster=4096", "ratio", ratioOf, "≥ 0.8×", atLeast(0.8)},
		{"faults of one thread against a bare fault-copy loop, 64 KiB", "BenchmarkServiceAgainstBareLoop/cluster=65536", "ratio", ratioOf, "≥ 0.8×", atLeast(0.8)},
		{"goroutines while four clones are served", "BenchmarkFourClones", "goroutines", number("%.0f"), "one for each clone, none for a fault", atMost(4)},
		{"cold start with its order read ahead", "BenchmarkColdStart", "×-faster", ratioOf, "", nil},
	}},
	{"./internal/pager", "1x", []engineFigure{
		{"pager's memory beyond the shared images, 100 VMs attached", "BenchmarkHundredVMs", "MiB", number("%.0f MiB"), "≤ 30 MiB", atMost(30)},
	}},
}

func atMost(limit float64) func(float64) bool  { return func(v float64) bool { return v <= limit } }
func atLeast(limit float64) func(float64) bool { return func(v float64) bool { return v >= limit } }

func milliseconds(v float64) string { return fmt.Sprintf("%.1f ms", v/1e6) }
func ratioOf(v float64) string      { return fmt.Sprintf("%.2f×", v) }

func number(format string) func(float64) string {
	return func(v float64) string { return fmt.Sprintf(format, v) }
}

// engine runs the benchmarks of the snapshot engine, several times each, and
// prints the medians and the spread. They need no server.
func engine(ctx context.Context, rounds int, out *report) error {
	for _, p := range enginePackages {
		got, err := goBench(ctx, p.path, p.time, min(rounds, 5))
		if err != nil {
			return err
		}
		for _, f := range p.figures {
			vs := got[f.bench][f.unit]
			if len(vs) == 0 {
				return fmt.Errorf("%s: %s gave no %s", p.path, f.bench, f.unit)
			}
			slices.Sort(vs)
			mid := vs[len(vs)/2]
			value := fmt.Sprintf("%s (%s to %s, n=%d)", f.show(mid), f.show(vs[0]), f.show(vs[len(vs)-1]), len(vs))
			out.row(fmt.Sprintf("%s (`%s`)", f.figure, f.bench), value, f.limit, f.holds != nil && f.holds(mid))
		}
	}
	return nil
}

// metrics are a benchmark's results, by unit.
type metrics map[string][]float64

// goBench runs a package's benchmarks and gives their results by name.
func goBench(ctx context.Context, pkg, each string, count int) (map[string]metrics, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", ".", "-benchmem",
		"-benchtime", each, "-count", strconv.Itoa(count), "-timeout", "30m", pkg)
	cmd.Stderr = os.Stderr
	b, err := cmd.Output()
	if err != nil {
		os.Stderr.Write(b)
		return nil, fmt.Errorf("go test -bench %s: %w", pkg, err)
	}
	return parseBench(b)
}

// parseBench reads the lines of Go's benchmark format: a name with the number
// of processors behind it, the number of operations, values and their units.
func parseBench(b []byte) (map[string]metrics, error) {
	out := map[string]metrics{}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) < 4 || len(f)%2 != 0 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		name := f[0]
		if i := strings.LastIndexByte(name, '-'); i > 0 {
			if _, err := strconv.Atoi(name[i+1:]); err == nil {
				name = name[:i]
			}
		}
		if out[name] == nil {
			out[name] = metrics{}
		}
		for i := 2; i < len(f); i += 2 {
			v, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return nil, fmt.Errorf("benchmark line %q: %w", sc.Text(), err)
			}
			out[name][f[i+1]] = append(out[name][f[i+1]], v)
		}
	}
	return out, nil
}
