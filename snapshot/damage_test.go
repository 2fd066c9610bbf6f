package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
)

// A bit flipped anywhere in the store is found by Verify, which names the file,
// and by a reader before it sees the byte.
func TestEveryFlippedByteIsFound(t *testing.T) {
	f := snaptest.NewFS()
	l, err := newLife(f)
	must(t, err)
	must(t, l.tryCommit("a", "", change{data: pages(1, 2, 3)}))
	must(t, l.tryCommit("b", "a", change{block: 1, data: pages(9, 0)}))
	want := map[string][]byte{"a": pages(1, 2, 3, 0), "b": pages(1, 9, 0, 0)}
	for _, name := range f.Files() {
		content := f.Content(name)
		for i := range content {
			// Blocks are alike inside; every byte of all that describes them is
			// tried.
			if strings.HasSuffix(name, "/data") && i%997 != 0 && i < len(content)-200 {
				continue
			}
			if strings.HasSuffix(name, ".json") && i%3 != 0 {
				continue // long, and one digest covers it
			}
			content[i] ^= 1 << (i % 8)
			findFlip(t, f, name, i, want)
			content[i] ^= 1 << (i % 8)
		}
	}
}

func findFlip(t *testing.T, f *snaptest.FS, name string, at int, want map[string][]byte) {
	t.Helper()
	s, err := Open("/store", Options{FS: f, ReadOnly: true})
	must(t, err)
	problems, err := s.Verify(context.Background(), nil)
	must(t, err)
	if len(problems) == 0 || problems[0].File != name || len(problems[0].Affected) == 0 {
		t.Fatalf("byte %d of %s: problems %v", at, name, problems)
	}
	ms, _ := s.Manifests()
	for _, m := range ms {
		img, err := s.OpenImage(m.Memory.ID)
		if err != nil {
			continue
		}
		got := bytes.Repeat([]byte{0xee}, int(img.Size()))
		n, err := img.ReadAt(got, 0)
		var c *CorruptError
		if err != nil && (!errors.As(err, &c) || c.File != name || c.Image.IsZero()) {
			t.Fatalf("byte %d of %s: error %v", at, name, err)
		}
		if !bytes.Equal(got[:n], want[m.Name][:n]) || (err == nil && n < len(got)) {
			t.Fatalf("byte %d of %s: a reader saw it", at, name)
		}
		if rest := got[n:]; len(bytes.Trim(rest, "\x00")) != 0 {
			t.Fatalf("byte %d of %s: bytes that were not verified are in the buffer", at, name)
		}
		must(t, img.Close())
	}
}

// Block and checksum changed together still do not fit the header's digest.
func TestForgedChecksumIsFound(t *testing.T) {
	f := snaptest.NewFS()
	l, err := newLife(f)
	must(t, err)
	must(t, l.tryCommit("a", "", change{data: pages(1, 2, 3)}))
	ms, _ := l.s.Manifests()
	name := l.s.dataPath(ms[0].Memory.ID)
	content := f.Content(name)
	content[10] ^= 1
	binary.LittleEndian.PutUint32(content[3*blockSize:], crc32.Checksum(content[:blockSize], castagnoli))
	img, err := l.s.OpenImage(ms[0].Memory.ID)
	must(t, err)
	defer img.Close()
	var c *CorruptError
	if _, err := img.ReadAt(make([]byte, 10), 0); !errors.As(err, &c) || c.File != name || c.Offset != 3*blockSize {
		t.Fatalf("read: %v, want an error at the checksum table of %s", err, name)
	}
}
