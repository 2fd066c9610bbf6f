// Package remote keeps snapshots in an object store: it publishes them from a
// local store, opens their images where they are, block by block, and imports
// them whole into another local store.
//
// The objects have the names of the files in a local store, so that a store
// copied with any tool is one:
//
//	images/<id>/data, images/<id>/header
//	snapshots/<id>/state, snapshots/<id>/manifest.json
//
// # Invariants
//
//  1. A manifest is published only after everything that it names, each file
//     of which was verified as a whole before it was sent.
//  2. Only a manifest ever changes under its key (when compaction gives an
//     image a better layout), so that all else may be cached: see [Immutable].
//  3. What is read is verified as in a local store: it is read by the same
//     code. What cannot be had is an error, never zeros.
//  4. Publishing and importing may be cut off anywhere and repeated; what is
//     there already is not sent again.
//
// The package imports snapshot and storage; it may be imported by everything
// above them. It does not remove anything from an object store.
package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"golang.org/x/sync/errgroup"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Immutable says whether the object of a key never changes: it is what
// storage.CacheOptions.Cacheable wants to know.
func Immutable(key string) bool { return !strings.HasSuffix(key, "/manifest.json") }

// Open opens the snapshots in o for reading: OpenImage, Manifest, Verify and
// all else that changes nothing. Blocks come when they are read; put a cache
// (storage.NewStack) around o. The context ends every later read too.
func Open(ctx context.Context, o storage.Objects) (*snapshot.Store, error) {
	s, err := snapshot.Open("/", snapshot.Options{FS: &objectFS{ctx: ctx, objects: o}, ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("open remote snapshots: %w", err)
	}
	return s, nil
}

// Import copies a snapshot with all that it needs into a local store; see
// snapshot.Store.Import.
func Import(ctx context.Context, o storage.Objects, id format.ID, into *snapshot.Store) error {
	from, err := Open(ctx, o)
	if err != nil {
		return err
	}
	return errors.Join(into.Import(ctx, from, id), from.Close())
}

// PublishOptions are the knobs of Publish. The zero value is usable.
type PublishOptions struct {
	// Concurrent is how many files are sent at a time; default 4.
	Concurrent int
	// Progress, which may be nil, is told how many bytes are done of how many,
	// those that were there already included. Calls do not overlap.
	Progress func(done, total int64)
}

// Published says what Publish did.
type Published struct {
	Files, Sent      int   // of the snapshot, without its manifest; of them sent
	Bytes, SentBytes int64 // likewise
	Manifest         bool  // it was sent; false: it was there as it is
}

// Publish copies a committed snapshot into an object store, so that it can be
// opened and imported from there. It may be repeated at any time: files that
// are there are not sent again. When it fails, the snapshot is not there, or is
// there as an earlier Publish made it.
func Publish(ctx context.Context, s *snapshot.Store, id format.ID, o storage.Objects, options PublishOptions) (_ Published, err error) {
	if options.Concurrent <= 0 {
		options.Concurrent = 4
	}
	e, err := s.Export(id)
	if err != nil {
		return Published{}, fmt.Errorf("publish: %w", err)
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	p := &publisher{export: e, objects: o, options: options}
	if err := p.run(ctx); err != nil {
		return Published{}, fmt.Errorf("publish snapshot %s: %w", id, err)
	}
	return p.result, nil
}

type publisher struct {
	export  *snapshot.Export
	objects storage.Objects
	options PublishOptions
	result  Published
}

// outcome is what became of one file.
type outcome struct {
	file snapshot.ExportFile
	sent bool
}

func (p *publisher) run(ctx context.Context) error {
	files := p.export.Files()
	for _, f := range files {
		p.result.Bytes += f.Size
	}
	p.result.Files = len(files)

	// The results are counted in one place.
	done := make(chan outcome)
	counted := make(chan struct{})
	go func() {
		defer close(counted)
		p.count(done)
	}()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(p.options.Concurrent)
	for _, f := range files {
		g.Go(func() error {
			sent, err := p.file(gctx, f)
			if err == nil {
				done <- outcome{f, sent}
			}
			return err
		})
	}
	err := g.Wait()
	close(done)
	<-counted
	if err != nil {
		return err
	}
	return p.manifest(ctx)
}

func (p *publisher) count(done <-chan outcome) {
	var bytes int64
	for o := range done {
		bytes += o.file.Size
		if o.sent {
			p.result.Sent++
			p.result.SentBytes += o.file.Size
		}
		if p.options.Progress != nil {
			p.options.Progress(bytes, p.result.Bytes)
		}
	}
}

// file sends a file unless it is there. Its key says what is in it and an
// object appears whole, so that the size is all there is to compare.
func (p *publisher) file(ctx context.Context, f snapshot.ExportFile) (sent bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	info, err := p.objects.Head(ctx, f.Name)
	if err == nil && info.Size == f.Size {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	h, err := p.export.Open(ctx, f.Name)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	return true, p.objects.Put(ctx, f.Name, h, f.Size)
}

// manifest is the commit: with it, the snapshot is there.
func (p *publisher) manifest(ctx context.Context) error {
	name, content := p.export.ManifestFile()
	there := make([]byte, len(content)+1)
	n, err := p.objects.ReadAt(ctx, name, there, 0)
	if err != nil && err != io.EOF && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if bytes.Equal(there[:n], content) {
		return nil
	}
	if err := p.objects.Put(ctx, name, bytes.NewReader(content), int64(len(content))); err != nil {
		return err
	}
	p.result.Manifest = true
	return nil
}
