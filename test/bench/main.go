// Command bench measures what SPECIFICATION.md promises: of the snapshot engine
// by its Go benchmarks, of the whole product on real virtual machines through
// the public API. It prints medians and ratios. Sizes that are compared are measured in turn, in one run, so that
// what else the machine does falls on both. It changes nothing outside its
// state directory and judges no absolute time: a reader does, who knows the
// machine.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

func main() {
	rounds := flag.Int("rounds", 10, "measurements of each figure")
	only := flag.String("only", "", "run only the parts whose name contains this")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, *rounds, *only)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is what the parts share.
type bench struct {
	s      *harness.Server
	rounds int
	out    *report
}

func run(ctx context.Context, rounds int, only string) error {
	log, err := os.CreateTemp("", "wrenn-bench-*.log")
	if err != nil {
		return err
	}
	defer log.Close()
	out := &report{w: os.Stdout, log: log.Name()}
	b := &bench{rounds: rounds, out: out}
	var parts []part
	for _, p := range b.parts() {
		if strings.Contains(p.name, only) {
			parts = append(parts, p)
		}
	}
	if len(parts) > 0 {
		if err := b.runOnServer(ctx, parts, log); err != nil {
			return err
		}
	}
	alone := []part{ // without a server
		{"firecracker", b.firecracker},
		{"engine", func(ctx context.Context) error { return engine(ctx, rounds, out) }},
	}
	for _, p := range alone {
		if !strings.Contains(p.name, only) {
			continue
		}
		if err := p.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// part is a group of figures.
type part struct {
	name string
	run  func(context.Context) error
}

func (b *bench) parts() []part {
	return []part{
		{"boot", b.boot}, {"resume", b.resume}, {"prefetch", b.prefetch}, {"spawn", b.spawn}, {"pause", b.pause},
		{"clone-memory", b.cloneMemory}, {"saturated-boot", b.saturatedBoot},
		{"fork", b.fork}, {"adopt", b.adopt}, {"load", b.load}, {"e2b", b.e2b},
	}
}

// runOnServer starts a server for the parts, and ends it.
func (b *bench) runOnServer(ctx context.Context, parts []part, log *os.File) (err error) {
	dir := filepath.Join(harness.DevDir(), "bench")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "bench: the server's log is", log.Name())
	b.s, err = harness.Start(ctx, harness.Options{Dir: dir, Output: log, Args: []string{"--on-exit", "destroy", "--rate-limit", "-1", "--max-requests", "-1"}})
	if err != nil {
		return err
	}
	defer func() {
		if serr := b.s.Stop(); err == nil {
			err = serr
		}
		b.s.Wipe()
		os.RemoveAll(dir)
	}()
	for _, p := range parts {
		if err := p.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// sandbox makes a sandbox of so much RAM from a template.
func (b *bench) sandbox(ctx context.Context, template string, mb int) (*client.Sandbox, error) {
	return b.s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: template, MemoryMB: mb})
}

// answers waits until a command has run, which is when a user can use it.
func (b *bench) answers(ctx context.Context, id string) error {
	r, err := b.s.Exec(ctx, id, client.ExecRequest{Cmd: "/bin/true"})
	if err == nil && r.ExitCode != 0 {
		err = fmt.Errorf("/bin/true exits with %d", r.ExitCode)
	}
	return err
}

// timed returns how long f took.
func timed(f func() error) (time.Duration, error) {
	t := time.Now()
	err := f()
	return time.Since(t), err
}
