package format

import "math/bits"

// leaf holds some mappings, ascending, in one line of the processor's cache:
// the line is what a look-up waits for. From the top, word 0 has
//
//	36 bits  the least offset in a build
//	 6       number of mappings
//	 2       log2 of the bytes of a start
//	 6, 5, 6 bits of a length, of a build, of an offset
//
// and the others, from the low bits up, first the starts, less the first one,
// each with a zero above it for search, then length less one, build, and offset
// less the least, mapping by mapping. The sizes are what the leaf's largest
// values need, so a leaf holds two mappings at the least, and 15 as a rule.
//
// The first start is kept beside the leaf, in its entry.
type leaf [leafWords]uint64

const (
	leafWords = 8
	leafBits  = (leafWords - 1) * 64
	maxRows   = leafBits / 8
)

// head is the first word of a leaf.
type head uint64

func (h head) low() uint64 { return uint64(h >> 28) }
func (h head) rows() int   { return int(h >> 22 & 63) }
func (h head) size() uint  { return uint(h >> 20 & 3) }

// Bits of the fields, of a start with what is above it, and of a row of values.
func (h head) start() uint  { return 8 << h.size() }
func (h head) length() uint { return uint(h >> 14 & 63) }
func (h head) build() uint  { return uint(h >> 9 & 31) }
func (h head) offset() uint { return uint(h >> 3 & 63) }
func (h head) row() uint    { return h.length() + h.build() + h.offset() }

// values is where the values begin.
func (h head) values() uint { return uint(h.rows()) << (h.size() + 3) }

func (l *leaf) head() head { return head(l[0]) }

// word returns the 64 bits from a place on. The masks tell the compiler that it
// need not check; what lies beyond the last word is for the caller to mask.
func (l *leaf) word(at uint) uint64 {
	i := at/64 + 1
	return l[i%leafWords]>>(at%64) | l[(i+1)%leafWords]<<1<<(63-at%64)
}

// put sets bits that are zeros.
func (l *leaf) put(at, n uint, v uint64) {
	if n == 0 {
		return
	}
	i := at/64 + 1
	l[i%leafWords] |= v << (at % 64)
	if at%64+n > 64 {
		l[(i+1)%leafWords] |= v >> (64 - at%64)
	}
}

// at returns where a row begins. Starts do not cross words.
func (e entry) at(h head, i int) uint64 {
	at := uint(i) << (h.size() + 3)
	v := e.leaf[(at/64+1)%leafWords] >> (at % 64)
	return e.start + v&(1<<(h.start()-1)-1)
}

// mapping returns a row.
func (e entry) mapping(h head, i int) Mapping {
	at := h.values() + uint(i)*h.row()
	if h.row() > 64 {
		return e.wide(h, i, at)
	}
	v := e.leaf.word(at)
	length := v&(1<<h.length()-1) + 1
	v >>= h.length()
	return Mapping{
		Start: e.at(h, i), Length: length,
		Build:  uint32(v & (1<<h.build() - 1)),
		Offset: h.low() + v>>h.build()&(1<<h.offset()-1),
	}
}

// wide is mapping for values that do not fit into a word.
func (e entry) wide(h head, i int, at uint) Mapping {
	get := func(at, n uint) uint64 { return e.leaf.word(at) & (1<<n - 1) }
	return Mapping{
		Start: e.at(h, i), Length: get(at, h.length()) + 1,
		Build:  uint32(get(at+h.length(), h.build())),
		Offset: h.low() + get(at+h.length()+h.build(), h.offset()),
	}
}

// unpack returns all rows, in a buffer of the caller's.
func (e entry) unpack(rows *[maxRows]Mapping) []Mapping {
	h := e.leaf.head()
	for i := range rows[:h.rows()] {
		rows[i] = e.mapping(h, i)
	}
	return rows[:h.rows()]
}

// ones has a one at the lowest bit of each start of a size.
var ones = [4]uint64{0x0101010101010101, 0x0001000100010001, 0x0000000100000001, 1}

// last returns the last row that begins at or before a block; the first does.
// It compares as many starts at once as a word holds: where block is not less,
// a one set above it outlives the subtraction of the start.
func (e entry) last(h head, block uint64) int {
	one := ones[h.size()]
	top := one << (h.start() - 1)
	block = min(block-e.start, 1<<(h.start()-1)-1)*one | top
	n := -1
	i := 1
	for rest := h.values(); ; rest -= 64 {
		le := (block - e.leaf[i%leafWords]) & top
		if rest <= 64 {
			// What is behind the last start is no start.
			return n + bits.OnesCount64(le<<(64-rest))
		}
		n += bits.OnesCount64(le)
		i++
	}
}

