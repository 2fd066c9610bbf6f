package storage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/storagetest"
)

const (
	chunk     = 1024
	chunkFile = chunk + 36 // with its trailer
)

func openCache(t testing.TB, f storage.FS, next storage.Objects, max int64) *storage.Cache {
	t.Helper()
	c, err := storage.NewCache(next, storage.CacheOptions{FS: f, Dir: "/cache", MaxBytes: max, ChunkSize: chunk})
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// origin is a store with one object of n chunks and a half, and its content.
func origin(t testing.TB, n int) (*storagetest.Faulty, []byte) {
	t.Helper()
	b := make([]byte, n*chunk+chunk/2)
	r := rand.NewChaCha8([32]byte{7})
	_, _ = r.Read(b)
	m := storagetest.NewMemory()
	must(t, m.Put(bg, "k", bytes.NewReader(b), int64(len(b))))
	return storagetest.NewFaulty(m), b
}

func readRange(t testing.TB, o storage.Objects, want []byte, off, n int) {
	t.Helper()
	p := make([]byte, n)
	got, err := o.ReadAt(bg, "k", p, int64(off))
	want = want[off:min(off+n, len(want))]
	if err != nil && err != io.EOF || !bytes.Equal(p[:got], want) {
		t.Fatalf("read of %d at %d: %d bytes, %v, equal %v", n, off, got, err, bytes.Equal(p[:got], want))
	}
}

func TestCacheFetchesOnce(t *testing.T) {
	f := snaptest.NewFS()
	next, b := origin(t, 20)
	c := openCache(t, f, next, 1<<20)
	for range 2 {
		readRange(t, c, b, 100, 10)
		readRange(t, c, b, chunk-5, 10)
		readRange(t, c, b, 0, len(b)+100) // more than is fetched side by side
	}
	must(t, c.Close())
	if n := len(next.Calls()); n != 21 {
		t.Errorf("%d reads of the store, want one for each of 21 chunks", n)
	}
	// The next process finds them.
	c = openCache(t, f.Restart(), next, 1<<20)
	readRange(t, c, b, 0, len(b))
	if n, s := len(next.Calls()), c.Stats(); n != 21 || s.Misses != 0 || s.Chunks != 21 {
		t.Errorf("after a restart %d reads of the store, %+v", n, s)
	}
	_, err := storage.NewCache(next, storage.CacheOptions{FS: f, Dir: "/cache", ChunkSize: 1})
	if err == nil || !strings.Contains(err.Error(), "ChunkSize") {
		t.Errorf("a chunk size of 1: %v", err)
	}
}

func cacheBytes(f *snaptest.FS) (n int64) {
	for _, name := range f.Files() {
		n += int64(len(f.Content(name)))
	}
	return n
}

func TestCacheEvictsTheLeastRecentlyUsed(t *testing.T) {
	f := snaptest.NewFS()
	next, b := origin(t, 10)
	c := openCache(t, f, next, 3*chunkFile)
	for _, i := range []int{0, 1, 2, 0, 3} { // 3 takes the place of 1
		readRange(t, c, b, i*chunk, chunk)
		if n := cacheBytes(f); n > 3*chunkFile {
			t.Fatalf("the cache holds %d bytes, the limit is %d", n, 3*chunkFile)
		}
		must(t, c.Close()) // what is fetched is on the disk
		c = openCache(t, f, next, 3*chunkFile)
		readRange(t, c, b, 0, 10)
	}
	before := len(next.Calls())
	for _, i := range []int{0, 3} {
		readRange(t, c, b, i*chunk, chunk)
	}
	if n := len(next.Calls()) - before; n != 0 {
		t.Errorf("%d chunks that were used last had to be fetched again", n)
	}
	must(t, c.Close())
	c = openCache(t, f, next, chunkFile) // a smaller limit
	if s := c.Stats(); s.Chunks != 1 || s.Bytes != chunkFile || cacheBytes(f) != chunkFile {
		t.Errorf("with a smaller limit: %+v and %d bytes", s, cacheBytes(f))
	}
}

// A flipped bit anywhere, a cut, and a file of another object or place are all
// found and fetched again.
func TestCacheTrustsNothingOnDisk(t *testing.T) {
	next, b := origin(t, 2)
	f := snaptest.NewFS()
	c := openCache(t, f, next, 1<<20)
	readRange(t, c, b, 0, len(b))
	must(t, c.Close())
	var names []string
	for _, n := range f.Files() {
		if len(f.Content(n)) > 0 {
			names = append(names, n)
		}
	}
	if len(names) != 3 {
		t.Fatalf("files %q", f.Files())
	}
	for at := 0; at < chunkFile; at += 7 {
		d := f.Restart()
		damaged := d.Content(names[0])
		damaged[at%len(damaged)] ^= 0x40
		readRange(t, openCache(t, d, next, 1<<20), b, 0, len(b))
	}
	d := f.Restart()
	h, err := d.OpenRW(names[1])
	must(t, err)
	must(t, h.Truncate(100))
	must(t, h.Close())
	must(t, d.Rename(names[2], names[0]))
	c = openCache(t, d, next, 1<<20)
	readRange(t, c, b, 0, len(b))
	if s := c.Stats(); s.Misses == 0 {
		t.Errorf("nothing was fetched again: %+v", s)
	}
}

// Power fails at any operation of the cache: the next one reads right.
func TestCacheSurvivesACrashAtEveryOperation(t *testing.T) {
	next, b := origin(t, 6)
	r := rand.New(rand.NewPCG(1, 2))
	power := errors.New("no power")
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		off := false
		f.FailWith(func(op int, _ string) error {
			if op >= n {
				off = true
				return power
			}
			return nil
		})
		c, err := storage.NewCache(next, storage.CacheOptions{FS: f, Dir: "/cache", MaxBytes: 3 * chunkFile, ChunkSize: chunk})
		if err == nil {
			for range 2 {
				readRange(t, c, b, 0, len(b)) // a dead disk does not stop reads
			}
			must(t, c.Close())
		}
		for _, survives := range []func(string) bool{nil, func(string) bool { return true }, func(string) bool { return r.IntN(2) == 0 }} {
			d := f.Crash(survives)
			c := openCache(t, d, next, 3*chunkFile)
			readRange(t, c, b, 0, len(b))
			must(t, c.Close())
			if got := cacheBytes(d); got > 3*chunkFile {
				t.Fatalf("after a crash at operation %d the cache holds %d bytes", n, got)
			}
		}
		if !off {
			return
		}
	}
}

