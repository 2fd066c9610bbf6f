package snapshot

import (
	"slices"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
)

func TestInspectSaysWhereBytesComeFrom(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	const size = 16 * blockSize
	_, base := snap(t, s, size, nil, change{block: 0, data: pages(1, 2, 3, 4, 5, 6, 7, 8)})
	m, img := snap(t, s, size, base,
		change{block: 1, data: pages(11)}, change{block: 6, zero: 2}, change{block: 12, data: pages(12, 13, 14)})
	got, err := s.Inspect(bg, m.ID, 8)
	must(t, err)
	if len(got.Images) != 1 || got.Manifest.ID != m.ID {
		t.Fatalf("%+v", got)
	}
	i := got.Images[0]
	if i.ID != img.ID() || i.Size != size || i.Generation != 1 || i.DataBytes != 9*blockSize || i.ZeroBytes != 7*blockSize {
		t.Errorf("%+v", i)
	}
	// 0 | 1 | 2…5 | 12…14
	if i.Mappings != 4 || i.LongestRun != 4*blockSize || i.HeaderBytes == 0 {
		t.Errorf("%d mappings, the longest of %d bytes, a header of %d", i.Mappings, i.LongestRun, i.HeaderBytes)
	}
	byID := map[format.ID]BuildInspection{}
	old, young := 0, 0
	for n, b := range i.Builds {
		byID[b.ID] = b
		if b.ID == base.ID() {
			old = n
		} else {
			young = n
		}
	}
	if b := byID[base.ID()]; b.Generation != 0 || b.StoredBytes != 8*blockSize || b.UsedBytes != 5*blockSize || b.Mappings != 2 {
		t.Errorf("the base's build: %+v", b)
	}
	if b := byID[img.ID()]; b.Generation != 1 || b.StoredBytes != 4*blockSize || b.UsedBytes != 4*blockSize || b.Mappings != 2 {
		t.Errorf("the own build: %+v", b)
	}
	// Of the cell of blocks 0 and 1 each build has a half: the later in the table.
	want := []int{max(old, young), old, old, CellZero, CellZero, CellZero, young, young}
	if !slices.Equal(i.Cells, want) {
		// Block 14 alone is half of the last cell, and data wins over zeros.
		t.Errorf("cells %v, want %v", i.Cells, want)
	}
}

func TestInspectAfterTheParentIsGone(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	first, base := snap(t, s, 8*blockSize, nil, change{block: 0, data: pages(1, 2, 3, 4)})
	m, _ := snap(t, s, 8*blockSize, base, change{block: 5, data: pages(9)})
	gone := base.ID()
	must(t, base.Close())
	must(t, s.Delete(bg, first.ID))
	_, err := s.GC(bg, nil, false)
	must(t, err)
	got, err := s.Inspect(bg, m.ID, 1)
	must(t, err)
	for _, b := range got.Images[0].Builds {
		if b.ID == gone && (b.Generation != -1 || b.UsedBytes != 4*blockSize) {
			t.Errorf("the build of a deleted image: %+v", b)
		}
	}
}

func TestInspectRefuses(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	m, _ := snap(t, s, 8*blockSize, nil, change{block: 0, data: pages(1)})
	for _, cells := range []int{-1, 0, 1<<16 + 1} {
		if _, err := s.Inspect(bg, m.ID, cells); err == nil {
			t.Errorf("%d cells are taken", cells)
		}
	}
	_, err := s.Inspect(bg, format.ID{7}, 1)
	isErr(t, err, ErrNotFound)
}
