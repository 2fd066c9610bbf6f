//go:build linux

package uffd

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// Bounds on what a VMM says when it hands its userfaultfd over.
const (
	maxRegions       = 64
	maxHandoverBytes = 64 << 10
	maxHandoverParts = 64
	// maxUserAddr is beyond every address of user space, with 5 levels too.
	maxUserAddr = 1 << 56
)

// Region is a part of guest memory: where it lies in the VMM, and which part
// of the image it holds. All are bytes and multiples of 4096.
type Region struct {
	Addr   uint64 `json:"addr"`
	Size   int64  `json:"size"`
	Offset int64  `json:"offset"`
}

func (r Region) end() int64 { return r.Offset + r.Size }

// wireRegion is a region as Firecracker sends it. page_size_kib is an old name
// of page_size and holds bytes all the same.
type wireRegion struct {
	Base     *uint64 `json:"base_host_virt_addr"`
	Size     *uint64 `json:"size"`
	Offset   *uint64 `json:"offset"`
	PageSize *uint64 `json:"page_size"`
	PageKiB  *uint64 `json:"page_size_kib"`
}

// ParseRegions reads the JSON that a VMM hands over with its userfaultfd:
//
//	[{"base_host_virt_addr":…, "size":…, "offset":…, "page_size":4096}, …]
//
// The regions must hold the whole image of size bytes, each byte once, and not
// overlap in the VMM. They come back in the order of their offsets. The sender
// is not trusted: every error names the region and the field.
func ParseRegions(b []byte, size int64) ([]Region, error) {
	if len(b) > maxHandoverBytes {
		return nil, fmt.Errorf("hand-over has %d bytes, %d allowed", len(b), maxHandoverBytes)
	}
	var wire []wireRegion
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&wire); err != nil {
		return nil, fmt.Errorf("hand-over is no list of regions: %w", err)
	}
	if rest := bytes.TrimSpace(b[d.InputOffset():]); len(rest) > 0 {
		return nil, fmt.Errorf("hand-over has %d bytes after the list of regions", len(rest))
	}
	if len(wire) == 0 || len(wire) > maxRegions {
		return nil, fmt.Errorf("hand-over has %d regions, 1 to %d allowed", len(wire), maxRegions)
	}
	regions := make([]Region, len(wire))
	for i, w := range wire {
		r, err := w.region(size)
		if err != nil {
			return nil, fmt.Errorf("region %d: %w", i, err)
		}
		regions[i] = r
	}
	return checkRegions(regions, size)
}

func (w wireRegion) region(size int64) (Region, error) {
	if w.Base == nil || w.Size == nil || w.Offset == nil {
		return Region{}, errors.New("base_host_virt_addr, size or offset is missing")
	}
	for name, p := range map[string]*uint64{"page_size": w.PageSize, "page_size_kib": w.PageKiB} {
		if p != nil && *p != pageSize {
			return Region{}, fmt.Errorf("%s is %d, only %d is supported: no huge pages", name, *p, pageSize)
		}
	}
	if *w.Size > uint64(size) || *w.Offset > uint64(size) {
		return Region{}, fmt.Errorf("size %d at offset %d is outside the image of %d bytes", *w.Size, *w.Offset, size)
	}
	return Region{Addr: *w.Base, Size: int64(*w.Size), Offset: int64(*w.Offset)}, nil
}

// checkRegions gives regions in the order of their offsets, having made sure
// that they cover an image of size bytes exactly and do not overlap in memory.
func checkRegions(regions []Region, size int64) ([]Region, error) {
	if len(regions) == 0 || len(regions) > maxRegions {
		return nil, fmt.Errorf("%d regions, 1 to %d allowed", len(regions), maxRegions)
	}
	for i, r := range regions {
		switch {
		case r.Size <= 0 || r.Size%pageSize != 0 || r.Size > size:
			return nil, fmt.Errorf("region %d: size %d is no positive multiple of %d within the image", i, r.Size, pageSize)
		case r.Offset < 0 || r.Offset%pageSize != 0 || r.Offset > size-r.Size:
			return nil, fmt.Errorf("region %d: offset %d is no multiple of %d within the image", i, r.Offset, pageSize)
		case r.Addr == 0 || r.Addr%pageSize != 0 || r.Addr >= maxUserAddr || uint64(r.Size) > maxUserAddr-r.Addr:
			return nil, fmt.Errorf("region %d: address %#x is no page of user space", i, r.Addr)
		}
	}
	regions = slices.Clone(regions)
	slices.SortFunc(regions, func(a, b Region) int { return cmp.Compare(a.Addr, b.Addr) })
	for i := 1; i < len(regions); i++ {
		if a, b := regions[i-1], regions[i]; a.Addr+uint64(a.Size) > b.Addr {
			return nil, fmt.Errorf("regions at %#x and %#x overlap in memory", a.Addr, b.Addr)
		}
	}
	slices.SortFunc(regions, func(a, b Region) int { return cmp.Compare(a.Offset, b.Offset) })
	var next int64
	for _, r := range regions {
		if r.Offset != next {
			return nil, fmt.Errorf("region at offset %d: the one before it ends at %d", r.Offset, next)
		}
		next = r.end()
	}
	if next != size {
		return nil, fmt.Errorf("regions hold %d bytes, the image has %d", next, size)
	}
	return regions, nil
}
