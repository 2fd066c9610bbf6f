package format

import (
	"iter"
	"slices"
)

// Mappings is an ordered list of mappings that never changes. It is kept in
// leaves of about a dozen mappings, so that a list made from another by changing
// a few places shares all other leaves with it. A look-up goes from an index of
// equal parts of the image to an entry and from there to the leaf, which is one
// line of the processor's cache: index and entries are a twentieth of a list
// without packing, and stay in the nearer caches.
type Mappings struct {
	entries []entry
	n       int
	// uses counts, for each build, the mappings that name it; nil: not counted.
	uses []int

	// index[i] is the last leaf that begins at or before block i<<shift, or 0.
	// One entry more than there are parts closes it.
	index []uint32
	shift uint8

	// raw holds a list that no valid header has, for Validate to say why.
	raw []Mapping
}

// An entry is a leaf, and its first block.
type entry struct {
	start uint64
	leaf  *leaf
}

// minLeaf is how many mappings are packed anew rather than left in a leaf of
// their own, so that leaves do not crumble as one merge follows another.
const minLeaf = 8

// fits reports whether a leaf keeps m whole: Validate refuses all others.
func (m Mapping) fits() bool {
	return m.Start < MaxBlocks && m.Length-1 < MaxBlocks && m.Build < MaxBuilds && m.Offset < MaxBlocks
}

// NewMappings returns the list of ms. Whether they ascend is for Validate to
// say.
func NewMappings(ms ...Mapping) Mappings {
	for i, m := range ms {
		if !m.fits() || i > 0 && m.Start <= ms[i-1].Start {
			return Mappings{n: len(ms), raw: slices.Clone(ms)}
		}
	}
	l := Mappings{n: len(ms)}
	p := newPacker(&l)
	p.addAll(ms)
	p.finish()
	return l
}

// finish ends the list.
func (p *packer) finish() {
	p.flush()
	p.out.makeIndex()
}

// makeIndex divides the blocks up to the last leaf into more parts than there
// are leaves, but not more than twice as many. Where mappings lie in heaps a
// part has many of them, and the search between two entries of the index is a
// binary one.
func (l *Mappings) makeIndex() {
	if len(l.entries) == 0 {
		return
	}
	last := l.entries[len(l.entries)-1].start
	l.shift = 0
	for last>>l.shift >= 2*uint64(len(l.entries)) {
		l.shift++
	}
	l.index = make([]uint32, last>>l.shift+2)
	leaf := 0
	for i := range l.index {
		for leaf+1 < len(l.entries) && l.entries[leaf+1].start <= uint64(i)<<l.shift {
			leaf++
		}
		l.index[i] = uint32(leaf)
	}
	l.index[len(l.index)-1] = uint32(len(l.entries) - 1)
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
		var rows [maxRows]Mapping
		for _, e := range l.entries {
			for _, m := range e.unpack(&rows) {
				if !yield(i, m) {
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
	i := l.find(block)
	if i < 0 {
		return Cursor{l: l}
	}
	return Cursor{l: l, leaf: i, at: l.entries[i].search(block)}
}

// lookup returns the mapping that holds a block. Where there is none it returns
// false, and the first block of the next mapping, or limit.
func (l *Mappings) lookup(block, limit uint64) (m Mapping, ok bool, next uint64) {
	i := l.find(block)
	if i < 0 {
		if len(l.entries) > 0 {
			limit = l.entries[0].start
		}
		return Mapping{}, false, limit
	}
	e := &l.entries[i]
	h := e.leaf.head()
	var row int
	if h.near() {
		// As below, but inlined: fewer instructions let the processor begin the
		// next look-up while this one waits for its leaf.
		row = e.leaf.lastNear(block - e.start)
		m = h.unpack(e.start+uint64(e.leaf[uint(row)%maxRows]), e.leaf.bits(maxRows*8+uint(row)*h.row()))
	} else {
		row = e.last(h, block)
		m = e.mapping(h, row)
	}
	if m.End() > block {
		return m, true, 0
	}
	switch {
	case row+1 < h.rows():
		limit = e.at(h, row+1)
	case i+1 < len(l.entries):
		limit = l.entries[i+1].start
	}
	return Mapping{}, false, limit
}

// find returns the last leaf that begins at or before block, -1 if none does.
func (l *Mappings) find(block uint64) int {
	if len(l.entries) == 0 || block < l.entries[0].start {
		return -1
	}
	part := min(block>>(l.shift&63), uint64(len(l.index)-2))
	from, to := uint(l.index[part]), uint(l.index[part+1])
	if to-from > 2 || from+2 >= uint(len(l.entries)) {
		return int(from) + lastFrom(l.entries[from:to+1], block)
	}
	// Where mappings are spread evenly that is never so. Two comparisons that
	// compile to conditional moves are cheaper than a loop, of which nobody can
	// foretell the length.
	at := from
	if l.entries[from+1].start <= block {
		at = from + 1
	}
	if l.entries[from+2].start <= block {
		at = from + 2
	}
	return int(at)
}

// leafFrom is find for a block that is not before leaf from, by searching.
func (l *Mappings) leafFrom(block uint64, from int) int {
	return from + lastFrom(l.entries[from:], block)
}

// lastFrom returns the last of the ascending entries that starts at or before
// block; the first one does.
func lastFrom(entries []entry, block uint64) int {
	// By hand, and in a form that compiles to conditional moves: a branch per
	// step is mispredicted half of the time, and this is the hot path of every
	// page fault.
	at := 0
	for n := len(entries); n > 1; {
		half := n >> 1
		next := at + half
		if entries[next].start <= block {
			at = next
		}
		n -= half
	}
	return at
}

// Cursor is a place in Mappings. It is a small value; copying it is a bookmark.
type Cursor struct {
	l        *Mappings
	leaf, at int
}

// Next returns the mapping at the cursor and moves on; false at the end.
func (c *Cursor) Next() (Mapping, bool) {
	for c.leaf < len(c.l.entries) {
		e := c.l.entries[c.leaf]
		if h := e.leaf.head(); c.at < h.rows() {
			c.at++
			return e.mapping(h, c.at-1), true
		}
		c.leaf, c.at = c.leaf+1, 0
	}
	return Mapping{}, false
}

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
