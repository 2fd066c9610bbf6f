package format

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// Versions of the encoding. The list is append-only: a number once released
// keeps its meaning for ever.
const (
	// Version1: prefix, table of builds, four columns, checksum.
	Version1 = 1
)

const (
	magic       = "WRENNHDR"
	prefixSize  = 104
	buildSize   = 56
	trailerSize = 4

	columns = 4
)

// Columns in the order in which they are stored.
const (
	colGap = iota
	colLength
	colBuild
	colOffset
)

var columnNames = [columns]string{"mappings.gap", "mappings.length", "mappings.build", "mappings.offset"}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encode validates h and returns its encoding. Equal headers have equal bytes.
func Encode(h *Header) ([]byte, error) {
	if err := h.Validate(); err != nil {
		return nil, err
	}
	cols := encodeColumns(h)
	size := prefixSize + buildSize*len(h.Builds) + trailerSize
	for _, c := range cols {
		size += len(c)
	}
	if size > MaxEncodedSize {
		return nil, fieldErr("length", "%d bytes are more than the limit %d", size, MaxEncodedSize)
	}
	le := binary.LittleEndian
	b := make([]byte, 0, size)
	b = append(b, magic...)
	b = le.AppendUint16(b, Version1)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint32(b, BlockSize)
	b = le.AppendUint64(b, uint64(size))
	b = le.AppendUint64(b, uint64(h.Size))
	b = le.AppendUint64(b, h.Generation)
	b = append(b, h.Build[:]...)
	b = append(b, h.Parent[:]...)
	b = le.AppendUint32(b, uint32(len(h.Builds)))
	b = le.AppendUint32(b, uint32(h.Mappings.Len()))
	for _, c := range cols {
		b = le.AppendUint32(b, uint32(len(c)))
	}
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, crc32.Checksum(b, castagnoli))
	for i := range h.Builds {
		r := &h.Builds[i]
		b = append(b, r.ID[:]...)
		b = le.AppendUint64(b, r.Blocks)
		b = append(b, r.Digest[:]...)
	}
	for _, c := range cols {
		b = append(b, c...)
	}
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

func encodeColumns(h *Header) [columns][]byte {
	var cols [columns][]byte
	for i := range cols {
		cols[i] = make([]byte, 0, h.Mappings.Len()*3/2)
	}
	next := make([]uint64, len(h.Builds)) // where each build's last mapping ended
	var end uint64
	for _, m := range h.Mappings.All() {
		cols[colGap] = binary.AppendUvarint(cols[colGap], m.Start-end)
		cols[colLength] = binary.AppendUvarint(cols[colLength], m.Length-1)
		cols[colBuild] = binary.AppendUvarint(cols[colBuild], uint64(m.Build))
		cols[colOffset] = binary.AppendVarint(cols[colOffset], int64(m.Offset)-int64(next[m.Build]))
		next[m.Build] = m.Offset + m.Length
		end = m.Start + m.Length
	}
	return cols
}

// prefix is the fixed part of an encoded header after it has been checked.
type prefix struct {
	header   Header
	builds   uint32
	mappings uint32
	columns  [columns]uint32
}

// Decode returns the header that b holds. Every error is a *FieldError. It
// trusts no count before the prefix's checksum and the length agree, and
// allocates at most a small multiple of len(b).
func Decode(b []byte) (*Header, error) {
	p, err := decodePrefix(b)
	if err != nil {
		return nil, err
	}
	body := len(b) - trailerSize
	if got, want := crc32.Checksum(b[:body], castagnoli), binary.LittleEndian.Uint32(b[body:]); got != want {
		return nil, fieldErr("checksum", "is %08x, the content has %08x", want, got)
	}
	h := p.header
	h.Builds = decodeBuilds(b[prefixSize:], p.builds)
	at := prefixSize + buildSize*int(p.builds)
	var cols [columns][]byte
	for i, n := range p.columns {
		cols[i] = b[at : at+int(n)]
		at += int(n)
	}
	if err := h.validateBuilds(); err != nil {
		return nil, err
	}
	if h.Mappings, err = decodeMappings(cols, p.mappings, &h); err != nil {
		return nil, err
	}
	return &h, nil
}

func decodePrefix(b []byte) (*prefix, error) {
	le := binary.LittleEndian
	if len(b) < len(magic) || !bytes.Equal(b[:len(magic)], []byte(magic)) {
		return nil, fieldErr("magic", "is not %q: this is no image header", magic)
	}
	if len(b) < prefixSize+trailerSize {
		return nil, fieldErr("length", "%d bytes are less than the shortest header, %d", len(b), prefixSize+trailerSize)
	}
	if v := le.Uint16(b[8:]); v != Version1 {
		return nil, fieldErr("version", "%d is not known, want %d", v, Version1)
	}
	// The prefix has a checksum of its own: a cut file cannot be told from an
	// altered one otherwise, and no count below may be believed before it.
	if got, want := crc32.Checksum(b[:prefixSize-4], castagnoli), le.Uint32(b[prefixSize-4:]); got != want {
		return nil, fieldErr("prefix checksum", "is %08x, the content has %08x", want, got)
	}
	if v := le.Uint16(b[10:]); v != 0 {
		return nil, fieldErr("flags", "%#x is not known", v)
	}
	if v := le.Uint32(b[12:]); v != BlockSize {
		return nil, fieldErr("block size", "%d is not %d", v, BlockSize)
	}
	if n := le.Uint64(b[16:]); n != uint64(len(b)) {
		return nil, fieldErr("length", "the header says %d bytes, there are %d", n, len(b))
	}
	if v := le.Uint32(b[prefixSize-8:]); v != 0 {
		return nil, fieldErr("reserved", "%#x is not zero", v)
	}
	p := &prefix{
		header: Header{
			Size:       int64(le.Uint64(b[24:])),
			Generation: le.Uint64(b[32:]),
			Build:      ID(b[40:56]),
			Parent:     ID(b[56:72]),
		},
		builds:   le.Uint32(b[72:]),
		mappings: le.Uint32(b[76:]),
	}
	for i := range p.columns {
		p.columns[i] = le.Uint32(b[80+4*i:])
	}
	if err := p.header.validateFixed(); err != nil {
		return nil, err
	}
	return p, p.checkCounts(len(b))
}

