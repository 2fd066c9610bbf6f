package block

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// history is an overlay's workload with, per byte, the values that a reader
// may find: a bit per value.
type history struct {
	exact   []byte  // if everything acknowledged is there
	inDoubt []uint8 // values of a write that failed
	since   []uint8 // values since the last good Flush
	failed  int
}

func newHistory() *history {
	h := &history{exact: bytes.Repeat([]byte{baseFill}, testSize), inDoubt: make([]uint8, testSize), since: make([]uint8, testSize)}
	for i := range h.since {
		h.since[i] = 1 << baseFill
	}
	return h
}

func (h *history) wrote(off, n int, fill byte, err error) {
	if err != nil {
		h.failed++
	}
	for i := off; i < off+n; i++ {
		h.since[i] |= 1 << fill
		if err != nil {
			h.inDoubt[i] |= 1 << fill
		} else {
			h.exact[i] = fill
		}
	}
}

func (h *history) flushed(err error) {
	if err != nil {
		h.failed++
		return
	}
	for i := range h.since {
		h.since[i] = 1<<h.exact[i] | h.inDoubt[i]
	}
}

// run does the same random work each time.
func (h *history) run(o *Overlay) {
	r := rand.New(rand.NewPCG(5, 5))
	for range 30 {
		off := r.IntN(testSize)
		n := 1 + r.IntN(min(testSize-off, 2*BlockSize+BlockSize/2))
		if r.IntN(2) == 0 {
			off = off / BlockSize * BlockSize
			n = min(testSize-off, (1+r.IntN(3))*BlockSize)
		}
		switch r.IntN(5) {
		case 0:
			h.flushed(o.Flush())
		case 1:
			h.wrote(off, n, 0, o.Zero(int64(off), int64(n)))
		default:
			fill := byte(2 + r.IntN(6))
			_, err := o.WriteAt(bytes.Repeat([]byte{fill}, n), int64(off))
			h.wrote(off, n, fill, err)
		}
	}
}

func (h *history) checkExact(t *testing.T, what string, o *Overlay) {
	t.Helper()
	for i, b := range content(t, o) {
		if b != h.exact[i] && h.inDoubt[i]&(1<<b) == 0 {
			t.Fatalf("%s: byte %d is %d, acknowledged was %d", what, i, b, h.exact[i])
		}
	}
}

func (h *history) checkSince(t *testing.T, what string, o *Overlay) {
	t.Helper()
	for i, b := range content(t, o) {
		if h.since[i]&(1<<b) == 0 {
			t.Fatalf("%s: byte %d is %d, which it never was since the last flush (%b)", what, i, b, h.since[i])
		}
	}
}

var errPower = errors.New("power lost")

func TestOverlayCrashAtEveryOperation(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	some := func(string) bool { return r.IntN(2) == 0 }
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		f.FailWith(func(op int, _ string) error {
			if op >= n {
				return errPower
			}
			return nil
		})
		h := newHistory()
		o, err := OpenOverlay(f, "/o", testBase)
		if err == nil {
			h.run(o)
		}
		killed := open(t, f.Restart())
		h.checkExact(t, "process killed", killed)
		must(t, killed.Flush())
		must(t, killed.Close())
		for _, c := range []*snaptest.FS{f.Crash(nil), f.Crash(some), f.Crash(some), f.Crash(some)} {
			lost := open(t, c)
			h.checkSince(t, "power lost", lost)
			before := content(t, lost)
			must(t, lost.Close())
			again := open(t, c) // the same boot now: the live area counts
			if !bytes.Equal(before, content(t, again)) {
				t.Fatal("the second open after a crash reads something else")
			}
		}
		if err == nil && h.failed == 0 {
			if n < 40 {
				t.Fatalf("the run has only %d operations", n)
			}
			return
		}
	}
}

func TestOverlayFailEveryOperation(t *testing.T) {
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		o := open(t, f)
		hit := ""
		f.FailWith(func(op int, what string) error {
			if op == n {
				hit = what
				return syscall.ENOSPC
			}
			return nil
		})
		h := newHistory()
		h.run(o)
		f.FailWith(nil)
		if hit == "" {
			return
		}
		if h.failed == 0 {
			t.Fatalf("%s failed and nobody was told", hit)
		}
		h.checkExact(t, hit, o)
		must(t, o.Close())
		h.checkExact(t, hit+", reopened", open(t, f))
	}
}

func TestFailedFlushStaysFailed(t *testing.T) {
	f := snaptest.NewFS()
	o := open(t, f)
	defer o.Close()
	_, err := o.WriteAt([]byte{7}, 0)
	must(t, err)
	f.FailWith(func(op int, what string) error {
		if what == "sync /o.data" {
			return syscall.EIO
		}
		return nil
	})
	if err := o.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("flush: %v, want EIO", err)
	}
	f.FailWith(nil)
	if err := o.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("second flush: %v, want the first one's EIO", err)
	}
}

// A zero block keeps its meaning even when its storage could not be given back.
func TestPartOfAZeroBlockWhoseHoleFailed(t *testing.T) {
	f := snaptest.NewFS()
	o := open(t, f)
	_, err := o.WriteAt(bytes.Repeat([]byte{7}, BlockSize), BlockSize)
	must(t, err)
	f.FailWith(func(_ int, what string) error {
		if what[:5] == "punch" {
			return syscall.EIO
		}
		return nil
	})
	if err := o.Zero(BlockSize, BlockSize); !errors.Is(err, syscall.EIO) {
		t.Fatalf("zero: %v, want EIO", err)
	}
	f.FailWith(nil)
	must(t, o.Close())
	o = open(t, f.Restart())
	_, err = o.WriteAt([]byte{9}, BlockSize+5)
	must(t, err)
	want := make([]byte, BlockSize)
	want[5] = 9
	if got := content(t, o)[BlockSize : 2*BlockSize]; !bytes.Equal(got, want) {
		t.Fatal("bytes from before the zero came back")
	}
}

// hookFS calls afterSync when a file has been synced.
type hookFS struct {
	*snaptest.FS
	afterSync func(name string)
}

type hookFile struct {
	storage.File
	fs *hookFS
}

func (f *hookFS) Create(name string) (storage.File, error) {
	h, err := f.FS.Create(name)
	return &hookFile{h, f}, err
}

func (f *hookFS) OpenRW(name string) (storage.File, error) {
	h, err := f.FS.OpenRW(name)
	if err != nil {
		return nil, err
	}
	return &hookFile{h, f}, nil
}

func (h *hookFile) Sync() error {
	err := h.File.Sync()
	h.fs.afterSync(h.Name())
	return err
}

// What is written while a Flush runs may be lost, but must not be marked as if
// its data had been synced.
func TestWriteDuringFlush(t *testing.T) {
	f := &hookFS{FS: snaptest.NewFS(), afterSync: func(string) {}}
	o := open(t, f)
	_, err := o.WriteAt([]byte{7}, 0)
	must(t, err)
	f.afterSync = func(name string) {
		if name == "/o.data" {
			_, err := o.WriteAt(bytes.Repeat([]byte{9}, BlockSize), 3*BlockSize)
			must(t, err)
		}
	}
	must(t, o.Flush())
	lost := open(t, f.Crash(nil))
	want := bytes.Repeat([]byte{baseFill}, testSize)
	want[0] = 7
	if !bytes.Equal(content(t, lost), want) {
		t.Fatal("a block that was never synced is marked as data")
	}
}
