package zstd_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	klauspost "github.com/klauspost/compress/zstd"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/storagetest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/zstd"
)

var bg = context.Background()

func open(t testing.TB, o storage.Objects, options zstd.Options) storage.Objects {
	t.Helper()
	options.TempDir = t.TempDir()
	z, err := zstd.New(o, options)
	must(t, err)
	return z
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, o storage.Objects, key string, b []byte) {
	t.Helper()
	must(t, o.Put(bg, key, bytes.NewReader(b), int64(len(b))))
}

// get reads an object whole, with one byte more than there is.
func get(o storage.Objects, key string, size int) ([]byte, error) {
	p := make([]byte, size+1)
	n, err := o.ReadAt(bg, key, p, 0)
	if err == io.EOF {
		err = nil
	}
	return p[:n], err
}

// mixed has runs of zeros, of text, and of noise.
func mixed(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for at := 0; at < n; {
		run := b[at:min(n, at+1+r.IntN(20_000))]
		switch r.IntN(3) {
		case 0:
			copy(run, bytes.Repeat(fmt.Appendf(nil, "line %d\n", r.IntN(1000)), len(run)/7+1))
		case 1:
			for i := range run {
				run[i] = byte(r.Uint32())
			}
		}
		at += len(run)
	}
	return b
}

func TestCompressedObjectsConform(t *testing.T) {
	for name, f := range map[string]func(t *testing.T) storage.Objects{
		"memory": func(t *testing.T) storage.Objects { return open(t, storagetest.NewMemory(), zstd.Options{}) },
		"small frames": func(t *testing.T) storage.Objects {
			return open(t, storagetest.NewMemory(), zstd.Options{FrameSize: 4 << 10})
		},
		"large frames": func(t *testing.T) storage.Objects {
			return open(t, storagetest.NewMemory(), zstd.Options{FrameSize: 1 << 20})
		},
		"indexes kept": func(t *testing.T) storage.Objects {
			return open(t, storagetest.NewMemory(), zstd.Options{FrameSize: 4 << 10, Immutable: func(k string) bool { return k != "dir/k" }})
		},
		"no room for them": func(t *testing.T) storage.Objects {
			return open(t, storagetest.NewMemory(), zstd.Options{Immutable: func(k string) bool { return k != "dir/k" }, Indexes: 1})
		},
		"files": func(t *testing.T) storage.Objects {
			files, err := storage.NewFiles(nil, t.TempDir())
			must(t, err)
			return open(t, files, zstd.Options{})
		},
		"in the stack": func(t *testing.T) storage.Objects {
			s, err := storage.NewStack(storagetest.NewMemory(), storage.StackOptions{
				Cache: storage.CacheOptions{Dir: t.TempDir(), MaxBytes: 64 << 10, ChunkSize: 16 << 10, Cacheable: func(k string) bool { return k != "dir/k" }},
				Encode: func(o storage.Objects) (storage.Objects, error) {
					return zstd.New(o, zstd.Options{TempDir: t.TempDir()})
				},
			})
			must(t, err)
			t.Cleanup(func() { must(t, s.Close()) })
			return s
		},
	} {
		t.Run(name, func(t *testing.T) { storagetest.RunObjects(t, f) })
	}
}

// Any part of an object is what was put, whatever its size has to do with the
// frames'.
func TestEveryPartIsWhatWasPut(t *testing.T) {
	o := open(t, storagetest.NewMemory(), zstd.Options{FrameSize: 4 << 10})
	r := rand.New(rand.NewPCG(2, 3))
	for _, size := range []int{0, 1, 4095, 4096, 4097, 8192, 100_000, 5 << 20} {
		b := mixed(size, uint64(size))
		put(t, o, "k", b)
		for range 50 {
			off := r.IntN(size + 2)
			p := make([]byte, r.IntN(20_000))
			n, err := o.ReadAt(bg, "k", p, int64(off))
			want := b[min(off, size):min(off+len(p), size)]
			if !bytes.Equal(p[:n], want) || (n < len(p)) != (err == io.EOF) {
				t.Fatalf("%d bytes at %d of %d: %d bytes, %v", len(p), off, size, n, err)
			}
		}
	}
}

// Any zstd program makes the content of an object.
func TestAnObjectIsAZstdFile(t *testing.T) {
	m := storagetest.NewMemory()
	b := mixed(700_000, 4)
	put(t, open(t, m, zstd.Options{}), "k", b)
	info, err := m.Head(bg, "k")
	must(t, err)
	if info.Size > int64(len(b))/2 {
		t.Errorf("%d bytes take %d", len(b), info.Size)
	}
	stored, err := get(m, "k", int(info.Size))
	must(t, err)
	d, err := klauspost.NewReader(bytes.NewReader(stored))
	must(t, err)
	defer d.Close()
	if got, err := io.ReadAll(d); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(b), err)
	}
}

