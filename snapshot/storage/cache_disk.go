package storage

import (
	"cmp"
	"container/list"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A file of the cache is the chunk's content and a trailer:
//
//	offset  bytes  what
//	0       8      magic "WRENNCCH"
//	8       4      version, 1
//	12      4      chunk size
//	16      8      sequence number of the fetch
//	24      8      number of the chunk
//	32      4      CRC32C over key, content and the trailer's bytes before
//
// The name is "<hash of the key>-<number of the chunk>", both hexadecimal, in
// a directory of the hash's first two digits.
const (
	cacheMagic   = "WRENNCCH"
	cacheVersion = 1
	cacheTrailer = 36
)

var (
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	errBadChunk = errors.New("the chunk's checksum does not fit")
)

func (id chunkID) name() string {
	return hex.EncodeToString(id.key[:]) + "-" + strconv.FormatInt(id.index, 16)
}

func parseChunkName(name string) (id chunkID, ok bool) {
	hash, index, _ := strings.Cut(name, "-")
	b, err := hex.DecodeString(hash)
	if err != nil || len(b) != len(id.key) {
		return id, false
	}
	copy(id.key[:], b)
	id.index, err = strconv.ParseInt(index, 16, 64)
	return id, err == nil && id.name() == name
}

func (c *Cache) path(id chunkID) string {
	n := id.name()
	return path.Join(c.dir, n[:2], n)
}

func (c *Cache) trailer(key string, id chunkID, content []byte, seq uint64) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, cacheTrailer)
	b = append(b, cacheMagic...)
	b = le.AppendUint32(b, cacheVersion)
	b = le.AppendUint32(b, uint32(c.size))
	b = le.AppendUint64(b, seq)
	b = le.AppendUint64(b, uint64(id.index))
	sum := crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, content)
	return le.AppendUint32(b, crc32.Update(sum, castagnoli, b))
}

// readFile returns the verified content of a chunk.
func (c *Cache) readFile(key string, id chunkID) ([]byte, error) {
	f, err := c.fs.Open(c.path(id))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size <= cacheTrailer || size > int64(c.size)+cacheTrailer {
		return nil, errBadChunk
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, err
	}
	content, trailer := b[:size-cacheTrailer], b[size-cacheTrailer:]
	seq := binary.LittleEndian.Uint64(trailer[16:])
	if string(trailer) != string(c.trailer(key, id, content, seq)) {
		return nil, errBadChunk
	}
	return content, nil
}

// keep writes a fetched chunk into the cache, if it can.
func (c *Cache) keep(key string, id chunkID, f *flight) {
	size := int64(len(f.data)) + cacheTrailer
	c.mu.Lock()
	if f.stale || size > c.max || c.entries[id] != nil {
		c.mu.Unlock()
		return
	}
	// The room is taken before the file is there, so that it is never too much.
	for c.stats.Bytes+size > c.max && c.lru.Len() > 0 {
		c.drop(c.lru.Back())
		c.stats.Evicted++
	}
	if c.stats.Bytes+size > c.max {
		c.mu.Unlock()
		return // all of it is being written by others
	}
	c.stats.Bytes += size
	c.seq++
	seq := c.seq
	c.mu.Unlock()

	tmp := path.Join(path.Dir(c.path(id)), tempMark+strconv.FormatUint(seq, 16))
	err := c.writeFile(tmp, f.data, c.trailer(key, id, f.data, seq))
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && !f.stale && c.entries[id] == nil {
		// Under the lock: nobody may drop the name between here and the entry.
		if err = c.fs.Rename(tmp, c.path(id)); err == nil {
			c.entries[id] = c.lru.PushFront(&cached{id: id, size: size})
			c.stats.Chunks++
			return
		}
	}
	c.stats.Bytes -= size
	if err != nil {
		c.stats.DiskErrors++
	}
	if err := c.fs.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.stats.DiskErrors++ // the next start removes it
	}
}

func (c *Cache) writeFile(name string, content, trailer []byte) error {
	if err := c.fs.Mkdir(path.Dir(name)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, err := c.fs.Create(name)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	if err == nil {
		_, err = f.WriteAt(trailer, int64(len(content)))
	}
	return errors.Join(err, f.Close())
}

// drop removes an entry and its file. Callers hold the lock; who is reading the
// file goes on.
func (c *Cache) drop(e *list.Element) {
	en := e.Value.(*cached)
	if c.entries[en.id] != e {
		return
	}
	delete(c.entries, en.id)
	c.lru.Remove(e)
	c.stats.Bytes -= en.size
	c.stats.Chunks--
	if err := c.fs.Remove(c.path(en.id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.stats.DiskErrors++
	}
}

// load takes the directory and what is in it.
func (c *Cache) load() (err error) {
	if err := c.fs.Mkdir(c.dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	name := path.Join(c.dir, "lock")
	f, err := c.fs.OpenRW(name)
	if errors.Is(err, fs.ErrNotExist) {
		if f, err = c.fs.Create(name); errors.Is(err, fs.ErrExist) {
			f, err = c.fs.OpenRW(name)
		}
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := f.Lock(); err != nil {
		return err
	}
	found, err := c.scan()
	if err != nil {
		return err
	}
	slices.SortFunc(found, func(a, b foundChunk) int { return cmp.Compare(a.seq, b.seq) })
	for _, e := range found {
		c.entries[e.id] = c.lru.PushFront(&cached{id: e.id, size: e.size})
		c.stats.Bytes += e.size
		c.stats.Chunks++
		c.seq = max(c.seq, e.seq)
	}
	for c.stats.Bytes > c.max && c.lru.Len() > 0 {
		c.drop(c.lru.Back()) // the limit was made smaller
		c.stats.Evicted++
	}
	c.lock = f
	return nil
}

type foundChunk struct {
	cached
	seq uint64
}

// scan lists the chunks on the disk and removes what is none. The contents are
// verified when they are read.
func (c *Cache) scan() ([]foundChunk, error) {
	dirs, err := c.fs.ReadDir(c.dir)
	if err != nil {
		return nil, err
	}
	var out []foundChunk
	for _, d := range dirs {
		if len(d) != 2 {
			continue // the lock, or not ours
		}
		names, err := c.fs.ReadDir(path.Join(c.dir, d))
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			e, err := c.inspect(n)
			if err != nil {
				if err := c.fs.Remove(path.Join(c.dir, d, n)); err != nil {
					return nil, fmt.Errorf("remove what is no chunk: %w", err)
				}
				continue
			}
			out = append(out, e)
		}
	}
	return out, nil
}

// inspect reads what a file says of itself.
func (c *Cache) inspect(name string) (foundChunk, error) {
	id, ok := parseChunkName(name)
	if !ok {
		return foundChunk{}, errBadChunk
	}
	f, err := c.fs.Open(c.path(id))
	if err != nil {
		return foundChunk{}, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return foundChunk{}, err
	}
	b := make([]byte, cacheTrailer)
	if size <= cacheTrailer {
		return foundChunk{}, errBadChunk
	}
	if n, err := f.ReadAt(b, size-cacheTrailer); n < len(b) {
		return foundChunk{}, err
	}
	le := binary.LittleEndian
	if string(b[:8]) != cacheMagic || le.Uint32(b[8:]) != cacheVersion || le.Uint32(b[12:]) != uint32(c.size) {
		return foundChunk{}, errBadChunk
	}
	return foundChunk{cached: cached{id: id, size: size}, seq: le.Uint64(b[16:])}, nil
}
