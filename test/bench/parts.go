package main

import (
	"context"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
)

// The two sizes that must not differ.
const (
	small = 256  // MiB
	large = 2048 // MiB
)

// boot measures cold boots of the base, until the guest answers.
func (b *bench) boot(ctx context.Context) error {
	var took samples
	for range min(b.rounds, 5) {
		d, err := b.oneBoot(ctx)
		if err != nil {
			return err
		}
		took = append(took, d)
	}
	b.out.row("boot of base, cold, until an exec answers", took.String(), "", true)
	return nil
}

func (b *bench) oneBoot(ctx context.Context) (time.Duration, error) {
	var sb *client.Sandbox
	d, err := timed(func() (err error) {
		if sb, err = b.sandbox(ctx, "base", 512); err != nil {
			return err
		}
		return b.answers(ctx, sb.ID)
	})
	if err != nil {
		return 0, err
	}
	return d, b.s.DeleteSandbox(ctx, sb.ID)
}

// resume measures resumes at two sizes of RAM, in turn.
func (b *bench) resume(ctx context.Context) error {
	sizes := []int{small, large}
	took := map[int]samples{}
	ids := map[int]string{}
	for _, mb := range sizes {
		sb, err := b.sandbox(ctx, "base", mb)
		if err != nil {
			return err
		}
		ids[mb] = sb.ID
		if err := b.answers(ctx, sb.ID); err != nil {
			return err
		}
	}
	for range b.rounds {
		for _, mb := range sizes {
			if _, err := b.s.PauseSandbox(ctx, ids[mb]); err != nil {
				return err
			}
			d, err := timed(func() error {
				if _, err := b.s.ResumeSandbox(ctx, ids[mb]); err != nil {
					return err
				}
				return b.answers(ctx, ids[mb])
			})
			if err != nil {
				return err
			}
			took[mb] = append(took[mb], d)
		}
	}
	for _, mb := range sizes {
		b.out.row(fmt.Sprintf("resume at %d MiB, until an exec answers", mb), took[mb].String(), "≤ 1.0 s on an idle 2-core machine", took[mb].median() <= time.Second)
		if err := b.s.DeleteSandbox(ctx, ids[mb]); err != nil {
			return err
		}
	}
	r := ratio(took[large], took[small])
	b.out.row("resume at 2 GiB against 256 MiB", fmt.Sprintf("%.2f×", r), "≤ 1.3×", r <= 1.3)
	return nil
}

// spawn measures clones of a warm snapshot at two sizes of RAM, in turn. The
// first clone of each, which loads the shared image, is told apart.
func (b *bench) spawn(ctx context.Context) error {
	sizes := []int{small, large}
	took, first := map[int]samples{}, map[int]samples{}
	for _, mb := range sizes {
		sb, err := b.sandbox(ctx, "base", mb)
		if err != nil {
			return err
		}
		if err := b.answers(ctx, sb.ID); err != nil {
			return err
		}
		if _, err := b.s.CreateSnapshot(ctx, sb.ID, spawnName(mb)); err != nil {
			return err
		}
		if err := b.s.DeleteSandbox(ctx, sb.ID); err != nil {
			return err
		}
	}
	for round := range b.rounds + 1 {
		for _, mb := range sizes {
			var sb *client.Sandbox
			d, err := timed(func() (err error) {
				if sb, err = b.sandbox(ctx, spawnName(mb), 0); err != nil {
					return err
				}
				return b.answers(ctx, sb.ID)
			})
			if err != nil {
				return err
			}
			if round == 0 {
				first[mb] = append(first[mb], d)
			} else {
				took[mb] = append(took[mb], d)
			}
			if err := b.s.DeleteSandbox(ctx, sb.ID); err != nil {
				return err
			}
		}
	}
	for _, mb := range sizes {
		b.out.row(fmt.Sprintf("spawn at %d MiB, first clone (cold)", mb), first[mb].String(), "", true)
		b.out.row(fmt.Sprintf("spawn at %d MiB from a warm snapshot", mb), took[mb].String(), "≤ 1.0 s on an idle 2-core machine", took[mb].median() <= time.Second)
		if err := b.s.DeleteSnapshot(ctx, spawnName(mb)); err != nil {
			return err
		}
	}
	r := ratio(took[large], took[small])
	b.out.row("spawn at 2 GiB against 256 MiB", fmt.Sprintf("%.2f×", r), "≤ 1.3×", r <= 1.3)
	return nil
}

func spawnName(mb int) string { return fmt.Sprintf("bench-%d", mb) }

// dirtySizes are how much memory is changed before a pause, MiB.
var dirtySizes = []int{0, 32, 64, 128, 256}

