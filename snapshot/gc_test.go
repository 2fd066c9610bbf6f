package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

func TestDeletingAParentKeepsTheChild(t *testing.T) {
	f := snaptest.NewFS()
	s := openStore(t, f)
	m1, a := snap(t, s, 4*blockSize, nil, change{data: pages(1, 2)})
	m2, b := snap(t, s, 4*blockSize, a, change{block: 1, data: pages(3)})
	must(t, a.Close())
	must(t, b.Close())
	must(t, s.Delete(bg, m1.ID))
	dry, err := s.GC(bg, nil, true)
	must(t, err)
	before := f.Files()
	r, err := s.GC(bg, nil, false)
	must(t, err)
	if fmt.Sprint(dry) != fmt.Sprint(r) || len(r.Headers) != 1 || len(r.Images) != 0 || r.Bytes == 0 {
		t.Fatalf("dry run %+v, real run %+v", dry, r)
	}
	if want := []GCItem{{GCHeader, m1.Memory.ID, r.Bytes}}; !slices.Equal(r.Items, want) {
		t.Fatalf("items %+v, want %+v", r.Items, want)
	}
	if len(f.Files()) != len(before)-1 {
		t.Fatalf("left %q", f.Files())
	}
	b, err = s.OpenImage(m2.Memory.ID)
	must(t, err)
	if !bytes.Equal(readImage(t, b), pages(1, 3, 0, 0)) {
		t.Fatal("the child lost blocks")
	}
	must(t, b.Close())
	must(t, s.Delete(bg, m2.ID))
	if r, err = s.GC(bg, []format.ID{m2.Memory.ID}, false); err != nil || len(r.Images) != 0 {
		t.Fatalf("a root was removed: %+v, %v", r, err)
	}
	r, err = s.GC(bg, nil, false)
	must(t, err)
	if got := f.Files(); len(r.Images) != 2 || !slices.Equal(got, []string{"/store/lock"}) {
		t.Fatalf("the last snapshot left %q (%+v)", got, r)
	}
}

func TestGCSparesWhatThisProcessUses(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	m1, a := snap(t, s, 4*blockSize, nil, change{data: pages(1, 2)})
	must(t, s.Delete(bg, m1.ID)) // only the open handle is left
	unfinished, err := s.NewImage(a.Size(), a)
	must(t, err)
	finished, err := makeImage(s, a.Size(), a, change{data: pages(9)})
	must(t, err)
	txn, err := s.Begin()
	must(t, err)
	r, err := s.GC(bg, nil, false)
	must(t, err)
	if len(r.Images)+len(r.Headers)+len(r.Snapshots) != 0 {
		t.Fatalf("GC removed %+v", r)
	}
	must(t, a.Close()) // now the writers alone hold the parent's blocks
	_, err = s.GC(bg, nil, false)
	must(t, err)
	must(t, unfinished.Abort())
	must(t, txn.Commit(bg, Manifest{Kind: KindPause, Memory: ImageRef{ID: finished.ID()}}))
	_, err = s.GC(bg, nil, false)
	must(t, err)
	b, err := s.OpenImage(finished.ID())
	must(t, err)
	defer b.Close()
	if !bytes.Equal(readImage(t, b), pages(9, 2, 0, 0)) {
		t.Fatal("blocks of the parent are gone")
	}
}

func TestGCRemovesNothingWhenItCannotRead(t *testing.T) {
	for _, file := range []string{"manifest.json", "header"} {
		f := snaptest.NewFS()
		s := openStore(t, f)
		_, a := snap(t, s, 4*blockSize, nil, change{data: pages(1)})
		m2, b := snap(t, s, 4*blockSize, nil, change{data: pages(2)})
		must(t, a.Close())
		must(t, b.Close())
		name := s.manifestPath(m2.ID)
		if file == "header" {
			name = s.headerPath(m2.Memory.ID)
		}
		f.Content(name)[20] ^= 1
		before := f.Files()
		_, err := s.GC(bg, nil, false)
		var c *CorruptError
		if !errors.As(err, &c) || c.File != name {
			t.Fatalf("%s: error %v, want one that names %s", file, err, name)
		}
		if !slices.Equal(before, f.Files()) {
			t.Fatalf("%s: GC removed something", file)
		}
		must(t, s.Delete(bg, m2.ID)) // an unreadable snapshot can be deleted
		_, err = s.GC(bg, nil, false)
		must(t, err)
	}
}

// meanwhileFS calls meanwhile once, at a moment: before and after each
// operation that finds files is one.
type meanwhileFS struct {
	storage.FS
	at        int
	moment    int
	meanwhile func()
}

func (f *meanwhileFS) pass() {
	now := f.moment
	f.moment++
	if m := f.meanwhile; m != nil && now == f.at {
		f.meanwhile = nil
		m()
	}
}

func (f *meanwhileFS) Open(name string) (storage.File, error) {
	f.pass()
	defer f.pass()
	return f.FS.Open(name)
}

func (f *meanwhileFS) ReadDir(name string) ([]string, error) {
	f.pass()
	defer f.pass()
	return f.FS.ReadDir(name)
}

