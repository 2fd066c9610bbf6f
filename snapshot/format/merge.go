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
// With k extents and n mappings it costs k binary searches and one copy of the
// n mappings.
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
	// An extent adds at most itself and the second half of a mapping it cuts.
	out := make([]Mapping, 0, len(base.Mappings)+2*len(diff))
	ms := base.Mappings
	next := 0 // first mapping of base that is not fully in out
	var cut uint64
	for _, e := range diff {
		out, next, cut = copyUntil(out, ms, next, cut, e.Start)
		if e.Kind == Data {
			out = join(out, Mapping{Start: e.Start, Length: e.Length, Build: own, Offset: e.Offset})
		}
		next = searchFrom(ms, next, e.End())
		cut = e.End()
	}
	out, _, _ = copyUntil(out, ms, next, cut, h.Blocks())
	h.Mappings = out
	h.dropUnused()
	if len(h.Builds) > MaxBuilds || len(h.Mappings) > MaxMappings {
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

// copyUntil appends to out what ms[next:] holds in [from, until) and returns
// the first mapping that reaches beyond until. The first mapping may begin
// before from, where an extent covers it.
func copyUntil(out, ms []Mapping, next int, from, until uint64) ([]Mapping, int, uint64) {
	if next < len(ms) && ms[next].Start < from {
		m := tail(ms[next], from)
		if m.Start >= until {
			return out, next, from
		}
		if m.End() > until {
			m.Length = until - m.Start
			return join(out, m), next, until
		}
		out = join(out, m)
		next++
	}
	stop := searchFrom(ms, next, until)
	if next < stop {
		// Only the seam can join: base's own neighbours were joined before.
		out = join(out, ms[next])
		out = append(out, ms[next+1:stop]...)
	}
	if stop < len(ms) && ms[stop].Start < until {
		m := ms[stop]
		m.Length = until - m.Start
		out = join(out, m)
	}
	return out, stop, until
}

// tail returns the part of m from block on.
func tail(m Mapping, block uint64) Mapping {
	d := block - m.Start
	return Mapping{Start: block, Length: m.Length - d, Build: m.Build, Offset: m.Offset + d}
}

// join appends m, or lengthens the last mapping when m continues it both in
// the image and in the storage. Touching in the image alone is not enough.
func join(out []Mapping, m Mapping) []Mapping {
	if n := len(out); n > 0 {
		l := &out[n-1]
		if l.Build == m.Build && l.End() == m.Start && l.Offset+l.Length == m.Offset {
			l.Length += m.Length
			return out
		}
	}
	return append(out, m)
}

// dropUnused removes builds that no mapping uses from the table.
func (h *Header) dropUnused() {
	used := make([]bool, len(h.Builds))
	for i := range h.Mappings {
		used[h.Mappings[i].Build] = true
	}
	if !slices.Contains(used, false) {
		return
	}
	renumber := make([]uint32, len(h.Builds))
	kept := h.Builds[:0]
	for i, u := range used {
		if u {
			renumber[i] = uint32(len(kept))
			kept = append(kept, h.Builds[i])
		}
	}
	h.Builds = kept
	for i := range h.Mappings {
		h.Mappings[i].Build = renumber[h.Mappings[i].Build]
	}
}
