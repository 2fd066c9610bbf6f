package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// RunObjects is the conformance suite of storage.Objects: open must return an
// empty store that behaves as the interface says.
func RunObjects(t *testing.T, open func(t *testing.T) storage.Objects) {
	for name, f := range map[string]func(*testing.T, storage.Objects){
		"one object":      oneObject,
		"reads":           reads,
		"large object":    largeObject,
		"listings":        listings,
		"pages":           pages,
		"bad arguments":   badArguments,
		"bad bodies":      badBodies,
		"ended contexts":  endedContexts,
		"concurrent puts": concurrentPuts,
	} {
		t.Run(name, func(t *testing.T) { f(t, open(t)) })
	}
}

var bg = context.Background()

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func is(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want one that is %v", err, want)
	}
}

func put(t *testing.T, o storage.Objects, key string, b []byte) {
	t.Helper()
	must(t, o.Put(bg, key, bytes.NewReader(b), int64(len(b))))
}

func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
	return b
}

func oneObject(t *testing.T, o storage.Objects) {
	const key = "a/b-1/C_2.json"
	_, err := o.Head(bg, key)
	is(t, err, fs.ErrNotExist)
	_, err = o.ReadAt(bg, key, make([]byte, 1), 0)
	is(t, err, fs.ErrNotExist)
	must(t, o.Delete(bg, key))
	for _, content := range []string{"first", "", "another, longer one"} {
		put(t, o, key, []byte(content))
		info, err := o.Head(bg, key)
		must(t, err)
		if info != (storage.ObjectInfo{Key: key, Size: int64(len(content))}) {
			t.Fatalf("Head = %+v after a Put of %q", info, content)
		}
		p := make([]byte, 100)
		if n, err := o.ReadAt(bg, key, p, 0); err != io.EOF || string(p[:n]) != content {
			t.Fatalf("ReadAt = %q, %v, want %q and EOF", p[:n], err, content)
		}
	}
	// Neither a key above nor one below is there.
	for _, other := range []string{"a", "a/b-1", key + "/x"} {
		_, err := o.Head(bg, other)
		is(t, err, fs.ErrNotExist)
		must(t, o.Delete(bg, other))
	}
	must(t, o.Delete(bg, key))
	must(t, o.Delete(bg, key))
	_, err = o.Head(bg, key)
	is(t, err, fs.ErrNotExist)
}

func reads(t *testing.T, o storage.Objects) {
	b := noise(10_000)
	put(t, o, "k", b)
	for _, r := range []struct{ off, n int }{
		{0, 10_000}, {0, 1}, {9_999, 1}, {5_000, 5_000}, {1, 4_096}, {0, 10_001}, {9_999, 2}, {10_000, 1}, {20_000, 10}, {1 << 40, 1}, {0, 0},
	} {
		p := make([]byte, r.n)
		n, err := o.ReadAt(bg, "k", p, int64(r.off))
		want := b[min(r.off, len(b)):min(r.off+r.n, len(b))]
		if !bytes.Equal(p[:n], want) {
			t.Errorf("read of %d at %d: %d wrong bytes, want %d", r.n, r.off, n, len(want))
		}
		if len(want) < r.n && err != io.EOF || len(want) == r.n && err != nil && err != io.EOF {
			t.Errorf("read of %d at %d: error %v", r.n, r.off, err)
		}
	}
}

// largeObject goes over the size from which S3 takes several parts.
func largeObject(t *testing.T, o storage.Objects) {
	b := noise(11<<20 + 17)
	put(t, o, "large", b)
	info, err := o.Head(bg, "large")
	must(t, err)
	got := make([]byte, info.Size)
	if n, err := o.ReadAt(bg, "large", got, 0); err != nil && err != io.EOF || !bytes.Equal(got[:n], b) {
		t.Fatalf("read %d bytes of %d, %v", n, len(b), err)
	}
	if _, err := o.ReadAt(bg, "large", got[:100], 5<<20-50); err != nil || !bytes.Equal(got[:100], b[5<<20-50:5<<20+50]) {
		t.Fatalf("a read over the seam of two parts is wrong: %v", err)
	}
}

func list(t *testing.T, o storage.Objects, prefix, after string) []string {
	t.Helper()
	page, more, err := o.List(bg, prefix, after)
	must(t, err)
	if more {
		t.Fatal("a small listing says that there is more")
	}
	var out []string
	for _, info := range page {
		out = append(out, fmt.Sprintf("%s:%d", info.Key, info.Size))
	}
	return out
}

func listings(t *testing.T, o storage.Objects) {
	if got := list(t, o, "", ""); len(got) != 0 {
		t.Fatalf("an empty store lists %q", got)
	}
	for i, k := range []string{"a/x", "a-b", "a.b/y", "a/y/1", "B", "a/y-1", "ab/z"} {
		put(t, o, k, make([]byte, i))
	}
	for _, c := range []struct {
		prefix, after string
		want          []string
	}{
		{"", "", []string{"B:4", "a-b:1", "a.b/y:2", "a/x:0", "a/y-1:5", "a/y/1:3", "ab/z:6"}},
		{"a/", "", []string{"a/x:0", "a/y-1:5", "a/y/1:3"}},
		{"a/y/", "", []string{"a/y/1:3"}},
		{"a/x/", "", nil},
		{"none/", "", nil},
		{"", "a/x", []string{"a/y-1:5", "a/y/1:3", "ab/z:6"}},
		{"a/", "a/y", []string{"a/y-1:5", "a/y/1:3"}},
		{"a/", "zzz", nil},
	} {
		if got := list(t, o, c.prefix, c.after); !slices.Equal(got, c.want) {
			t.Errorf("List(%q, %q) = %q, want %q", c.prefix, c.after, got, c.want)
		}
	}
	must(t, o.Delete(bg, "a/y-1"))
	if got := list(t, o, "a/", ""); !slices.Equal(got, []string{"a/x:0", "a/y/1:3"}) {
		t.Errorf("after a Delete: %q", got)
	}
}

