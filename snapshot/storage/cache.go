package storage

import (
	"container/list"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"
)

// CacheOptions are the knobs of NewCache.
type CacheOptions struct {
	// FS and Dir say where the cache lives; a nil FS is OS. The directory is
	// made if its parent exists, and belongs to the cache alone.
	FS  FS
	Dir string
	// MaxBytes bounds the files of the cache together; default 8 GiB.
	MaxBytes int64
	// ChunkSize is what is fetched and kept at a time, in bytes; default
	// 256 KiB. Changing it makes the cache begin anew.
	ChunkSize int
	// Cacheable says which objects never change under their key; nil: all.
	// Others are read from the store each time: a cached read is made of
	// chunks, which may come from before and after a change.
	Cacheable func(key string) bool
}

// Cache keeps parts of objects on a local disk. Only reads go through it, in
// chunks; a Put or Delete through it drops what it has of the object.
//
// Invariants:
//
//  1. No byte leaves the cache unless the checksum over its chunk, the chunk's
//     number and the key fits. What does not fit is fetched again, and is only counted.
//  2. The files never exceed MaxBytes together; the least recently used go
//     first. After a restart the order is that of the fetching.
//  3. A chunk is fetched once, however many readers wait for it.
//  4. A failing disk makes reads slow, never wrong and never impossible.
//  5. It needs no sync: what a crash leaves half written does not fit its
//     checksum.
type Cache struct {
	next Objects
	fs   FS
	dir  string
	max  int64
	size int // of a chunk
	only func(key string) bool
	lock File

	// The fetches end with the cache.
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	entries map[chunkID]*list.Element // of *cached
	lru     *list.List                // front: used last
	flights map[chunkID]*flight
	seq     uint64
	stats   CacheStats
}

var _ Objects = (*Cache)(nil)

// chunkID names a chunk: the hash of the object's key, and the number.
type chunkID struct {
	key   [16]byte
	index int64
}

type cached struct {
	id   chunkID
	size int64 // of the file
}

// CacheStats counts since the opening, but for Bytes and Chunks, which are what
// is there now.
type CacheStats struct {
	Bytes, Chunks int64
	Hits, Misses  int64 // chunks asked for
	Fetched       int64 // bytes that came from the store
	Evicted       int64 // chunks
	Damaged       int64 // chunks whose checksum did not fit
	DiskErrors    int64
}

const (
	defaultCacheBytes = 8 << 30
	defaultChunk      = 256 << 10
	maxChunk          = 64 << 20
	// fanOut is how many chunks of one read are got at a time.
	fanOut = 8
)

// NewCache opens the cache in o.Dir, with what an earlier process left there.
// ErrLocked when another process has it. The caller closes it.
func NewCache(next Objects, o CacheOptions) (*Cache, error) {
	if o.Dir == "" {
		return nil, errors.New("open cache: Dir: is empty")
	}
	if o.FS == nil {
		o.FS = OS{}
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = defaultCacheBytes
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = defaultChunk
	}
	if o.ChunkSize < 512 || o.ChunkSize > maxChunk {
		return nil, fmt.Errorf("open cache: ChunkSize: %d is not in 512…%d", o.ChunkSize, maxChunk)
	}
	if o.MaxBytes < 0 {
		return nil, fmt.Errorf("open cache: MaxBytes: %d is negative", o.MaxBytes)
	}
	if o.Cacheable == nil {
		o.Cacheable = func(string) bool { return true }
	}
	c := &Cache{
		next: next, fs: o.FS, dir: path.Clean(o.Dir), max: o.MaxBytes, size: o.ChunkSize, only: o.Cacheable,
		entries: map[chunkID]*list.Element{}, lru: list.New(), flights: map[chunkID]*flight{},
	}
	c.ctx, c.stop = context.WithCancel(context.Background())
	if err := c.load(); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	return c, nil
}

// Close ends the fetches, keeps what was fetched by then, and gives the
// directory back. Reads fail afterwards.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.stop()
	c.wg.Wait()
	if err := c.lock.Close(); err != nil {
		return fmt.Errorf("close cache: %w", err)
	}
	return nil
}

// Stats returns the counters.
func (c *Cache) Stats() CacheStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

func keyHash(key string) [16]byte {
	d := sha256.Sum256([]byte(key))
	return [16]byte(d[:16])
}

// ReadAt implements Objects.
func (c *Cache) ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := checkRead(ctx, key, off); err != nil {
		return 0, err
	}
	if len(p) == 0 || !c.only(key) {
		return c.next.ReadAt(ctx, key, p, off)
	}
	hash := keyHash(key)
	first := off / int64(c.size)
	if (off+int64(len(p))-1)/int64(c.size) == first {
		return c.part(ctx, key, chunkID{hash, first}, p, int(off%int64(c.size)))
	}
	return c.readMany(ctx, key, hash, p, off)
}

// partRead is one chunk's part of a read.
type partRead struct {
	id   chunkID
	p    []byte
	from int // in the chunk
	n    int
	err  error
}

// readMany reads a range of several chunks, some at a time, and returns what is
// good from its beginning on.
func (c *Cache) readMany(ctx context.Context, key string, hash [16]byte, p []byte, off int64) (int, error) {
	var parts []partRead
	for len(p) > 0 {
		from := int(off % int64(c.size))
		n := min(len(p), c.size-from)
		parts = append(parts, partRead{id: chunkID{hash, off / int64(c.size)}, p: p[:n], from: from})
		p, off = p[n:], off+int64(n)
	}
	for at := 0; at < len(parts); at += fanOut {
		var wg sync.WaitGroup
		group := parts[at:min(at+fanOut, len(parts))]
		for i := range group {
			r := &group[i]
			wg.Go(func() { r.n, r.err = c.part(ctx, key, r.id, r.p, r.from) })
		}
		wg.Wait()
		if group[len(group)-1].err != nil {
			break
		}
	}
	n := 0
	for i := range parts {
		n += parts[i].n
		if parts[i].err != nil {
			return n, parts[i].err
		}
	}
	return n, nil
}

// part reads p from a chunk.
func (c *Cache) part(ctx context.Context, key string, id chunkID, p []byte, from int) (int, error) {
	chunk, err := c.chunk(ctx, key, id)
	if err != nil {
		return 0, NewObjectError("read", key, nil, err)
	}
	n := 0
	if from < len(chunk) {
		n = copy(p, chunk[from:])
	}
	if n < len(p) {
		return n, io.EOF // a chunk that is not full is the last one
	}
	return n, nil
}

// Put implements Objects.
func (c *Cache) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	if err := checkPut(ctx, key, size); err != nil {
		return err
	}
	defer c.forget(key)
	return c.next.Put(ctx, key, body, size)
}

// Delete implements Objects.
func (c *Cache) Delete(ctx context.Context, key string) error {
	if err := checkCall(ctx, "delete", key); err != nil {
		return err
	}
	defer c.forget(key)
	return c.next.Delete(ctx, key)
}

// Head implements Objects.
func (c *Cache) Head(ctx context.Context, key string) (ObjectInfo, error) {
	return c.next.Head(ctx, key)
}

// List implements Objects.
func (c *Cache) List(ctx context.Context, prefix, after string) ([]ObjectInfo, bool, error) {
	return c.next.List(ctx, prefix, after)
}

// forget drops what there is of an object, also what is under way.
func (c *Cache) forget(key string) {
	hash := keyHash(key)
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, f := range c.flights {
		if id.key == hash {
			f.stale = true
			delete(c.flights, id)
		}
	}
	for id, e := range c.entries {
		if id.key == hash {
			c.drop(e)
		}
	}
}
