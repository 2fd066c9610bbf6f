package guest

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReplaceIsAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("f", link); err != nil {
		t.Fatal(err)
	}
	me := account{uid: uint32(os.Getuid()), gid: uint32(os.Getgid())}
	put := func(path string, body io.Reader, mode os.FileMode) error {
		up := upload{user: me, path: path, body: body, size: -1, mode: mode}
		_, err := up.replace()
		return err
	}
	expect := func(content string, mode os.FileMode) {
		t.Helper()
		b, err := os.ReadFile(path)
		fi, serr := os.Stat(path)
		if err != nil || serr != nil || string(b) != content || fi.Mode().Perm() != mode {
			t.Errorf("the file is %q, %v (%v %v), want %q, %v", b, fi.Mode(), err, serr, content, mode)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("the directory holds %v, %v", entries, err)
		}
	}
	broken := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(errors.New("cut")))
	if err := put(path, broken, 0); err == nil {
		t.Error("an upload that broke off succeeds")
	}
	expect("old", 0o600)
	if err := put(link, strings.NewReader("new"), 0); err != nil {
		t.Error(err)
	}
	expect("new", 0o600) // by the link, with the file's own mode
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v", fi, err)
	}
	if err := put(path, strings.NewReader(""), 0o640); err != nil {
		t.Error(err)
	}
	expect("", 0o640)
	if err := put(dir, strings.NewReader("x"), 0); err == nil {
		t.Error("a directory was replaced")
	}
	if _, err := parseMode("789"); err == nil {
		t.Error("789 is no octal number")
	}
}
