// Package zstd keeps objects compressed: a decorator of [storage.Objects] whose
// content is cut into frames of one size, each compressed by itself, so that a
// read of some bytes fetches and decompresses the frames around them alone.
//
// # Layout
//
// An object begins with an index, which is a skippable frame, so that any zstd
// program decompresses the whole object as it is. Numbers are little-endian.
//
//	 0  4  0x184D2A5E, a skippable frame
//	 4  4  bytes that follow in this frame: 28 + 8·n
//	 8  8  "wrenn-zf"
//	16  4  version: 1
//	20  4  F, bytes of content in a frame: a power of two, 4 KiB to 1 MiB
//	24  8  S, bytes of content: at most 2^18 frames of them, n = ⌈S/F⌉
//	32 8n  for each frame: 4 its compressed length, 4 the CRC-32C of that
//	 …  4  CRC-32C of all before it
//
// The frames follow without gaps, to the end. Each has F bytes of content, the
// last one the rest, and a checksum of its own.
//
// # Invariants
//
//  1. No byte of a frame is given out before the frame's checksums held. What
//     does not fit is an error that names the object and the frame.
//  2. No memory is taken for a length or count before it is bounded.
//  3. A read sees one content, also where the object is replaced meanwhile.
//  4. Objects that were stored without this package are read as they are, so
//     that it can be put around a store that is in use.
package zstd
