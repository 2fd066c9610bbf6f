package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

func diskStore(tb testing.TB) *Store {
	tb.Helper()
	s, err := Open(filepath.Join(tb.TempDir(), "store"), Options{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

// cluster is what one page fault reads, in bytes.
const cluster = 64 << 10

// pauses makes what a guest of 64 MiB becomes by so many pauses, each followed
// by the compaction that the background would do, and the same content as one
// image of generation 1. Of the pages that a pause writes four of five lie in a
// fifth of the memory, and they come in runs of one to eight, as in the pauses
// of real guests.
func pauses(tb testing.TB, s *Store, n int) (first, last *Image) {
	tb.Helper()
	const size = 64 << 20
	r := rand.New(rand.NewPCG(1, uint64(n)))
	content := make([]byte, size)
	fill := func(p []byte) {
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], r.Uint64())
		}
	}
	fill(content)
	base := capture(tb, s, nil, size, change{data: content})
	img := base
	for range n {
		img = capture(tb, s, img, size, dirtied(r, content, fill)...)
	}
	empty := capture(tb, s, nil, size)
	return capture(tb, s, empty, size, change{data: content}), img
}

// capture makes an image, names it, compacts it as the background does, and
// forgets the parent.
func capture(tb testing.TB, s *Store, parent *Image, size int64, changes ...change) *Image {
	tb.Helper()
	m, img := snap(tb, s, size, parent, changes...)
	if parent != nil {
		must(tb, parent.Close())
	}
	must(tb, img.Close())
	r, err := s.Compact(bg, m.Memory.ID)
	must(tb, err)
	img, err = s.OpenImage(r.To)
	must(tb, err)
	return img
}

// dirtied changes about 80 pages of content and returns the changes.
func dirtied(r *rand.Rand, content []byte, fill func([]byte)) []change {
	blocks := len(content) / blockSize
	var changes []change
	given := map[int]bool{}
	for range 30 {
		at, run := r.IntN(blocks/5), 1+r.IntN(1+r.IntN(8))
		if r.IntN(5) == 0 {
			at = r.IntN(blocks)
		}
		for b := at; b < min(at+run, blocks); b++ {
			if given[b] {
				continue
			}
			given[b] = true
			p := content[b*blockSize : (b+1)*blockSize]
			fill(p)
			changes = append(changes, change{block: int64(b), data: p})
		}
	}
	return changes
}

// Reading must not depend on how many generations there are. Both images are
// read in turn, cluster by cluster in the order of nothing, so that what else
// the machine does falls on both.
func BenchmarkReadAfterPauses(b *testing.B) {
	const n = 1000
	first, last := pauses(b, diskStore(b), n)
	b.Cleanup(func() { must(b, errors.Join(first.Close(), last.Close())) })
	p := make([]byte, cluster)
	clusters := first.Size() / cluster
	pass := func(img *Image) time.Duration {
		t := time.Now()
		for i := range clusters {
			if _, err := img.ReadAt(p, i*7919%clusters*cluster); err != nil {
				b.Fatal(err)
			}
		}
		return time.Since(t)
	}
	pass(first) // opens the builds, warms the page cache
	pass(last)
	b.SetBytes(first.Size() + last.Size())
	var ratios []float64
	for b.Loop() {
		one := pass(first)
		ratios = append(ratios, float64(pass(last))/float64(one))
	}
	slices.Sort(ratios)
	b.ReportMetric(ratios[len(ratios)/2], "gen1000/gen1")
	b.ReportMetric(float64(last.Header().Mappings.Len()), "mappings")
	b.ReportMetric(float64(len(last.Header().Builds)), "builds")
}

// BenchmarkPauseAgainstPlainWrite compares a pause of so many dirty pages, up
// to the durable manifest, with a plain sequential write and fsync of the same
// bytes, in turn. ratio is the pause's speed over the write's.
func BenchmarkPauseAgainstPlainWrite(b *testing.B) {
	for _, n := range []int{2048, 16384} {
		b.Run(fmt.Sprintf("pages=%d", n), func(b *testing.B) {
			data := make([]byte, n*blockSize)
			for i := range data {
				data[i] = byte(i>>12) | 1
			}
			s := diskStore(b)
			dir := b.TempDir()
			b.SetBytes(2 * int64(len(data)))
			var ratios []float64
			for b.Loop() {
				start := time.Now()
				plainWrite(b, filepath.Join(dir, "f"), data)
				plain := time.Since(start)
				start = time.Now()
				id := pause(b, s, data)
				ratios = append(ratios, float64(plain)/float64(time.Since(start)))
				must(b, s.Delete(bg, id))
				_, err := s.GC(bg, nil, false)
				must(b, err)
				must(b, os.Remove(filepath.Join(dir, "f")))
			}
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "ratio")
		})
	}
}

func plainWrite(b *testing.B, name string, data []byte) {
	f, err := os.Create(name)
	must(b, err)
	_, err = f.Write(data)
	must(b, err)
	must(b, f.Sync())
	must(b, f.Close())
}

// pause writes dirty pages as the engine does, in runs with gaps between them,
// and commits them.
func pause(b *testing.B, s *Store, data []byte) format.ID {
	const run = 256 << 10
	w, err := s.NewImage(2*int64(len(data)), nil)
	must(b, err)
	for off := 0; off < len(data); off += run {
		must(b, w.WriteAt(data[off:off+run], 2*int64(off)))
	}
	id, err := w.Finish(bg)
	must(b, err)
	txn, err := s.Begin()
	must(b, err)
	must(b, txn.Commit(bg, Manifest{Kind: KindPause, Memory: ImageRef{ID: id}}))
	return txn.ID()
}
