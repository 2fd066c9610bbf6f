package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Options are the knobs of a store. The zero value is usable.
type Options struct {
	// FS is where the store lives; nil is storage.OS.
	FS storage.FS
	// Logger gets what an operator may want to know; nil logs nothing.
	Logger *slog.Logger
	// ReadOnly refuses every changing call.
	ReadOnly bool
	// Compaction bounds what Compact lets an image be made of.
	Compaction CompactionPolicy
	// Now is the clock of Manifest.CreatedAt; nil is time.Now.
	Now func() time.Time
}

// Store is an open store.
type Store struct {
	dir  string
	fs   storage.FS
	log  *slog.Logger
	now  func() time.Time
	ro   bool
	gcMu sync.Mutex // one GC, Delete or replacing of a file at a time

	compaction CompactionPolicy
	compactMu  sync.Mutex // one Compact at a time; taken before gcMu

	importMu sync.Mutex // one Import at a time; taken before gcMu

	lockMu sync.Mutex
	lock   storage.File // the write lock; nil until the first changing call
	closed bool

	mu      sync.Mutex
	images  map[format.ID]*imageCore // open images
	builds  map[format.ID]*build     // builds in use by open images
	pending map[format.ID]*Writer    // images that no manifest names yet
	txns    map[format.ID]struct{}   // snapshots being made
	// importing are the images and builds that an Import is bringing here.
	importing map[format.ID]bool
}

// Open opens the store in dir. Nothing is read or made yet: any number of
// processes may have it open, and the first changing call makes the
// directories and takes the write lock.
func Open(dir string, o Options) (*Store, error) {
	if dir == "" {
		return nil, errors.New("open store: the directory is empty")
	}
	if o.FS == nil {
		o.FS = storage.OS{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Store{
		dir: path.Clean(dir), fs: o.FS, log: o.Logger, now: o.Now, ro: o.ReadOnly,
		compaction: o.Compaction.withDefaults(),
		images:     map[format.ID]*imageCore{},
		builds:     map[format.ID]*build{},
		pending:    map[format.ID]*Writer{},
		txns:       map[format.ID]struct{}{},
	}, nil
}

// Close gives the write lock back. Open images stay readable; unfinished
// writers and transactions must be aborted before.
func (s *Store) Close() error {
	s.lockMu.Lock()
	defer s.lockMu.Unlock()
	s.closed = true
	if s.lock == nil {
		return nil
	}
	f := s.lock
	s.lock = nil
	return f.Close()
}

// forWriting takes the write lock, once, and makes the directories.
func (s *Store) forWriting() error {
	if s.ro {
		return ErrReadOnly
	}
	s.lockMu.Lock()
	defer s.lockMu.Unlock()
	if s.closed {
		return fmt.Errorf("store: %w", ErrClosed)
	}
	if s.lock != nil {
		return nil
	}
	if err := s.makeDirs(); err != nil {
		return fmt.Errorf("make the store's directories: %w", err)
	}
	name := path.Join(s.dir, "lock")
	f, err := s.fs.OpenRW(name)
	if errors.Is(err, fs.ErrNotExist) {
		if f, err = s.fs.Create(name); errors.Is(err, fs.ErrExist) {
			f, err = s.fs.OpenRW(name) // another process was faster
		}
	}
	if err != nil {
		return fmt.Errorf("open the store's lock: %w", err)
	}
	if err := f.Lock(); err != nil {
		return errors.Join(fmt.Errorf("take the store's write lock: %w", err), f.Close())
	}
	s.lock = f
	return nil
}

// makeDirs makes what is missing. It syncs in any case: a predecessor may have
// made the directories and failed to.
func (s *Store) makeDirs() error {
	for _, d := range []string{s.dir, s.imagesDir(), s.snapshotsDir()} {
		if err := s.fs.Mkdir(d); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := s.fs.SyncDir(path.Dir(s.dir)); err != nil {
		return err
	}
	return s.fs.SyncDir(s.dir)
}

func (s *Store) imagesDir() string               { return path.Join(s.dir, "images") }
func (s *Store) imageDir(id format.ID) string    { return path.Join(s.imagesDir(), id.String()) }
func (s *Store) dataPath(id format.ID) string    { return path.Join(s.imageDir(id), "data") }
func (s *Store) headerPath(id format.ID) string  { return path.Join(s.imageDir(id), "header") }
func (s *Store) snapshotsDir() string            { return path.Join(s.dir, "snapshots") }
func (s *Store) snapshotDir(id format.ID) string { return path.Join(s.snapshotsDir(), id.String()) }
func (s *Store) manifestPath(id format.ID) string {
	return path.Join(s.snapshotDir(id), "manifest.json")
}
func (s *Store) statePath(id format.ID) string { return path.Join(s.snapshotDir(id), "state") }

// removeAll removes files and then their directory; what is already gone is
// fine. Names ascend in importance: a crash leaves the later ones.
func (s *Store) removeAll(dir string, names ...string) error {
	for _, n := range names {
		if err := s.fs.Remove(path.Join(dir, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := s.fs.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.fs.SyncDir(path.Dir(dir))
}

// removeFiles removes those of the files that exist.
func (s *Store) removeFiles(dir string, names ...string) error {
	for _, n := range names {
		if err := s.fs.Remove(path.Join(dir, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return s.fs.SyncDir(dir)
}

// readAll reads a whole file of at most limit bytes.
func (s *Store) readAll(name string, limit int64) ([]byte, error) {
	f, err := s.fs.Open(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", ErrNotFound, err)
		}
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%s: %d bytes are more than the limit %d", name, size, limit)
	}
	b := make([]byte, size)
	if size == 0 {
		return b, nil
	}
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}
