package snapshot

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
)

// exporting returns a store with a parent and a child that shares blocks with
// it, both with a state, and what their images hold.
func exporting(t testing.TB) (s *Store, parent, child format.ID, want map[format.ID][]byte) {
	t.Helper()
	s = openStore(t, snaptest.NewFS())
	commit := func(w *Writer) format.ID {
		txn, err := s.Begin()
		must(t, err)
		st, err := txn.StateFile()
		must(t, err)
		_, err = st.Write([]byte("state of " + w.ID().String()))
		must(t, err)
		must(t, txn.Commit(bg, Manifest{Kind: KindSnapshot, Name: "warm", Memory: ImageRef{ID: w.ID()}}))
		return txn.ID()
	}
	a, err := makeImage(s, 4*blockSize, nil, change{data: pages(1, 2)})
	must(t, err)
	parent = commit(a)
	img, err := s.OpenImage(a.ID())
	must(t, err)
	defer img.Close()
	b, err := makeImage(s, 4*blockSize, img, change{block: 1, data: pages(3)}, change{block: 3, data: pages(4)})
	must(t, err)
	child = commit(b)
	return s, parent, child, map[format.ID][]byte{parent: pages(1, 2, 0, 0), child: pages(1, 3, 0, 4)}
}

func checkImported(t testing.TB, from, s *Store, id format.ID, want []byte, when string) {
	t.Helper()
	m, err := s.Manifest(id)
	must(t, err)
	origin, err := from.Manifest(id)
	must(t, err)
	if a, b := mustEncode(t, &m), mustEncode(t, &origin); !bytes.Equal(a, b) {
		t.Fatalf("%s: the manifest is\n%s\nwant\n%s", when, a, b)
	}
	img, err := s.OpenImage(m.Memory.ID)
	must(t, err)
	defer img.Close()
	if !bytes.Equal(readImage(t, img), want) {
		t.Fatalf("%s: the image differs", when)
	}
	problems, err := s.Verify(bg, nil)
	must(t, err)
	if len(problems) > 0 {
		t.Fatalf("%s: %+v", when, problems)
	}
}

func mustEncode(t testing.TB, m *Manifest) []byte {
	t.Helper()
	b, err := encodeManifest(m)
	must(t, err)
	return b
}

