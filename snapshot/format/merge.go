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
	// The first mapping of base that is not dealt with.
	leaf, at int
	rows     []Mapping // of that leaf, once it is unpacked
	buf      [maxRows]Mapping
	// rest is what an extent left of the last mapping that it covered.
	rest    Mapping
	hasRest bool

	out  Mappings
	pack packer
	// last is taken, but not packed: what comes may lengthen it.
	last    Mapping
	hasLast bool
}

func newMerger(base *Mappings, builds, extents int) *merger {
	g := &merger{base: base}
	g.out.uses = base.counted(builds)
	// An extent takes one leaf apart, which may become three.
	g.out.entries = make([]entry, 0, len(base.entries)+2*extents+1)
	g.pack = packer{out: &g.out, expect: 2 * minLeaf * extents}
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
	if m, ok := g.next(); ok && m.Start < block {
		g.take(m)
		g.rest, g.hasRest = tail(m, block), true
		m.Length = block - m.Start
		g.add(m)
	}
}

// next returns the first mapping of base that is not dealt with.
func (g *merger) next() (Mapping, bool) {
	if g.leaf < len(g.base.entries) && g.at == g.base.entries[g.leaf].leaf.head().rows() {
		g.move(g.leaf + 1)
	}
	if g.leaf == len(g.base.entries) {
		return Mapping{}, false
	}
	return g.unpacked()[g.at], true
}

// take moves past that mapping, which is not taken over as it is.
func (g *merger) take(m Mapping) {
	g.at++
	g.out.uses[m.Build]--
}

// move goes to the begin of a leaf.
func (g *merger) move(leaf int) { g.leaf, g.at, g.rows = leaf, 0, nil }

// unpacked returns the mappings of the leaf that the merger is at.
func (g *merger) unpacked() []Mapping {
	if g.rows == nil {
		g.rows = g.base.entries[g.leaf].unpack(&g.buf)
	}
	return g.rows
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
		m, ok := g.next()
		if !ok || m.Start >= block {
			return
		}
		g.take(m)
		if m.End() > block {
			g.rest, g.hasRest = tail(m, block), true
			return
		}
	}
}

// share takes over the mappings of base that end at or before a block.
func (g *merger) share(block uint64) {
	if g.leaf == len(g.base.entries) {
		return
	}
	// The last leaf of which some, but perhaps not all, is before the block.
	last := g.base.leafFrom(block, g.leaf)
	if g.leaf < last && g.at > 0 {
		g.restOfLeaf()
	}
	// A few mappings do not become a leaf of their own, but are packed with the
	// next one's. Only one: the shift would go on to the end of the list.
	if g.leaf < last && g.pack.few() {
		g.restOfLeaf()
	}
	if g.leaf < last {
		g.whole(last)
	}
	leaf := g.base.entries[last]
	if end := leaf.search(block); g.at == 0 && end == leaf.leaf.head().rows() {
		g.whole(last + 1)
	} else {
		g.part(end)
	}
}

// whole takes over leaves as they are, from the merger's, of which nothing has
// been taken, up to another.
func (g *merger) whole(end int) {
	g.close()
	g.out.entries = append(g.out.entries, g.base.entries[g.leaf:end]...)
	g.move(end)
}

// part takes over mappings of the merger's leaf, up to another.
func (g *merger) part(end int) {
	for rows := g.unpacked(); g.at < end; g.at++ {
		g.push(rows[g.at])
	}
}

// restOfLeaf takes over the merger's leaf, from where it is.
func (g *merger) restOfLeaf() {
	g.part(len(g.unpacked()))
	g.move(g.leaf + 1)
}

// add takes a new mapping, or lengthens the last one when it continues that
// both in the image and in the storage. Touching in the image alone is not
// enough. Mappings of base that did not join there do not join here, so only
// the last new one can.
func (g *merger) add(m Mapping) {
	if l := &g.last; g.hasLast && l.Build == m.Build && l.End() == m.Start && l.Offset+l.Length == m.Offset {
		l.Length += m.Length
		return
	}
	g.out.uses[m.Build]++
	g.push(m)
}

func (g *merger) push(m Mapping) {
	if g.hasLast {
		g.pack.add(g.last)
	}
	g.last, g.hasLast = m, true
}

// close ends the open leaf.
func (g *merger) close() {
	if g.hasLast {
		g.pack.add(g.last)
		g.hasLast = false
	}
	g.pack.flush()
}

func (g *merger) finish() Mappings {
	g.close()
	for _, u := range g.out.uses {
		g.out.n += u
	}
	g.pack.finish()
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
	l := Mappings{n: h.Mappings.n, uses: keptUses}
	p := newPacker(&l)
	for _, m := range h.Mappings.All() {
		m.Build = renumber[m.Build]
		p.add(m)
	}
	p.finish()
	h.Mappings = l
}
