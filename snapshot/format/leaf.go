package format

import (
	"encoding/binary"
	"math/bits"
)

// leaf holds some mappings, ascending, in one line of the processor's cache:
// the line is what a look-up waits for. Its last 8 bytes are the head. From the
// first byte on it has the starts, less the leaf's first one, each with a zero
// above it for search. Then comes a row for each mapping, bit by bit: length
// less one, build, and offset less the leaf's least. The sizes are what the
// leaf's largest values need, so a leaf holds two mappings at the least, and 16
// as a rule.
//
// The first start is kept beside the leaf, in its entry.
type leaf [64]byte

const (
	headAt   = 56
	leafBits = headAt * 8
	maxRows  = 16
	// Starts of one byte have room for the most rows, so that searching them is
	// always the same few instructions; farStart is where there is no row.
	farStart = 0x7f
	// wholeRow is how many bits one read has behind any bit.
	wholeRow = 57
)

// head says how a leaf is laid out. From the top:
//
//	36 bits  the least offset in a build
//	 4       number of mappings, less one
//	 2       log2 of the bytes of a start
//	 6, 6, 7 bits of a row up to the end of its length, build, offset
type head uint64

func newHead(low uint64, rows int, size, length, build, offset uint) head {
	return head(low<<28 | uint64(rows-1)<<21 | uint64(size)<<19 |
		uint64(length)<<13 | uint64(length+build)<<7 | uint64(length+build+offset))
}

func (h head) low() uint64  { return uint64(h >> 28) }
func (h head) rows() int    { return int(h>>21&15) + 1 }
func (h head) size() uint   { return uint(h >> 19 & 3) }
func (h head) length() uint { return uint(h >> 13 & 63) }
func (h head) build() uint  { return uint(h >> 7 & 63) }
func (h head) row() uint    { return uint(h & 127) }

// near says that starts take a byte, and that one read gets a row.
func (h head) near() bool { return h&(3<<19) == 0 && h.row() <= wholeRow }

// starts is the bits of all starts: where the first row begins.
func (h head) starts() uint { return startBits(h.size(), h.rows()) }

func startBits(size uint, rows int) uint {
	if size == 0 {
		rows = maxRows
	}
	return uint(rows) << (size&3 + 3)
}

func (l *leaf) head() head { return head(l.word(headAt)) }

// word reads 64 bits, at a byte.
func (l *leaf) word(at uint) uint64 { return binary.LittleEndian.Uint64(l[at&63:]) }

// bits reads 57 or more bits, at a bit.
func (l *leaf) bits(at uint) uint64 { return l.word(at/8) >> (at % 8) }

// put sets at most 57 bits that are zeros.
func (l *leaf) put(at uint, v uint64) {
	binary.LittleEndian.PutUint64(l[at/8&63:], l.word(at/8)|v<<(at%8))
}

// startMasks, by log2 of the bytes of a start.
var startMasks = [4]uint64{1<<8 - 1, 1<<16 - 1, 1<<32 - 1, 1<<64 - 1}

// at returns where a mapping begins.
func (e entry) at(h head, i int) uint64 {
	return e.start + e.leaf.word(uint(i)<<h.size())&startMasks[h.size()]
}

// mapping returns a mapping.
func (e entry) mapping(h head, i int) Mapping {
	at := h.starts() + uint(i)*h.row()
	if h.row() > wholeRow {
		return e.wide(h, i, at)
	}
	return h.unpack(e.at(h, i), e.leaf.bits(at))
}

// unpack returns the mapping of a start and of a row that was read whole.
func (h head) unpack(start, v uint64) Mapping {
	return Mapping{
		Start: start, Length: v&(1<<h.length()-1) + 1,
		Build:  uint32(v & (1<<h.build() - 1) >> h.length()),
		Offset: h.low() + v&(1<<(h.row()&63)-1)>>h.build(),
	}
}

