// Package format is the on-disk header of an image: the complete map from the
// image's blocks to the builds that hold them. README.md in this directory is
// the specification, with byte tables.
//
// The package is a leaf. It imports only the standard library, opens no file
// and may be imported by anything.
//
// Invariants of a valid Header (see [Header.Validate]):
//
//  1. Every block of the image has exactly one meaning: it lies in one mapping
//     (data) or in a gap between mappings (zero). There is no third one: a
//     header is flat, so nothing is "inherited" and reading costs the same in
//     every generation.
//  2. Mappings ascend, do not overlap and lie inside the image.
//  3. Every mapping lies inside its build.
//  4. Every build of the table is used by at least one mapping, so that a
//     build which no image needs can be found by looking at the tables alone.
//  5. Encode is deterministic, and Decode accepts nothing but what Encode
//     writes.
package format

import "fmt"

// BlockSize is the size of a block in bytes: one page of guest memory, one
// block of the guest's file system.
const BlockSize = 4096

// Limits on what a header may hold. They are checked before anything is
// allocated for a count.
const (
	MaxBlocks   = 1 << 36 // 256 TiB in blocks
	MaxBuilds   = 1 << 20
	MaxMappings = 1 << 27
	// MaxEncodedSize bounds the bytes of an encoded header.
	MaxEncodedSize = 1 << 31
)

// Kind is the meaning of a block. The four must never be mixed up.
type Kind uint8

const (
	// Absent: beyond the end of the image. It is the zero value, so that a
	// forgotten Kind is not taken for a meaning that a stored block can have.
	Absent Kind = iota
	// Inherited: not touched by this layer; the layer below says what it is.
	// It never occurs in a Header or an Extent.
	Inherited
	// Zero: all bytes are zero, and no storage is used.
	Zero
	// Data: the bytes are stored in a build.
	Data
)

