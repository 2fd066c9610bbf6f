package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sort"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// BaseFiles are a built base template, as the template builder left them.
type BaseFiles struct {
	Name string
	// Digest of everything that went into it; the same digest is the same base.
	Digest       string
	Rootfs       string // raw disk image
	Kernel       string
	Initrd       string
	KernelDigest string
}

// baseNote is what a base's manifest keeps beside the disk image.
type baseNote struct {
	Digest string `json:"digest"`
}

// ImportBase makes a built base available to Create. Its disk is read into
// the store once; the same digest again costs nothing. Sandboxes and snapshots
// made from an earlier base of that name keep what they need of it. progress
// may be nil; it is told bytes.
func (e *Engine) ImportBase(ctx context.Context, b BaseFiles, progress func(done, total int64)) error {
	if err := checkName(b.Name); err != nil {
		return err
	}
	im := &importing{e: e, base: b, progress: progress}
	if err := e.importBase(ctx, im); err != nil {
		return fmt.Errorf("import the base template %q: %w", b.Name, err)
	}
	if !im.made {
		return nil
	}
	if err := e.perform(ctx, OpImport, e.newPhases(), im.replaceSteps()); err != nil {
		// The new one is there and used; the next start removes the old one.
		e.log.ErrorContext(ctx, "the old base template is not removed yet", "name", b.Name, "err", err)
	}
	return nil
}

// importing reads a base's disk into the store.
type importing struct {
	e        *Engine
	base     BaseFiles
	progress func(done, total int64)

	old   format.ID // the manifest that it takes the place of
	id    format.ID // the manifest that was committed
	image *snapshot.Writer
	made  bool
}

func (im *importing) steps() []step {
	return append(im.readSteps(), im.replaceSteps()...)
}

// readSteps are taken with the store held against GC, replaceSteps after that.
func (im *importing) readSteps() []step {
	return []step{{name: "read_rootfs", do: im.read}, {name: "commit", do: im.commit}}
}

func (im *importing) replaceSteps() []step {
	return []step{
		{name: "delete_old", do: func(ctx context.Context) error {
			if im.old.IsZero() {
				return nil
			}
			return im.e.deleteManifest(ctx, im.old)
		}},
		{name: "sweep", do: im.e.sweep},
	}
}

// importBase imports what the store does not have, and lets Create use it.
func (e *Engine) importBase(ctx context.Context, im *importing) error {
	e.storeUse.RLock()
	defer e.storeUse.RUnlock()
	b := im.base
	disk, err := im.find()
	if err != nil {
		return err
	}
	if disk.IsZero() {
		err := e.perform(ctx, OpImport, e.newPhases(), im.readSteps())
		if err != nil && !im.id.IsZero() {
			err = errors.Join(err, e.deleteManifest(ctx, im.id))
		}
		if im.image != nil {
			// After the commit Abort leaves what the manifest names.
			err = errors.Join(err, im.image.Abort())
		}
		if err != nil {
			return err
		}
		e.settleName(b.Name, im.id, true)
		disk, im.made = im.image.ID(), true
	}
	e.mu.Lock()
	e.bases[b.Name] = Base{Name: b.Name, Disk: disk, Kernel: b.Kernel, Initrd: b.Initrd, KernelDigest: b.KernelDigest}
	e.mu.Unlock()
	return nil
}

// find returns the disk of the same base, imported before; zero if there is
// none.
func (im *importing) find() (disk format.ID, err error) {
	e := im.e
	e.mu.Lock()
	id, known := e.names[im.base.Name]
	e.mu.Unlock()
	if !known {
		return disk, nil
	}
	m, err := e.opts.Store.Manifest(id)
	if err != nil {
		return disk, err
	}
	if m.Kind != snapshot.KindBase {
		return disk, fmt.Errorf("a snapshot %w under that name", ErrExists)
	}
	var note baseNote
	if json.Unmarshal(m.Annotations, &note) == nil && note.Digest == im.base.Digest {
		return m.Disk.ID, nil
	}
	im.old = id
	return disk, nil
}

