package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// The map file, version 1, little-endian:
//
//	offset  bytes  what
//	0       8      magic "WRENNOVL"
//	8       4      version, 1
//	12      4      block size, 4096
//	16      8      blocks of the disk, B
//	24      64     boot id of the last open, padded with zeros
//	88      4      CRC32C over bytes 0…87
//	4096    B      live area: one byte per block
//	4096+P  B      stable area: the same (P is B rounded up to 4096)
//
// A byte is 0 inherited, 1 zero, 2 data. The live area is written with every
// change and is what counts while the same boot of the machine goes on. It is
// not synced on its own, so after a power failure it may point to data that
// never reached the disk; then the stable area counts, which Flush writes and
// syncs after the data.
const (
	mapMagic   = "WRENNOVL"
	mapVersion = 1
	mapHeader  = 4096
	mapCRC     = 88
	bootIDSize = 64
	// mapPage is the unit in which changes wait for a Flush, in blocks.
	mapPage = 4096
)

const (
	stateInherited byte = iota
	stateZero
	stateData
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// dirtyMap is the map file and its copy in memory.
type dirtyMap struct {
	file   storage.File
	blocks int64

	mu    sync.RWMutex
	state []byte             // per block; what the live area holds
	dirty map[int64]struct{} // map pages that changed since the last takeDirty
}

func openMap(fsys storage.FS, name string, blocks int64) (*dirtyMap, error) {
	boot, err := fsys.BootID()
	if err != nil {
		return nil, err
	}
	if boot == "" || len(boot) > bootIDSize {
		return nil, fmt.Errorf("map file: boot id %q does not fit", boot)
	}
	f, err := fsys.OpenRW(name)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = createMap(fsys, name, boot, blocks)
	}
	if err != nil {
		return nil, fmt.Errorf("map file: %w", err)
	}
	m := &dirtyMap{file: f, blocks: blocks, dirty: map[int64]struct{}{}}
	if err := m.load(boot); err != nil {
		return nil, errors.Join(fmt.Errorf("map file %s: %w", name, err), f.Close())
	}
	return m, nil
}

// stableAt returns the offset of the stable area.
func stableAt(blocks int64) int64 {
	return mapHeader + (blocks+mapPage-1)/mapPage*mapPage
}

// createMap makes the file under another name first: it exists whole or not.
func createMap(fsys storage.FS, name, boot string, blocks int64) (storage.File, error) {
	tmp := name + ".tmp"
	if err := fsys.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := fsys.Create(tmp)
	if err != nil {
		return nil, err
	}
	err = f.Truncate(stableAt(blocks) + blocks)
	if err == nil {
		_, err = f.WriteAt(encodeMapHeader(boot, blocks), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	// The data file's name must be durable before there is a map.
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return nil, err
	}
	if err := fsys.Rename(tmp, name); err != nil {
		return nil, err
	}
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return nil, err
	}
	return fsys.OpenRW(name)
}

func encodeMapHeader(boot string, blocks int64) []byte {
	b := make([]byte, mapCRC+4)
	copy(b, mapMagic)
	binary.LittleEndian.PutUint32(b[8:], mapVersion)
	binary.LittleEndian.PutUint32(b[12:], BlockSize)
	binary.LittleEndian.PutUint64(b[16:], uint64(blocks))
	copy(b[24:], boot)
	binary.LittleEndian.PutUint32(b[mapCRC:], crc32.Checksum(b[:mapCRC], castagnoli))
	return b
}

// decodeMapHeader checks a header against the disk that is opened and returns
// its boot id.
func decodeMapHeader(b []byte, blocks int64) (boot string, err error) {
	le := binary.LittleEndian
	switch {
	case len(b) != mapCRC+4:
		return "", fmt.Errorf("header: %d bytes, want %d", len(b), mapCRC+4)
	case string(b[:8]) != mapMagic:
		return "", errors.New("magic: this is no overlay map")
	case le.Uint32(b[mapCRC:]) != crc32.Checksum(b[:mapCRC], castagnoli):
		return "", errors.New("header checksum: does not fit")
	case le.Uint32(b[8:]) != mapVersion:
		return "", fmt.Errorf("version: %d is not known", le.Uint32(b[8:]))
	case le.Uint32(b[12:]) != BlockSize:
		return "", fmt.Errorf("block size: %d is not %d", le.Uint32(b[12:]), BlockSize)
	case le.Uint64(b[16:]) != uint64(blocks):
		return "", fmt.Errorf("blocks: %d, the base has %d", le.Uint64(b[16:]), blocks)
	}
	return string(bytes.TrimRight(b[24:24+bootIDSize], "\x00")), nil
}

