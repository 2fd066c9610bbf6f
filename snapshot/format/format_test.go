package format

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func testID(n byte) ID { return ID{0: n, 15: 0xee} }

func ref(n byte, blocks uint64) BuildRef {
	return BuildRef{ID: testID(n), Blocks: blocks, Digest: [32]byte{n}}
}

// example has a gap at both ends, a seam and two builds.
func example() *Header {
	return &Header{
		Size: 100 * BlockSize, Generation: 2, Build: testID(2), Parent: testID(1),
		Builds: []BuildRef{ref(1, 50), ref(2, 7)},
		Mappings: NewMappings([]Mapping{
			{Start: 3, Length: 10, Build: 0, Offset: 0},
			{Start: 13, Length: 2, Build: 1, Offset: 5},
			{Start: 15, Length: 5, Build: 0, Offset: 12},
			{Start: 40, Length: 1, Build: 1, Offset: 0},
		}...),
	}
}

// edit changes one mapping of a header.
func edit(h *Header, i int, change func(*Mapping)) {
	var ms []Mapping
	for _, m := range h.Mappings.All() {
		ms = append(ms, m)
	}
	change(&ms[i])
	h.Mappings = NewMappings(ms...)
}

func mustEncode(t testing.TB, h *Header) []byte {
	t.Helper()
	b, err := Encode(h)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for name, h := range map[string]*Header{
		"example":  example(),
		"zeros":    {Size: 10 * BlockSize, Build: testID(9)},
		"no bytes": {Build: testID(9)},
	} {
		got, err := Decode(mustEncode(t, h))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(h, got); d != "" {
			t.Fatalf("%s: %s", name, d)
		}
	}
}

// The specification shows these bytes.
func TestEncodingIsAsSpecified(t *testing.T) {
	h := &Header{
		Size: 16 * BlockSize, Build: ID(bytes.Repeat([]byte{0xab}, 16)),
		Builds: []BuildRef{{ID: ID(bytes.Repeat([]byte{0xab}, 16)), Blocks: 3}},
		Mappings: NewMappings([]Mapping{
			{Start: 2, Length: 1, Build: 0, Offset: 0},
			{Start: 3, Length: 2, Build: 0, Offset: 1},
		}...),
	}
	// The second mapping continues the first; Encode does not care.
	got := fmt.Sprintf("%x", mustEncode(t, h))
	ab, z16 := strings.Repeat("ab", 16), strings.Repeat("00", 16)
	want := "5752454e4e484452" + "0100" + "0000" + "00100000" + // magic, version, flags, block size
		"ac00000000000000" + "0000010000000000" + "0000000000000000" + // length 172, size, generation
		ab + z16 + "01000000" + "02000000" + // build, parent, counts
		"02000000" + "02000000" + "02000000" + "02000000" + "00000000" + // columns, reserved
		got[200:208] + // checksum of the prefix
		ab + "0300000000000000" + z16 + z16 + // the build
		"0200" + "0001" + "0000" + "0000" + // gaps, lengths, builds, offsets
		got[len(got)-8:]
	if got != want {
		t.Fatalf("encoding\n%s, want\n%s", got, want)
	}
}

func TestEveryCutIsAnError(t *testing.T) {
	b := mustEncode(t, example())
	for n := range b {
		wantFieldError(t, fmt.Sprintf("cut to %d bytes", n), b[:n])
	}
	wantFieldError(t, "a byte too many", append(bytes.Clone(b), 0))
}

func TestEveryFlippedBitIsAnError(t *testing.T) {
	b := mustEncode(t, example())
	for i := range len(b) * 8 {
		c := bytes.Clone(b)
		c[i/8] ^= 1 << (i % 8)
		wantFieldError(t, fmt.Sprintf("bit %d of byte %d flipped", i%8, i/8), c)
	}
}

func wantFieldError(t *testing.T, what string, b []byte) {
	t.Helper()
	h, err := Decode(b)
	var f *FieldError
	if !errors.As(err, &f) || f.Field == "" || h != nil {
		t.Fatalf("%s: got %v and error %v, want an error that names the field", what, h, err)
	}
}

// reseal makes the checksums fit again, so that the checks behind them are met.
func reseal(b []byte) []byte {
	b = bytes.Clone(b)
	if len(b) < prefixSize+trailerSize {
		return b
	}
	binary.LittleEndian.PutUint32(b[prefixSize-4:], crc32.Checksum(b[:prefixSize-4], castagnoli))
	binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
	return b
}

