package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var (
	figure = regexp.MustCompile(`FIGURE (\S+) (\S+) of `)
	pairs  = regexp.MustCompile(`RATIO (\S+) (\S+) of `)
)

// firecracker compares our resume on Firecracker, and our clone of a named
// snapshot, with Firecracker's own load of the same state and memory. Ours takes
// the process that waits in each prepared network slot; its own is told with the
// start of one, and without. Neither is started by jailer. Without KVM
// both run in the machine of test/nested, whose processor is emulated, guest's and
// host's alike.
func (b *bench) firecracker(ctx context.Context) error {
	pkg, test, where := "./test/nested", "^TestResumeInNestedMachine$", "nested, emulated KVM"
	if os.Getenv("WRENN_TEST_KVM") == "1" {
		pkg, test, where = "./internal/engine", "^TestVMResumeBesideFirecrackersOwnLoad$", "KVM"
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-timeout", "20m", "-run", test, pkg)
	cmd.Env = append(os.Environ(), "WRENN_BENCH=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	found := map[string]time.Duration{}
	for _, m := range figure.FindAllStringSubmatch(string(out), -1) {
		if d, err := time.ParseDuration(m[2]); err == nil {
			found[m[1]] = d
		}
	}
	ratios := map[string]float64{}
	for _, m := range pairs.FindAllStringSubmatch(string(out), -1) {
		if r, err := strconv.ParseFloat(m[2], 64); err == nil {
			ratios[m[1]] = r
		}
	}
	for _, what := range []struct{ name, of string }{
		{"resume", "resume on Firecracker"}, {"clone", "clone of a snapshot on Firecracker"},
	} {
		for _, end := range []struct{ ratio, ours, own, of, promise string }{
			{"runs", "runs", "runs", "its own load, until it runs", "≤ 1.2×"},
			{"calls", "runs", "calls", "the calls of its own load alone, in a process that waited", ""},
			{"speaks", "speaks", "speaks", "its own load, until its guest has spoken", ""},
		} {
			ours, own, r := found[what.name+"-ours-"+end.ours], found[what.name+"-own-"+end.own], ratios[what.name+"-"+end.ratio]
			if ours == 0 || own == 0 || r == 0 {
				// It may have been skipped, where there is nothing to run it with.
				return fmt.Errorf("there are no figures:\n%s", strings.TrimSpace(string(out)))
			}
			b.out.row(fmt.Sprintf("%s against %s (%s)", what.of, end.of, where),
				fmt.Sprintf("%.2f× (%v : %v)", r, ours, own), end.promise, end.promise == "" || r <= 1.2)
		}
		b.out.row(fmt.Sprintf("%s, until our call returns (%s)", what.of, where),
			fmt.Sprintf("%v, a stand-in for the guest's agent has confirmed by then", found[what.name+"-ours-ready"]), "", true)
	}
	return nil
}