// Every operation of the disk fails once: reads are right, and the limit holds.
func TestCacheReadsOnAFailingDisk(t *testing.T) {
	next, b := origin(t, 6)
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		hit := ""
		f.FailWith(func(op int, what string) error {
			if op == n {
				hit = what
				return syscall.EIO
			}
			return nil
		})
		c, err := storage.NewCache(next, storage.CacheOptions{FS: f, Dir: "/cache", MaxBytes: 3 * chunkFile, ChunkSize: chunk})
		if err != nil {
			isErr(t, err, syscall.EIO)
			continue
		}
		for range 3 {
			readRange(t, c, b, 0, len(b))
		}
		must(t, c.Close())
		if hit == "" {
			return
		}
		// A file that could not be removed may be left until the next start.
		if got := cacheBytes(f); got > 4*chunkFile {
			t.Fatalf("after the failure of %s the cache holds %d bytes", hit, got)
		}
	}
}

func TestCacheIsSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		next, b := origin(t, 3)
		gate := make(chan struct{})
		next.FailWith(func(int, string) *storagetest.Fault { return &storagetest.Fault{Wait: gate} })
		c := openCache(t, snaptest.NewFS(), next, 1<<20)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { readRange(t, c, b, 10, 20) })
		}
		// One of them gives up; the others are served all the same.
		ctx, cancel := context.WithCancel(bg)
		wg.Go(func() {
			_, err := c.ReadAt(ctx, "k", make([]byte, 1), 0)
			isErr(t, err, context.Canceled)
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(gate)
		wg.Wait()
		if n := len(next.Calls()); n != 1 {
			t.Errorf("%d fetches for 21 readers of a chunk", n)
		}
	})
}

