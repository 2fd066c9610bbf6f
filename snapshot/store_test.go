package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

var bg = context.Background()

func openStore(t testing.TB, f storage.FS) *Store {
	t.Helper()
	s, err := Open("/store", Options{FS: f})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// pages returns n blocks, each filled with its own byte.
func pages(fill ...byte) []byte {
	var b []byte
	for _, f := range fill {
		b = append(b, bytes.Repeat([]byte{f}, blockSize)...)
	}
	return b
}

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

// change is one call of a Writer.
type change struct {
	block int64
	data  []byte
	zero  int64 // blocks; when data is nil
}

func makeImage(s *Store, size int64, parent *Image, changes ...change) (*Writer, error) {
	w, err := s.NewImage(size, parent)
	if err != nil {
		return nil, err
	}
	for _, c := range changes {
		if c.data != nil {
			err = w.WriteAt(c.data, c.block*blockSize)
		} else {
			err = w.Zero(c.block*blockSize, c.zero*blockSize)
		}
		if err != nil {
			return w, err
		}
	}
	_, err = w.Finish(bg)
	return w, err
}

// snap makes an image and a snapshot that names it.
func snap(t testing.TB, s *Store, size int64, parent *Image, changes ...change) (Manifest, *Image) {
	t.Helper()
	w, err := makeImage(s, size, parent, changes...)
	must(t, err)
	txn, err := s.Begin()
	must(t, err)
	must(t, txn.Commit(bg, Manifest{Kind: KindSnapshot, Memory: ImageRef{ID: w.ID()}}))
	must(t, w.Abort())
	must(t, txn.Abort())
	m, err := s.Manifest(txn.ID())
	must(t, err)
	img, err := s.OpenImage(m.Memory.ID)
	must(t, err)
	t.Cleanup(func() { _ = img.Close() })
	return m, img
}

func readImage(t testing.TB, src block.Source) []byte {
	t.Helper()
	b := make([]byte, src.Size())
	if n, err := src.ReadAt(b, 0); err != nil || n != len(b) {
		t.Fatalf("read of the whole image: %d, %v", n, err)
	}
	return b
}

func TestZeroPageOverDataBecomesZero(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	_, a := snap(t, s, 8*blockSize, nil, change{block: 1, data: pages(1, 2, 3, 4)})
	w, err := makeImage(s, a.Size(), a,
		change{block: 2, data: pages(0)},    // written zeros over data
		change{block: 3, zero: 2},           // discarded
		change{block: 6, data: pages(0, 0)}) // zeros over zeros
	must(t, err)
	if n := w.BytesWritten(); n != 0 {
		t.Fatalf("zeros took %d bytes", n)
	}
	b, err := s.OpenImage(w.ID())
	must(t, err)
	defer b.Close()
	if !bytes.Equal(readImage(t, b), pages(0, 1, 0, 0, 0, 0, 0, 0)) {
		t.Fatal("the zeros did not become zeros")
	}
	if !bytes.Equal(readImage(t, a), pages(0, 1, 2, 3, 4, 0, 0, 0)) {
		t.Fatal("the parent changed")
	}
	if k, n := b.Span(blockSize); k != format.Data || n != blockSize {
		t.Fatalf("Span(1) = %v %d, want data for one block", k, n)
	}
	if k, n := b.Span(2 * blockSize); k != format.Zero || n != 6*blockSize {
		t.Fatalf("Span(2) = %v %d, want zeros for six blocks", k, n)
	}
	if k, n := b.Span(8 * blockSize); k != format.Absent || n != 0 {
		t.Fatalf("Span at the end = %v %d, want absent", k, n)
	}
}

func TestReadsAtAnyAlignment(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	_, a := snap(t, s, 16*blockSize, nil, change{block: 5, data: pages(5, 6)}, change{block: 2, data: pages(2, 3)})
	_, b := snap(t, s, a.Size(), a, change{block: 3, data: pages(9)}, change{block: 7, data: pages(7)})
	want := pages(0, 0, 2, 9, 0, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0)
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		off := r.Int64N(int64(len(want)) + 10)
		p := bytes.Repeat([]byte{0xff}, r.IntN(5*blockSize))
		n, err := b.ReadAt(p, off)
		in := min(int64(len(p)), max(0, int64(len(want))-off))
		if int64(n) != in || (err != nil) != (in < int64(len(p))) || (err != nil && err != io.EOF) {
			t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
		}
		if in > 0 && !bytes.Equal(p[:n], want[off:off+in]) {
			t.Fatalf("ReadAt(%d bytes, %d) differs", len(p), off)
		}
	}
	if _, err := b.ReadAt(make([]byte, 1), -1); err == nil {
		t.Fatal("a negative offset was read")
	}
}