func TestDamageBehindGoodChecksumsNamesItsField(t *testing.T) {
	const body = prefixSize + 2*buildSize
	set := func(at int, v ...byte) func([]byte) { return func(b []byte) { copy(b[at:], v) } }
	for _, c := range []struct {
		field  string
		damage func(b []byte)
	}{
		{"magic", set(0, 'X')},
		{"version", set(8, 9)},
		{"flags", set(10, 1)},
		{"block size", set(12, 1)},
		{"length", set(16, 1)},
		{"size", set(24, 1)},
		{"size", set(31, 0x80)},
		{"size", set(31, 0x7f)},
		{"parent", set(32, 0)},
		{"build", set(40, make([]byte, 16)...)},
		{"parent", set(56, make([]byte, 16)...)},
		{"builds", set(75, 0xff)},
		{"length", set(72, 1)},
		{"mappings", set(79, 0xff)},
		{"mappings.gap", set(76, 5)},
		{"mappings.gap", set(76, 3)}, // one value left over, in each column
		{"reserved", set(96, 1)},
		{"length", set(80, 200)},
		{"builds[0].id", set(prefixSize, make([]byte, 16)...)},
		{"builds[1].id", func(b []byte) { copy(b[prefixSize+buildSize:], b[prefixSize:prefixSize+16]) }},
		{"builds[0].blocks", set(prefixSize+16, 0)},
		{"mappings.gap", set(body, 0x80, 0x00)},
		{"mappings[3].start", set(body+3, 0x7f)},
		{"mappings[3].length", set(body+4+3, 0x7f)},
		{"mappings.build", set(body+8, 2)},
		{"mappings[0].offset", set(body+12, 0x7f)},
		{"builds[1]", set(body+8, 0, 0, 0, 0)},
	} {
		b := mustEncode(t, example())
		c.damage(b)
		_, err := Decode(reseal(b))
		var f *FieldError
		if !errors.As(err, &f) || f.Field != c.field {
			t.Errorf("want an error about %s, got %v", c.field, err)
		}
	}
}

func TestValidateNamesTheField(t *testing.T) {
	for _, c := range []struct {
		field  string
		change func(h *Header)
	}{
		{"size", func(h *Header) { h.Size++ }},
		{"size", func(h *Header) { h.Size = -BlockSize }},
		{"parent", func(h *Header) { h.Generation = 0 }},
		{"parent", func(h *Header) { h.Parent = h.Build }},
		{"mappings[0].length", func(h *Header) { edit(h, 0, func(m *Mapping) { m.Length = 0 }) }},
		{"mappings[1].start", func(h *Header) { edit(h, 1, func(m *Mapping) { m.Start = 12 }) }},
		{"mappings[3].length", func(h *Header) { edit(h, 3, func(m *Mapping) { m.Length = 61 }); h.Builds[1].Blocks = 99 }},
		{"mappings[3].start", func(h *Header) { edit(h, 3, func(m *Mapping) { m.Start = 100 }) }},
		{"mappings[2].build", func(h *Header) { edit(h, 2, func(m *Mapping) { m.Build = 2 }) }},
		{"mappings[3].offset", func(h *Header) { edit(h, 3, func(m *Mapping) { m.Offset = ^uint64(0) }) }},
	} {
		h := example()
		c.change(h)
		var f *FieldError
		if err := h.Validate(); !errors.As(err, &f) || f.Field != c.field {
			t.Errorf("want an error about %s, got %v", c.field, err)
		}
		if _, err := Encode(h); err == nil {
			t.Errorf("%s: Encode took it", c.field)
		}
	}
}

func TestDecodeAllocatesForWhatIsThere(t *testing.T) {
	b := mustEncode(t, example())
	binary.LittleEndian.PutUint32(b[76:], MaxMappings) // 4 GiB of mappings
	b = reseal(b)
	if n := testing.AllocsPerRun(10, func() { _, _ = Decode(b) }); n > 10 {
		t.Fatalf("%v allocations for a count that cannot be true", n)
	}
}

