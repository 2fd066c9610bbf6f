//go:build unix

package format

import (
	"math/rand/v2"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// processorTime reports, when what it returns is called, the time of processors
// that an operation has taken since: what the operation costs, however many
// others want the machine.
func processorTime(b *testing.B) func() {
	used := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	start := used()
	return func() { b.ReportMetric(float64(used()-start)/float64(b.N), "cpu-ns/op") }
}

// large returns a header of n mappings such as a long-used memory image has:
// short runs and gaps, 40 builds.
func large(n int) *Header {
	r := rand.New(rand.NewPCG(1, 2))
	h := &Header{Generation: 40, Build: testID(40), Parent: testID(39)}
	var next [40]uint64
	var at uint64
	var ms []Mapping
	for range n {
		m := Mapping{Start: at + r.Uint64N(3), Length: 1 + r.Uint64N(8), Build: uint32(r.IntN(40))}
		m.Offset = next[m.Build] + r.Uint64N(4)
		next[m.Build] = m.Offset + m.Length
		at = m.End()
		ms = append(ms, m)
	}
	h.Mappings = NewMappings(ms...)
	for i, blocks := range next {
		h.Builds = append(h.Builds, ref(byte(i+1), blocks))
	}
	h.Size = int64(at) * BlockSize
	return h
}

// decoded returns a header as a store reads it.
func decoded(b *testing.B, h *Header) *Header {
	h, err := Decode(mustEncode(b, h))
	if err != nil {
		b.Fatal(err)
	}
	return h
}

const manyMappings = 483_000

func BenchmarkDecode(b *testing.B) {
	enc := mustEncode(b, large(manyMappings))
	b.ReportAllocs()
	defer processorTime(b)()
	for b.Loop() {
		if _, err := Decode(enc); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(enc))/manyMappings, "B/mapping")
}

func BenchmarkEncode(b *testing.B) {
	h := large(manyMappings)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Encode(h); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMerge2000(b *testing.B) {
	h := decoded(b, large(manyMappings))
	step := h.Blocks() / 2000
	var diff []Extent
	for i := range uint64(2000) {
		diff = append(diff, Extent{Start: i * step, Length: 1, Kind: Data, Offset: i})
	}
	build := ref(99, 2000)
	b.ReportAllocs()
	defer processorTime(b)()
	for b.Loop() {
		if _, err := Merge(h, build, diff); err != nil {
			b.Fatal(err)
		}
	}
}

// A look-up in places that have nothing to do with each other waits for memory.
// How long that takes is measured in the same run: chase goes from line to line
// of more memory than the nearer caches hold, each of which says where the next
// one is.
func BenchmarkLookup(b *testing.B) {
	h := decoded(b, large(manyMappings))
	r := rand.New(rand.NewPCG(3, 4))
	blocks := make([]uint64, 1<<16)
	for i := range blocks {
		blocks[i] = r.Uint64N(h.Blocks())
	}
	b.ReportAllocs()
	used := processorTime(b)
	i := 0
	for b.Loop() {
		h.Lookup(blocks[i&(1<<16-1)])
		i++
	}
	used()
	lookup := time.Duration(float64(b.Elapsed()) / float64(b.N))
	b.ReportMetric(float64(h.Mappings.bytes())/manyMappings, "memory-B/mapping")
	b.ReportMetric(float64(lookup)/float64(chase(r, 64<<20)), "lookup/miss")
}

// chase returns how long a read of a random line of so much memory takes.
func chase(r *rand.Rand, size int) time.Duration {
	type line struct {
		next *line
		_    [56]byte
	}
	lines := make([]line, size/64)
	order := r.Perm(len(lines))
	for i, at := range order {
		lines[at].next = &lines[order[(i+1)%len(order)]]
	}
	const steps = 1 << 20
	at := &lines[0]
	start := time.Now()
	for range steps {
		at = at.next
	}
	d := time.Since(start)
	runtime.KeepAlive(at)
	return d / steps
}
