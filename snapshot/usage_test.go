package snapshot

import (
	"bytes"
	"io/fs"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// What Usage says is what lies in the directory, and what a snapshot is said to
// keep alone is what its deletion frees.
func TestUsageIsWhatTheFilesTake(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, err := Open(dir, Options{})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	const size = 64 * blockSize
	m0, base := snap(t, s, size, nil, change{block: 0, data: bytes.Repeat([]byte{1}, 9*blockSize)})
	m1, left := snap(t, s, size, base, change{block: 4, data: bytes.Repeat([]byte{2}, 3*blockSize)})
	m2, right := snap(t, s, size, base, change{block: 40, data: bytes.Repeat([]byte{3}, 7*blockSize)})
	m3, empty := snap(t, s, size, left) // nothing of its own but names
	for _, img := range []*Image{base, left, right, empty} {
		must(t, img.Close())
	}
	for _, id := range []format.ID{m0.ID, m3.ID, m1.ID, m2.ID} {
		usage, total, err := s.Usage()
		must(t, err)
		if got := bytesBelow(t, dir); got != total {
			t.Fatalf("%d bytes are in use, there are %d", total, got)
		}
		var own, shared int64
		for _, u := range usage {
			if own += u.Own; u.Manifest.ID == id {
				shared = u.Shared
			}
		}
		if rest := total - own; shared > rest || len(usage) > 1 && rest == 0 || len(usage) == 1 && rest != 0 {
			t.Fatalf("of %d bytes %d belong to one of %d snapshots alone, %d to this and others", total, own, len(usage), shared)
		}
		must(t, s.Delete(bg, id))
		_, err = s.GC(bg, nil, false)
		must(t, err)
		for _, u := range usage {
			if after := bytesBelow(t, dir); u.Manifest.ID == id && total-after != u.Own {
				t.Fatalf("deleting %s freed %d bytes, its own are %d", id, total-after, u.Own)
			}
		}
	}
	if n := bytesBelow(t, dir); n != 0 {
		t.Fatalf("%d bytes are left", n)
	}
}

// bytesBelow adds up the sizes of the files below a directory, as du does with
// --apparent-size, but for the directories.
func bytesBelow(t *testing.T, dir string) (sum int64) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			sum += info.Size()
		}
		return err
	}))
	return sum
}
