package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Delete removes a snapshot, readable or not. Its images stay until GC finds
// that nothing else needs them. ErrNotFound when it does not exist. After
// another error the snapshot may be gone already; GC finishes the work.
func (s *Store) Delete(ctx context.Context, id format.ID) error {
	if err := s.forWriting(); err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, err)
	}
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, err)
	}
	err := s.fs.Remove(s.manifestPath(id)) // the one point after which it is gone
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrNotFound
	}
	if err == nil {
		err = s.sweepSnapshot(id)
	}
	if err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, err)
	}
	s.log.Info("snapshot deleted", "id", id.String())
	return nil
}

// sweepSnapshot removes what is left of a snapshot without manifest. First it
// makes sure that the manifest cannot come back: its images may go next.
func (s *Store) sweepSnapshot(id format.ID) error {
	err := s.fs.SyncDir(s.snapshotDir(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // aborted meanwhile
	}
	if err != nil {
		return err
	}
	return s.removeAll(s.snapshotDir(id), "manifest.json.tmp", "state")
}

// GCReport says what GC removed, or would remove in a dry run.
type GCReport struct {
	Snapshots []format.ID // unfinished or half deleted
	Images    []format.ID // removed whole
	Headers   []format.ID // images of which only the blocks are needed still
	Bytes     int64       // freed
	// Items are the same one by one, and the temporary files that a crash left,
	// in the order in which they go.
	Items []GCItem
}

// GCKind says what a GCItem is.
type GCKind string

// The kinds of what GC removes.
const (
	GCSnapshot GCKind = "snapshot" // unfinished or half deleted
	GCImage    GCKind = "image"    // with its blocks
	GCHeader   GCKind = "header"   // of an image whose blocks others read
	GCFile     GCKind = "file"     // temporary; ID is of what it lies beside
)

// A GCItem is one thing that GC removed, or would remove in a dry run.
type GCItem struct {
	Kind  GCKind    `json:"kind"`
	ID    format.ID `json:"id"`
	Bytes int64     `json:"bytes"`
}

// add records what goes.
func (r *GCReport) add(kind GCKind, id format.ID, n int64) {
	switch kind {
	case GCSnapshot:
		r.Snapshots = append(r.Snapshots, id)
	case GCImage:
		r.Images = append(r.Images, id)
	case GCHeader:
		r.Headers = append(r.Headers, id)
	}
	r.Bytes += n
	r.Items = append(r.Items, GCItem{Kind: kind, ID: id, Bytes: n})
}

// GC removes what nothing needs: it marks from every manifest, from roots (the
// images of running sandboxes; an ID without an image is an error), from the
// images open in this Store and from unfinished writers and transactions, and
// sweeps the rest. When a manifest or the header of a marked image cannot be
// read it removes nothing. It may be stopped and repeated at any point.
func (s *Store) GC(ctx context.Context, roots []format.ID, dryRun bool) (GCReport, error) {
	var r GCReport
	if !dryRun {
		if err := s.forWriting(); err != nil {
			return r, fmt.Errorf("gc: %w", err)
		}
	}
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	plan, err := s.mark(ctx, roots)
	if err != nil {
		return r, fmt.Errorf("gc: nothing removed: %w", err)
	}
	if err := s.sweep(ctx, plan, &r, dryRun); err != nil {
		return r, fmt.Errorf("gc: %w", err)
	}
	if !dryRun {
		s.log.Info("gc done", "snapshots", len(r.Snapshots), "images", len(r.Images), "headers", len(r.Headers), "bytes", r.Bytes)
	}
	return r, nil
}

// gcPlan is what there was and what of it is needed.
type gcPlan struct {
	snapshots []format.ID // all without a manifest that are not being made
	images    []format.ID // all
	whole     map[format.ID]bool
	data      map[format.ID]bool
	named     map[format.ID][]format.ID // images, and the snapshots that name them
	// strays are files that a crash left beside what counts.
	strays []stray
}

// stray is a temporary file beside a snapshot's or an image's own.
type stray struct {
	of   format.ID
	name string
}

// mark looks in an order that makes it safe beside commits of this process:
// first at what exists, then at what is pending, then at the manifests, listed
// anew. An image made later is not in the list; one of the list is pending, or
// its manifest is there to be read, or nobody wants it. The same holds for a
// snapshot without a manifest.
func (s *Store) mark(ctx context.Context, roots []format.ID) (*gcPlan, error) {
	p := &gcPlan{whole: map[format.ID]bool{}, data: map[format.ID]bool{}, named: map[format.ID][]format.ID{}}
	var err error
	if p.images, err = s.list(s.imagesDir()); err != nil {
		return nil, err
	}
	existed, err := s.list(s.snapshotsDir())
	if err != nil {
		return nil, err
	}
	making := s.markLive(p)
	named, err := s.markManifests(p, func(id format.ID) bool {
		return slices.Contains(existed, id) && !making[id]
	})
	if err != nil {
		return nil, err
	}
	for _, id := range slices.Concat(roots, named) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if p.whole[id] {
			continue // seen, or in use by this process and marked for that
		}
		h, _, err := s.readHeader(id)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", id, err)
		}
		p.needs(id, h)
	}
	s.markCompacted(p)
	return p, nil
}

