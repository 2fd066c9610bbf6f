package snapshot

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// CompactionReport says what Compact did.
type CompactionReport struct {
	From, To  format.ID // To is From when there was nothing to do
	Builds    int       // of To
	Fragments int       // of To
	Bytes     int64     // of blocks copied
	Switched  []format.ID
}

// Compact brings an image inside of the bounds of Options.Compaction, if it is
// not: it copies the blocks of some of its builds into a new image of the same
// content, and lets every manifest that names the old one name the new one. It
// is made for the background: it holds no lock while it copies, and readers of
// the old image, in this process or another, go on undisturbed, for the old
// files stay until GC finds that nothing needs them. Writers whose parent is
// the old image build on the new layout from then on.
//
// The work follows a plan that is stored beside the image. After a crash, or
// an error, calling Compact again goes on where the plan stands; doing it twice
// does nothing.
func (s *Store) Compact(ctx context.Context, id format.ID) (CompactionReport, error) {
	r := CompactionReport{From: id, To: id}
	if err := s.forWriting(); err != nil {
		return r, fmt.Errorf("compact image %s: %w", id, err)
	}
	s.compactMu.Lock()
	defer s.compactMu.Unlock()
	if err := s.compact(ctx, &r); err != nil {
		return r, fmt.Errorf("compact image %s: %w", id, err)
	}
	if r.To != id {
		s.log.Info("image compacted", "from", id.String(), "to", r.To.String(), "builds", r.Builds, "fragments", r.Fragments, "bytes", r.Bytes)
	}
	return r, nil
}

func (s *Store) compact(ctx context.Context, r *CompactionReport) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		img, err := s.OpenImage(r.To) // its builds stay meanwhile
		if err != nil {
			return err
		}
		next, err := s.compactOnce(ctx, img, r)
		if err := errors.Join(err, img.Close()); err != nil {
			return err
		}
		if next.IsZero() {
			return nil
		}
		r.To = next
	}
}

// compactOnce carries out the plan of an image, the stored one or a new one,
// and returns the image that took its place, or the zero ID.
func (s *Store) compactOnce(ctx context.Context, img *Image, r *CompactionReport) (format.ID, error) {
	h := img.Header()
	c, err := s.readCompaction(h.Build)
	var damaged *CorruptError
	if errors.As(err, &damaged) {
		// What it said can be found anew; what it had made is garbage.
		s.log.Warn("a damaged plan is made anew", "err", err)
		c, err = nil, nil
	}
	if err != nil {
		return format.ID{}, err
	}
	if c != nil && c.built() {
		if _, err := s.compactedTo(c, h.Size); err != nil {
			return format.ID{}, err
		}
	}
	if c == nil {
		p := planCompaction(h, s.compaction)
		r.Builds, r.Fragments = p.Builds, p.Fragments
		if !p.Needed() {
			return format.ID{}, nil
		}
		c = newCompaction(&p)
	}
	if !c.built() {
		if err := s.aim(c); err != nil {
			return format.ID{}, fmt.Errorf("write the plan: %w", err)
		}
		n, err := s.buildCompacted(ctx, img, c)
		if err != nil {
			return format.ID{}, err
		}
		r.Bytes += n
	}
	return c.To, s.switchManifests(ctx, c, r)
}

// aim gives a plan an image to make. What an earlier try has left of one is
// never used again nor removed here: a plan that was replaced without becoming
// durable may have let others build on it, and only GC knows.
func (s *Store) aim(c *compactionFile) error {
	if !c.To.IsZero() {
		_, err := s.fs.ReadDir(s.imageDir(c.To))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	c.To = format.NewID()
	return s.writeCompaction(c)
}

// buildCompacted makes the image that the plan names and then says in the plan
// that it is whole.
func (s *Store) buildCompacted(ctx context.Context, img *Image, c *compactionFile) (int64, error) {
	h := img.Header()
	w := &Writer{
		store: s, id: c.To, size: h.Size, base: h, relayout: true,
		seen: make([]uint64, (h.Size/blockSize+63)/64),
	}
	s.mu.Lock()
	s.pending[w.id] = w // from here on GC leaves it alone
	s.mu.Unlock()
	err := w.create()
	if err == nil {
		err = copySelected(ctx, img, w, c)
	}
	if err == nil {
		_, err = w.Finish(ctx)
	}
	if err == nil {
		// Into a copy: the plan is not built until its file says so.
		done := *c
		done.HeaderSHA256 = hex.EncodeToString(w.headerDigest[:])
		if err = s.writeCompaction(&done); err != nil {
			err = s.planUnknown(c, w, err)
		} else {
			*c = done
		}
	}
	if err != nil {
		return 0, errors.Join(err, w.Abort())
	}
	w.setState(finished, committed)
	s.mu.Lock()
	delete(s.pending, w.id)
	s.mu.Unlock()
	return int64(w.blocks) * blockSize, nil
}

// planUnknown handles a plan that could not be replaced: the file may say
// either, and after a crash may say the other. If it may say that the image is
// whole, the image must stay; GC removes it with the plan.
func (s *Store) planUnknown(c *compactionFile, w *Writer, cause error) error {
	if now, err := s.readCompaction(c.From); err == nil && now != nil && !now.built() {
		return cause
	}
	w.setState(finished, committed) // Abort does nothing from now on
	s.mu.Lock()
	delete(s.pending, w.id)
	s.mu.Unlock()
	return cause
}

// copySelected copies every block that the plan wants copied, in the order of
// the image, so that what is adjacent there becomes adjacent in the storage.
func copySelected(ctx context.Context, img *Image, w *Writer, c *compactionFile) error {
	h := img.Header()
	sel := selection{builds: make([]bool, len(h.Builds)), pieces: c.Pieces}
	for i, b := range h.Builds {
		sel.builds[i] = slices.Contains(c.Rewrite, b.ID)
	}
	buf := make([]byte, 1<<20)
	for m, copied := range sel.parts(h) {
		if !copied {
			continue
		}
		for off, end := int64(m.Start)*blockSize, int64(m.End())*blockSize; off < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := buf[:min(int64(len(buf)), end-off)]
			if n, err := img.ReadAt(p, off); n < len(p) {
				return err
			}
			if err := w.WriteAt(p, off); err != nil {
				return err
			}
			off += int64(len(p))
		}
	}
	return nil
}

// switchManifests lets every manifest that names the old image name the new
// one: one atomic replacement for each. A manifest that is deleted meanwhile
// stays deleted.
func (s *Store) switchManifests(ctx context.Context, c *compactionFile, r *CompactionReport) error {
	ids, err := s.list(s.snapshotsDir())
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		switched, err := s.switchManifest(id, c)
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
		if switched {
			r.Switched = append(r.Switched, id)
		}
	}
	return nil
}

func (s *Store) switchManifest(id format.ID, c *compactionFile) (bool, error) {
	s.gcMu.Lock() // against Delete: a manifest must not come back
	defer s.gcMu.Unlock()
	m, err := s.Manifest(id)
	var damaged *CorruptError
	if errors.Is(err, ErrNotFound) || errors.As(err, &damaged) {
		return false, nil // not there, or not ours to repair
	}
	if err != nil {
		return false, err
	}
	switched := false
	for _, ref := range []*ImageRef{&m.Memory, &m.Disk} {
		if ref.ID == c.From {
			ref.ID, ref.HeaderSHA256 = c.To, c.HeaderSHA256
			switched = true
		}
	}
	if !switched {
		return false, nil
	}
	b, err := encodeManifest(&m)
	if err != nil {
		return false, err
	}
	return true, s.replaceFile(s.manifestPath(id), b)
}
