package block

import (
	"fmt"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

const benchSize = 8 << 30

func BenchmarkOverlayCreate(b *testing.B) {
	dir := b.TempDir()
	i := 0
	for b.Loop() {
		o, err := OpenOverlay(storage.OS{}, filepath.Join(dir, fmt.Sprint(i)), Zeros(benchSize))
		must(b, err)
		must(b, o.Close())
		i++
	}
}

func BenchmarkOverlayReopen(b *testing.B) {
	name := filepath.Join(b.TempDir(), "o")
	for b.Loop() {
		o, err := OpenOverlay(storage.OS{}, name, Zeros(benchSize))
		must(b, err)
		must(b, o.Close())
	}
}

func BenchmarkOverlayWrite(b *testing.B) {
	for _, size := range []int{BlockSize, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			o, err := OpenOverlay(storage.OS{}, filepath.Join(b.TempDir(), "o"), Zeros(benchSize))
			must(b, err)
			defer o.Close()
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			i := int64(0)
			for b.Loop() {
				if _, err := o.WriteAt(p, i%1024*int64(size)); err != nil {
					b.Fatal(err)
				}
				i++
			}
		})
	}
}