func pages(t *testing.T, o storage.Objects) {
	n := storage.MaxList + 3
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := g; i < n; i += 8 {
				if err := o.Put(bg, fmt.Sprintf("p/%05d", i), strings.NewReader("x"), 1); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	i := 0
	must(t, storage.ListAll(bg, o, "p/", func(info storage.ObjectInfo) error {
		if want := fmt.Sprintf("p/%05d", i); info.Key != want {
			return fmt.Errorf("object %d is %q, want %q", i, info.Key, want)
		}
		i++
		return nil
	}))
	if i != n {
		t.Fatalf("ListAll gave %d objects, want %d", i, n)
	}
	stop := errors.New("stop")
	is(t, storage.ListAll(bg, o, "p/", func(storage.ObjectInfo) error { return stop }), stop)
}

func badArguments(t *testing.T, o storage.Objects) {
	for _, key := range []string{
		"", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/.b", "ä", "a b", "a\x00", "a\\b", "a:b",
		strings.Repeat("x", 201), strings.Repeat("x/", 257) + "x",
	} {
		_, herr := o.Head(bg, key)
		_, rerr := o.ReadAt(bg, key, make([]byte, 1), 0)
		for op, err := range map[string]error{
			"put": o.Put(bg, key, strings.NewReader("x"), 1), "head": herr, "read": rerr, "delete": o.Delete(bg, key),
		} {
			if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, storage.ErrTransient) {
				t.Errorf("%s of the key %.30q: error %v", op, key, err)
			}
		}
	}
	for _, prefix := range []string{"a", "/", "../", "a//"} {
		if _, _, err := o.List(bg, prefix, ""); err == nil {
			t.Errorf("the prefix %q was taken", prefix)
		}
	}
	put(t, o, "k", []byte("abc"))
	_, err := o.ReadAt(bg, "k", make([]byte, 1), -1)
	is(t, err, fs.ErrInvalid)
	is(t, o.Put(bg, "k", strings.NewReader(""), -1), fs.ErrInvalid)
	if got := list(t, o, "", ""); !slices.Equal(got, []string{"k:3"}) {
		t.Errorf("there is %q, want only k", got)
	}
}

var errBody = errors.New("the body cannot be read")

// brokenBody fails at a byte.
type brokenBody struct{ at int64 }

func (b brokenBody) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > b.at {
		return 0, errBody
	}
	clear(p)
	return len(p), nil
}

func badBodies(t *testing.T, o storage.Objects) {
	put(t, o, "k", []byte("old"))
	// In the first part, and in a later one.
	for _, at := range []int64{0, 6 << 20} {
		is(t, o.Put(bg, "k", brokenBody{at}, 11<<20), errBody)
		is(t, o.Put(bg, "new", brokenBody{at}, 11<<20), errBody)
	}
	is(t, o.Put(bg, "k", strings.NewReader("short"), 6), io.ErrUnexpectedEOF)
	put(t, o, "longer", []byte("x"))
	must(t, o.Put(bg, "longer", strings.NewReader("abcdef"), 3)) // only what was said
	if got := list(t, o, "", ""); !slices.Equal(got, []string{"k:3", "longer:3"}) {
		t.Fatalf("failed Puts left %q", got)
	}
}

func endedContexts(t *testing.T, o storage.Objects) {
	put(t, o, "k", []byte("abc"))
	ctx, cancel := context.WithCancel(bg)
	cancel()
	_, rerr := o.ReadAt(ctx, "k", make([]byte, 3), 0)
	_, herr := o.Head(ctx, "k")
	_, _, lerr := o.List(ctx, "", "")
	for op, err := range map[string]error{
		"put": o.Put(ctx, "new", strings.NewReader("x"), 1), "delete": o.Delete(ctx, "k"), "read": rerr, "head": herr, "list": lerr,
	} {
		if !errors.Is(err, context.Canceled) || errors.Is(err, storage.ErrTransient) || errors.Is(err, storage.ErrThrottled) {
			t.Errorf("%s with an ended context: %v", op, err)
		}
	}
	if got := list(t, o, "", ""); !slices.Equal(got, []string{"k:3"}) {
		t.Errorf("there is %q, want only k", got)
	}
}

// concurrentPuts has readers beside them see one of the contents, whole.
func concurrentPuts(t *testing.T, o storage.Objects) {
	const size = 64 << 10
	put(t, o, "dir/k", make([]byte, size))
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for range 5 {
				b := bytes.Repeat([]byte{byte(g)}, size)
				if err := o.Put(bg, "dir/k", bytes.NewReader(b), size); err != nil {
					t.Error(err)
				}
				if err := o.Put(bg, fmt.Sprintf("dir/own/%d", g), bytes.NewReader(b), size); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			p := make([]byte, size)
			for range 10 {
				if n, err := o.ReadAt(bg, "dir/k", p, 0); n != size || err != nil && err != io.EOF {
					t.Errorf("read %d bytes, %v", n, err)
				} else if !bytes.Equal(p, bytes.Repeat(p[:1], size)) {
					t.Error("a reader saw two contents mixed")
				}
			}
		})
	}
	wg.Wait()
}