// load reads the area that counts and, after another boot, brings the live
// area in line with the stable one before it counts again.
func (m *dirtyMap) load(boot string) error {
	size, err := m.file.Size()
	if err != nil {
		return err
	}
	if want := stableAt(m.blocks) + m.blocks; size != want {
		return fmt.Errorf("length: %d bytes, want %d", size, want)
	}
	b := make([]byte, mapCRC+4)
	if _, err := m.file.ReadAt(b, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	last, err := decodeMapHeader(b, m.blocks)
	if err != nil {
		return err
	}
	m.state = make([]byte, m.blocks)
	at := int64(mapHeader)
	if last != boot {
		at = stableAt(m.blocks)
	}
	if m.blocks > 0 {
		if _, err := m.file.ReadAt(m.state, at); err != nil {
			return fmt.Errorf("states: %w", err)
		}
	}
	for i, s := range m.state {
		if s > stateData {
			return fmt.Errorf("state of block %d: %d is not known", i, s)
		}
	}
	if last != boot {
		return m.adopt(boot)
	}
	// Which changes a predecessor flushed is not known: take all as not.
	for i, s := range m.state {
		if s != stateInherited {
			m.dirty[int64(i)/mapPage] = struct{}{}
		}
	}
	return nil
}

// adopt begins another boot: the live area becomes a copy of the stable one,
// durably, before the header says that it counts.
func (m *dirtyMap) adopt(boot string) error {
	if m.blocks > 0 {
		if _, err := m.file.WriteAt(m.state, mapHeader); err != nil {
			return err
		}
	}
	if err := m.file.Sync(); err != nil {
		return err
	}
	if _, err := m.file.WriteAt(encodeMapHeader(boot, m.blocks), 0); err != nil {
		return err
	}
	return m.file.Sync()
}

// run returns the kind of a block and how many blocks from it on, at most
// limit, have the same one.
func (m *dirtyMap) run(block, limit int64) (format.Kind, int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.state[block:min(m.blocks, block+limit)]
	n := 1
	for n < len(s) && s[n] == s[0] {
		n++
	}
	return kindOf(s[0]), int64(n)
}

func kindOf(state byte) format.Kind {
	switch state {
	case stateZero:
		return format.Zero
	case stateData:
		return format.Data
	}
	return format.Inherited
}

// set marks n blocks as Zero or Data: in the file, where it survives the
// process, and then in memory, where readers see it. The caller holds the
// lock of the range, so nobody else changes these blocks.
func (m *dirtyMap) set(first, n int64, kind format.Kind) error {
	state := stateData
	if kind == format.Zero {
		state = stateZero
	}
	if m.all(first, n, state) {
		return nil
	}
	if _, err := m.file.WriteAt(bytes.Repeat([]byte{state}, int(n)), mapHeader+first); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.state[first : first+n]
	for i := range s {
		s[i] = state
	}
	for p := first / mapPage; p <= (first+n-1)/mapPage; p++ {
		m.dirty[p] = struct{}{}
	}
	return nil
}

// all reports whether n blocks already have a state: the usual case of a write
// to a place that was written before, which then costs no write to the map.
func (m *dirtyMap) all(first, n int64, state byte) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, s := range m.state[first : first+n] {
		if s != state {
			return false
		}
	}
	return true
}

// takeDirty returns copies of the map pages that changed since it was last
// called. It must be called before the data is synced: marks that come later
// may point to data that the sync did not cover.
func (m *dirtyMap) takeDirty() map[int64][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	pages := make(map[int64][]byte, len(m.dirty))
	for p := range m.dirty {
		pages[p] = bytes.Clone(m.state[p*mapPage : min(m.blocks, (p+1)*mapPage)])
	}
	clear(m.dirty)
	return pages
}

// write puts pages into the stable area.
func (m *dirtyMap) write(pages map[int64][]byte) error {
	for p, b := range pages {
		if _, err := m.file.WriteAt(b, stableAt(m.blocks)+p*mapPage); err != nil {
			return err
		}
	}
	return nil
}

// putBack has takeDirty give pages again that could not be written.
func (m *dirtyMap) putBack(pages map[int64][]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := range pages {
		m.dirty[p] = struct{}{}
	}
}

func (m *dirtyMap) close() error { return m.file.Close() }
