package format

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// golden are headers as released versions wrote them. A file, once committed,
// is never changed: every later program must read it as what it was.
func golden() map[string]*Header {
	long := &Header{Size: MaxBlocks * BlockSize, Generation: 1 << 40, Build: testID(200), Parent: testID(199)}
	for n := range 150 { // indices and offsets of one, two and more bytes
		long.Builds = append(long.Builds, ref(byte(n+1), 1<<uint(n%37)))
	}
	start := uint64(0)
	var ms []Mapping
	for i := range 600 {
		b := uint32(i * 7 % 150)
		length := min(long.Builds[b].Blocks, uint64(1+i%3*100))
		ms = append(ms, Mapping{Start: start, Length: length, Build: b, Offset: long.Builds[b].Blocks - length})
		start += length + uint64(i%5)*1000
	}
	long.Mappings = NewMappings(ms...)
	return map[string]*Header{
		"v1-example.hdr": example(),
		"v1-zeros.hdr":   {Size: 10 * BlockSize, Build: testID(9)},
		"v1-empty.hdr":   {Build: testID(9)},
		"v1-long.hdr":    long,
	}
}

func TestReleasedHeadersAreReadAndWrittenAsTheyWere(t *testing.T) {
	for name, want := range golden() {
		path := filepath.Join("testdata", name)
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && os.Getenv("WRENN_GOLDEN") == "new" {
			b = mustEncode(t, want) // only what is missing is written, nothing over
			err = errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, b, 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if !bytes.Equal(mustEncode(t, want), b) {
			t.Errorf("%s: the same header is written in other bytes; that is a new version", name)
		}
	}
}