// pause measures what pauses write, and how long they take, by how much of
// the guest's memory changed since the last one. A snapshot tells its bytes.
func (b *bench) pause(ctx context.Context) error {
	sb, err := b.sandbox(ctx, "base", 1024)
	if err != nil {
		return err
	}
	const hold = `import os,sys,mmap,time
m = mmap.mmap(-1, 300 << 20)
os.mkfifo("/tmp/want")
while True:
    with open("/tmp/want") as f: n = int(f.read())
    block = os.urandom(1 << 20)
    for i in range(n): m[i << 20:(i + 1) << 20] = block[i:] + block[:i]
    open("/tmp/done", "w").write(str(n))
`
	if err := b.s.PutFile(ctx, sb.ID, "/home/user/hold.py", strings.NewReader(hold), client.PutOptions{Size: int64(len(hold))}); err != nil {
		return err
	}
	if _, err := b.s.Sh(ctx, sb.ID, "setsid python3 hold.py </dev/null >/tmp/hold.log 2>&1 & while [ ! -p /tmp/want ]; do sleep 0.1; done"); err != nil {
		return err
	}
	took, wrote := map[int]samples{}, map[int]int64{}
	for round := range max(2, b.rounds/2) {
		for _, mb := range dirtySizes {
			if err := b.onePause(ctx, sb.ID, mb, round == 0, took, wrote); err != nil {
				return err
			}
		}
	}
	for _, mb := range dirtySizes {
		extra := float64(wrote[mb]-wrote[0]) / (1 << 20)
		holds := mb == 0 || extra <= float64(mb)*1.1+8
		b.out.row(fmt.Sprintf("pause after %d MiB changed", mb), fmt.Sprintf("%s, %.1f MiB written", took[mb], float64(wrote[mb])/(1<<20)),
			"writes only what changed", holds)
	}
	last := dirtySizes[len(dirtySizes)-1]
	slope := float64((took[last].median() - took[0].median()).Microseconds()) / 1000 / float64(last)
	half := dirtySizes[len(dirtySizes)-2]
	predicted := took[0].median() + time.Duration(slope*float64(half)*float64(time.Millisecond))
	r := float64(took[half].median()) / float64(predicted)
	b.out.row("pause time against a straight line", fmt.Sprintf("%.2f ms/MiB; %d MiB at %.2f× of the line", slope, half, r), "≈ proportional (0.5× to 1.5×)", r > 0.5 && r < 1.5)
	return b.s.DeleteSandbox(ctx, sb.ID)
}

func (b *bench) onePause(ctx context.Context, id string, mb int, measure bool, took map[int]samples, wrote map[int]int64) error {
	if _, err := b.s.Sh(ctx, id, fmt.Sprintf("rm -f /tmp/done; echo %d > /tmp/want; while [ ! -s /tmp/done ]; do sleep 0.05; done", mb)); err != nil {
		return err
	}
	before := diskUsage(b.s)
	d, err := timed(func() error { _, err := b.s.PauseSandbox(ctx, id); return err })
	if err != nil {
		return err
	}
	took[mb] = append(took[mb], d)
	if measure {
		// The first round only: later pauses also free what they overwrite.
		wrote[mb] = diskUsage(b.s) - before
	}
	_, err = b.s.ResumeSandbox(ctx, id)
	return err
}

// cloneMemory tells what an idle second clone owns of the guest's memory.
func (b *bench) cloneMemory(ctx context.Context) error {
	sb, err := b.sandbox(ctx, "base", 512)
	if err != nil {
		return err
	}
	if err := b.answers(ctx, sb.ID); err != nil {
		return err
	}
	if _, err := b.s.CreateSnapshot(ctx, sb.ID, "bench-memory"); err != nil {
		return err
	}
	ids := []string{sb.ID}
	var second *client.Metrics
	for range 2 {
		c, err := b.sandbox(ctx, "bench-memory", 0)
		if err != nil {
			return err
		}
		ids = append(ids, c.ID)
		if second, err = b.s.GetMetrics(ctx, c.ID); err != nil {
			return err
		}
	}
	mib := float64(second.PrivateMemoryBytes) / (1 << 20)
	b.out.row("guest memory that an idle second clone owns", fmt.Sprintf("%.1f MiB (%d faults served)", mib, second.Faults), "< 16 MiB", mib < 16)
	for _, id := range ids {
		if err := b.s.DeleteSandbox(ctx, id); err != nil {
			return err
		}
	}
	return b.s.DeleteSnapshot(ctx, "bench-memory")
}

// saturatedBoot boots while every core has something else to do.
func (b *bench) saturatedBoot(ctx context.Context) error {
	for range runtime.NumCPU() {
		busy := exec.CommandContext(ctx, "sh", "-c", "while :; do :; done")
		if err := busy.Start(); err != nil {
			return err
		}
		defer func() {
			busy.Process.Kill()
			busy.Wait()
		}()
	}
	var took samples
	const boots = 10
	for range boots {
		if d, err := b.oneBoot(ctx); err == nil {
			took = append(took, d)
		}
	}
	b.out.row("boot of base with all cores busy", fmt.Sprintf("%d of %d, %s", len(took), boots, took), "10 of 10", len(took) == boots)
	return nil
}
