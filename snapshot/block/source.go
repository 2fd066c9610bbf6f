// Package block has the two things that a running sandbox reads from: a
// Source, which is an image that does not change, and an Overlay, the private
// copy-on-write layer of a disk.
//
// The package imports format and storage and may be imported by everything
// above them.
//
// Invariants of the Overlay:
//
//  1. A block is marked in the map only after its data has been written, so
//     the death of the process at any point leaves the old or the new content.
//  2. A write that was acknowledged survives the death of the process. A write
//     that a successful Flush followed also survives the loss of the machine.
//  3. After the loss of the machine a block holds what it held at the last
//     Flush or what was written to it since, never anything else.
//  4. A zeroed block is zero, whatever lies below it; it is not "inherited".
//  5. A write that fails (a full disk) is an error and changes no block that it
//     did not cover.
package block

import "git.omukk.dev/wrenn/sandbox/snapshot/format"

// BlockSize is the unit of a Source, in bytes.
const BlockSize = format.BlockSize

// Source is an image that can be read. It does not change, and its methods are
// safe for concurrent use.
type Source interface {
	// Size returns the length in bytes, a multiple of BlockSize.
	Size() int64
	// ReadAt reads at any alignment, as io.ReaderAt demands: fewer bytes than
	// asked for come with an error, which is io.EOF at the end of the image.
	// Bytes are verified before they are returned, where the source can.
	ReadAt(p []byte, off int64) (int, error)
	// Span returns what is at off, a multiple of BlockSize, and for how many
	// bytes it is so: Zero (reads as zeros) or Data, for n bytes that are a
	// multiple of BlockSize. Two spans in a row may be of the same kind. At or
	// beyond the end it returns Absent and 0.
	Span(off int64) (kind format.Kind, n int64)
}

// Zeros is a Source of a given size in bytes that holds nothing but zeros.
type Zeros int64

var _ Source = Zeros(0)