// String returns the lower-case name of the kind.
func (k Kind) String() string {
	switch k {
	case Absent:
		return "absent"
	case Inherited:
		return "inherited"
	case Zero:
		return "zero"
	case Data:
		return "data"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// A BuildRef names the immutable data that one generation added.
type BuildRef struct {
	ID     ID
	Blocks uint64   // blocks stored in the build, > 0
	Digest [32]byte // SHA-256 over the build's block checksum table
}

// A Mapping says where a run of data blocks is stored. All counts are blocks.
type Mapping struct {
	Start  uint64 // first block of the image
	Length uint64 // blocks, > 0
	Build  uint32 // index in Header.Builds
	Offset uint64 // first block in the build
}

// End returns the block after the last one of the run.
func (m Mapping) End() uint64 { return m.Start + m.Length }

// A Header is the complete map of an image.
type Header struct {
	Size       int64  // bytes, a multiple of BlockSize
	Generation uint64 // 0 for an image without a parent
	Build      ID     // the build that this generation added: the image's own ID
	Parent     ID     // the image that this one was made from; zero in generation 0
	Builds     []BuildRef
	Mappings   Mappings // ascending; blocks in no mapping are zero
}

// A FieldError says which field of a header is wrong, and why.
type FieldError struct {
	Field  string
	Reason string
}

func (e *FieldError) Error() string {
	return fmt.Sprintf("image header: %s: %s", e.Field, e.Reason)
}

func fieldErr(field, reason string, args ...any) error {
	return &FieldError{Field: field, Reason: fmt.Sprintf(reason, args...)}
}

// Blocks returns the size of the image in blocks.
func (h *Header) Blocks() uint64 { return uint64(h.Size) / BlockSize }

// Validate checks every invariant of the package. Its errors are *FieldError.
func (h *Header) Validate() error {
	if err := h.validateFixed(); err != nil {
		return err
	}
	if err := h.validateBuilds(); err != nil {
		return err
	}
	return h.validateMappings()
}

func (h *Header) validateBuilds() error {
	seen := make(map[ID]struct{}, len(h.Builds))
	for i, b := range h.Builds {
		if b.ID.IsZero() {
			return fieldErr(fmt.Sprintf("builds[%d].id", i), "is zero")
		}
		if _, dup := seen[b.ID]; dup {
			// One build under two numbers would break the joining of mappings.
			return fieldErr(fmt.Sprintf("builds[%d].id", i), "%s is listed twice", b.ID)
		}
		seen[b.ID] = struct{}{}
		if b.Blocks == 0 || b.Blocks > MaxBlocks {
			return fieldErr(fmt.Sprintf("builds[%d].blocks", i), "%d is not in 1…%d", b.Blocks, uint64(MaxBlocks))
		}
	}
	return nil
}

func (h *Header) validateFixed() error {
	switch {
	case h.Size < 0 || h.Size%BlockSize != 0:
		return fieldErr("size", "%d is not a multiple of the block size %d", h.Size, BlockSize)
	case h.Blocks() > MaxBlocks:
		return fieldErr("size", "%d blocks are more than the limit %d", h.Blocks(), uint64(MaxBlocks))
	case h.Build.IsZero():
		return fieldErr("build", "is zero")
	case h.Build == h.Parent:
		return fieldErr("parent", "is the image itself")
	case h.Generation == 0 && !h.Parent.IsZero():
		return fieldErr("parent", "generation 0 has no parent")
	case h.Generation > 0 && h.Parent.IsZero():
		return fieldErr("parent", "is missing in generation %d", h.Generation)
	case len(h.Builds) > MaxBuilds:
		return fieldErr("builds", "%d are more than the limit %d", len(h.Builds), MaxBuilds)
	case h.Mappings.Len() > MaxMappings:
		return fieldErr("mappings", "%d are more than the limit %d", h.Mappings.Len(), MaxMappings)
	}
	return nil
}

// validateMappings is one pass without allocation per mapping: it is part of
// every decode.
func (h *Header) validateMappings() error {
	c := mappingCheck{header: h, blocks: h.Blocks(), used: make([]bool, len(h.Builds))}
	for i, m := range h.Mappings.All() {
		if err := c.next(i, m); err != nil {
			return err
		}
	}
	return c.finish()
}

// mappingCheck validates mappings one by one, in order.
type mappingCheck struct {
	header *Header // its size and builds
	blocks uint64
	used   []bool
	end    uint64 // of the mapping before
}

func (c *mappingCheck) next(i int, m Mapping) error {
	if m.Length == 0 || m.Start < c.end || m.Start >= c.blocks || m.Length > c.blocks-m.Start {
		return c.header.rangeError(i, m, c.end)
	}
	if uint64(m.Build) >= uint64(len(c.used)) {
		return fieldErr(fmt.Sprintf("mappings[%d].build", i), "%d is not in the table of %d builds", m.Build, len(c.used))
	}
	if n := c.header.Builds[m.Build].Blocks; m.Offset >= n || m.Length > n-m.Offset {
		return offsetError(i, m, c.header.Builds)
	}
	c.used[m.Build] = true
	c.end = m.Start + m.Length
	return nil
}

// finish is for when all mappings have passed.
func (c *mappingCheck) finish() error {
	for i, u := range c.used {
		if !u {
			return fieldErr(fmt.Sprintf("builds[%d]", i), "no mapping uses it")
		}
	}
	return nil
}

func offsetError(i int, m Mapping, builds []BuildRef) error {
	return fieldErr(fmt.Sprintf("mappings[%d].offset", i), "%d+%d is outside the build's %d blocks", m.Offset, m.Length, builds[m.Build].Blocks)
}

// rangeError words what a mappingCheck found, off its fast path.
func (h *Header) rangeError(i int, m Mapping, end uint64) error {
	switch {
	case m.Length == 0:
		return fieldErr(fmt.Sprintf("mappings[%d].length", i), "is zero")
	case m.Start < end:
		return fieldErr(fmt.Sprintf("mappings[%d].start", i), "%d is before the end of the previous mapping, %d", m.Start, end)
	case m.Start >= h.Blocks():
		return fieldErr(fmt.Sprintf("mappings[%d].start", i), "%d is outside the image of %d blocks", m.Start, h.Blocks())
	}
	return fieldErr(fmt.Sprintf("mappings[%d].length", i), "%d+%d is outside the image of %d blocks", m.Start, m.Length, h.Blocks())
}

// Lookup says what a block is. For Data, m is the whole mapping that holds it
// and run counts the blocks from block to the mapping's end. For Zero, run
// counts the blocks up to the next mapping or the end of the image. Beyond the
// image the kind is Absent and run is 0.
func (h *Header) Lookup(block uint64) (m Mapping, kind Kind, run uint64) {
	if block >= h.Blocks() {
		return Mapping{}, Absent, 0
	}
	m, ok, next := h.Mappings.lookup(block, h.Blocks())
	if !ok {
		return Mapping{}, Zero, next - block
	}
	return m, Data, m.End() - block
}
