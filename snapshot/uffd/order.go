//go:build linux

package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Order is which clusters of an image a VM needed when it started, the first
// one first: what Server.Touched gives and Server.Prefetch takes. It is a hint;
// one that is lost or of another image costs time, nothing else.
type Order struct {
	Image       format.ID
	ClusterSize int // bytes
	Clusters    []uint32
}

// MaxOrder bounds an Order: 4 GiB of clusters of 64 KiB.
const MaxOrder = 1 << 16

// An encoded order, little-endian: magic, image (16), cluster size (4), count
// (4), clusters (4 each), CRC32C of all before it (4).
const (
	orderMagic = "WRNORD01"
	orderHead  = 8 + 16 + 4 + 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encode gives the order's stored form; clusters beyond MaxOrder are left out.
func (o Order) Encode() []byte {
	n := min(len(o.Clusters), MaxOrder)
	b := append(make([]byte, 0, orderHead+4*n+4), orderMagic...)
	b = append(b, o.Image[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(o.ClusterSize))
	b = binary.LittleEndian.AppendUint32(b, uint32(n))
	for _, c := range o.Clusters[:n] {
		b = binary.LittleEndian.AppendUint32(b, c)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// DecodeOrder is the reverse of Encode. What was cut or changed is an error.
func DecodeOrder(b []byte) (Order, error) {
	if len(b) < orderHead+4 || string(b[:8]) != orderMagic {
		return Order{}, errors.New("uffd: order: magic is wrong")
	}
	n := int64(binary.LittleEndian.Uint32(b[28:]))
	if n > MaxOrder || int64(len(b)) != orderHead+4*n+4 {
		return Order{}, fmt.Errorf("uffd: order: count %d does not fit %d bytes", n, len(b))
	}
	body := b[:len(b)-4]
	if sum := crc32.Checksum(body, castagnoli); sum != binary.LittleEndian.Uint32(b[len(body):]) {
		return Order{}, errors.New("uffd: order: checksum does not match")
	}
	o := Order{ClusterSize: int(binary.LittleEndian.Uint32(b[24:])), Clusters: make([]uint32, n)}
	copy(o.Image[:], b[8:])
	for i := range o.Clusters {
		o.Clusters[i] = binary.LittleEndian.Uint32(b[orderHead+4*i:])
	}
	return o, nil
}

// Used gives those of the clusters that an attachment has pages of in its page
// tables: it used them, whether it faulted on them or found them there. The
// kernel maps the neighbours of a page with it, in aligned windows of 64 KiB,
// so this is exact to DefaultClusterSize where guest memory is aligned to it, as
// QEMU's is; elsewhere a neighbour may be among them. In copy mode a cluster that was put ahead
// cannot be told from a used one, and it is an error.
func (s *Server) Used(id string, clusters []uint32) ([]uint32, error) {
	v, err := s.find(id)
	if err != nil {
		return nil, err
	}
	if v.pages != nil {
		return nil, errors.New("uffd: what a VM in copy mode used cannot be told")
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", v.rec.PID))
	if err == nil {
		defer f.Close()
	}
	if v.proc.exited() { // what was opened may be another's
		return nil, fmt.Errorf("uffd: process %d: %w", v.rec.PID, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("uffd: open page map of process %d: %w", v.rec.PID, err)
	}
	const entry = 8
	size := int64(s.o.ClusterSize)
	buf := make([]byte, size/pageSize*entry)
	var used []uint32
	for _, c := range clusters {
		off := int64(c) * size
		if off >= v.src.Size() {
			return nil, fmt.Errorf("uffd: cluster %d is beyond the image", c)
		}
		b := buf[:min(size, v.src.Size()-off)/pageSize*entry]
		if _, err := f.ReadAt(b, (int64(v.rec.Addr)+off)/pageSize*entry); err != nil {
			return nil, fmt.Errorf("uffd: read page map of process %d: %w", v.rec.PID, err)
		}
		for ; len(b) > 0; b = b[entry:] {
			if binary.NativeEndian.Uint64(b)>>62 != 0 { // present or swapped
				used = append(used, c)
				break
			}
		}
	}
	return used, nil
}

// ClusterSize is Options.ClusterSize, or its default.
func (s *Server) ClusterSize() int { return s.o.ClusterSize }