func TestLookup(t *testing.T) {
	h := example()
	for _, c := range []struct {
		block, run uint64
		kind       Kind
		start      uint64
	}{
		{0, 3, Zero, 0}, {3, 10, Data, 3}, {12, 1, Data, 3}, {13, 2, Data, 13}, {20, 20, Zero, 0},
		{40, 1, Data, 40}, {41, 59, Zero, 0}, {99, 1, Zero, 0}, {100, 0, Absent, 0}, {^uint64(0), 0, Absent, 0},
	} {
		m, kind, run := h.Lookup(c.block)
		if kind != c.kind || run != c.run || m.Start != c.start {
			t.Errorf("Lookup(%d) = %+v %v %d, want start %d, %v %d", c.block, m, kind, run, c.start, c.kind, c.run)
		}
	}
}

func TestMergeRefusesBadDiffs(t *testing.T) {
	for _, c := range []struct {
		field string
		diff  []Extent
	}{
		{"diff[0].length", []Extent{{Start: 1, Kind: Zero}}},
		{"diff[1].start", []Extent{{Start: 1, Length: 2, Kind: Zero}, {Start: 2, Length: 1, Kind: Zero}}},
		{"diff[0].length", []Extent{{Start: 99, Length: 2, Kind: Zero}}},
		{"diff[0].length", []Extent{{Start: 1, Length: ^uint64(0), Kind: Zero}}},
		{"diff[0].kind", []Extent{{Start: 1, Length: 1, Kind: Inherited}}},
		{"diff[0].kind", []Extent{{Start: 1, Length: 1}}},
		{"diff[0].offset", []Extent{{Start: 1, Length: 2, Kind: Data, Offset: 3}}},
	} {
		var f *FieldError
		if _, err := Merge(example(), ref(3, 4), c.diff); !errors.As(err, &f) || f.Field != c.field {
			t.Errorf("want an error about %s, got %v", c.field, err)
		}
	}
	var f *FieldError
	if _, err := Merge(example(), ref(1, 4), nil); !errors.As(err, &f) || f.Field != "build" {
		t.Errorf("a build that is in the parent: %v", err)
	}
}

func TestMergeNeverJoinsAcrossStorage(t *testing.T) {
	h, err := New(10*BlockSize, ref(1, 10), []Extent{
		{Start: 0, Length: 2, Kind: Data, Offset: 4},
		{Start: 2, Length: 2, Kind: Data, Offset: 0}, // touches in the image only
		{Start: 4, Length: 2, Kind: Data, Offset: 2}, // touches in both
	})
	if err != nil {
		t.Fatal(err)
	}
	want := NewMappings([]Mapping{{Start: 0, Length: 2, Offset: 4}, {Start: 2, Length: 4, Offset: 0}}...)
	if d := cmp.Diff(want, h.Mappings); d != "" {
		t.Fatal(d)
	}
}

// cell says where a block is stored; the zero cell is a zero block.
type cell struct {
	build  ID
	offset uint64
}

// cells spells a header out, block by block.
func cells(h *Header) []cell {
	out := make([]cell, h.Blocks())
	for _, m := range h.Mappings.All() {
		for i := range m.Length {
			out[m.Start+i] = cell{h.Builds[m.Build].ID, m.Offset + i}
		}
	}
	return out
}

func drawDiff(t *rapid.T, blocks uint64) ([]Extent, uint64) {
	var diff []Extent
	var stored uint64
	for at := rapid.Uint64Range(0, 12).Draw(t, "gap"); at < blocks; at += rapid.Uint64Range(0, 12).Draw(t, "gap") {
		e := Extent{Start: at, Length: min(blocks-at, rapid.Uint64Range(1, 9).Draw(t, "length")), Kind: Zero}
		if rapid.Bool().Draw(t, "data") {
			e.Kind, e.Offset = Data, stored
			stored += e.Length
		}
		diff = append(diff, e)
		at = e.End()
	}
	return diff, stored
}

func TestMergeEqualsOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 64
		want := make([]cell, blocks)
		var h *Header
		for g := range byte(6) {
			diff, stored := drawDiff(t, blocks)
			b := ref(g+1, stored)
			var err error
			if h == nil {
				h, err = New(blocks*BlockSize, b, diff)
			} else {
				before := mustEncodeR(t, h)
				base := h
				h, err = Merge(base, b, diff)
				if !bytes.Equal(before, mustEncodeR(t, base)) {
					t.Fatal("Merge changed its base")
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range diff {
				for i := range e.Length {
					want[e.Start+i] = cell{}
					if e.Kind == Data {
						want[e.Start+i] = cell{b.ID, e.Offset + i}
					}
				}
			}
			got, err := Decode(mustEncodeR(t, h))
			if err != nil {
				t.Fatal(err)
			}
			if h.Generation != uint64(g) {
				t.Fatalf("generation %d, want %d", h.Generation, g)
			}
			if d := cmp.Diff(want, cells(got), cmp.AllowUnexported(cell{})); d != "" {
				t.Fatal(d)
			}
			checkRuns(t, got, want)
		}
	})
}