// What a released version stored is read for ever.
func TestGoldenObject(t *testing.T) {
	content := append(bytes.Repeat([]byte("wrenn "), 1000), "the end"...)
	golden := filepath.Join("testdata", "object.hex")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		m := storagetest.NewMemory()
		put(t, open(t, m, zstd.Options{FrameSize: 4 << 10}), "k", content)
		stored, err := get(m, "k", 1<<16)
		must(t, err)
		must(t, os.WriteFile(golden, []byte(hex.Dump(stored)), 0o644))
	}
	m := storagetest.NewMemory()
	put(t, m, "k", undump(t, golden))
	if got, err := get(open(t, m, zstd.Options{}), "k", len(content)); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(content), err)
	}
}

func undump(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	must(t, err)
	var b []byte
	for line := range strings.Lines(string(text)) {
		fields, _, _ := strings.Cut(line, "|")
		for i, f := range strings.Fields(fields) {
			if i > 0 {
				x, err := hex.DecodeString(f)
				must(t, err)
				b = append(b, x...)
			}
		}
	}
	return b
}

// An object that is cut or changed anywhere is an error, never another content.
func TestDamageIsFound(t *testing.T) {
	m := storagetest.NewMemory()
	content := mixed(9000, 5)
	put(t, open(t, m, zstd.Options{FrameSize: 4 << 10}), "k", content)
	stored, err := get(m, "k", 1<<16)
	must(t, err)
	o := open(t, m, zstd.Options{})
	check := func(what string, b []byte) {
		t.Helper()
		put(t, m, "bad", b)
		got, err := get(o, "bad", len(content))
		switch {
		case err == nil && bytes.HasPrefix(b, got) && !isOurs(b):
			// Its beginning is another one's: it is read as it is, which the
			// engine's own checksums then refuse.
		case err == nil:
			t.Fatalf("%s: %d bytes are read", what, len(got))
		case !strings.Contains(err.Error(), `"bad"`) || errors.Is(err, storage.ErrTransient):
			t.Fatalf("%s: %v", what, err)
		}
	}
	for n := range stored {
		check(fmt.Sprintf("cut at %d", n), stored[:n])
	}
	check("longer", append(bytes.Clone(stored), 0))
	for i := range stored {
		b := bytes.Clone(stored)
		b[i] ^= 1 << (i % 8)
		check(fmt.Sprintf("byte %d changed", i), b)
	}
}

func isOurs(b []byte) bool {
	return len(b) >= 16 && bytes.Equal(b[:4], []byte{0x5e, 0x2a, 0x4d, 0x18}) && string(b[8:16]) == "wrenn-zf"
}

// A store that is in use can be put under New.
func TestPlainObjectsAreReadAsTheyAre(t *testing.T) {
	m := storagetest.NewMemory()
	o := open(t, m, zstd.Options{Immutable: func(key string) bool { return key == "large" }})
	for key, size := range map[string]int{"none": 0, "small": 20_000, "just": 32 << 10, "large": 300_000} {
		b := mixed(size, 6)
		put(t, m, key, b)
		for range 2 { // and with what is kept of it
			if got, err := get(o, key, size); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%s: %d bytes, %v", key, len(got), err)
			}
			if info, err := o.Head(bg, key); err != nil || info.Size != int64(size) {
				t.Errorf("%s: %+v, %v", key, info, err)
			}
			p := make([]byte, 10)
			if n, err := o.ReadAt(bg, key, p, int64(size)); n != 0 || err != io.EOF {
				t.Errorf("%s: %d bytes at its end, %v", key, n, err)
			}
		}
	}
	put(t, o, "small", []byte("compressed now"))
	if got, err := get(o, "small", 100); err != nil || string(got) != "compressed now" {
		t.Errorf("%q, %v", got, err)
	}
}

// A reader of many frames sees one of the contents that take each other's place,
// of both kinds.
func TestAReadSeesOneContent(t *testing.T) {
	m := storagetest.NewMemory()
	o := open(t, m, zstd.Options{FrameSize: 4 << 10})
	const size = 200_000
	contents := [][]byte{mixed(size, 7), mixed(size, 8), mixed(size, 9)}
	put(t, o, "k", contents[0])
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for i := range 100 {
			put(t, o, "k", contents[i%2])
			if i%10 == 0 {
				put(t, m, "k", contents[2])
			}
		}
	})
	for range 2 {
		wg.Go(func() {
			for running := true; running; {
				select {
				case <-done:
					running = false
				default:
				}
				got, err := get(o, "k", size)
				if errors.Is(err, storage.ErrTransient) {
					continue // it says so itself
				}
				if err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) && !bytes.Equal(got, contents[2]) {
					t.Error("two contents are mixed")
					return
				}
			}
		})
	}
	wg.Wait()
}

