package block

import (
	"bytes"
	"errors"
	"io/fs"
	"path/filepath"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// filled is a Source whose bytes are all the same, not zero.
type filled struct {
	size int64
	fill byte
}

func (f filled) Size() int64 { return f.size }

func (f filled) ReadAt(p []byte, off int64) (int, error) {
	n, err := Clip(f.size, p, off)
	for i := range p[:n] {
		p[i] = f.fill
	}
	return n, err
}

func (f filled) Span(off int64) (format.Kind, int64) {
	if off < 0 || off >= f.size {
		return format.Absent, 0
	}
	return format.Data, f.size - off
}

const (
	testBlocks = 8
	testSize   = testBlocks * BlockSize
	baseFill   = 1
)

var testBase = filled{testSize, baseFill}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, f storage.FS) *Overlay {
	t.Helper()
	o, err := OpenOverlay(f, "/o", testBase)
	must(t, err)
	return o
}

func content(t testing.TB, src Source) []byte {
	t.Helper()
	b := make([]byte, src.Size())
	if n, err := src.ReadAt(b, 0); err != nil || n != len(b) {
		t.Fatalf("read all: %d, %v", n, err)
	}
	return b
}

func TestFourMeanings(t *testing.T) {
	o := open(t, snaptest.NewFS())
	defer o.Close()
	_, err := o.WriteAt([]byte{7}, 2*BlockSize+100) // data, the rest from below
	must(t, err)
	must(t, o.Zero(4*BlockSize, BlockSize))
	_, err = o.WriteAt([]byte{9}, 4*BlockSize+BlockSize-1) // over zero: zeros around it
	must(t, err)
	must(t, o.Zero(5*BlockSize, 2*BlockSize))
	want := bytes.Repeat([]byte{baseFill}, testSize)
	want[2*BlockSize+100] = 7
	clear(want[4*BlockSize : 7*BlockSize])
	want[5*BlockSize-1] = 9
	if !bytes.Equal(content(t, o), want) {
		t.Fatal("content differs")
	}
	type run struct {
		off, n int64
		kind   format.Kind
	}
	var got []run
	o.Dirty(func(off, n int64, kind format.Kind) bool {
		got = append(got, run{off / BlockSize, n / BlockSize, kind})
		return true
	})
	wantRuns := []run{{2, 1, format.Data}, {4, 1, format.Data}, {5, 2, format.Zero}}
	if len(got) != len(wantRuns) || got[0] != wantRuns[0] || got[1] != wantRuns[1] || got[2] != wantRuns[2] {
		t.Fatalf("dirty %v, want %v", got, wantRuns)
	}
	for block, want := range []format.Kind{format.Data, format.Data, format.Data, format.Data, format.Data, format.Zero, format.Zero, format.Data, format.Absent} {
		if kind, _ := o.Span(int64(block) * BlockSize); kind != want {
			t.Errorf("block %d is %v, want %v", block, kind, want)
		}
	}
}

func TestRefusesWhatIsOutside(t *testing.T) {
	o := open(t, snaptest.NewFS())
	defer o.Close()
	for _, c := range []struct{ off, n int64 }{{-1, 1}, {testSize, 1}, {testSize - 1, 2}, {1 << 62, 1 << 62}} {
		if _, err := o.WriteAt(make([]byte, min(c.n, 10)), c.off); err == nil {
			t.Errorf("write at %d of %d was taken", c.off, c.n)
		}
		if err := o.Zero(c.off, c.n); err == nil {
			t.Errorf("zero at %d of %d was taken", c.off, c.n)
		}
	}
	must(t, o.Zero(0, 0))
	if n, err := o.WriteAt(nil, testSize); n != 0 || err != nil {
		t.Errorf("empty write at the end: %d, %v", n, err)
	}
}

func TestOpenRefusesDamage(t *testing.T) {
	fresh := func() *snaptest.FS {
		f := snaptest.NewFS()
		o := open(t, f)
		_, err := o.WriteAt([]byte{7}, 0)
		must(t, err)
		must(t, o.Flush())
		must(t, o.Close())
		return f
	}
	for what, damage := range map[string]func(f *snaptest.FS){
		"map lost":   func(f *snaptest.FS) { must(t, f.Remove("/o.map")) },
		"data lost":  func(f *snaptest.FS) { must(t, f.Remove("/o.data")) },
		"magic":      func(f *snaptest.FS) { f.Content("/o.map")[0] ^= 1 },
		"block size": func(f *snaptest.FS) { f.Content("/o.map")[12] ^= 1 },
		"boot id":    func(f *snaptest.FS) { f.Content("/o.map")[24] ^= 1 },
		"state":      func(f *snaptest.FS) { f.Content("/o.map")[mapHeader] = 9 },
		"map cut": func(f *snaptest.FS) {
			h, err := f.OpenRW("/o.map")
			must(t, err)
			must(t, h.Truncate(mapHeader+1))
			must(t, h.Close())
		},
	} {
		f := fresh()
		damage(f)
		if o, err := OpenOverlay(f, "/o", testBase); err == nil {
			t.Errorf("%s: opened, block 0 begins with %d", what, content(t, o)[0])
		}
	}
	f := fresh()
	if _, err := OpenOverlay(f, "/o", filled{testSize * 2, 1}); err == nil {
		t.Error("a base of another size was taken")
	}
	o := open(t, f)
	if _, err := OpenOverlay(f, "/o", testBase); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("second handle: %v, want ErrLocked", err)
	}
	must(t, o.Close())
	must(t, RemoveOverlay(f, "/o"))
	if files := f.Files(); len(files) != 0 {
		t.Errorf("left %q", files)
	}
	must(t, RemoveOverlay(f, "/o"))
}

