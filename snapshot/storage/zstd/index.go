package zstd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
)

const (
	skippable = 0x184D2A5E
	tag       = "wrenn-zf"
	version   = 1

	headLen  = 32 // before the entries
	entryLen = 8
	sumLen   = 4

	minFrame  = 4 << 10
	maxFrame  = 1 << 20
	maxFrames = 1 << 18
	maxIndex  = headLen + entryLen*maxFrames + sumLen
	// slack is more than a frame grows by when it cannot be compressed.
	slack = 1 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// entry describes a frame as it is stored.
type entry struct {
	off int64 // in the object
	len uint32
	crc uint32
}

// index describes an object. One without frames of ours is plain.
type index struct {
	plain   bool
	frame   int64
	size    int64
	entries []entry
	sum     uint32 // tells contents apart
}

// frameLen is how many bytes of content frame i has.
func (x *index) frameLen(i int) int64 {
	return min(x.frame, x.size-int64(i)*x.frame)
}

// end is the length of the object.
func (x *index) end() int64 {
	if len(x.entries) == 0 {
		return int64(headLen + sumLen)
	}
	last := x.entries[len(x.entries)-1]
	return last.off + int64(last.len)
}

func indexLen(frames int) int { return headLen + entryLen*frames + sumLen }

func framesOf(size, frame int64) int64 { return (size + frame - 1) / frame }

func (x *index) encode() []byte {
	n := len(x.entries)
	b := make([]byte, 0, indexLen(n))
	b = binary.LittleEndian.AppendUint32(b, skippable)
	b = binary.LittleEndian.AppendUint32(b, uint32(indexLen(n)-8))
	b = append(b, tag...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, uint32(x.frame))
	b = binary.LittleEndian.AppendUint64(b, uint64(x.size))
	for _, e := range x.entries {
		b = binary.LittleEndian.AppendUint32(b, e.len)
		b = binary.LittleEndian.AppendUint32(b, e.crc)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// ours tells whether an object that begins with b is one of this package.
func ours(b []byte) bool {
	return len(b) >= 16 && binary.LittleEndian.Uint32(b) == skippable && string(b[8:16]) == tag
}

// lengthOf gives how many bytes the index at the beginning of b has. b is ours.
func lengthOf(b []byte) (int, error) {
	n := int64(binary.LittleEndian.Uint32(b[4:])) + 8
	if n < headLen+sumLen || n > maxIndex || (n-headLen-sumLen)%entryLen != 0 {
		return 0, fmt.Errorf("index: its length is %d", n)
	}
	return int(n), nil
}

// decode reads an index of which b holds all.
func decode(b []byte) (*index, error) {
	body, sum := b[:len(b)-sumLen], binary.LittleEndian.Uint32(b[len(b)-sumLen:])
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return nil, fmt.Errorf("index: its checksum is %08x, its bytes have %08x", sum, got)
	}
	if v := binary.LittleEndian.Uint32(b[16:]); v != version {
		return nil, fmt.Errorf("index: version is %d, this program reads %d", v, version)
	}
	frame := binary.LittleEndian.Uint32(b[20:])
	if frame < minFrame || frame > maxFrame || bits.OnesCount32(frame) != 1 {
		return nil, fmt.Errorf("index: a frame has %d bytes of content", frame)
	}
	size := binary.LittleEndian.Uint64(b[24:])
	n := (len(b) - headLen - sumLen) / entryLen
	if size > uint64(frame)*maxFrames || framesOf(int64(size), int64(frame)) != int64(n) {
		return nil, fmt.Errorf("index: %d bytes of content in %d frames of %d", size, n, frame)
	}
	x := &index{frame: int64(frame), size: int64(size), entries: make([]entry, n), sum: sum}
	off := int64(len(b))
	for i := range x.entries {
		at := b[headLen+entryLen*i:]
		e := entry{off: off, len: binary.LittleEndian.Uint32(at), crc: binary.LittleEndian.Uint32(at[4:])}
		if e.len == 0 || int64(e.len) > x.frame+slack {
			return nil, fmt.Errorf("index: frame %d has %d bytes", i, e.len)
		}
		x.entries[i] = e
		off += int64(e.len)
	}
	return x, nil
}

var errCut = errors.New("the object is cut off")
