package snapshot

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// The whole way on a real file system: a life, modes, and nothing left.
func TestOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, err := Open(dir, Options{})
	must(t, err)
	defer s.Close()
	if ms, errs := s.Manifests(); len(ms) != 0 || len(errs) != 0 {
		t.Fatalf("a store that does not exist yet has %v, %v", ms, errs)
	}
	big := bytes.Repeat(pages(1, 2, 3), 400) // more than a writer buffers
	m1, a := snap(t, s, 2048*blockSize, nil, change{block: 0, data: pages(9)}, change{block: 5, data: big}, change{block: 2, data: pages(8)})
	m2, b := snap(t, s, a.Size(), a, change{block: 100, data: pages(0, 7)})
	want := make([]byte, a.Size())
	copy(want, pages(9, 0, 8))
	copy(want[5*blockSize:], big)
	if !bytes.Equal(readImage(t, a), want) {
		t.Fatal("generation 0 differs")
	}
	copy(want[100*blockSize:], pages(0, 7))
	if !bytes.Equal(readImage(t, b), want) {
		t.Fatal("generation 1 differs")
	}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		must(t, err)
		st, err := d.Info()
		must(t, err)
		if mode := st.Mode().Perm(); (d.IsDir() && mode != 0o700) || (!d.IsDir() && mode != 0o600) {
			t.Errorf("%s has mode %o", path, mode)
		}
		return nil
	}))
	var last, total int64
	problems, err := s.Verify(bg, func(done, all int64) { last, total = done, all })
	must(t, err)
	if len(problems) != 0 || last != total || total != int64(1203)*blockSize {
		t.Fatalf("verify: %v, %d of %d", problems, last, total)
	}
	must(t, a.Close())
	must(t, b.Close())
	for _, id := range []format.ID{m1.ID, m2.ID} {
		must(t, s.Delete(bg, id))
	}
	_, err = s.GC(bg, nil, false)
	must(t, err)
	for _, sub := range []string{"images", "snapshots"} {
		left, err := os.ReadDir(filepath.Join(dir, sub))
		must(t, err)
		if len(left) != 0 {
			t.Errorf("%s still holds %v", sub, left)
		}
	}
}