func TestFlushOrder(t *testing.T) {
	f := snaptest.NewFS()
	o := open(t, f)
	defer o.Close()
	f.Transcript()
	_, err := o.WriteAt(make([]byte, BlockSize), BlockSize)
	must(t, err)
	must(t, o.Flush())
	_, err = o.WriteAt(make([]byte, 10), BlockSize) // a place that is data already
	must(t, err)
	must(t, o.Flush())
	want := []string{
		"write /o.data 4096 4096", "write /o.map 4097 1",
		"sync /o.data", "write /o.map 8192 8", "sync /o.map",
		"write /o.data 4096 10", "sync /o.data",
	}
	got := f.Transcript()
	if len(got) != len(want) {
		t.Fatalf("calls %q, want %q", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("call %d is %q, want %q", i, got[i], want[i])
		}
	}
}

// Writers of neighbouring parts of one block must not undo each other.
func TestConcurrentWritesToOneBlock(t *testing.T) {
	dir := t.TempDir()
	o, err := OpenOverlay(storage.OS{}, filepath.Join(dir, "o"), testBase)
	must(t, err)
	defer o.Close()
	const writers = 8
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range testSize / 512 {
				if i%writers != w {
					continue
				}
				if _, err := o.WriteAt(bytes.Repeat([]byte{byte(w + 2)}, 512), int64(i)*512); err != nil {
					t.Error(err)
				}
				if w == 0 && i%64 == 0 {
					if err := o.Flush(); err != nil {
						t.Error(err)
					}
				}
				if _, err := o.ReadAt(make([]byte, 3*BlockSize), 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	check := func(o *Overlay) {
		for i, b := range content(t, o) {
			if want := byte(i/512%writers + 2); b != want {
				t.Fatalf("byte %d is %d, want %d", i, b, want)
			}
		}
	}
	check(o)
	must(t, o.Zero(BlockSize, 2*BlockSize))
	must(t, o.Close())
	if o, err = OpenOverlay(storage.OS{}, filepath.Join(dir, "o"), testBase); err != nil {
		t.Fatal(err)
	}
	got := content(t, o)
	if !bytes.Equal(got[BlockSize:3*BlockSize], make([]byte, 2*BlockSize)) || got[3*BlockSize] != byte(3*BlockSize/512%writers+2) {
		t.Fatal("reopened, the zeros or their neighbours are wrong")
	}
	if _, err := (storage.OS{}).Open(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

func TestWriteDoesNotAllocate(t *testing.T) {
	o, err := OpenOverlay(storage.OS{}, filepath.Join(t.TempDir(), "o"), testBase)
	must(t, err)
	defer o.Close()
	p := make([]byte, BlockSize)
	_, err = o.WriteAt(p, 0)
	must(t, err)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := o.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("a read allocates %v times", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		if _, err := o.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}); n > 1 {
		t.Errorf("a write over data allocates %v times", n)
	}
}

func FuzzMapHeader(f *testing.F) {
	f.Add(encodeMapHeader("boot-1", 8))
	f.Add([]byte(mapMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		boot, err := decodeMapHeader(b, 8)
		if err == nil && !bytes.Equal(encodeMapHeader(boot, 8)[:24], b[:24]) {
			t.Fatalf("%x was taken", b)
		}
	})
}

func TestOwnedIsWhatWasWritten(t *testing.T) {
	o := open(t, snaptest.NewFS())
	_, err := o.WriteAt(make([]byte, 2*BlockSize), BlockSize)
	must(t, err)
	must(t, o.Zero(5*BlockSize, BlockSize))
	for _, c := range []struct {
		off, n int64
		owned  bool
	}{
		{0, 1, false}, {BlockSize, 2 * BlockSize, true}, {BlockSize + 1, 5, true}, {BlockSize - 1, 2, false}, {2*BlockSize + 1, BlockSize, false},
		{5 * BlockSize, 1, false}, {0, 0, true}, {-1, 1, false}, {testSize, 1, false}, {0, 1 << 62, false},
	} {
		if got := o.Owned(c.off, c.n); got != c.owned {
			t.Errorf("%d bytes at %d: %v", c.n, c.off, got)
		}
	}
}
