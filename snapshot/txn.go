package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Txn makes one snapshot. It is not safe for concurrent use, but for Abort.
type Txn struct {
	store *Store
	id    format.ID

	mu    sync.Mutex
	state storage.File // nil until StateFile
	done  bool
	// failed: a Commit failed half way, so only Abort is left.
	failed bool
}

// Begin begins a snapshot. The caller always calls Abort in the end; after a
// commit it does nothing.
func (s *Store) Begin() (*Txn, error) {
	if err := s.forWriting(); err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	t := &Txn{store: s, id: format.NewID()}
	s.mu.Lock()
	s.txns[t.id] = struct{}{} // before the directory exists: GC must not take it
	s.mu.Unlock()
	if err := s.fs.Mkdir(s.snapshotDir(t.id)); err != nil {
		return nil, errors.Join(fmt.Errorf("begin snapshot: %w", err), t.Abort())
	}
	return t, nil
}

// ID returns the ID that the snapshot will have.
func (t *Txn) ID() format.ID { return t.id }

// StateFile returns the file to write the device state into, by Write or
// WriteAt; each call returns the same one. Commit syncs and closes it. Without
// a call the snapshot has no state.
func (t *Txn) StateFile() (storage.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return nil, fmt.Errorf("state of snapshot %s: %w", t.id, ErrClosed)
	}
	if t.state != nil {
		return t.state, nil
	}
	f, err := t.store.fs.Create(t.store.statePath(t.id))
	if err != nil {
		return nil, fmt.Errorf("state of snapshot %s: %w", t.id, err)
	}
	t.state = f
	return f, nil
}

// Commit makes the snapshot durable and visible, in one step: the renaming of
// the manifest. The images that m names must be finished. It sets the fields
// of m that say "set by Commit"; read them back with Store.Manifest. When it
// fails, the snapshot does not exist, and Abort removes what there is of it;
// the writers of its images are to be aborted on their own, or committed by
// another Txn. An image that this store has not just made must be named by
// another manifest or be open meanwhile.
func (t *Txn) Commit(ctx context.Context, m Manifest) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return fmt.Errorf("commit snapshot %s: %w", t.id, ErrClosed)
	}
	if t.failed {
		return fmt.Errorf("commit snapshot %s: it failed before, abort it", t.id)
	}
	if err := t.commit(ctx, &m); err != nil {
		t.failed = true
		return fmt.Errorf("commit snapshot %s: %w", t.id, err)
	}
	t.store.log.Info("snapshot committed", "id", t.id.String(), "name", m.Name, "kind", m.Kind, "bytes", m.Size)
	return nil
}

func (t *Txn) commit(ctx context.Context, m *Manifest) error {
	s := t.store
	if !m.ID.IsZero() && m.ID != t.id {
		return fmt.Errorf("manifest: id: %s is not the transaction's", m.ID)
	}
	m.ID = t.id
	if m.CreatedAt.IsZero() {
		m.CreatedAt = s.now().UTC()
	}
	writers, own, err := t.resolveImages(m)
	defer func() {
		for _, w := range writers {
			w.setState(committing, finished) // undecided still: it failed
		}
	}()
	if err != nil {
		return err
	}
	if m.State, err = t.sealState(); err != nil {
		return err
	}
	if m.Size == 0 {
		m.Size = own + m.State.Size
	}
	b, err := encodeManifest(m)
	if err != nil {
		return err
	}
	if len(b) > maxManifest {
		return fmt.Errorf("manifest: length: %d bytes are more than the limit %d", len(b), maxManifest)
	}
	tmp := s.manifestPath(t.id) + ".tmp"
	if err := s.writeFile(tmp, b); err != nil {
		return err
	}
	// All names must be durable before one of them says that the rest counts.
	if err := s.fs.SyncDir(s.snapshotDir(t.id)); err != nil {
		return err
	}
	if err := s.fs.SyncDir(s.snapshotsDir()); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err // the last moment: nothing is visible yet
	}
	if err := s.fs.Rename(tmp, s.manifestPath(t.id)); err != nil {
		return err
	}
	if err := s.fs.SyncDir(s.snapshotDir(t.id)); err != nil {
		return t.takeBack(err, writers)
	}
	t.finish(writers)
	return nil
}