func TestWriterRefusesWhatItCannotKeep(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	_, a := snap(t, s, 8*blockSize, nil)
	if _, err := s.NewImage(9*blockSize, a); err == nil {
		t.Error("another size than the parent's was taken")
	}
	if _, err := s.NewImage(100, nil); err == nil {
		t.Error("a size that is not a multiple of the block size was taken")
	}
	w, err := s.NewImage(8*blockSize, a)
	must(t, err)
	must(t, w.WriteAt(pages(1), 0))
	for what, err := range map[string]error{
		"a block twice":         w.WriteAt(pages(2), 0),
		"a zero after a write":  w.Zero(0, blockSize),
		"an unaligned offset":   w.WriteAt(pages(2), 100),
		"a part of a block":     w.WriteAt([]byte{1}, blockSize),
		"a block beyond":        w.WriteAt(pages(1, 2), 7*blockSize),
		"a negative offset":     w.WriteAt(pages(1), -blockSize),
		"a huge count of zeros": w.Zero(blockSize, 1<<62),
	} {
		if err == nil {
			t.Errorf("%s was taken", what)
		}
	}
	must(t, w.WriteAt(pages(3), blockSize)) // refusing did not break it
	_, err = w.Finish(bg)
	must(t, err)
	isErr(t, w.WriteAt(pages(3), 2*blockSize), ErrClosed)
	_, err = w.Finish(bg)
	isErr(t, err, ErrClosed)
	must(t, w.Abort())
	must(t, w.Abort())
}

func TestAbortLeavesNothing(t *testing.T) {
	f := snaptest.NewFS()
	s := openStore(t, f)
	_, a := snap(t, s, 8*blockSize, nil, change{block: 0, data: pages(1)})
	before := f.Files()
	for _, finish := range []bool{false, true} {
		w, err := s.NewImage(a.Size(), a)
		must(t, err)
		must(t, w.WriteAt(pages(7), 0))
		if finish {
			_, err := w.Finish(bg)
			must(t, err)
		}
		txn, err := s.Begin()
		must(t, err)
		st, err := txn.StateFile()
		must(t, err)
		_, err = st.Write([]byte("device"))
		must(t, err)
		if !finish {
			if err := txn.Commit(bg, Manifest{Kind: KindPause, Memory: ImageRef{ID: w.ID()}}); err == nil {
				t.Fatal("an unfinished image was committed")
			}
		}
		must(t, txn.Abort())
		must(t, w.Abort())
		if got := f.Files(); !slices.Equal(got, before) {
			t.Fatalf("finished %v: left %q, want %q", finish, got, before)
		}
	}
}

func TestCommitKeepsWhatTheManifestSays(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	mem, err := makeImage(s, 4*blockSize, nil, change{data: pages(1)})
	must(t, err)
	disk, err := makeImage(s, 8*blockSize, nil, change{data: pages(2)})
	must(t, err)
	txn, err := s.Begin()
	must(t, err)
	st, err := txn.StateFile()
	must(t, err)
	_, err = st.Write([]byte("device state"))
	must(t, err)
	want := Manifest{
		Name: "warm", Kind: KindSnapshot, SandboxID: "sb1", Parent: "base", Generation: 3,
		Memory: ImageRef{ID: mem.ID()}, Disk: ImageRef{ID: disk.ID()}, EnvdVersion: "0.6.13", NetworkLayout: "1",
		VMM: VMMInfo{Kind: "qemu", VCPUs: 2, MemoryMB: 512, TSCKHz: 2_400_000}, Annotations: []byte{0, 1, 0xff},
	}
	must(t, txn.Commit(bg, want))
	isErr(t, txn.Commit(bg, want), ErrClosed)
	got, err := s.Manifest(txn.ID())
	must(t, err)
	if got.Name != "warm" || got.Memory.Size != 4*blockSize || got.Disk.Size != 8*blockSize || got.State.Size != 12 ||
		!bytes.Equal(got.Annotations, want.Annotations) || got.VMM != want.VMM || got.CreatedAt.IsZero() || got.Size < 2*blockSize+12 {
		t.Fatalf("manifest %+v", got)
	}
	if _, err := s.StatePath(txn.ID()); err != nil {
		t.Fatal(err)
	}
	list, errs := s.Manifests()
	if len(list) != 1 || len(errs) != 0 || list[0].ID != txn.ID() {
		t.Fatalf("Manifests = %v, %v", list, errs)
	}
	_, err = s.Manifest(format.NewID())
	isErr(t, err, ErrNotFound)
	isErr(t, s.Delete(bg, format.NewID()), ErrNotFound)
	_, err = s.OpenImage(format.NewID())
	isErr(t, err, ErrNotFound)
	_, err = s.OpenImage(format.ID{})
	isErr(t, err, ErrNotFound)
}