// checkCounts bounds every count by the bytes that are there.
func (p *prefix) checkCounts(size int) error {
	if p.builds > MaxBuilds {
		return fieldErr("builds", "%d are more than the limit %d", p.builds, MaxBuilds)
	}
	if p.mappings > MaxMappings {
		return fieldErr("mappings", "%d are more than the limit %d", p.mappings, MaxMappings)
	}
	want := uint64(prefixSize) + buildSize*uint64(p.builds) + trailerSize
	for i, n := range p.columns {
		if n < p.mappings { // each value takes at least a byte
			return fieldErr(columnNames[i], "%d bytes cannot hold %d values", n, p.mappings)
		}
		want += uint64(n)
	}
	if want != uint64(size) {
		return fieldErr("length", "the parts take %d bytes, there are %d", want, size)
	}
	return nil
}

func decodeBuilds(b []byte, n uint32) []BuildRef {
	if n == 0 {
		return nil
	}
	out := make([]BuildRef, n)
	for i := range out {
		e := b[i*buildSize:]
		out[i] = BuildRef{ID: ID(e[:16]), Blocks: binary.LittleEndian.Uint64(e[16:]), Digest: [32]byte(e[24:56])}
	}
	return out
}

// decodeMappings decodes the columns and validates the mappings in one pass. h
// has all but its mappings.
func decodeMappings(cols [columns][]byte, n uint32, h *Header) (Mappings, error) {
	builds := h.Builds
	check := mappingCheck{header: h, blocks: h.Blocks(), used: make([]bool, len(builds))}
	if n == 0 {
		for i, c := range cols {
			if len(c) != 0 {
				return Mappings{}, fieldErr(columnNames[i], "%d bytes are left over", len(c))
			}
		}
		return Mappings{}, check.finish()
	}
	l := Mappings{n: int(n), uses: make([]int, len(builds))}
	p := newPacker(&l)
	next := make([]uint64, len(builds))
	r := [columns]reader{{b: cols[0]}, {b: cols[1]}, {b: cols[2]}, {b: cols[3]}}
	for i := range int(n) {
		gap, length, build, offset := r[colGap].next(), r[colLength].next(), r[colBuild].next(), r[colOffset].next()
		if build >= uint64(len(builds)) || gap > MaxBlocks || length >= MaxBlocks {
			return Mappings{}, rowError(&r, i, gap, length, build, len(builds))
		}
		m := Mapping{Start: check.end + gap, Length: length + 1, Build: uint32(build), Offset: next[build] + unzigzag(offset)}
		next[build] = m.Offset + m.Length
		if m.End() > MaxBlocks {
			return Mappings{}, fieldErr(columnNames[colGap], "value %d ends beyond the limit of %d blocks", i, uint64(MaxBlocks))
		}
		if err := check.next(i, m); err != nil {
			if bad := badColumn(&r, i); bad != nil {
				err = bad
			}
			return Mappings{}, err
		}
		l.uses[build]++
		p.add(m)
	}
	for i := range r {
		if r[i].bad {
			return Mappings{}, fieldErr(columnNames[i], "holds a value that is cut or not in its shortest form")
		}
		if len(r[i].b) != r[i].at {
			return Mappings{}, fieldErr(columnNames[i], "%d bytes are left over", len(r[i].b)-r[i].at)
		}
	}
	if err := check.finish(); err != nil {
		return Mappings{}, err
	}
	p.finish()
	return l, nil
}

// badColumn is the fault behind a row that makes no sense, if a column has one.
func badColumn(r *[columns]reader, i int) error {
	for c := range r {
		if r[c].bad {
			return fieldErr(columnNames[c], "value %d is cut or not in its shortest form", i)
		}
	}
	return nil
}

func rowError(r *[columns]reader, i int, gap, length, build uint64, builds int) error {
	if err := badColumn(r, i); err != nil {
		return err
	}
	switch {
	case gap > MaxBlocks:
		return fieldErr(columnNames[colGap], "value %d is %d, the limit is %d", i, gap, uint64(MaxBlocks))
	case length >= MaxBlocks:
		return fieldErr(columnNames[colLength], "value %d is %d, the limit is %d", i, length, uint64(MaxBlocks))
	}
	return fieldErr(columnNames[colBuild], "value %d is %d, the table has %d builds", i, build, builds)
}

// reader takes unsigned varints from a column. A fault is kept in bad, so that
// the loop over millions of rows tests it once.
type reader struct {
	b   []byte
	at  int
	bad bool
}

func (r *reader) next() uint64 {
	if r.at < len(r.b) {
		if c := r.b[r.at]; c < 0x80 {
			r.at++
			return uint64(c)
		}
	}
	return r.long()
}

func (r *reader) long() uint64 {
	v, n := binary.Uvarint(r.b[r.at:])
	// A last byte of zero is a longer spelling of a shorter number.
	if n <= 0 || (n > 1 && r.b[r.at+n-1] == 0) {
		r.bad = true
		r.at = len(r.b)
		return 0
	}
	r.at += n
	return v
}

func unzigzag(v uint64) uint64 { return v>>1 ^ -(v & 1) }
