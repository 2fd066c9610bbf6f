package storage

import (
	"context"
	"errors"
	"io"
)

// flight is a chunk that is being fetched. The goroutine that fetches it owns
// it; waiters and stale are guarded by Cache.mu.
type flight struct {
	cancel  context.CancelFunc
	waiters int
	stale   bool          // the object was changed meanwhile: do not keep it
	done    chan struct{} // closed once data or err is set
	data    []byte
	err     error
}

var errCacheClosed = errors.New("the cache is closed")

// chunk returns the content of a chunk: a full one, or less at the object's
// end. It must not be changed.
func (c *Cache) chunk(ctx context.Context, key string, id chunkID) ([]byte, error) {
	if data := c.fromDisk(key, id); data != nil {
		return data, nil
	}
	f, err := c.join(key, id)
	if err != nil {
		return nil, err
	}
	select {
	case <-f.done:
		return f.data, f.err
	case <-ctx.Done():
		c.leave(id, f)
		return nil, ctx.Err()
	}
}

// fromDisk returns a chunk that the cache holds, or nil.
func (c *Cache) fromDisk(key string, id chunkID) []byte {
	c.mu.Lock()
	e := c.entries[id]
	if e == nil || c.closed {
		c.mu.Unlock()
		return nil
	}
	c.lru.MoveToFront(e)
	c.mu.Unlock()
	data, err := c.readFile(key, id)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.stats.Hits++
		return data
	}
	if c.entries[id] != e {
		return nil // it was evicted while we read
	}
	if errors.Is(err, errBadChunk) {
		c.stats.Damaged++
	} else {
		c.stats.DiskErrors++
	}
	c.drop(e)
	return nil
}

// join takes part in the fetching of a chunk, or begins it.
func (c *Cache) join(key string, id chunkID) (*flight, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errCacheClosed
	}
	c.stats.Misses++
	if f := c.flights[id]; f != nil {
		f.waiters++
		return f, nil
	}
	ctx, cancel := context.WithCancel(c.ctx)
	f := &flight{cancel: cancel, waiters: 1, done: make(chan struct{})}
	c.flights[id] = f
	c.wg.Go(func() { c.fetch(ctx, key, id, f) })
	return f, nil
}

// leave gives up waiting; when nobody is left the fetch ends, and the next
// reader begins another one.
func (c *Cache) leave(id chunkID, f *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.waiters--
	if f.waiters > 0 {
		return
	}
	f.cancel()
	if c.flights[id] == f {
		delete(c.flights, id)
	}
}

func (c *Cache) fetch(ctx context.Context, key string, id chunkID, f *flight) {
	defer f.cancel()
	buf := make([]byte, c.size)
	n, err := c.next.ReadAt(ctx, key, buf, id.index*int64(c.size))
	switch {
	case err == io.EOF || err == nil && n == len(buf):
		f.data = buf[:n]
	case err == nil:
		f.err = NewObjectError("read", key, ErrTransient, io.ErrUnexpectedEOF)
	default:
		f.err = err
	}
	if f.err != nil {
		c.land(id, f, n) // first: who reads after a failure tries again
		close(f.done)
		return
	}
	// Readers go on; later ones find the flight until the file is there.
	close(f.done)
	if n > 0 {
		c.keep(key, id, f)
	}
	c.land(id, f, n)
}

// land takes a flight out that has brought n bytes.
func (c *Cache) land(id chunkID, f *flight, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Fetched += int64(n)
	if c.flights[id] == f {
		delete(c.flights, id)
	}
}
