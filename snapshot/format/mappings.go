package format

import (
	"iter"
	"slices"
)

// Mappings is an ordered list of mappings that never changes. It is kept in
// leaves of some dozen mappings, so that a list made from another by changing
// a few places shares all other leaves with it. A look-up goes from an index of
// equal parts of the image to the leaf, and reads that from its begin: it costs
// about two misses of the processor's caches, however long the list is.
type Mappings struct {
	starts []uint64 // first block of each leaf
	leaves [][]packed
	n      int
	// uses counts, for each build, the mappings that name it; nil: not counted.
	uses []int

	// index[i] is the last leaf that begins at or before block i<<shift, or 0.
	// One entry more than there are parts closes it.
	index []uint32
	shift uint8

	// raw holds a list that no valid header has, for Validate to say why.
	raw []Mapping
}

// Sizes of a leaf, in mappings. A piece shorter than minLeaf is copied rather
// than shared, so that leaves do not crumble as one merge follows another.
const (
	minLeaf = 8
	newLeaf = 32
	maxLeaf = 64
)

// packed is a mapping in 16 bytes: the limits of a header are just so. From the
// top, a holds the first block (36 bits) and the upper 28 bits of the length
// less one, b the other 8 of them, the build (20) and the offset (36).
type packed struct{ a, b uint64 }

// fits reports whether pack keeps m whole: Validate refuses all others.
func (m Mapping) fits() bool {
	return m.Start < MaxBlocks && m.Length-1 < MaxBlocks && m.Build < MaxBuilds && m.Offset < MaxBlocks
}

func (m Mapping) pack() packed {
	n := m.Length - 1
	return packed{a: m.Start<<28 | n>>8, b: n<<56 | uint64(m.Build)<<36 | m.Offset}
}

func (p packed) start() uint64 { return p.a >> 28 }

func (p packed) mapping() Mapping {
	return Mapping{
		Start: p.a >> 28, Length: (p.a<<36>>28 | p.b>>56) + 1,
		Build: uint32(p.b << 8 >> 44), Offset: p.b << 28 >> 28,
	}
}

// NewMappings returns the list of ms. Whether they ascend is for Validate to
// say.
func NewMappings(ms ...Mapping) Mappings {
	ps := make([]packed, len(ms))
	for i, m := range ms {
		if !m.fits() {
			return Mappings{n: len(ms), raw: slices.Clone(ms)}
		}
		ps[i] = m.pack()
	}
	return inLeaves(ps)
}

// inLeaves returns the list of ps, which it keeps.
func inLeaves(ps []packed) Mappings {
	l := Mappings{n: len(ps)}
	if len(ps) == 0 {
		return l
	}
	leaves := (len(ps) + newLeaf - 1) / newLeaf
	l.starts = make([]uint64, 0, leaves)
	l.leaves = make([][]packed, 0, leaves)
	for len(ps) > 0 {
		k := min(newLeaf, len(ps))
		l.starts = append(l.starts, ps[0].start())
		l.leaves = append(l.leaves, ps[:k:k])
		ps = ps[k:]
	}
	l.makeIndex()
	return l
}

// makeIndex divides the blocks up to the last leaf into about as many parts as
// there are leaves. Where mappings lie in heaps a part has many of them, and
// the search between two entries of the index is a binary one.
func (l *Mappings) makeIndex() {
	if len(l.starts) == 0 {
		return
	}
	last := l.starts[len(l.starts)-1]
	l.shift = 0
	for last>>l.shift >= uint64(len(l.starts)) {
		l.shift++
	}
	l.index = make([]uint32, last>>l.shift+2)
	leaf := 0
	for i := range l.index {
		for leaf+1 < len(l.starts) && l.starts[leaf+1] <= uint64(i)<<l.shift {
			leaf++
		}
		l.index[i] = uint32(leaf)
	}
	l.index[len(l.index)-1] = uint32(len(l.starts) - 1)
}

// Len returns the number of mappings.
func (l Mappings) Len() int { return l.n }