func TestCommitRefusesBadManifests(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	w, err := makeImage(s, blockSize, nil)
	must(t, err)
	good := Manifest{Kind: KindBase, Disk: ImageRef{ID: w.ID()}}
	for field, change := range map[string]func(m *Manifest){
		"kind":         func(m *Manifest) { m.Kind = "other" },
		"id":           func(m *Manifest) { m.ID = format.NewID() },
		"memory, disk": func(m *Manifest) { m.Disk = ImageRef{} },
		"name":         func(m *Manifest) { m.Name = "\xff" },
		"parent":       func(m *Manifest) { m.Parent = strings.Repeat("x", 5000) },
		"annotations":  func(m *Manifest) { m.Annotations = make([]byte, 2<<20) },
		"image":        func(m *Manifest) { m.Memory.ID = format.NewID() },
	} {
		m := good
		change(&m)
		txn, err := s.Begin()
		must(t, err)
		if err := txn.Commit(bg, m); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("want an error about %s, got %v", field, err)
		}
		must(t, txn.Abort())
	}
	txn, err := s.Begin()
	must(t, err)
	ctx, cancel := context.WithCancel(bg)
	cancel()
	isErr(t, txn.Commit(ctx, good), context.Canceled)
	must(t, txn.Abort())
	txn, err = s.Begin()
	must(t, err)
	must(t, txn.Commit(bg, good)) // the failed ones left the image usable
	must(t, w.Abort())
	if _, err := s.OpenImage(w.ID()); err != nil {
		t.Fatalf("Abort removed a committed image: %v", err)
	}
}

func TestOneWriterManyReaders(t *testing.T) {
	f := snaptest.NewFS()
	s1 := openStore(t, f)
	m, _ := snap(t, s1, blockSize, nil, change{data: pages(1)})
	s2 := openStore(t, f)
	img, err := s2.OpenImage(m.Memory.ID)
	must(t, err)
	if !bytes.Equal(readImage(t, img), pages(1)) {
		t.Fatal("a second reader reads something else")
	}
	_, err = s2.NewImage(blockSize, nil)
	isErr(t, err, storage.ErrLocked)
	must(t, s1.Close())
	_, err = s1.NewImage(blockSize, nil)
	isErr(t, err, ErrClosed)
	w, err := s2.NewImage(blockSize, img)
	must(t, err)
	must(t, w.Abort())
	must(t, img.Close())
	must(t, img.Close())
	s3, err := Open("/store", Options{FS: f, ReadOnly: true})
	must(t, err)
	_, err = s3.Begin()
	isErr(t, err, ErrReadOnly)
}

// A read on the path of a page fault costs no allocation.
func TestReadDoesNotAllocate(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	_, a := snap(t, s, 16*blockSize, nil, change{block: 0, data: pages(1, 2, 3, 4, 5, 6, 7)}, change{block: 9, data: pages(8)})
	p := make([]byte, 16*blockSize)
	for _, off := range []int64{0, 100} {
		if n := testing.AllocsPerRun(100, func() {
			if _, err := a.ReadAt(p[:12*blockSize], off); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("a read at %d allocates %v times", off, n)
		}
	}
}

func FuzzManifest(f *testing.F) {
	m := Manifest{ID: format.ID{1}, Name: "warm", Kind: KindSnapshot,
		Memory: ImageRef{ID: format.ID{2}, Size: blockSize, HeaderSHA256: strings.Repeat("0a", 32)}}
	good, err := encodeManifest(&m)
	must(f, err)
	f.Add(good)
	f.Add([]byte(`{"version":1,"sha256":"","manifest":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		inputs := [][]byte{b}
		if sealed, err := wrapManifest(b); err == nil { // past the digest, to the fields
			inputs = append(inputs, sealed)
		}
		for _, in := range inputs {
			m, err := decodeManifest(in)
			if err != nil {
				continue
			}
			if _, err := encodeManifest(m); err != nil {
				t.Fatalf("decoded, but cannot be written: %v", err)
			}
		}
	})
}