// checkRuns checks Lookup at every block, and that no two neighbours should
// have been one mapping.
func checkRuns(t *rapid.T, h *Header, want []cell) {
	for b := range want {
		m, kind, run := h.Lookup(uint64(b))
		if (kind == Zero) != (want[b] == cell{}) || run == 0 {
			t.Fatalf("block %d: %v for %d", b, kind, run)
		}
		if kind == Data && (h.Builds[m.Build].ID != want[b].build || m.Offset+uint64(b)-m.Start != want[b].offset) {
			t.Fatalf("block %d: %+v, want %+v", b, m, want[b])
		}
	}
	var a Mapping
	for i, b := range h.Mappings.All() {
		if i > 0 && a.End() == b.Start && a.Build == b.Build && a.Offset+a.Length == b.Offset {
			t.Fatalf("mappings %d and %d are one", i-1, i)
		}
		a = b
	}
}

func mustEncodeR(t *rapid.T, h *Header) []byte {
	b, err := Encode(h)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestIDs(t *testing.T) {
	id := NewID()
	if got, err := ParseID(id.String()); err != nil || got != id {
		t.Fatalf("ParseID(%q) = %v, %v", id.String(), got, err)
	}
	for _, s := range []string{"", "00", strings.Repeat("0", 31), strings.Repeat("0", 33), strings.Repeat("A", 32), "../" + strings.Repeat("0", 29)} {
		if _, err := ParseID(s); err == nil {
			t.Errorf("ParseID(%q) took it", s)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(mustEncode(f, example()))
	f.Add(mustEncode(f, &Header{Build: testID(9)}))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, in := range [][]byte{b, reseal(b)} {
			h, err := Decode(in)
			if err != nil {
				var fe *FieldError
				if !errors.As(err, &fe) {
					t.Fatalf("error %v names no field", err)
				}
				continue
			}
			if out, err := Encode(h); err != nil || !bytes.Equal(out, in) {
				t.Fatalf("decoded, but encoded again (%v) it is not the same", err)
			}
		}
	})
}

// A merge allocates for the diff and an index, not for what it keeps.
func TestMergeSharesWhatItKeeps(t *testing.T) {
	h := large(100_000)
	diff := []Extent{{Start: h.Blocks() / 2, Length: 1, Kind: Data}}
	before := new(runtime.MemStats)
	after := new(runtime.MemStats)
	runtime.ReadMemStats(before)
	got, err := Merge(h, ref(99, 1), diff)
	runtime.ReadMemStats(after)
	if err != nil {
		t.Fatal(err)
	}
	whole := h.Mappings.bytes()
	if n := int(after.TotalAlloc - before.TotalAlloc); n > whole/3 {
		t.Fatalf("%d bytes allocated for one block in an image of %d bytes of mappings", n, whole)
	}
	old := map[*leaf]bool{}
	for _, e := range h.Mappings.entries {
		old[e.leaf] = true
	}
	anew := 0
	for _, e := range got.Mappings.entries {
		if !old[e.leaf] {
			anew++
		}
	}
	if anew == 0 || anew > 4 {
		t.Fatalf("%d leaves of %d are new", anew, len(old))
	}
}

// However many merges a list has been through, it takes about as much memory as
// one made of the same mappings at once.
func TestLeavesDoNotCrumble(t *testing.T) {
	h := large(20_000)
	r := rand.New(rand.NewPCG(5, 5))
	for g := range byte(150) {
		var diff []Extent
		var stored uint64
		for at := r.Uint64N(2000); at < h.Blocks(); at += 1 + r.Uint64N(4000) {
			e := Extent{Start: at, Length: min(1+r.Uint64N(4), h.Blocks()-at), Kind: Data, Offset: stored}
			stored += e.Length + 1
			diff = append(diff, e)
			at = e.End()
		}
		var err error
		if h, err = Merge(h, ref(g+100, stored), diff); err != nil {
			t.Fatal(err)
		}
	}
	var ms []Mapping
	for _, m := range h.Mappings.All() {
		ms = append(ms, m)
	}
	if got, want := h.Mappings.bytes(), NewMappings(ms...).bytes(); got > 3*want/2 {
		t.Fatalf("%d mappings take %d bytes after 150 merges, %d when made at once", len(ms), got, want)
	}
}

// Merges of merges, never encoded between, equal the oracle: lists that share
// leaves, with cut and joined pieces, in images long enough to have many.
func TestMergesOfMergesEqualOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 3000
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		want := make([]cell, blocks)
		h := &Header{Size: blocks * BlockSize, Build: testID(250)}
		for g := range byte(8) {
			var diff []Extent
			var stored uint64
			for at := r.Uint64N(40); at < blocks; at += r.Uint64N(1 + r.Uint64N(200)) {
				e := Extent{Start: at, Length: min(blocks-at, 1+r.Uint64N(1+r.Uint64N(60))), Kind: Zero}
				if r.IntN(3) > 0 {
					e.Kind, e.Offset = Data, stored
					stored += e.Length + r.Uint64N(2)
				}
				for i := range e.Length {
					want[e.Start+i] = cell{}
					if e.Kind == Data {
						want[e.Start+i] = cell{testID(g + 1), e.Offset + i}
					}
				}
				diff = append(diff, e)
				at = e.End()
			}
			var err error
			if h, err = Merge(h, ref(g+1, stored+1), diff); err != nil {
				t.Fatal(err)
			}
			if err := h.Validate(); err != nil {
				t.Fatal(err)
			}
			n := 0
			for range h.Mappings.All() {
				n++
			}
			if n != h.Mappings.Len() {
				t.Fatalf("Len is %d, there are %d", h.Mappings.Len(), n)
			}
		}
		if !slices.Equal(cells(h), want) {
			t.Fatal("a merge differs from the oracle")
		}
		checkRuns(t, h, want)
	})
}