// All returns the mappings in their order, with their numbers.
func (l Mappings) All() iter.Seq2[int, Mapping] {
	return func(yield func(int, Mapping) bool) {
		for i, m := range l.raw {
			if !yield(i, m) {
				return
			}
		}
		i := 0
		for _, leaf := range l.leaves {
			for _, p := range leaf {
				if !yield(i, p.mapping()) {
					return
				}
				i++
			}
		}
	}
}

// Equal reports whether both lists hold the same, however they are kept.
func (l Mappings) Equal(o Mappings) bool {
	if l.n != o.n || (l.raw == nil) != (o.raw == nil) {
		return false
	}
	if l.raw != nil {
		return slices.Equal(l.raw, o.raw)
	}
	a, b := Cursor{l: &l}, Cursor{l: &o}
	for {
		m, ok := a.Next()
		if !ok {
			return true
		}
		if other, _ := b.Next(); m != other {
			return false
		}
	}
}

// Seek returns a cursor on the first mapping that ends after block. The list
// must be that of a valid header.
func (l *Mappings) Seek(block uint64) Cursor {
	leaf := l.find(block)
	if leaf < 0 {
		return Cursor{l: l}
	}
	return Cursor{l: l, leaf: leaf, at: searchIn(l.leaves[leaf], block)}
}

// find returns the last leaf that begins at or before block, -1 if none does.
func (l *Mappings) find(block uint64) int {
	if len(l.starts) == 0 || block < l.starts[0] {
		return -1
	}
	part := min(block>>l.shift, uint64(len(l.index)-2))
	from, to := int(l.index[part]), int(l.index[part+1])
	return from + lastFrom(l.starts[from:to+1], block)
}

// leafFrom is find for a block that is not before leaf from, by searching.
func (l *Mappings) leafFrom(block uint64, from int) int {
	return from + lastFrom(l.starts[from:], block)
}

// lastFrom returns the last of the ascending starts that is at most block; the
// first one is.
func lastFrom(starts []uint64, block uint64) int {
	// By hand, and in a form that compiles to conditional moves: a branch per
	// step is mispredicted half of the time, and this is the hot path of every
	// page fault.
	at := 0
	for n := len(starts); n > 1; {
		half := n >> 1
		next := at + half
		if starts[next] <= block {
			at = next
		}
		n -= half
	}
	return at
}

// searchIn returns the index of the first mapping of a leaf that ends after
// block, or its length.
func searchIn(ps []packed, block uint64) int {
	n := startingIn(ps, block)
	if n > 0 && ps[n-1].mapping().End() > block {
		return n - 1
	}
	return n
}

// startingIn counts the mappings that start at or before a block: first the
// whole groups of eight that do, then in the group where it ends. It looks at
// all it may need without a branch, so that the processor fetches the lines at
// once where a search would wait for one after the other.
func startingIn(ps []packed, block uint64) int {
	const group = 8
	n := uint64(0)
	for i := group - 1; i < len(ps); i += group {
		n += (ps[i].start() - block - 1) >> 63
	}
	n *= group
	rest := ps[n:]
	for i := range rest[:min(group, len(rest))] {
		n += (rest[i].start() - block - 1) >> 63
	}
	return int(n)
}

// Cursor is a place in Mappings. It is a small value; copying it is a bookmark.
type Cursor struct {
	l        *Mappings
	leaf, at int
}

// Next returns the mapping at the cursor and moves on; false at the end.
func (c *Cursor) Next() (Mapping, bool) {
	for c.leaf < len(c.l.leaves) {
		leaf := c.l.leaves[c.leaf]
		if c.at < len(leaf) {
			p := leaf[c.at]
			c.at++
			return p.mapping(), true
		}
		c.leaf, c.at = c.leaf+1, 0
	}
	return Mapping{}, false
}

// peek returns what Next would.
func (c Cursor) peek() (Mapping, bool) { return c.Next() }

// counted returns how many mappings name each of so many builds, in a copy.
func (l Mappings) counted(builds int) []int {
	uses := make([]int, builds, builds+1)
	if l.uses != nil {
		copy(uses, l.uses)
		return uses
	}
	for _, m := range l.All() {
		uses[m.Build]++
	}
	return uses
}
