package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
)

// A bit flipped anywhere in the store is found by Verify, which names the file,
// the place and the snapshots that it harms, and by a reader before it sees the
// byte.
func TestEveryFlippedByteIsFound(t *testing.T) {
	f := snaptest.NewFS()
	l, err := newLife(f)
	must(t, err)
	must(t, l.tryCommit("a", "", change{data: pages(1, 2, 3)}))
	must(t, l.tryCommit("b", "a", change{block: 1, data: pages(9, 0)}))
	want := map[string][]byte{"a": pages(1, 2, 3, 0), "b": pages(1, 9, 0, 0)}
	harms := filesOf(t, l)
	for _, name := range f.Files() {
		content := f.Content(name)
		if len(content) > 0 && harms[name] == nil {
			t.Fatalf("nobody knows what %s is for", name)
		}
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
			findFlip(t, f, name, i, harms[name], want)
			content[i] ^= 1 << (i % 8)
		}
	}
}

// filesOf tells for each file which snapshots need it: of a and b, which has
// blocks of a.
func filesOf(t *testing.T, l *life) map[string][]format.ID {
	t.Helper()
	needed := map[string][]format.ID{}
	for _, name := range []string{"a", "b"} {
		id := l.ids[name]
		m, err := l.s.Manifest(id)
		must(t, err)
		for _, file := range []string{l.s.manifestPath(id), l.s.statePath(id), l.s.headerPath(m.Memory.ID), l.s.dataPath(m.Memory.ID)} {
			needed[file] = []format.ID{id}
		}
		if name == "a" {
			needed[l.s.dataPath(m.Memory.ID)] = []format.ID{id, l.ids["b"]}
		}
	}
	return needed
}

// offsetOf bounds where the damage of a byte is told to be: at its block, or not
// behind it in what one checksum covers.
func offsetOf(name string, size, at int) (from, to int64) {
	if !strings.HasSuffix(name, "/data") {
		return 0, int64(at)
	}
	start := int64(at/blockSize) * blockSize
	if at/blockSize == size/blockSize { // what describes the blocks
		return start, int64(at)
	}
	return start, start
}

func findFlip(t *testing.T, f *snaptest.FS, name string, at int, harms []format.ID, want map[string][]byte) {
	t.Helper()
	s, err := Open("/store", Options{FS: f, ReadOnly: true})
	must(t, err)
	problems, err := s.Verify(context.Background(), nil)
	must(t, err)
	if len(problems) != 1 || problems[0].File != name || !sameIDs(problems[0].Affected, harms) {
		t.Fatalf("byte %d of %s, which %v need: problems %v", at, name, harms, problems)
	}
	if from, to := offsetOf(name, len(f.Content(name)), at); problems[0].Offset < from || problems[0].Offset > to {
		t.Fatalf("byte %d of %s: told to be at %d", at, name, problems[0].Offset)
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

func sameIDs(a, b []format.ID) bool {
	order := func(x, y format.ID) int { return bytes.Compare(x[:], y[:]) }
	return slices.Equal(slices.SortedFunc(slices.Values(a), order), slices.SortedFunc(slices.Values(b), order))
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

// A scrub tells its progress by the bytes of data that it has to read, to the
// last one.
func TestVerifyTellsItsProgress(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	_, a := snap(t, s, 4*blockSize, nil, change{data: pages(1, 2, 3)})
	_, b := snap(t, s, 4*blockSize, a, change{block: 1, data: pages(9)})
	must(t, errors.Join(a.Close(), b.Close()))
	var last int64
	problems, err := s.Verify(bg, func(done, total int64) {
		if done < last || done > total || total != 4*blockSize {
			t.Errorf("%d of %d bytes are done, after %d", done, total, last)
		}
		last = done
	})
	if err != nil || len(problems) > 0 || last != 4*blockSize {
		t.Fatalf("ended at %d bytes: %v, %v", last, problems, err)
	}
}