// A snapshot is committed at every moment of a GC, begun before it or just
// then: it has its image afterwards.
func TestGCSparesWhatIsCommittedMeanwhile(t *testing.T) {
	for _, begun := range []bool{true, false} {
		for n, called := 0, true; called; n++ {
			f := &meanwhileFS{FS: snaptest.NewFS(), at: n}
			called = commitDuringGC(t, f, begun)
			if !called && n < 8 {
				t.Fatalf("a GC has %d moments only", n)
			}
		}
	}
}

// commitDuringGC says whether the GC got as far as the moment of the commit.
func commitDuringGC(t *testing.T, f *meanwhileFS, begun bool) (called bool) {
	t.Helper()
	s := openStore(t, f)
	w, err := makeImage(s, 4*blockSize, nil, change{data: pages(1, 2)})
	must(t, err)
	var txn *Txn
	if begun {
		txn, err = s.Begin()
		must(t, err)
	}
	commit := func() {
		if !begun {
			txn, err = s.Begin()
			must(t, err)
		}
		must(t, txn.Commit(bg, Manifest{Kind: KindPause, Memory: ImageRef{ID: w.ID()}}))
		must(t, w.Abort())
		must(t, txn.Abort())
	}
	f.moment, f.meanwhile = 0, func() { called = true; commit() }
	_, err = s.GC(bg, nil, false)
	must(t, err)
	f.meanwhile = nil
	if !called {
		commit()
	}
	_, err = s.GC(bg, nil, false)
	must(t, err)
	img, err := s.OpenImage(w.ID())
	if err != nil {
		t.Fatalf("begun before %t, committed at moment %d: %v", begun, f.at, err)
	}
	defer img.Close()
	if !bytes.Equal(readImage(t, img), pages(1, 2, 0, 0)) {
		t.Fatal("blocks are gone")
	}
	if _, err := s.Manifest(txn.ID()); err != nil {
		t.Fatal(err)
	}
	return called
}

// At every moment of a scrub a snapshot is compacted or deleted, and what it
// does not need any more is removed: that is no damage, while a real one is.
func TestVerifyTakesChangesForNoDamage(t *testing.T) {
	for what, change := range map[string]func(*Store, Manifest) error{
		"compacted": func(s *Store, m Manifest) error { _, err := s.Compact(bg, m.Memory.ID); return err },
		"deleted":   func(s *Store, m Manifest) error { return s.Delete(bg, m.ID) },
	} {
		for n, called := 0, true; called; n++ {
			called = false
			mem := snaptest.NewFS()
			f := &meanwhileFS{FS: mem, at: n}
			s, err := Open("/store", Options{FS: f, Compaction: CompactionPolicy{MaxBuilds: 1}})
			must(t, err)
			kept, _ := scatter(t, s, 8, 2, 2)
			m, _ := scatter(t, s, 8, 4, 1)
			mem.Content(s.dataPath(kept.Memory.ID))[0] ^= 1
			f.moment, f.meanwhile = 0, func() {
				called = true
				must(t, change(s, m))
				_, err := s.GC(bg, nil, false)
				must(t, err)
			}
			problems, err := s.Verify(bg, nil)
			must(t, err)
			f.meanwhile = nil
			if len(problems) != 1 || !slices.Equal(problems[0].Affected, []format.ID{kept.ID}) {
				t.Fatalf("%s at moment %d: %+v", what, n, problems)
			}
			must(t, s.Close())
		}
	}
}

// Readers, writers and GC at once: nobody sees another's work half done.
func TestConcurrentUse(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	m, base := snap(t, s, 8*blockSize, nil, change{data: pages(1, 2, 3, 4)})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 10 {
				fill := byte(10 + g*10 + i)
				w, err := makeImage(s, base.Size(), base, change{block: 1, data: pages(fill)})
				if err != nil {
					t.Error(err)
					return
				}
				txn, err := s.Begin()
				if err == nil && i%3 != 0 {
					err = txn.Commit(bg, Manifest{Kind: KindPause, Memory: ImageRef{ID: w.ID()}})
				}
				if err != nil {
					t.Error(err)
					return
				}
				img, err := s.OpenImage(w.ID())
				if err != nil {
					t.Error(err)
					return
				}
				got := make([]byte, 4*blockSize)
				if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, pages(1, fill, 3, 4)) {
					t.Errorf("image reads wrong: %v", err)
				}
				if err := errors.Join(img.Close(), txn.Abort(), w.Abort()); err != nil {
					t.Error(err)
				}
				if i%3 == 1 {
					if err := s.Delete(bg, txn.ID()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for range 20 {
		if _, err := s.GC(bg, nil, false); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	_, err := s.GC(bg, nil, false)
	must(t, err)
	ms, errs := s.Manifests()
	if len(ms) != 4*3+1 || len(errs) != 0 {
		t.Fatalf("%d snapshots, %v; want %d", len(ms), errs, 4*3+1)
	}
	problems, err := s.Verify(bg, nil)
	must(t, err)
	if len(problems) != 0 {
		t.Fatal(problems)
	}
	must(t, s.Delete(bg, m.ID))
}
