package snaptest

import (
	"errors"
	"io"
	"io/fs"
	"slices"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// RunFS is the conformance suite of storage.FS: fsys must behave as its
// documentation says in the empty directory dir.
func RunFS(t *testing.T, fsys storage.FS, dir string) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	is := func(err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Fatalf("got error %v, want one that is %v", err, want)
		}
	}
	f, err := fsys.Create(dir + "/a")
	must(err)
	_, err = fsys.Create(dir + "/a")
	is(err, fs.ErrExist)
	_, err = fsys.Open(dir + "/none")
	is(err, fs.ErrNotExist)
	_, err = fsys.OpenRW(dir + "/none")
	is(err, fs.ErrNotExist)
	is(fsys.Remove(dir+"/none"), fs.ErrNotExist)
	is(fsys.Rename(dir+"/none", dir+"/x"), fs.ErrNotExist)
	is(fsys.SyncDir(dir+"/none"), fs.ErrNotExist)
	_, err = fsys.ReadDir(dir + "/none")
	is(err, fs.ErrNotExist)

	checkFile(t, f)
	must(f.Lock())
	g, err := fsys.OpenRW(dir + "/a")
	must(err)
	is(g.Lock(), storage.ErrLocked)
	must(f.Close())
	must(g.Lock())
	must(g.Close())

	r, err := fsys.Open(dir + "/a")
	must(err)
	if _, err := r.WriteAt([]byte("x"), 0); err == nil {
		t.Fatal("a file that was opened for reading took a write")
	}
	must(r.Close())

	must(fsys.Mkdir(dir + "/d"))
	is(fsys.Mkdir(dir+"/d"), fs.ErrExist)
	h, err := fsys.Create(dir + "/d/inner")
	must(err)
	must(h.Close())
	if fsys.Remove(dir+"/d") == nil {
		t.Fatal("a directory that is not empty was removed")
	}
	must(fsys.Rename(dir+"/d/inner", dir+"/d/a"))
	must(fsys.Remove(dir + "/d/a"))
	must(fsys.SyncDir(dir))
	got, err := fsys.ReadDir(dir)
	must(err)
	if want := []string{"a", "d"}; !slices.Equal(got, want) {
		t.Fatalf("ReadDir = %q, want %q", got, want)
	}
	must(fsys.Remove(dir + "/d"))
	b1, err := fsys.BootID()
	must(err)
	if b2, _ := fsys.BootID(); b1 == "" || b1 != b2 {
		t.Fatalf("boot ids %q and %q: want the same, not empty", b1, b2)
	}
}

// checkFile expects an empty file, open for writing.
func checkFile(t *testing.T, f storage.File) {
	t.Helper()
	content := func(want string) {
		t.Helper()
		b := make([]byte, len(want)+1)
		n, err := f.ReadAt(b, 0)
		if string(b[:n]) != want || !errors.Is(err, io.EOF) {
			t.Fatalf("content %q (%v), want %q and EOF", b[:n], err, want)
		}
		if size, err := f.Size(); err != nil || size != int64(len(want)) {
			t.Fatalf("size %d (%v), want %d", size, err, len(want))
		}
	}
	steps := []struct {
		do   func() error
		want string
	}{
		{func() error { return nil }, ""},
		{func() error { _, err := f.Write([]byte("ab")); return err }, "ab"},
		{func() error { _, err := f.Write([]byte("cd")); return err }, "abcd"},
		{func() error { _, err := f.WriteAt([]byte("xy"), 6); return err }, "abcd\x00\x00xy"},
		{func() error { return f.PunchHole(1, 2) }, "a\x00\x00d\x00\x00xy"},
		{func() error { return f.PunchHole(6, 100) }, "a\x00\x00d\x00\x00\x00\x00"},
		{func() error { return f.Truncate(1) }, "a"},
		{func() error { return f.Truncate(3) }, "a\x00\x00"},
		{f.Sync, "a\x00\x00"},
	}
	for i, s := range steps {
		if err := s.do(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		content(s.want)
	}
}