// A fetch that nobody waits for any more ends, and the next reader is served by
// another one. Close ends what is left.
func TestCacheEndsFetchesThatNobodyWants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		next, b := origin(t, 3)
		never := make(chan struct{})
		next.FailWith(func(n int, _ string) *storagetest.Fault {
			if n == 1 {
				return nil
			}
			return &storagetest.Fault{Wait: never}
		})
		c := openCache(t, snaptest.NewFS(), next, 1<<20)
		ctx, cancel := context.WithCancel(bg)
		go func() { synctest.Wait(); cancel() }()
		_, err := c.ReadAt(ctx, "k", make([]byte, 1), 0)
		isErr(t, err, context.Canceled)
		readRange(t, c, b, 0, 10)
		done := make(chan error)
		go func() {
			_, err := c.ReadAt(bg, "k", make([]byte, 1), chunk)
			done <- err
		}()
		synctest.Wait()
		must(t, c.Close())
		if err := <-done; err == nil {
			t.Error("a read went well after Close")
		}
		if _, err := c.ReadAt(bg, "k", make([]byte, 1), 0); err == nil {
			t.Error("a closed cache was read")
		}
		must(t, c.Close())
	})
}

func TestCacheKeepsNoFailure(t *testing.T) {
	next, b := origin(t, 1)
	next.FailWith(func(n int, _ string) *storagetest.Fault {
		if n == 0 {
			return &storagetest.Fault{Err: transient()}
		}
		if n == 1 {
			return &storagetest.Fault{Short: 5}
		}
		return nil
	})
	c := openCache(t, snaptest.NewFS(), next, 1<<20)
	for range 2 {
		_, err := c.ReadAt(bg, "k", make([]byte, 10), 0)
		isErr(t, err, storage.ErrTransient)
	}
	readRange(t, c, b, 0, 10)
}

// A Put through the cache is seen by what is read afterwards, also when a fetch
// of the old content is still under way.
func TestCacheForgetsWhatIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		next := newFaulty(t)
		c := openCache(t, snaptest.NewFS(), next, 1<<20)
		gate := make(chan struct{})
		next.FailWith(func(n int, _ string) *storagetest.Fault {
			if n == 0 {
				return &storagetest.Fault{Err: nil, Wait: gate}
			}
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = getString(c, "k") })
		synctest.Wait()
		must(t, putString(c, "k", "new"))
		close(gate)
		wg.Wait()
		for i := range 3 {
			if got, err := getString(c, "k"); got != "new" || err != nil {
				t.Fatalf("read %q, %v", got, err)
			}
			if i == 1 {
				must(t, c.Delete(bg, "k"))
				_, err := getString(c, "k")
				if err == nil {
					t.Fatal("a deleted object was read")
				}
				must(t, putString(c, "k", "new"))
			}
		}
	})
}

func BenchmarkCacheHit(b *testing.B) {
	m := storagetest.NewMemory()
	must(b, m.Put(bg, "k", bytes.NewReader(make([]byte, 16<<20)), 16<<20))
	c, err := storage.NewCache(m, storage.CacheOptions{Dir: b.TempDir()})
	must(b, err)
	defer c.Close()
	p := make([]byte, 64<<10)
	for b.Loop() {
		for off := int64(0); off < 16<<20; off += int64(len(p)) {
			if n, err := c.ReadAt(bg, "k", p, off); n < len(p) {
				b.Fatal(fmt.Errorf("read %d: %w", n, err))
			}
		}
	}
	b.SetBytes(16 << 20)
}