// What mappings may be fits into leaves, to the last value of each field, and
// is found there.
func TestPackingKeepsEveryMapping(t *testing.T) {
	ends := func(limit uint64) []uint64 { return []uint64{0, 1, 255, 256, limit / 3, limit - 2, limit - 1} }
	for _, before := range []int{0, 1, 2, 20, 70} {
		for _, start := range ends(MaxBlocks - 200) {
			for _, length := range ends(MaxBlocks) {
				for _, build := range ends(MaxBuilds) {
					for _, offset := range ends(MaxBlocks) {
						var ms []Mapping
						for i := range uint64(before) {
							ms = append(ms, Mapping{Start: i, Length: 1, Build: uint32(i % 3), Offset: i * 5})
						}
						last := Mapping{Start: 100 + start, Length: length + 1, Build: uint32(build), Offset: offset}
						checkPacked(t, append(ms, last))
					}
				}
			}
		}
	}
	for _, m := range []Mapping{{Start: MaxBlocks, Length: 1}, {}, {Length: MaxBlocks + 1}, {Length: 1, Build: MaxBuilds}, {Length: 1, Offset: MaxBlocks}} {
		if m.fits() {
			t.Errorf("%+v fits", m)
		}
		// Validate sees it as it was given.
		if l := NewMappings(m); l.Len() != 1 || !l.Equal(NewMappings(m)) || l.Equal(NewMappings(Mapping{Length: 1})) {
			t.Errorf("%+v is not kept", m)
		}
	}
}

// Leaves of every number of rows and every width of a field hold them.
func TestLeavesOfEveryShape(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for range 3000 {
		bits := func(most int) uint64 { return r.Uint64() >> (64 - r.IntN(most+1)) }
		limit := [4]int{r.IntN(31), r.IntN(37), r.IntN(21), r.IntN(37)}
		low, at := bits(35), bits(34)
		var ms []Mapping
		for range 1 + r.IntN(200) {
			m := Mapping{Start: at, Length: 1 + bits(limit[1])%(MaxBlocks-1), Build: uint32(bits(limit[2])), Offset: min(low+bits(limit[3]), MaxBlocks-1)}
			if at += 1 + bits(limit[0]); at >= MaxBlocks {
				break
			}
			ms = append(ms, m)
		}
		checkPacked(t, ms)
	}
}