// A small read fetches the frames around it, and not the object.
func TestASmallReadFetchesLittle(t *testing.T) {
	m := &counting{Objects: storagetest.NewMemory()}
	o := open(t, m, zstd.Options{FrameSize: 4 << 10, Immutable: func(string) bool { return true }})
	b := make([]byte, 4<<20)
	r := rand.New(rand.NewPCG(1, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	put(t, o, "k", b)
	_, err := o.ReadAt(bg, "k", make([]byte, 1), 0)
	must(t, err)
	m.calls, m.bytes = 0, 0
	p := make([]byte, 100)
	_, err = o.ReadAt(bg, "k", p, 3<<20)
	must(t, err)
	if !bytes.Equal(p, b[3<<20:3<<20+100]) || m.calls != 1 || m.bytes > 5<<10 {
		t.Errorf("%d calls for %d bytes", m.calls, m.bytes)
	}
}

type counting struct {
	storage.Objects
	calls, bytes int
}

func (c *counting) ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error) {
	c.calls++
	c.bytes += len(p)
	return c.Objects.ReadAt(ctx, key, p, off)
}

func TestBadOptionsAreRefused(t *testing.T) {
	for _, size := range []int{-1, 1, 4095, 5000, 2 << 20} {
		if _, err := zstd.New(storagetest.NewMemory(), zstd.Options{FrameSize: size}); err == nil || !strings.Contains(err.Error(), "FrameSize") {
			t.Errorf("%d: %v", size, err)
		}
	}
	if _, err := zstd.New(nil, zstd.Options{}); err == nil {
		t.Error("no store is taken")
	}
}

// A disk without room for what is compressed is told, and nothing is stored.
func TestNoPlaceToCompress(t *testing.T) {
	m := storagetest.NewMemory()
	o, err := zstd.New(m, zstd.Options{TempDir: filepath.Join(t.TempDir(), "none")})
	must(t, err)
	if err := o.Put(bg, "k", strings.NewReader("x"), 1); err == nil || !strings.Contains(err.Error(), "to compress into") {
		t.Errorf("%v", err)
	}
	if page, _, err := m.List(bg, "", ""); err != nil || len(page) != 0 {
		t.Errorf("%v, %v", page, err)
	}
}

// FuzzObject reads whatever a store may give.
func FuzzObject(f *testing.F) {
	m := storagetest.NewMemory()
	for _, size := range []int{0, 100, 9000} {
		put(f, open(f, m, zstd.Options{FrameSize: 4 << 10}), "k", mixed(size, 10))
		b, err := get(m, "k", 1<<16)
		must(f, err)
		f.Add(b, int64(0))
		f.Add(b, int64(5000))
	}
	o := open(f, m, zstd.Options{})
	f.Fuzz(func(t *testing.T, b []byte, off int64) {
		put(t, m, "k", b)
		p := make([]byte, 10_000)
		n, err := o.ReadAt(bg, "k", p, off)
		if n < 0 || n > len(p) || n < len(p) && err == nil {
			t.Fatalf("%d bytes, %v", n, err)
		}
		if info, err := o.Head(bg, "k"); err == nil && info.Size < 0 {
			t.Fatalf("%+v", info)
		}
	})
}

func BenchmarkRead64K(b *testing.B) {
	content := mixed(64<<20, 11)
	for name, over := range map[string]func(o storage.Objects) storage.Objects{
		"plain": func(o storage.Objects) storage.Objects { return o },
		"zstd": func(o storage.Objects) storage.Objects {
			return open(b, o, zstd.Options{Immutable: func(string) bool { return true }})
		},
	} {
		b.Run(name, func(b *testing.B) {
			files, err := storage.NewFiles(nil, b.TempDir())
			must(b, err)
			o := over(files)
			put(b, o, "k", content)
			info, err := files.Head(bg, "k")
			must(b, err)
			p := make([]byte, 64<<10)
			r := rand.New(rand.NewPCG(1, 2))
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				off := int64(r.IntN(len(content)/len(p)) * len(p))
				if _, err := o.ReadAt(bg, "k", p, off); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(info.Size)/float64(len(content)), "stored/content")
		})
	}
}
