package snapshot

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// The trailer of a data file; see the package documentation.
const (
	dataMagic   = "WRENNDAT"
	dataVersion = 1
	trailerSize = 76
	trailerCRC  = 72
	sumSize     = 4
)

const blockSize = format.BlockSize

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encodeTrailer returns the trailer of a build's data file.
func encodeTrailer(ref format.BuildRef) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, trailerSize)
	b = append(b, dataMagic...)
	b = le.AppendUint32(b, dataVersion)
	b = le.AppendUint32(b, blockSize)
	b = le.AppendUint64(b, ref.Blocks)
	b = append(b, ref.ID[:]...)
	b = append(b, ref.Digest[:]...)
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// build is the open data file of one build, with its verified checksums. It is
// shared by all images of the store that read from it.
type build struct {
	ref  format.BuildRef
	name string
	refs int // guarded by Store.mu

	open sync.Mutex // guards what follows until it is set
	file storage.File
	sums []byte // checksum table as stored: 4 bytes per block
}

// acquireBuild returns the build with its file open, and counts the user.
func (s *Store) acquireBuild(ref format.BuildRef) (*build, error) {
	s.mu.Lock()
	b := s.builds[ref.ID]
	if b == nil {
		b = &build{ref: ref, name: s.dataPath(ref.ID)}
		s.builds[ref.ID] = b
	}
	b.refs++
	s.mu.Unlock()

	err := b.load(s.fs)
	if err == nil && b.ref != ref {
		err = &CorruptError{Image: ref.ID, File: b.name, Reason: "two headers give it different sizes or digests"}
	}
	if err != nil {
		return nil, errors.Join(err, s.releaseBuild(b))
	}
	return b, nil
}

// releaseBuild gives one use back; the last one closes the file.
func (s *Store) releaseBuild(b *build) error {
	s.mu.Lock()
	b.refs--
	last := b.refs == 0
	if last {
		delete(s.builds, b.ref.ID)
	}
	s.mu.Unlock()
	b.open.Lock()
	defer b.open.Unlock()
	if !last || b.file == nil {
		return nil
	}
	return b.file.Close()
}

// load opens the file and verifies the checksum table, once. A failed load is
// tried again by the next user: the fault may have passed.
func (b *build) load(fsys storage.FS) error {
	b.open.Lock()
	defer b.open.Unlock()
	if b.file != nil {
		return nil
	}
	f, err := fsys.Open(b.name)
	if errors.Is(err, fs.ErrNotExist) {
		return &CorruptError{Image: b.ref.ID, File: b.name, Reason: "the file is missing"}
	}
	if err != nil {
		return fmt.Errorf("open build %s: %w", b.ref.ID, err)
	}
	sums, err := readSums(f, b.ref, b.name)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	b.file, b.sums = f, sums
	return nil
}

// readSums reads and verifies the trailer and the checksum table.
func readSums(f storage.File, ref format.BuildRef, name string) ([]byte, error) {
	corrupt := func(off int64, reason string, args ...any) error {
		return &CorruptError{Image: ref.ID, File: name, Offset: off, Reason: fmt.Sprintf(reason, args...)}
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("open build %s: %w", ref.ID, err)
	}
	table := int64(ref.Blocks) * blockSize
	end := table + int64(ref.Blocks)*sumSize
	if size != end+trailerSize {
		return nil, corrupt(min(size, end+trailerSize), "the file has %d bytes, a build of %d blocks has %d", size, ref.Blocks, end+trailerSize)
	}
	b := make([]byte, size-table)
	if n, err := f.ReadAt(b, table); n < len(b) {
		return nil, fmt.Errorf("read checksums of build %s: %w", ref.ID, unexpected(err))
	}
	sums, trailer := b[:end-table:end-table], b[end-table:]
	if string(trailer) != string(encodeTrailer(ref)) {
		return nil, corrupt(end, "the trailer does not fit the header of the image")
	}
	if sha256.Sum256(sums) != ref.Digest {
		return nil, corrupt(table, "the checksum table does not fit its digest")
	}
	return sums, nil
}

// unexpected words the end of a file inside of what must be there.
func unexpected(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// read fills p, whole blocks, from the block first on, by one pread, and
// verifies it. On an error it returns how many bytes before the damage are
// good; the rest of p is cleared, so that nobody sees what was not verified.
func (b *build) read(p []byte, first uint64) (int, error) {
	n, err := b.file.ReadAt(p, int64(first)*blockSize)
	if n < len(p) {
		clear(p)
		return 0, fmt.Errorf("read block %d of build %s (%s): %w", first, b.ref.ID, b.name, unexpected(err))
	}
	for at := 0; at < len(p); at += blockSize {
		i := first + uint64(at/blockSize)
		want := binary.LittleEndian.Uint32(b.sums[i*sumSize:])
		if got := crc32.Checksum(p[at:at+blockSize], castagnoli); got != want {
			clear(p[at:])
			return at, &CorruptError{
				Image: b.ref.ID, File: b.name, Offset: int64(i) * blockSize,
				Reason: fmt.Sprintf("the block's checksum is %08x, want %08x", got, want),
			}
		}
	}
	return len(p), nil
}