// resolveImages fills in the references to images. It returns the writers of
// those that this process has just made, protected from Abort until the commit
// is decided, and the bytes that they added.
func (t *Txn) resolveImages(m *Manifest) ([]*Writer, int64, error) {
	s := t.store
	var writers []*Writer
	var own int64
	for _, ref := range []*ImageRef{&m.Memory, &m.Disk} {
		if ref.ID.IsZero() {
			*ref = ImageRef{}
			continue
		}
		s.mu.Lock()
		w := s.pending[ref.ID]
		s.mu.Unlock()
		if w == nil {
			h, b, err := s.readHeader(ref.ID)
			if err != nil {
				return writers, 0, fmt.Errorf("image %s: %w", ref.ID, err)
			}
			*ref = ImageRef{ID: ref.ID, Size: h.Size, HeaderSHA256: digestOf(b)}
			continue
		}
		size, digest, n, err := w.claimResult()
		if err != nil {
			return writers, 0, err
		}
		*ref = ImageRef{ID: ref.ID, Size: size, HeaderSHA256: hex.EncodeToString(digest[:])}
		writers = append(writers, w)
		own += n
	}
	return writers, own, nil
}

// claimResult returns what a manifest says of a finished image and takes the
// writer for the commit.
func (w *Writer) claimResult() (size int64, digest [32]byte, bytes int64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state != finished {
		return 0, digest, 0, fmt.Errorf("image %s is not finished, or in another commit", w.id)
	}
	w.state = committing
	return w.size, w.headerDigest, w.bytes, nil
}

// sealState makes the state file durable and describes it.
func (t *Txn) sealState() (FileRef, error) {
	if t.state == nil {
		return FileRef{}, nil
	}
	if err := t.state.Sync(); err != nil {
		return FileRef{}, fmt.Errorf("state: %w", err)
	}
	return describe(t.state)
}

// describe reads a state file for its size and digest.
func describe(f storage.File) (FileRef, error) {
	size, err := f.Size()
	if err != nil {
		return FileRef{}, fmt.Errorf("state: %w", err)
	}
	if size > MaxState {
		return FileRef{}, fmt.Errorf("state: %d bytes are more than the limit %d", size, MaxState)
	}
	d := sha256.New()
	n, err := io.Copy(d, io.NewSectionReader(f, 0, size))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return FileRef{}, fmt.Errorf("state: %w", err)
	}
	return FileRef{Size: size, SHA256: hex.EncodeToString(d.Sum(nil))}, nil
}

// takeBack undoes a rename whose durability could not be had. If it cannot be
// undone durably, the manifest may come back after a crash: then the images
// must stay, and the next GC of another process decides.
func (t *Txn) takeBack(cause error, writers []*Writer) error {
	s := t.store
	err := s.fs.Remove(s.manifestPath(t.id))
	if err == nil {
		if err = s.fs.SyncDir(s.snapshotDir(t.id)); err == nil {
			return cause
		}
	}
	for _, w := range writers {
		w.setState(committing, committed) // Abort does nothing from now on
	}
	t.close()
	return errors.Join(cause, fmt.Errorf("whether the snapshot exists is known only after the next start: %w", err))
}

// finish marks the images as named, so that Abort leaves them alone.
func (t *Txn) finish(writers []*Writer) {
	s := t.store
	for _, w := range writers {
		w.setState(committing, committed) // Abort does nothing from now on
	}
	s.mu.Lock()
	for _, w := range writers {
		delete(s.pending, w.id)
	}
	delete(s.txns, t.id)
	s.mu.Unlock()
	t.close()
}

func (w *Writer) setState(from, to writerState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state == from {
		w.state = to
	}
}

func (t *Txn) close() {
	t.done = true
	if t.state == nil {
		return
	}
	if err := t.state.Close(); err != nil {
		// It was synced: nothing is lost.
		t.store.log.Warn("close state file", "id", t.id.String(), "err", err)
	}
	t.state = nil
}

// Abort removes what there is of the snapshot, unless it is committed. It may
// be called again.
func (t *Txn) Abort() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return nil
	}
	t.close()
	s := t.store
	err := s.removeAll(s.snapshotDir(t.id), "manifest.json.tmp", "state")
	s.mu.Lock()
	delete(s.txns, t.id)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("abort snapshot %s: %w", t.id, err) // GC takes the rest
	}
	return nil
}

// StatePath verifies the device state of a snapshot against its manifest and
// returns the file's path.
func (s *Store) StatePath(id format.ID) (string, error) {
	m, err := s.Manifest(id)
	if err != nil {
		return "", err
	}
	if m.State.SHA256 == "" {
		return "", fmt.Errorf("state of snapshot %s: it has none: %w", id, ErrNotFound)
	}
	return s.statePath(id), s.checkState(&m)
}

func (s *Store) checkState(m *Manifest) error {
	name := s.statePath(m.ID)
	f, err := s.fs.Open(name)
	if err != nil {
		return &CorruptError{Image: m.ID, File: name, Reason: err.Error()}
	}
	defer f.Close()
	got, err := describe(f)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", m.ID, err)
	}
	if got != m.State {
		return &CorruptError{Image: m.ID, File: name, Reason: fmt.Sprintf(
			"it has %d bytes with SHA-256 %s, want %d with %s", got.Size, got.SHA256, m.State.Size, m.State.SHA256)}
	}
	return nil
}