// search returns the first row that ends after a block, or the number of rows.
func (e entry) search(block uint64) int {
	if block < e.start {
		return 0
	}
	h := e.leaf.head()
	i := e.last(h, block)
	if e.mapping(h, i).End() > block {
		return i
	}
	return i + 1
}

// packer makes leaves of mappings that ascend.
type packer struct {
	out *Mappings // gets the leaves
	// slab is where the next leaves come from: one allocation for many. expect
	// is how many mappings come: it keeps the slabs of a short list small.
	slab   []leaf
	expect int

	// rows[open][:n] are of the leaf that is open, the others of the leaf before
	// it, as long as they may move.
	rows            [2][maxRows]Mapping
	open, n, before int
	// What the open leaf's fields need: the or of lengths and of builds, and
	// the limits of the offsets.
	lengths, builds uint64
	low, high       uint64
}

// slabLeaves is how many leaves are allocated at once, at the most.
const slabLeaves = 512

// newPacker returns a packer for a list whose length is known.
func newPacker(out *Mappings) *packer {
	out.entries = make([]entry, 0, out.n/13+1)
	return &packer{out: out, expect: out.n}
}

// startSize returns log2 of the bytes for a start, the bit above it included.
func startSize(v uint64) uint {
	switch {
	case v < 1<<7:
		return 0
	case v < 1<<15:
		return 1
	case v < 1<<31:
		return 2
	}
	return 3
}

// add puts a mapping into the open leaf, or where that is full, into the next.
func (p *packer) add(m Mapping) {
	for {
		lengths, builds, low, high := m.Length-1, uint64(m.Build), m.Offset, m.Offset
		first := m.Start
		if p.n > 0 {
			lengths, builds = lengths|p.lengths, builds|p.builds
			low, high = min(low, p.low), max(high, p.high)
			first = p.rows[p.open][0].Start
		}
		bits := 8<<startSize(m.Start-first) + bits.Len64(lengths) + bits.Len64(builds) + bits.Len64(high-low)
		if p.n == 0 || (p.n+1)*bits <= leafBits {
			p.lengths, p.builds, p.low, p.high = lengths, builds, low, high
			p.rows[p.open][p.n] = m
			p.n++
			return
		}
		p.emit()
	}
}

// few reports whether flush would make a leaf of a few mappings.
func (p *packer) few() bool { return p.n > 0 && p.n < minLeaf && p.before < minLeaf }

// flush ends the open leaf. Where that has a few mappings only, it gets half of
// those of the one before.
func (p *packer) flush() {
	if p.n > 0 && p.n < min(minLeaf, p.before) {
		var few [minLeaf]Mapping
		own := few[:copy(few[:], p.rows[p.open][:p.n])]
		many := p.rows[1-p.open]
		before := many[:p.before]
		half := (len(before) + len(own)) / 2
		p.out.entries = p.out.entries[:len(p.out.entries)-1]
		p.n = 0
		p.addAll(before[:half])
		p.emit()
		p.addAll(before[half:])
		p.addAll(own)
	}
	p.emit()
	p.before = 0
}

func (p *packer) addAll(ms []Mapping) {
	for _, m := range ms {
		p.add(m)
	}
}

// emit makes a leaf of the open rows.
func (p *packer) emit() {
	if p.n == 0 {
		return
	}
	if len(p.slab) == 0 {
		p.slab = make([]leaf, min(p.expect/minLeaf+1, slabLeaves))
	}
	l := &p.slab[0]
	p.slab = p.slab[1:]
	rows := p.rows[p.open][:p.n]
	first := rows[0].Start
	size := startSize(rows[len(rows)-1].Start - first)
	length, build, offset := uint(bits.Len64(p.lengths)), uint(bits.Len64(p.builds)), uint(bits.Len64(p.high-p.low))
	l[0] = p.low<<28 | uint64(len(rows))<<22 | uint64(size)<<20 |
		uint64(length)<<14 | uint64(build)<<9 | uint64(offset)<<3
	h := l.head()
	at := h.values()
	for i := range rows {
		m := &rows[i]
		l.put(uint(i)*h.start(), h.start(), m.Start-first)
		l.put(at, length+build, m.Length-1|uint64(m.Build)<<length)
		l.put(at+length+build, offset, m.Offset-p.low)
		at += h.row()
	}
	p.out.entries = append(p.out.entries, entry{first, l})
	p.open, p.before, p.n = 1-p.open, p.n, 0
}
