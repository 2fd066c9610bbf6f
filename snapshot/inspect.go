package snapshot

import (
	"context"
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Inspection says what a snapshot is made of.
type Inspection struct {
	Manifest Manifest          `json:"manifest"`
	Images   []ImageInspection `json:"images"`
}

// ImageInspection says where an image's bytes come from.
type ImageInspection struct {
	Part       string    `json:"part"` // "memory" or "disk"
	ID         format.ID `json:"id"`
	Size       int64     `json:"size_bytes"`
	Generation uint64    `json:"generation"`
	// DataBytes and ZeroBytes are what the image's blocks mean; together
	// they are its size.
	DataBytes int64 `json:"data_bytes"`
	ZeroBytes int64 `json:"zero_bytes"`
	// Mappings are the runs of contiguous storage: what a read of the whole
	// image has to jump between.
	Mappings    int   `json:"mappings"`
	LongestRun  int64 `json:"longest_run_bytes"`
	HeaderBytes int64 `json:"header_bytes"`
	// Builds are the generations that the image still reads from, oldest
	// first where that is known.
	Builds []BuildInspection `json:"builds"`
	// Cells divide the image into equal parts. A cell names what most of its
	// bytes come from: the number of a build, or CellZero.
	Cells []int `json:"cells"`
}

// CellZero marks a part of an image that is mostly zeros.
const CellZero = -1

// BuildInspection is one build's share of an image.
type BuildInspection struct {
	ID format.ID `json:"id"`
	// Generation that added it, and -1 where its image has been deleted and
	// only the blocks are kept.
	Generation int64 `json:"generation"`
	// StoredBytes are in its file, UsedBytes of them are read by this image.
	StoredBytes int64 `json:"stored_bytes"`
	UsedBytes   int64 `json:"used_bytes"`
	Mappings    int   `json:"mappings"`
}

// Inspect reads the maps of a snapshot, not its data. cells is how many parts
// the picture of each image has, 1 to 65,536.
func (s *Store) Inspect(ctx context.Context, id format.ID, cells int) (Inspection, error) {
	if cells < 1 || cells > 1<<16 {
		return Inspection{}, fmt.Errorf("inspect: cells: %d is not in 1…65536", cells)
	}
	m, err := s.Manifest(id)
	if err != nil {
		return Inspection{}, err
	}
	out := Inspection{Manifest: m}
	for _, part := range []struct {
		name string
		ref  ImageRef
	}{{"memory", m.Memory}, {"disk", m.Disk}} {
		if part.ref.ID.IsZero() {
			continue
		}
		img, err := s.inspectImage(ctx, part.ref.ID, cells)
		if err != nil {
			return Inspection{}, fmt.Errorf("inspect the %s of snapshot %s: %w", part.name, id, err)
		}
		img.Part = part.name
		out.Images = append(out.Images, img)
	}
	return out, nil
}

func (s *Store) inspectImage(ctx context.Context, id format.ID, cells int) (ImageInspection, error) {
	h, raw, err := s.readHeader(id)
	if err != nil {
		return ImageInspection{}, err
	}
	out := ImageInspection{
		ID: id, Size: h.Size, Generation: h.Generation, Mappings: h.Mappings.Len(), HeaderBytes: int64(len(raw)),
		Builds: make([]BuildInspection, len(h.Builds)), Cells: cellsOf(h, cells),
	}
	for i, b := range h.Builds {
		if err := ctx.Err(); err != nil {
			return ImageInspection{}, err
		}
		g, err := s.generationOf(h, b.ID)
		if err != nil {
			return ImageInspection{}, err
		}
		out.Builds[i] = BuildInspection{ID: b.ID, Generation: g, StoredBytes: int64(b.Blocks) * blockSize}
	}
	for _, m := range h.Mappings.All() {
		n := int64(m.Length) * blockSize
		b := &out.Builds[m.Build]
		b.UsedBytes += n
		b.Mappings++
		out.DataBytes += n
		out.LongestRun = max(out.LongestRun, n)
	}
	out.ZeroBytes = out.Size - out.DataBytes
	return out, nil
}

// generationOf asks the image that added a build. Where that image is gone its
// blocks may still be there, without the header that knew.
func (s *Store) generationOf(h *format.Header, build format.ID) (int64, error) {
	if build == h.Build {
		return int64(h.Generation), nil
	}
	own, _, err := s.readHeader(build)
	if errors.Is(err, ErrNotFound) {
		return -1, nil
	}
	if err != nil {
		return 0, err
	}
	return int64(own.Generation), nil
}

// cellsOf divides the image and finds what most of each part comes from. Two
// parts look at the same mapping only where it reaches into both.
func cellsOf(h *format.Header, cells int) []int {
	blocks := h.Blocks()
	cells = int(min(uint64(cells), blocks))
	out := make([]int, cells)
	for c := range out {
		from, to := blocks*uint64(c)/uint64(cells), blocks*uint64(c+1)/uint64(cells)
		share := map[int]uint64{CellZero: to - from}
		for at := h.Mappings.Seek(from); ; {
			m, ok := at.Next()
			if !ok || m.Start >= to {
				break
			}
			n := min(m.End(), to) - max(m.Start, from)
			share[int(m.Build)] += n
			share[CellZero] -= n
		}
		out[c] = CellZero
		for b, n := range share {
			// Of equals the later build, so that the answer is always the same.
			if n > share[out[c]] || n == share[out[c]] && b > out[c] {
				out[c] = b
			}
		}
	}
	return out
}
