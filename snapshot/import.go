package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// copyStep is how much Import reads from the other store at a time.
const copyStep = 4 << 20

// Import copies a snapshot from another store into this one, under the same
// ID: what the other store's FS can read, this one can have. Files that are
// here already are not copied again, so that an Import which was cut off goes
// on where it was, unless GC came between. Everything is verified here before
// the manifest is written; a file of ours that is damaged is replaced.
//
// A snapshot that is here already is not touched, and that is no error.
func (s *Store) Import(ctx context.Context, from *Store, id format.ID) error {
	err := s.importSnapshot(ctx, from, id)
	if err != nil {
		return fmt.Errorf("import snapshot %s: %w", id, err)
	}
	return nil
}

func (s *Store) importSnapshot(ctx context.Context, from *Store, id format.ID) (err error) {
	if from == s {
		return errors.New("from: it is this store")
	}
	if err := s.forWriting(); err != nil {
		return err
	}
	s.importMu.Lock()
	defer s.importMu.Unlock()
	if _, err := s.Manifest(id); !errors.Is(err, ErrNotFound) {
		return err // here already, or damaged: then it must be deleted first
	}
	e, err := from.Export(id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	release := s.reserve(e)
	defer release()
	for _, f := range e.files {
		if f.Name == stateName(id) {
			continue
		}
		if err := s.importFile(ctx, e, f); err != nil {
			return err
		}
	}
	// The names of the images' directories, before a manifest counts on them.
	if err := s.fs.SyncDir(s.imagesDir()); err != nil {
		return err
	}
	return s.importManifest(ctx, e)
}

// reserve keeps GC away from every directory that the import writes to. A GC
// that is under way is waited for: it may have decided already that files which
// we would find here are garbage.
func (s *Store) reserve(e *Export) (release func()) {
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.importing = map[format.ID]bool{}
	for _, ref := range e.builds {
		s.importing[ref.ID] = true
	}
	for _, ref := range e.manifest.images() {
		s.importing[ref.ID] = true
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.importing = nil
	}
}

// importFile brings one file here, unless it is here. It is written under
// another name, verified, synced and renamed.
func (s *Store) importFile(ctx context.Context, e *Export, f ExportFile) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	name := path.Join(s.dir, f.Name)
	dir := path.Dir(name)
	if s.hasFile(e, f, name) {
		// It may be there without having become durable.
		return s.fs.SyncDir(dir)
	}
	if err := s.fs.Mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	tmp := name + ".tmp"
	if err := s.fs.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.copyVerified(ctx, e, f, tmp); err != nil {
		if rerr := s.fs.Remove(tmp); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr) // GC takes the rest
		}
		return err
	}
	if err := s.fs.Rename(tmp, name); err != nil {
		return err
	}
	return s.fs.SyncDir(dir)
}

// hasFile says whether a file is here and is what the snapshot needs: of a
// build the table of checksums is looked at, which was written last.
func (s *Store) hasFile(e *Export, f ExportFile, name string) bool {
	h, err := s.fs.Open(name)
	if err != nil {
		return false
	}
	defer h.Close()
	if ref, ok := e.builds[f.Name]; ok {
		_, err := readSums(h, ref, name)
		return err == nil
	}
	b, err := contentOf(h, f.Size)
	return err == nil && digestOf(b) == e.headers[f.Name]
}

// copyVerified copies a file and reads the copy back.
func (s *Store) copyVerified(ctx context.Context, e *Export, f ExportFile, to string) (err error) {
	src, err := e.open(f.Name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	dst, err := s.fs.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if err := copyFile(ctx, dst, src, f.Size); err != nil {
		return err
	}
	if err := e.verify(ctx, dst, f.Name); err != nil {
		return fmt.Errorf("the copy of %s: %w", f.Name, err)
	}
	return dst.Sync()
}

func copyFile(ctx context.Context, dst, src storage.File, size int64) error {
	buf := make([]byte, min(size, copyStep))
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), size-off)]
		if n, err := src.ReadAt(p, off); n < len(p) {
			return fmt.Errorf("read %s at %d: %w", src.Name(), off, unexpected(err))
		}
		if _, err := dst.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// importManifest brings the state here and commits.
func (s *Store) importManifest(ctx context.Context, e *Export) (err error) {
	t, err := s.beginAs(e.manifest.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Abort()) }()
	m := e.manifest
	if name := stateName(m.ID); m.State.SHA256 != "" {
		src, err := e.open(name)
		if err != nil {
			return err
		}
		dst, err := t.StateFile()
		if err == nil {
			err = copyFile(ctx, dst, src, m.State.Size)
		}
		if err == nil {
			err = e.verify(ctx, dst, name)
		}
		if err := errors.Join(err, src.Close()); err != nil {
			return err
		}
	}
	if b, err := encodeManifest(&m); err != nil || !bytes.Equal(b, e.raw) {
		return errors.Join(errors.New("the manifest cannot be written as it was"), err)
	}
	return t.Commit(ctx, m)
}

// beginAs begins a snapshot with a given ID; what a crash left of an earlier
// try is removed.
func (s *Store) beginAs(id format.ID) (*Txn, error) {
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	if err := s.sweepSnapshot(id); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.txns[id] = struct{}{}
	s.mu.Unlock()
	t := &Txn{store: s, id: id}
	if err := s.fs.Mkdir(s.snapshotDir(id)); err != nil {
		return nil, errors.Join(err, t.Abort())
	}
	return t, nil
}