// wide is mapping for rows that no one read gets whole.
func (e entry) wide(h head, i int, at uint) Mapping {
	get := func(from, to uint) uint64 { return e.leaf.bits(at+from) & (1<<(to-from) - 1) }
	return Mapping{
		Start: e.at(h, i), Length: get(0, h.length()) + 1,
		Build:  uint32(get(h.length(), h.build())),
		Offset: h.low() + get(h.build(), h.row()),
	}
}

// unpack returns all mappings, in a buffer of the caller's.
func (e entry) unpack(rows *[maxRows]Mapping) []Mapping {
	h := e.leaf.head()
	for i := range rows[:h.rows()] {
		rows[i] = e.mapping(h, i)
	}
	return rows[:h.rows()]
}

// ones has a one at the lowest bit of each start of a size.
var ones = [4]uint64{0x0101010101010101, 0x0001000100010001, 0x0000000100000001, 1}

// last returns the last mapping that begins at or before a block; the first
// does. It compares as many starts at once as a word holds: where block is not
// less, a one set above it outlives the subtraction of the start.
func (e entry) last(h head, block uint64) int {
	if h.size() > 0 {
		return e.lastWide(h, block)
	}
	return e.leaf.lastNear(block - e.start)
}

// lastNear is last for starts of a byte, for a block counted from the first.
func (l *leaf) lastNear(block uint64) int {
	const one, top = 0x0101010101010101, 0x8080808080808080
	block = min(block, farStart-1)*one | top
	le := (block-l.word(0))&top>>7 + (block-l.word(8))&top>>7
	return int(le*one>>56) - 1
}

// lastWide is last for starts of more than a byte.
func (e entry) lastWide(h head, block uint64) int {
	one := ones[h.size()]
	width := uint(8) << h.size()
	top := one << (width - 1)
	block = min(block-e.start, 1<<(width-1)-1)*one | top
	n := -1
	at := uint(0)
	for rest := h.starts(); ; rest -= 64 {
		le := (block - e.leaf.word(at)) & top
		if rest <= 64 {
			// What is behind the last start is no start.
			return n + bits.OnesCount64(le<<(64-rest))
		}
		n += bits.OnesCount64(le)
		at += 8
	}
}

// search returns the first mapping that ends after a block, or their number.
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
	case v < farStart:
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
		row := bits.Len64(lengths) + bits.Len64(builds) + bits.Len64(high-low)
		starts := int(startBits(startSize(m.Start-first), p.n+1))
		if p.n == 0 || p.n < maxRows && starts+(p.n+1)*row <= leafBits {
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
	h := newHead(p.low, len(rows), size, length, build, offset)
	l.fill(h, rows, p.low)
	p.out.entries = append(p.out.entries, entry{first, l})
	p.open, p.before, p.n = 1-p.open, p.n, 0
}

// fill writes an empty leaf.
func (l *leaf) fill(h head, rows []Mapping, low uint64) {
	binary.LittleEndian.PutUint64(l[headAt:], uint64(h))
	if h.near() {
		l.fillNear(h, rows, low)
		return
	}
	first := rows[0].Start
	at := h.starts()
	for i := range rows {
		m := &rows[i]
		l.put(uint(i)<<(h.size()+3), m.Start-first)
		l.put(at, m.Length-1|uint64(m.Build)<<h.length())
		l.put(at+h.build(), m.Offset-low)
		at += h.row()
	}
	if h.size() == 0 {
		for i := len(rows); i < maxRows; i++ {
			l[i] = farStart
		}
	}
}

// fillNear is fill for near leaves, which nearly all are, with one write for a
// row: it is a quarter of the time of decoding.
func (l *leaf) fillNear(h head, rows []Mapping, low uint64) {
	first := rows[0].Start
	length, build := h.length(), h.build()
	at := uint(maxRows * 8)
	for i := range l[:maxRows] {
		if i >= len(rows) {
			l[i] = farStart
			continue
		}
		m := &rows[i]
		l[i] = byte(m.Start - first)
		l.put(at, m.Length-1|uint64(m.Build)<<length|(m.Offset-low)<<build)
		at += h.row()
	}
}
