package templatebuild

import (
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// endless gives bytes for ever.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestAnUploadIsBounded: one that does not end is refused at the bound, and
// nothing of it is kept; one that has just that size is taken.
func TestAnUploadIsBounded(t *testing.T) {
	dir := t.TempDir()
	u, err := openUploads(dir, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	u.most = 1 << 20
	hash := strings.Repeat("ab", 32)
	if err := u.put("tpl", hash, endless{}); control.CodeOf(err) != control.CodeTooLarge {
		t.Errorf("one that does not end: %v, want too_large", err)
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("%s is left of it", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := u.put("tpl", hash, io.LimitReader(endless{}, u.most)); err != nil || !u.has("tpl", hash) {
		t.Errorf("one of the largest size: %v", err)
	}
}
