package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// An Export holds a committed snapshot for copying it elsewhere: the files of
// its images stay until Close, whatever is deleted meanwhile. The state goes
// with the snapshot, and against the GC of another process nothing is held: a
// file that is missing when it is opened is an error.
type Export struct {
	store    *Store
	manifest Manifest
	raw      []byte
	images   []*Image
	files    []ExportFile
	builds   map[string]format.BuildRef // by name of the data file
	headers  map[string]string          // digests by name of the header
}

// ExportFile is a file that a snapshot needs.
type ExportFile struct {
	// Name is where it lies in any store, relative to its directory: see "On
	// disk" in the package documentation.
	Name string
	Size int64 // bytes
}

// Names of files in a store, relative to its directory.
func dataName(id format.ID) string     { return "images/" + id.String() + "/data" }
func headerName(id format.ID) string   { return "images/" + id.String() + "/header" }
func stateName(id format.ID) string    { return "snapshots/" + id.String() + "/state" }
func manifestName(id format.ID) string { return "snapshots/" + id.String() + "/manifest.json" }

// Export opens a snapshot for copying, or returns ErrNotFound. The caller
// closes it.
func (s *Store) Export(id format.ID) (*Export, error) {
	// Compaction may let the manifest name other images between our look at it
	// and our hold on them; then we look again.
	for range 8 {
		e, err := s.export(id)
		if err != nil {
			return nil, fmt.Errorf("export snapshot %s: %w", id, err)
		}
		now, err := s.readAll(s.manifestPath(id), maxManifest)
		if err == nil && bytes.Equal(now, e.raw) {
			return e, nil
		}
		if err := errors.Join(err, e.Close()); err != nil {
			return nil, fmt.Errorf("export snapshot %s: %w", id, err)
		}
	}
	return nil, fmt.Errorf("export snapshot %s: its manifest changes all the time", id)
}

func (s *Store) export(id format.ID) (_ *Export, err error) {
	e := &Export{store: s, builds: map[string]format.BuildRef{}, headers: map[string]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if e.manifest, err = s.Manifest(id); err != nil {
		return nil, err
	}
	if e.raw, err = encodeManifest(&e.manifest); err != nil {
		return nil, err
	}
	var headers []ExportFile
	for _, ref := range e.manifest.images() {
		img, err := s.OpenImage(ref.ID)
		if err != nil {
			return nil, err
		}
		e.images = append(e.images, img)
		for _, b := range img.Header().Builds {
			e.builds[dataName(b.ID)] = b
		}
		size, err := s.fileSize(headerName(ref.ID))
		if err != nil {
			return nil, err
		}
		e.headers[headerName(ref.ID)] = ref.HeaderSHA256
		headers = append(headers, ExportFile{headerName(ref.ID), size})
	}
	for name, b := range e.builds {
		size, err := s.fileSize(name)
		if errors.Is(err, fs.ErrNotExist) {
			err = &CorruptError{Image: b.ID, File: path.Join(s.dir, name), Reason: "the file is missing"}
		}
		// Before anybody copies it: a store that lies must not fill a disk.
		if want := int64(b.Blocks)*(blockSize+sumSize) + trailerSize; err == nil && size != want {
			err = &CorruptError{Image: b.ID, File: path.Join(s.dir, name), Offset: min(size, want), Reason: fmt.Sprintf(
				"the file has %d bytes, a build of %d blocks has %d", size, b.Blocks, want)}
		}
		if err != nil {
			return nil, err
		}
		e.files = append(e.files, ExportFile{name, size})
	}
	slices.SortFunc(e.files, func(a, b ExportFile) int { return strings.Compare(a.Name, b.Name) })
	e.files = append(e.files, headers...)
	if e.manifest.State.SHA256 != "" {
		e.files = append(e.files, ExportFile{stateName(id), e.manifest.State.Size})
	}
	return e, nil
}

func (s *Store) fileSize(name string) (int64, error) {
	f, err := s.fs.Open(path.Join(s.dir, name))
	if err != nil {
		return 0, err
	}
	size, err := f.Size()
	return size, errors.Join(err, f.Close())
}

// Manifest returns the snapshot's manifest.
func (e *Export) Manifest() Manifest { return e.manifest }

// ManifestFile returns the name and the content of the manifest's file. Where
// the snapshot is copied to, it is to be written last: it says that the rest
// is there.
func (e *Export) ManifestFile() (name string, content []byte) {
	return manifestName(e.manifest.ID), slices.Clone(e.raw)
}

// Files returns all files but the manifest, in an order in which they may be
// copied: what a file refers to comes before it.
func (e *Export) Files() []ExportFile { return slices.Clone(e.files) }

// Open opens one of Files, after every byte of it has been verified. The
// caller closes it.
func (e *Export) Open(ctx context.Context, name string) (storage.File, error) {
	f, err := e.open(name)
	if err != nil {
		return nil, err
	}
	if err := e.verify(ctx, f, name); err != nil {
		return nil, errors.Join(fmt.Errorf("export %s: %w", name, err), f.Close())
	}
	return f, nil
}

func (e *Export) open(name string) (storage.File, error) {
	if !slices.ContainsFunc(e.files, func(f ExportFile) bool { return f.Name == name }) {
		return nil, fmt.Errorf("export %q: it is no file of the snapshot: %w", name, ErrNotFound)
	}
	f, err := e.store.fs.Open(path.Join(e.store.dir, name))
	if err != nil {
		return nil, fmt.Errorf("export %s: %w", name, err)
	}
	return f, nil
}

// verify checks that f, wherever it lies, is the snapshot's file of that name.
func (e *Export) verify(ctx context.Context, f storage.File, name string) error {
	if ref, ok := e.builds[name]; ok {
		return verifyData(ctx, f, ref)
	}
	if want, ok := e.headers[name]; ok {
		b, err := contentOf(f, format.MaxEncodedSize)
		if err != nil {
			return err
		}
		if digestOf(b) != want {
			return &CorruptError{File: f.Name(), Reason: "it is not the header that the manifest names"}
		}
		return nil
	}
	got, err := describe(f)
	if err == nil && got != e.manifest.State {
		err = &CorruptError{Image: e.manifest.ID, File: f.Name(), Reason: "it is not the state that the manifest names"}
	}
	return err
}

// verifyData reads every block of a build's file.
func verifyData(ctx context.Context, f storage.File, ref format.BuildRef) error {
	sums, err := readSums(f, ref, f.Name())
	if err != nil {
		return err
	}
	b := &build{ref: ref, name: f.Name(), file: f, sums: sums}
	const step = 256 // blocks
	buf := make([]byte, step*blockSize)
	for at := uint64(0); at < ref.Blocks; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(step, ref.Blocks-at)
		if _, err := b.read(buf[:n*blockSize], at); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// contentOf reads a whole file of at most limit bytes.
func contentOf(f storage.File, limit int64) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%s: %d bytes are more than the limit %d", f.Name(), size, limit)
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read %s: %w", f.Name(), unexpected(err))
	}
	return b, nil
}

// Close gives the hold on the snapshot back.
func (e *Export) Close() error {
	var errs []error
	for _, img := range e.images {
		errs = append(errs, img.Close())
	}
	e.images = nil
	return errors.Join(errs...)
}