func (im *importing) read(ctx context.Context) (err error) {
	im.image, err = im.e.readRootfs(ctx, im.base.Rootfs, im.progress)
	return err
}

func (im *importing) commit(ctx context.Context) (err error) {
	note, err := json.Marshal(baseNote{Digest: im.base.Digest})
	if err != nil {
		return err
	}
	txn, err := im.e.opts.Store.Begin()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, txn.Abort()) }()
	m := snapshot.Manifest{
		Name: im.base.Name, Kind: snapshot.KindBase, CreatedAt: im.e.opts.Now().UTC(), Disk: snapshot.ImageRef{ID: im.image.ID()},
		VMM: snapshot.VMMInfo{KernelDigest: im.base.KernelDigest}, Annotations: note,
	}
	if err := txn.Commit(ctx, m); err != nil {
		return err
	}
	im.id = txn.ID()
	return nil
}

func (e *Engine) readRootfs(ctx context.Context, path string, progress func(done, total int64)) (*snapshot.Writer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the disk image: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := st.Size()
	if size == 0 || size%format.BlockSize != 0 {
		return nil, fmt.Errorf("the disk image has %d bytes; want a multiple of %d", size, format.BlockSize)
	}
	changes := pagesOf(f, func(yield func(off, n int64) error) error { return scanFile(f, size, yield) })
	return e.writeImage(ctx, size, format.ID{}, format.ID{}, func(yield func(change) error) error {
		return changes(func(c change) error {
			if progress != nil {
				progress(c.off+int64(len(c.data)), size)
			}
			return yield(c)
		})
	})
}

// Templates lists the bases and the named snapshots, by name.
func (e *Engine) Templates() ([]snapshot.Manifest, error) {
	e.mu.Lock()
	ids := make([]format.ID, 0, len(e.names))
	for _, id := range e.names {
		ids = append(ids, id)
	}
	e.mu.Unlock()
	var out []snapshot.Manifest
	for _, id := range ids {
		m, err := e.opts.Store.Manifest(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// DeleteSnapshot removes a named snapshot. What was made from it keeps the
// blocks that it needs.
func (e *Engine) DeleteSnapshot(ctx context.Context, name string) error {
	ctx = context.WithoutCancel(ctx)
	if err := checkName(name); err != nil {
		return err
	}
	e.mu.Lock()
	_, isBase := e.bases[name]
	id, known := e.names[name]
	busy := e.reserved[name]
	if known && !isBase && !busy {
		delete(e.names, name)
	}
	e.mu.Unlock()
	if isBase {
		return fmt.Errorf("%w: %q is a base template, which is built, not snapshotted; it cannot be deleted", ErrInvalid, name)
	}
	if !known {
		return fmt.Errorf("snapshot %q: %w", name, ErrNotFound)
	}
	if busy {
		return fmt.Errorf("%w: snapshot %q is being made", ErrState, name)
	}
	if err := e.removeSnapshot(ctx, id); err != nil {
		if _, there := e.opts.Store.Manifest(id); there == nil {
			e.settleName(name, id, true)
		}
		return fmt.Errorf("delete snapshot %q: %w", name, err)
	}
	return nil
}

func (e *Engine) removeSnapshot(ctx context.Context, id format.ID) error {
	d := &deleting{e: e, id: id}
	return e.perform(ctx, OpDeleteSnapshot, e.newPhases(), d.steps())
}

// deleting removes a named snapshot.
type deleting struct {
	e  *Engine
	id format.ID
}

func (d *deleting) steps() []step {
	var memory format.ID
	return []step{
		{name: "delete_manifest", do: func(ctx context.Context) error {
			if m, err := d.e.opts.Store.Manifest(d.id); err == nil { // else it is damaged: it can go
				memory = m.Memory.ID
			}
			return d.e.opts.Store.Delete(ctx, d.id)
		}},
		{name: "drop_image", do: func(ctx context.Context) error {
			if memory.IsZero() {
				return nil
			}
			return d.e.dropImage(ctx, memory, format.ID{})
		}},
		{name: "sweep", do: d.e.sweep},
	}
}
