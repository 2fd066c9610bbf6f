package format

import (
	"fmt"
	"slices"
)

// An Extent is a run of blocks that a new build changes. All counts are blocks.
type Extent struct {
	Start  uint64 // first block of the image
	Length uint64 // blocks, > 0
	Kind   Kind   // Data or Zero
	Offset uint64 // first block in the new build; Data only
}

// End returns the block after the last one of the run.
func (e Extent) End() uint64 { return e.Start + e.Length }

// New returns the header of an image of generation 0: size bytes of zeros,
// changed by diff, whose data is in build. See Merge for what diff must be.
func New(size int64, build BuildRef, diff []Extent) (*Header, error) {
	return apply(&Header{Size: size}, Header{Size: size, Build: build.ID}, build, diff)
}

// Merge returns the flat header of the image that base becomes when diff is
// applied to it. The extents must ascend, not overlap, lie inside the image
// and be Data (inside build) or Zero; everything else is inherited from base,
// which is not changed. A build of which nothing is visible any more drops out
// of the table.
//
// With k extents and n mappings it costs about k·log n and allocates for the k
// extents, and one index entry for some dozen mappings: the mappings themselves
// are shared with base. Only where a build drops out are all of them written
// anew, because their numbers change.
func Merge(base *Header, build BuildRef, diff []Extent) (*Header, error) {
	return apply(base, Header{
		Size:       base.Size,
		Generation: base.Generation + 1,
		Build:      build.ID,
		Parent:     base.Build,
	}, build, diff)
}

func apply(base *Header, h Header, build BuildRef, diff []Extent) (*Header, error) {
	if err := h.validateFixed(); err != nil {
		return nil, err
	}
	for i := range base.Builds {
		if base.Builds[i].ID == build.ID {
			return nil, fieldErr("build", "%s is already part of the parent", build.ID)
		}
	}
	if err := checkDiff(h.Blocks(), build, diff); err != nil {
		return nil, err
	}
	own := uint32(len(base.Builds))
	h.Builds = append(slices.Clone(base.Builds), build)
	g := newMerger(&base.Mappings, len(h.Builds), len(diff))
	for _, e := range diff {
		g.until(e.Start)
		g.skip(e.End())
		if e.Kind == Data {
			g.add(Mapping{Start: e.Start, Length: e.Length, Build: own, Offset: e.Offset})
		}
	}
	g.until(h.Blocks())
	h.Mappings = g.finish()
	h.dropUnused()
	if len(h.Builds) > MaxBuilds || h.Mappings.Len() > MaxMappings {
		return nil, h.validateFixed()
	}
	return &h, nil
}

// checkDiff checks what Merge demands of the extents.
func checkDiff(blocks uint64, build BuildRef, diff []Extent) error {
	if build.Blocks > MaxBlocks {
		return fieldErr("build.blocks", "%d are more than the limit %d", build.Blocks, uint64(MaxBlocks))
	}
	var end uint64
	for i, e := range diff {
		field := func(name string) string { return fmt.Sprintf("diff[%d].%s", i, name) }
		switch {
		case e.Length == 0:
			return fieldErr(field("length"), "is zero")
		case e.Start < end:
			return fieldErr(field("start"), "%d is before the end of the previous extent, %d", e.Start, end)
		case e.Start >= blocks || e.Length > blocks-e.Start:
			return fieldErr(field("length"), "%d+%d is outside the image of %d blocks", e.Start, e.Length, blocks)
		case e.Kind != Data && e.Kind != Zero:
			return fieldErr(field("kind"), "%v cannot be stored", e.Kind)
		case e.Kind == Data && (e.Offset >= build.Blocks || e.Length > build.Blocks-e.Offset):
			return fieldErr(field("offset"), "%d+%d is outside the build's %d blocks", e.Offset, e.Length, build.Blocks)
		}
		end = e.End()
	}
	return nil
}

// merger makes a list of mappings from another, which it walks along.
type merger struct {
	base *Mappings
	at   Cursor // first mapping of base that is not dealt with
	// rest is what an extent left of the last mapping that it covered.
	rest    Mapping
	hasRest bool

	out  Mappings
	slab []packed // own mappings; those from open on are in no leaf yet
	open int
}

func newMerger(base *Mappings, builds, extents int) *merger {
	g := &merger{base: base, at: Cursor{l: base}}
	g.out.uses = base.counted(builds)
	// An extent ends one leaf, begins another, and may cut a third in two.
	leaves := len(base.leaves) + 2*extents + 1
	g.out.starts = make([]uint64, 0, leaves)
	g.out.leaves = make([][]packed, 0, leaves)
	g.slab = make([]packed, 0, 4*extents+1)
	return g
}