// A leaf's starts take a byte each as long as they fit, and it has at most so
// many: at and around both edges every block is found.
func TestLeavesAtTheEdgeOfAByte(t *testing.T) {
	for rows := uint64(1); rows <= maxRows+2; rows++ {
		for last := uint64(farStart - 4); last < farStart+4; last++ {
			var ms []Mapping
			for i := range rows - 1 {
				ms = append(ms, Mapping{Start: 7 + 3*i, Length: 1 + i%2, Offset: i})
			}
			ms = append(ms, Mapping{Start: 7 + last, Length: 2, Offset: rows})
			l := NewMappings(ms...)
			for block := range 7 + last + 5 {
				checkLookup(t, &l, ms, block)
			}
		}
	}
}

// checkLookup checks an answer against all mappings, which do not overlap.
func checkLookup(t *testing.T, l *Mappings, ms []Mapping, block uint64) {
	t.Helper()
	const limit = 2 * MaxBlocks
	want, holds, next := Mapping{}, false, uint64(limit)
	at, _ := slices.BinarySearchFunc(ms, block, func(m Mapping, block uint64) int {
		if m.End() > block {
			return 1
		}
		return -1
	})
	if at < len(ms) {
		if next = ms[at].Start; next <= block {
			want, holds, next = ms[at], true, 0
		}
	}
	if m, ok, n := l.lookup(block, limit); m != want || ok != holds || n != next {
		t.Fatalf("block %d of %d mappings: %+v, %v, next %d; want %+v, %v, %d", block, len(ms), m, ok, n, want, holds, next)
	}
}

// checkPacked checks that a list holds ms, and that Seek and look-ups find each.
func checkPacked(t *testing.T, ms []Mapping) {
	t.Helper()
	l := NewMappings(ms...)
	if l.raw != nil {
		t.Fatalf("%v is not packed", ms)
	}
	n := 0
	for i, m := range l.All() {
		if m != ms[i] {
			t.Fatalf("mapping %d is %+v, want %+v", i, m, ms[i])
		}
		n++
	}
	if n != len(ms) || l.Len() != n {
		t.Fatalf("%d mappings, Len says %d, want %d", n, l.Len(), len(ms))
	}
	for i, m := range ms {
		if i+1 < len(ms) && m.End() > ms[i+1].Start {
			continue // what overlaps is in no valid header
		}
		c := l.Seek(m.End() - 1)
		if got, ok := c.Next(); !ok || got != m {
			t.Fatalf("sought mapping %d, %+v: found %+v, %v", i, m, got, ok)
		}
		if m, ok, _ := l.lookup(m.End()-1, 0); !ok || m != ms[i] {
			t.Fatalf("looked mapping %d up, %+v: found %+v, %v", i, ms[i], m, ok)
		}
		if m, ok, next := l.lookup(m.End(), math.MaxUint64); i+1 < len(ms) && ms[i].End() < ms[i+1].Start && (ok || next != ms[i+1].Start) {
			t.Fatalf("behind mapping %d, %+v: found %+v, %v, next %d", i, ms[i], m, ok, next)
		}
	}
}

// The index divides the image evenly; mappings lie in heaps.
func TestLookupInHeaps(t *testing.T) {
	var ms []Mapping
	at := uint64(5)
	for heap := range 6 {
		for range []int{1, 40, 3000}[heap%3] {
			ms = append(ms, Mapping{Start: at, Length: 1 + at%3, Offset: at})
			at += 3 + at%2
		}
		at += []uint64{7, 1 << 30, 100_000}[heap%3]
	}
	h := &Header{Size: int64(at+10) * BlockSize, Mappings: NewMappings(ms...)}
	for i, m := range ms {
		for _, block := range []uint64{m.Start, m.End() - 1} {
			if got, kind, run := h.Lookup(block); kind != Data || got != m || run != m.End()-block {
				t.Fatalf("block %d is %v of %+v, run %d; want mapping %d, %+v", block, kind, got, run, i, m)
			}
		}
		next := h.Blocks()
		if i+1 < len(ms) {
			next = ms[i+1].Start
		}
		if _, kind, run := h.Lookup(m.End()); m.End() < next && (kind != Zero || run != next-m.End()) {
			t.Fatalf("block %d, after mapping %d, is %v, run %d; want zero, %d", m.End(), i, kind, run, next-m.End())
		}
	}
	if _, kind, run := h.Lookup(0); kind != Zero || run != ms[0].Start {
		t.Fatalf("block 0 is %v, run %d", kind, run)
	}
}

// bytes returns the memory that the list takes, leaves shared with others
// included.
func (l Mappings) bytes() int {
	return len(l.entries)*int(unsafe.Sizeof(entry{})+unsafe.Sizeof(leaf{})) + len(l.index)*4
}