func TestImportCopiesWhatIsMissing(t *testing.T) {
	from, parent, child, want := exporting(t)
	f := snaptest.NewFS()
	s := openStore(t, f)
	for _, id := range []format.ID{child, parent, child} {
		must(t, s.Import(bg, from, id))
		checkImported(t, from, s, id, want[id], "imported")
	}
	// The child brought the parent's blocks; the parent only its header.
	if got, all := f.Files(), needed(s); !slices.Equal(got, all) {
		t.Fatalf("there are\n%q, needed are\n%q", got, all)
	}
	must(t, s.Delete(bg, child))
	_, err := s.GC(bg, nil, false)
	must(t, err)
	checkImported(t, from, s, parent, want[parent], "after the child's end")
	isErr(t, s.Import(bg, from, format.NewID()), ErrNotFound)
	if err := s.Import(bg, s, parent); err == nil {
		t.Error("a store imported from itself")
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	isErr(t, s.Import(ctx, from, child), context.Canceled)
}

// A build that is damaged here is replaced by the good one.
func TestImportRepairsADamagedBuild(t *testing.T) {
	from, parent, child, want := exporting(t)
	f := snaptest.NewFS()
	s := openStore(t, f)
	must(t, s.Import(bg, from, parent))
	m, err := s.Manifest(parent)
	must(t, err)
	b := f.Content(s.dataPath(m.Memory.ID))
	b[len(b)-1] ^= 1
	must(t, s.Import(bg, from, child))
	checkImported(t, from, s, child, want[child], "after the repair")
	checkImported(t, from, s, parent, want[parent], "after the repair")
}

// A flipped bit in any file of the other store is found before there is a
// manifest.
func TestImportRefusesDamage(t *testing.T) {
	from, _, child, _ := exporting(t)
	ff := from.fs.(*snaptest.FS)
	e, err := from.Export(child)
	must(t, err)
	names := []string{manifestName(child)}
	for _, f := range e.Files() {
		names = append(names, f.Name)
	}
	must(t, e.Close())
	for _, name := range names {
		b := ff.Content("/store/" + name)
		for at := 0; at < len(b); at += 1 + len(b)/50 {
			b[at] ^= 4
			f := snaptest.NewFS()
			s := openStore(t, f)
			var c *CorruptError
			if err := s.Import(bg, from, child); !errors.As(err, &c) {
				t.Fatalf("%s with byte %d flipped: %v", name, at, err)
			}
			if _, err := s.Manifest(child); !errors.Is(err, ErrNotFound) {
				t.Fatalf("%s with byte %d flipped: the snapshot is there (%v)", name, at, err)
			}
			e, err := from.Export(child)
			if err == nil { // the damage is in the file itself: Open finds it
				if h, err := e.Open(bg, name); err == nil {
					t.Fatalf("%s with byte %d flipped was opened", name, at)
				} else if h != nil || !errors.As(err, &c) {
					t.Fatalf("%s with byte %d flipped: %v", name, at, err)
				}
				must(t, e.Close())
			}
			b[at] ^= 4
			must(t, s.Import(bg, from, child))
		}
	}
}

// A file that is longer or shorter than its build is found before any of it is
// copied: a lying store must not fill our disk.
func TestImportRefusesWrongSizesBeforeCopying(t *testing.T) {
	for _, by := range []int64{-1, 1, 1 << 20} {
		from, _, child, _ := exporting(t)
		m, err := from.Manifest(child)
		must(t, err)
		h, err := from.fs.OpenRW(from.dataPath(m.Memory.ID))
		must(t, err)
		size, err := h.Size()
		must(t, err)
		must(t, h.Truncate(size+by))
		must(t, h.Close())
		f := snaptest.NewFS()
		s := openStore(t, f)
		var c *CorruptError
		if err := s.Import(bg, from, child); !errors.As(err, &c) {
			t.Fatalf("%+d bytes: %v", by, err)
		}
		if got := f.Files(); !slices.Equal(got, []string{"/store/lock"}) {
			t.Fatalf("%+d bytes: %q was copied", by, got)
		}
	}
}

// The power fails after every operation of imports: the snapshots are there
// whole or not at all, the next import goes on, and nothing is left over.
func TestImportSurvivesACrashAtEveryOperation(t *testing.T) {
	from, parent, child, want := exporting(t)
	r := rand.New(rand.NewPCG(3, 3))
	power := errors.New("no power")
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		f.FailWith(func(op int, _ string) error {
			if op >= n {
				return power
			}
			return nil
		})
		s, err := Open("/store", Options{FS: f})
		must(t, err)
		done := map[format.ID]bool{}
		for _, id := range []format.ID{parent, child} {
			done[id] = s.Import(bg, from, id) == nil
		}
		for when, c := range map[string]*snaptest.FS{
			"nothing unsynced survived": f.Crash(nil), "all survived": f.Crash(func(string) bool { return true }),
			"some survived": f.Crash(func(string) bool { return r.IntN(2) == 0 }), "restarted": f.Restart(),
		} {
			s := openStore(t, c)
			for id, acknowledged := range done {
				_, err := s.Manifest(id)
				if err == nil {
					checkImported(t, from, s, id, want[id], when)
				} else if acknowledged || !errors.Is(err, ErrNotFound) {
					t.Fatalf("operation %d, %s: %v", n, when, err)
				}
			}
			if r.IntN(2) == 0 { // with and without a GC between
				_, err := s.GC(bg, nil, false)
				must(t, err)
			}
			for _, id := range []format.ID{child, parent} {
				must(t, s.Import(bg, from, id))
				checkImported(t, from, s, id, want[id], when)
			}
			_, err := s.GC(bg, nil, false)
			must(t, err)
			if got, all := c.Files(), needed(s); !slices.Equal(got, all) {
				t.Fatalf("operation %d, %s: there are\n%q, needed are\n%q", n, when, got, all)
			}
			must(t, s.Close())
		}
		if done[parent] && done[child] {
			if n < 50 {
				t.Fatalf("the run has only %d operations", n)
			}
			return
		}
	}
}

// Each operation fails once: it is told, and the next import succeeds.
func TestImportTellsEveryFailure(t *testing.T) {
	from, parent, child, want := exporting(t)
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		s := openStore(t, f)
		hit := ""
		f.FailWith(func(op int, what string) error {
			if op == n {
				hit = what
				return syscall.ENOSPC
			}
			return nil
		})
		err := errors.Join(s.Import(bg, from, parent), s.Import(bg, from, child))
		if hit == "" {
			must(t, err)
			return
		}
		if err == nil && !strings.HasPrefix(hit, "remove") {
			t.Fatalf("%s failed and nobody was told", hit)
		}
		for id := range want {
			must(t, s.Import(bg, from, id))
			checkImported(t, from, s, id, want[id], "after the failure of "+hit)
		}
	}
}

// GC beside an import takes nothing of it, and what is exported stays.
func TestImportAndExportHoldAgainstGC(t *testing.T) {
	from, parent, child, want := exporting(t)
	f := snaptest.NewFS()
	s := openStore(t, f)
	stop := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			if _, err := s.GC(bg, nil, false); err != nil {
				ended <- err
				return
			}
		}
	}()
	for range 20 {
		for _, id := range []format.ID{parent, child} {
			must(t, s.Import(bg, from, id))
			checkImported(t, from, s, id, want[id], "beside GC")
			must(t, s.Delete(bg, id))
		}
	}
	close(stop)
	must(t, <-ended)

	e, err := from.Export(child)
	must(t, err)
	must(t, from.Delete(bg, child))
	must(t, from.Delete(bg, parent))
	_, err = from.GC(bg, nil, false)
	must(t, err)
	for _, file := range e.Files() {
		if strings.HasSuffix(file.Name, "/state") {
			continue // it went with the snapshot
		}
		h, err := e.Open(bg, file.Name)
		must(t, err)
		must(t, h.Close())
	}
	_, err = e.Open(bg, "lock")
	isErr(t, err, ErrNotFound)
	must(t, e.Close())
}
