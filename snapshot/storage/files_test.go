package storage_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

var bg = context.Background()

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func isErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want one that is %v", err, want)
	}
}

func putString(o storage.Objects, key, s string) error {
	return o.Put(bg, key, strings.NewReader(s), int64(len(s)))
}

func getString(o storage.Objects, key string) (string, error) {
	p := make([]byte, 100)
	n, err := o.ReadAt(bg, key, p, 0)
	if err == io.EOF {
		err = nil
	}
	return string(p[:n]), err
}

// fileLife puts, replaces and deletes, and notes what must be there, or what
// may be, because the call that made it so failed.
type fileLife struct {
	o      *storage.Files
	must   map[string][]string // what a key may hold; "": nothing
	failed int
}

func (l *fileLife) do(key, after string, err error) {
	if err == nil {
		l.must[key] = []string{after}
		return
	}
	l.failed++
	l.must[key] = append(slices.Clone(l.must[key]), after)
}

func runFileLife(t *testing.T, f *snaptest.FS) *fileLife {
	l := &fileLife{o: newFiles(t, f, "/objects"), must: map[string][]string{}}
	for _, k := range []string{"a/b/one", "a/two"} {
		l.must[k] = []string{""}
	}
	put := func(k, s string) { l.do(k, s, putString(l.o, k, s)) }
	put("a/b/one", "1")
	put("a/two", "2")
	put("a/b/one", "11")
	l.do("a/two", "", l.o.Delete(bg, "a/two"))
	put("a/two", "22")
	return l
}

func (l *fileLife) check(t *testing.T, f *snaptest.FS, when string) {
	t.Helper()
	o := newFiles(t, f, "/objects")
	_, err := o.Clean(bg)
	must(t, err)
	var left []string
	for k, allowed := range l.must {
		got, err := getString(o, k)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		} else if err == nil {
			left = append(left, "/objects/"+k)
		}
		must(t, err)
		if !slices.Contains(allowed, got) {
			t.Fatalf("%s: %s holds %q, want one of %q", when, k, got, allowed)
		}
	}
	slices.Sort(left)
	if got := f.Files(); !slices.Equal(got, left) {
		t.Fatalf("%s: files %q, want %q", when, got, left)
	}
}

// The power fails after every single operation: what was acknowledged is there,
// what was under way is there whole or not at all, and Clean leaves nothing else.
func TestFilesSurviveACrashAtEveryOperation(t *testing.T) {
	power := errors.New("no power")
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		f.FailWith(func(op int, _ string) error {
			if op >= n {
				return power
			}
			return nil
		})
		l := runFileLife(t, f)
		l.check(t, f.Crash(nil), "nothing survived that was not synced")
		l.check(t, f.Crash(func(string) bool { return true }), "everything survived")
		l.check(t, f.Restart(), "the process alone died")
		if l.failed == 0 {
			if n < 30 {
				t.Fatalf("the run has only %d operations", n)
			}
			return
		}
	}
}

// Each operation fails once and the program goes on: an error is told, and
// nothing is left beside the objects.
func TestFilesTellEveryFailure(t *testing.T) {
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		hit := ""
		f.FailWith(func(op int, what string) error {
			if op == n {
				hit = what
				return syscall.ENOSPC
			}
			return nil
		})
		l := runFileLife(t, f)
		if hit == "" {
			return
		}
		if l.failed == 0 {
			t.Fatalf("operation %d (%s) failed and nobody was told", n, hit)
		}
		l.check(t, f.Crash(nil), "after the failure of "+hit)
	}
}

// A lost fsync is a difference.
func TestFilesPutTranscript(t *testing.T) {
	f := snaptest.NewFS()
	o := newFiles(t, f, "/objects")
	must(t, putString(o, "a/k", "content"))
	got := f.Transcript()
	for i, line := range got {
		if j := strings.Index(line, ".tmp-"); j >= 0 {
			rest := line[j+len(".tmp-"):]
			if k := strings.IndexByte(rest, ' '); k >= 0 {
				got[i] = line[:j] + "TMP" + rest[k:]
			} else {
				got[i] = line[:j] + "TMP"
			}
		}
	}
	want := []string{
		"mkdir /objects", "syncdir /", "mkdir /objects/a", "syncdir /objects",
		"create /objects/a/TMP", "write /objects/a/TMP 0 7", "sync /objects/a/TMP",
		"rename /objects/a/TMP /objects/a/k", "syncdir /objects/a",
	}
	if !slices.Equal(got, want) {
		t.Errorf("transcript\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestFilesRefuseAKeyAboveOrBelowAnother(t *testing.T) {
	for name, o := range map[string]*storage.Files{
		"os": newFiles(t, nil, t.TempDir()), "memory": newFiles(t, snaptest.NewFS(), "/objects"),
	} {
		must(t, putString(o, "a/b", "1"))
		for _, k := range []string{"a", "a/b/c"} {
			if err := putString(o, k, "2"); err == nil || errors.Is(err, storage.ErrTransient) {
				t.Errorf("%s: Put of %q beside a/b: %v", name, k, err)
			}
		}
		if got, err := getString(o, "a/b"); got != "1" || err != nil {
			t.Errorf("%s: a/b holds %q, %v", name, got, err)
		}
	}
}