// markManifests reads every manifest and returns the images that they name. Of
// the snapshots without one, unfinished says which nobody will finish.
func (s *Store) markManifests(p *gcPlan, unfinished func(format.ID) bool) ([]format.ID, error) {
	snapshots, err := s.list(s.snapshotsDir())
	if err != nil {
		return nil, err
	}
	var images []format.ID
	for _, id := range snapshots {
		m, err := s.Manifest(id)
		if errors.Is(err, ErrNotFound) {
			if unfinished(id) {
				p.snapshots = append(p.snapshots, id)
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, ref := range m.images() {
			images = append(images, ref.ID)
			p.named[ref.ID] = append(p.named[ref.ID], id)
		}
		p.strays = append(p.strays, stray{id, s.manifestPath(id) + ".tmp"})
	}
	return images, nil
}

// markCompacted marks the better layouts of what is needed: a writer whose
// parent is the old image will build on them. One that cannot be read is of no
// use, and the old one holds the same.
func (s *Store) markCompacted(p *gcPlan) {
	for _, id := range p.images {
		for p.whole[id] {
			p.strays = append(p.strays, stray{id, s.compactionPath(id) + ".tmp"})
			c, err := s.readCompaction(id)
			if err != nil || c == nil || !c.built() || p.whole[c.To] {
				break
			}
			h, _, err := s.readHeader(c.To)
			if err != nil {
				break
			}
			p.needs(c.To, h)
			id = c.To
		}
	}
}

// needs marks an image and the builds that it reads from.
func (p *gcPlan) needs(id format.ID, h *format.Header) {
	p.whole[id] = true
	for _, b := range h.Builds {
		p.data[b.ID] = true
	}
}

// markLive marks what this process is using, and returns the snapshots that it
// is making.
func (s *Store) markLive(p *gcPlan) map[format.ID]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	making := make(map[format.ID]bool, len(s.txns))
	for id := range s.txns {
		making[id] = true
	}
	for id, c := range s.images {
		p.needs(id, c.header)
	}
	for id := range s.importing {
		p.whole[id] = true
	}
	for id, w := range s.pending {
		p.whole[id] = true
		if w.base != nil {
			for _, b := range w.base.Builds {
				p.data[b.ID] = true
			}
		}
	}
	return making
}

// sweep removes snapshots first: no manifest may outlive an image it names.
func (s *Store) sweep(ctx context.Context, p *gcPlan, r *GCReport, dryRun bool) error {
	for _, id := range p.snapshots {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, _, err := s.sizes(s.snapshotDir(id), "manifest.json.tmp", "state")
		if err != nil {
			return err
		}
		if !dryRun {
			if err := s.sweepSnapshot(id); err != nil {
				return err
			}
		}
		r.add(GCSnapshot, id, n)
	}
	for _, f := range p.strays {
		if err := s.sweepStray(f, r, dryRun); err != nil {
			return err
		}
	}
	// All of them before any image goes: what a compacted image read from may
	// come before it in the list.
	for _, id := range p.images {
		if p.whole[id] || dryRun {
			continue
		}
		if err := s.settleSwitch(id, p); err != nil {
			return err
		}
	}
	for _, id := range p.images {
		if err := ctx.Err(); err != nil {
			return err
		}
		if p.whole[id] {
			continue
		}
		if err := s.sweepImage(id, p.data[id], r, dryRun); err != nil {
			return err
		}
	}
	return nil
}

// settleSwitch makes sure, before a compacted image goes, that the manifests
// that named it cannot come to name it again: replacing one may have failed
// just short of being durable.
func (s *Store) settleSwitch(id format.ID, p *gcPlan) error {
	c, err := s.readCompaction(id)
	if err == nil && c == nil {
		return nil
	}
	var damaged *CorruptError
	if err != nil && !errors.As(err, &damaged) {
		return err
	}
	for to, ids := range p.named {
		if c != nil && to != c.To {
			continue
		}
		for _, snapshot := range ids {
			if err := s.fs.SyncDir(s.snapshotDir(snapshot)); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweepStray removes a temporary file. Nobody is writing it: that is done under
// the same lock as GC.
func (s *Store) sweepStray(f stray, r *GCReport, dryRun bool) error {
	dir := path.Dir(f.name)
	n, files, err := s.sizes(dir, path.Base(f.name))
	if err != nil || files == 0 {
		return err
	}
	r.add(GCFile, f.of, n)
	if dryRun {
		return nil
	}
	if err := s.fs.Remove(f.name); err != nil {
		return err
	}
	return s.fs.SyncDir(dir)
}

// sweepImage removes an image, or only its header when others read its blocks.
func (s *Store) sweepImage(id format.ID, keepData bool, r *GCReport, dryRun bool) error {
	// The .tmp of an Import that was cut off; one under way is pending.
	names := []string{compactionName + ".tmp", compactionName, "header.tmp", "data.tmp", "header"}
	if !keepData {
		names = append(names, "data")
	}
	n, files, err := s.sizes(s.imageDir(id), names...)
	if err != nil {
		return err
	}
	if keepData && files == 0 {
		return nil // they went before
	}
	if keepData {
		r.add(GCHeader, id, n)
		if dryRun {
			return nil
		}
		return s.removeFiles(s.imageDir(id), names...)
	}
	r.add(GCImage, id, n)
	if dryRun {
		return nil
	}
	return s.removeAll(s.imageDir(id), names...)
}

// sizes adds up the sizes of those of the files that exist, and counts them.
func (s *Store) sizes(dir string, names ...string) (sum int64, files int, err error) {
	for _, n := range names {
		f, err := s.fs.Open(path.Join(dir, n))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, 0, err
		}
		size, err := f.Size()
		if err = errors.Join(err, f.Close()); err != nil {
			return 0, 0, err
		}
		sum += size
		files++
	}
	return sum, files, nil
}
