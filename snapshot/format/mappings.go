package format

import "iter"

// Mappings is an ordered list of mappings that never changes. It is kept in
// leaves of some dozen mappings, so that a list made from another by changing
// a few places shares all other leaves with it, and so that a look-up searches
// a short array of first blocks and then one leaf.
type Mappings struct {
	starts []uint64 // first block of each leaf
	leaves [][]Mapping
	n      int
	// uses counts, for each build, the mappings that name it; nil: not counted.
	uses []int
}

// Sizes of a leaf, in mappings. A piece shorter than minLeaf is copied rather
// than shared, so that leaves do not crumble as one merge follows another.
const (
	minLeaf = 8
	newLeaf = 32
	maxLeaf = 64
)

// NewMappings returns the list of ms, which it keeps: do not change it after.
// Whether they ascend is for Validate to say.
func NewMappings(ms ...Mapping) Mappings {
	l := Mappings{n: len(ms)}
	if len(ms) == 0 {
		return l
	}
	leaves := (len(ms) + newLeaf - 1) / newLeaf
	l.starts = make([]uint64, 0, leaves)
	l.leaves = make([][]Mapping, 0, leaves)
	for len(ms) > 0 {
		k := min(newLeaf, len(ms))
		l.starts = append(l.starts, ms[0].Start)
		l.leaves = append(l.leaves, ms[:k:k])
		ms = ms[k:]
	}
	return l
}

// Len returns the number of mappings.
func (l Mappings) Len() int { return l.n }

// All returns the mappings in their order, with their numbers.
func (l Mappings) All() iter.Seq2[int, Mapping] {
	return func(yield func(int, Mapping) bool) {
		i := 0
		for _, leaf := range l.leaves {
			for _, m := range leaf {
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
	if l.n != o.n {
		return false
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
	leaf := l.leafOf(block, 0)
	if leaf < 0 {
		return Cursor{l: l}
	}
	return Cursor{l: l, leaf: leaf, at: searchIn(l.leaves[leaf], block)}
}

// leafOf returns the last leaf that begins at or before block, -1 if none
// does. from is a leaf known not to be after it.
func (l *Mappings) leafOf(block uint64, from int) int {
	// By hand, and in a form that compiles to conditional moves: a branch per
	// step is mispredicted half of the time, and this is the hot path of every
	// page fault.
	at, n := from, len(l.starts)-from
	for n > 1 {
		half := n >> 1
		next := at + half
		if l.starts[next] <= block {
			at = next
		}
		n -= half
	}
	if n == 0 || l.starts[at] > block {
		return at - 1
	}
	return at
}

// searchIn returns the index of the first mapping of a leaf that ends after
// block, or its length.
func searchIn(ms []Mapping, block uint64) int {
	at, n := 0, len(ms)
	for n > 0 {
		half := (n + 1) >> 1
		next := at + half
		if m := &ms[next-1]; m.Start+m.Length <= block {
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
	for c.leaf < len(c.l.leaves) {
		leaf := c.l.leaves[c.leaf]
		if c.at < len(leaf) {
			m := leaf[c.at]
			c.at++
			return m, true
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
