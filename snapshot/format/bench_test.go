//go:build unix

package format

import (
	"math/bits"
	"math/rand/v2"
	"runtime"
	"sort"
	"syscall"
	"testing"
)

// processorTime reports, when what it returns is called, the time of processors
// that an operation has taken since, and returns that of all: what it costs,
// however many others want the machine.
func processorTime(b *testing.B) func() float64 {
	start := processorNow(b)
	return func() float64 {
		used := float64(processorNow(b) - start)
		b.ReportMetric(used/float64(b.N), "cpu-ns/op")
		return used
	}
}

// processorNow returns the time of processors that this process has taken, in ns.
func processorNow(b *testing.B) int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
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

// A look-up is measured at random places of the image, so that each one's leaf
// lies elsewhere. Finding the next place is part of the time: a multiplication
// or two, no memory. Nothing is subtracted.
//
// Of any: what a look-up costs where others wait to be done, as in a loop over
// places; the processor works at several at once.
//
// Waiting: each place depends on the answer before, so this is how long an
// answer takes. It is mostly waiting for memory; lookup/miss tells how much in
// the same run: against one read of a random line of more memory than the
// nearer caches hold.
//
// Search: as of any, by binary search in a plain slice of mappings.
func BenchmarkLookup(b *testing.B) {
	h := decoded(b, large(manyMappings))
	plain := make([]Mapping, 0, manyMappings)
	for _, m := range h.Mappings.All() {
		plain = append(plain, m)
	}
	b.Run("of=any", func(b *testing.B) {
		p := places{blocks: h.Blocks()}
		b.ReportAllocs()
		defer processorTime(b)()
		for b.Loop() {
			h.Lookup(p.next(0))
		}
		b.ReportMetric(float64(h.Mappings.bytes())/manyMappings, "memory-B/mapping")
	})
	b.Run("of=waiting", func(b *testing.B) {
		p := places{blocks: h.Blocks()}
		var run uint64
		used := processorTime(b)
		for b.Loop() {
			_, _, run = h.Lookup(p.next(run))
		}
		lookup := used() / float64(b.N)
		b.ReportMetric(lookup/chase(b, 64<<20), "lookup/miss")
	})
	b.Run("of=search", func(b *testing.B) {
		p := places{blocks: h.Blocks()}
		defer processorTime(b)()
		for b.Loop() {
			search(plain, p.next(0))
		}
	})
}

// places gives blocks at random.
type places struct{ x, blocks uint64 }

// next returns a block that nobody can know who does not know after.
func (p *places) next(after uint64) uint64 {
	// Knuth's MMIX generator; of its bits the high ones are good.
	p.x = (p.x+after)*6364136223846793005 + 1442695040888963407
	high, _ := bits.Mul64(p.x, p.blocks)
	return high
}

// search is a look-up in the structure that comes to mind first.
func search(ms []Mapping, block uint64) (Mapping, bool) {
	i := sort.Search(len(ms), func(i int) bool { return ms[i].End() > block })
	if i == len(ms) || ms[i].Start > block {
		return Mapping{}, false
	}
	return ms[i], true
}

// chase returns the time, in ns of a processor, of a read of a random line of so
// much memory: each line says where the next one is.
func chase(b *testing.B, size int) float64 {
	type line struct {
		next *line
		_    [56]byte
	}
	lines := make([]line, size/64)
	order := rand.New(rand.NewPCG(3, 4)).Perm(len(lines))
	for i, at := range order {
		lines[at].next = &lines[order[(i+1)%len(order)]]
	}
	const steps = 1 << 20
	at := &lines[0]
	start := processorNow(b)
	for range steps {
		at = at.next
	}
	took := processorNow(b) - start
	runtime.KeepAlive(at)
	return float64(took) / steps
}