// until takes over what base has before a block, and the part before it of the
// mapping that the block lies in.
func (g *merger) until(block uint64) {
	if g.hasRest {
		if g.rest.End() > block {
			if g.rest.Start < block {
				g.add(Mapping{Start: g.rest.Start, Length: block - g.rest.Start, Build: g.rest.Build, Offset: g.rest.Offset})
				g.rest = tail(g.rest, block)
			}
			return
		}
		g.add(g.rest)
		g.hasRest = false
	}
	g.share(block)
	if m, ok := g.at.peek(); ok && m.Start < block {
		g.take()
		g.rest, g.hasRest = tail(m, block), true
		m.Length = block - m.Start
		g.add(m)
	}
}

// take moves past a mapping that is not taken over as it is.
func (g *merger) take() {
	m, _ := g.at.Next()
	g.out.uses[m.Build]--
}

// skip leaves out what base has before a block.
func (g *merger) skip(block uint64) {
	if g.hasRest {
		if g.rest.End() > block {
			if g.rest.Start < block {
				g.rest = tail(g.rest, block)
			}
			return
		}
		g.hasRest = false
	}
	for {
		m, ok := g.at.peek()
		if !ok || m.Start >= block {
			return
		}
		g.take()
		if m.End() > block {
			g.rest, g.hasRest = tail(m, block), true
			return
		}
	}
}

// share takes over the mappings of base that end at or before a block.
func (g *merger) share(block uint64) {
	if g.at.leaf >= len(g.base.leaves) {
		return
	}
	// The last leaf of which some, but perhaps not all, is before the block.
	last := g.base.leafFrom(block, g.at.leaf)
	if first := g.at.leaf; first < last {
		g.piece(g.base.leaves[first][g.at.at:])
		if whole := first + 1; whole < last {
			g.close(0)
			g.out.starts = append(g.out.starts, g.base.starts[whole:last]...)
			g.out.leaves = append(g.out.leaves, g.base.leaves[whole:last]...)
		}
		g.at.leaf, g.at.at = last, 0
	}
	leaf := g.base.leaves[last]
	end := g.at.at + searchIn(leaf[g.at.at:], block)
	g.piece(leaf[g.at.at:end:end])
	g.at.at = end
}

// piece takes over a part of a leaf.
func (g *merger) piece(ps []packed) {
	if len(ps) < minLeaf {
		for _, p := range ps {
			g.push(p)
		}
		return
	}
	g.close(0)
	g.out.starts = append(g.out.starts, ps[0].start())
	g.out.leaves = append(g.out.leaves, ps)
}

// add takes a new mapping, or lengthens the last one when it continues that
// both in the image and in the storage. Touching in the image alone is not
// enough. Mappings of base that did not join there do not join here, so only
// the last new one can.
func (g *merger) add(m Mapping) {
	if len(g.slab) > g.open {
		l := g.slab[len(g.slab)-1].mapping()
		if l.Build == m.Build && l.End() == m.Start && l.Offset+l.Length == m.Offset {
			l.Length += m.Length
			g.slab[len(g.slab)-1] = l.pack()
			return
		}
	}
	g.out.uses[m.Build]++
	g.push(m.pack())
}

func (g *merger) push(p packed) {
	if len(g.slab) == cap(g.slab) {
		// Closed leaves keep the old slab.
		next := make([]packed, 0, max(cap(g.slab), 2*maxLeaf))
		g.slab, g.open = append(next, g.slab[g.open:]...), 0
	}
	g.slab = append(g.slab, p)
	if len(g.slab)-g.open > maxLeaf {
		g.close(1) // the last one may still be joined
	}
}

// close makes a leaf of the open mappings but the last keep.
func (g *merger) close(keep int) {
	end := len(g.slab) - keep
	if end <= g.open {
		return
	}
	g.out.starts = append(g.out.starts, g.slab[g.open].start())
	g.out.leaves = append(g.out.leaves, g.slab[g.open:end:end])
	g.open = end
}

func (g *merger) finish() Mappings {
	g.close(0)
	for _, u := range g.out.uses {
		g.out.n += u
	}
	g.out.makeIndex()
	return g.out
}

// tail returns the part of m from block on.
func tail(m Mapping, block uint64) Mapping {
	d := block - m.Start
	return Mapping{Start: block, Length: m.Length - d, Build: m.Build, Offset: m.Offset + d}
}

// dropUnused removes builds that no mapping uses from the table.
func (h *Header) dropUnused() {
	uses := h.Mappings.uses
	if !slices.Contains(uses, 0) {
		return
	}
	renumber := make([]uint32, len(h.Builds))
	kept, keptUses := h.Builds[:0], uses[:0]
	first := len(uses) // number of the first build that goes
	for i, n := range uses {
		if n == 0 {
			first = min(first, i)
			continue
		}
		renumber[i] = uint32(len(kept))
		kept, keptUses = append(kept, h.Builds[i]), append(keptUses, n)
	}
	h.Builds = kept
	h.Mappings.uses = keptUses
	if first == len(renumber)-1 {
		return // the last one: no number changes
	}
	ps := make([]packed, 0, h.Mappings.n)
	for _, m := range h.Mappings.All() {
		m.Build = renumber[m.Build]
		ps = append(ps, m.pack())
	}
	h.Mappings = inLeaves(ps)
	h.Mappings.uses = keptUses
}
