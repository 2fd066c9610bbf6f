package snapshot

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
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

// generations makes an image of 16 MiB of random data and n more generations
// that each change a few clusters of it.
func generations(tb testing.TB, s *Store, n int) *Image {
	tb.Helper()
	const size = 16 << 20
	r := rand.New(rand.NewPCG(1, uint64(n)))
	random := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		return p
	}
	w, err := makeImage(s, size, nil, change{data: random(size)})
	must(tb, err)
	img, err := s.OpenImage(w.ID())
	must(tb, err)
	for range n {
		var changes []change
		for _, c := range r.Perm(size / cluster)[:4] {
			changes = append(changes, change{block: int64(c) * 16, data: random(cluster)})
		}
		w, err := makeImage(s, size, img, changes...)
		must(tb, err)
		must(tb, img.Close())
		img, err = s.OpenImage(w.ID())
		must(tb, err)
	}
	tb.Cleanup(func() { _ = img.Close() })
	return img
}

// cluster is what one page fault reads, in bytes.
const cluster = 64 << 10

// Reading must not depend on how many generations there are.
func BenchmarkReadCluster(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("generation=%d", n), func(b *testing.B) {
			img := generations(b, diskStore(b), n)
			p := make([]byte, cluster)
			clusters := img.Size() / cluster
			for c := range clusters { // open the builds, warm the page cache
				_, err := img.ReadAt(p, c*cluster)
				must(b, err)
			}
			b.SetBytes(cluster)
			b.ReportAllocs()
			i := int64(0)
			for b.Loop() {
				if _, err := img.ReadAt(p, i*7919%clusters*cluster); err != nil {
					b.Fatal(err)
				}
				i++
			}
		})
	}
}

// A pause of k dirty pages against a plain sequential write and fsync of the
// same bytes.
func BenchmarkWrite64MiB(b *testing.B) {
	const size = 64 << 20
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i>>12) | 1
	}
	b.Run("plain", func(b *testing.B) {
		dir := b.TempDir()
		b.SetBytes(size)
		for b.Loop() {
			f, err := os.Create(filepath.Join(dir, "f"))
			must(b, err)
			_, err = f.Write(data)
			must(b, err)
			must(b, f.Sync())
			must(b, f.Close())
			must(b, os.Remove(f.Name()))
		}
	})
	for _, chunk := range []int{blockSize, 1 << 20} {
		b.Run(fmt.Sprintf("image/chunk=%d", chunk), func(b *testing.B) {
			s := diskStore(b)
			b.SetBytes(size)
			for b.Loop() {
				w, err := s.NewImage(2*size, nil)
				must(b, err)
				for off := 0; off < size; off += chunk {
					must(b, w.WriteAt(data[off:off+chunk], int64(off)*2))
				}
				_, err = w.Finish(bg)
				must(b, err)
				must(b, w.Abort())
			}
		})
	}
}
