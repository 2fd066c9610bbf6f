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
	e.storeUse.RLock()
	old, disk, err := e.importDisk(ctx, b, progress)
	if err == nil {
		e.mu.Lock()
		e.bases[b.Name] = Base{Name: b.Name, Disk: disk, Kernel: b.Kernel, Initrd: b.Initrd, KernelDigest: b.KernelDigest}
		e.mu.Unlock()
	}
	e.storeUse.RUnlock()
	if err != nil {
		return fmt.Errorf("import the base template %q: %w", b.Name, err)
	}
	if old == (format.ID{}) {
		return nil
	}
	return errors.Join(e.opts.Store.Delete(ctx, old), e.sweep(ctx))
}

// importDisk returns the base's disk image, and the manifest that it takes
// the place of.
func (e *Engine) importDisk(ctx context.Context, b BaseFiles, progress func(done, total int64)) (old, disk format.ID, err error) {
	e.mu.Lock()
	id, known := e.names[b.Name]
	e.mu.Unlock()
	if known {
		m, err := e.opts.Store.Manifest(id)
		if err != nil {
			return old, disk, err
		}
		if m.Kind != snapshot.KindBase {
			return old, disk, fmt.Errorf("a snapshot %w under that name", ErrExists)
		}
		var note baseNote
		if json.Unmarshal(m.Annotations, &note) == nil && note.Digest == b.Digest {
			return old, m.Disk.ID, nil
		}
		old = id
	}
	image, err := e.readRootfs(ctx, b.Rootfs, progress)
	if err != nil {
		return old, disk, err
	}
	// After the commit Abort leaves what the manifest names.
	defer func() { err = errors.Join(err, image.Abort()) }()
	note, err := json.Marshal(baseNote{Digest: b.Digest})
	if err != nil {
		return old, disk, err
	}
	txn, err := e.opts.Store.Begin()
	if err != nil {
		return old, disk, err
	}
	defer func() { err = errors.Join(err, txn.Abort()) }()
	m := snapshot.Manifest{
		Name: b.Name, Kind: snapshot.KindBase, CreatedAt: e.opts.Now().UTC(), Disk: snapshot.ImageRef{ID: image.ID()},
		VMM: snapshot.VMMInfo{KernelDigest: b.KernelDigest}, Annotations: note,
	}
	if err := txn.Commit(ctx, m); err != nil {
		return old, disk, err
	}
	e.settleName(b.Name, txn.ID(), true)
	return old, image.ID(), nil
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
	if known && !isBase {
		delete(e.names, name)
	}
	e.mu.Unlock()
	if isBase {
		return fmt.Errorf("%w: %q is a base template, which is built, not snapshotted; it cannot be deleted", ErrInvalid, name)
	}
	if !known {
		return fmt.Errorf("snapshot %q: %w", name, ErrNotFound)
	}
	m, merr := e.opts.Store.Manifest(id)
	if err := e.opts.Store.Delete(ctx, id); err != nil {
		e.settleName(name, id, true)
		return fmt.Errorf("delete snapshot %q: %w", name, err)
	}
	var err error
	if merr == nil {
		err = e.dropImage(ctx, m.Memory.ID)
	}
	return errors.Join(err, e.sweep(ctx))
}
