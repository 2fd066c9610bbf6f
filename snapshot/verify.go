package snapshot

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// A Problem is damage that Verify found.
type Problem struct {
	File     string      // path of the damaged or missing file
	Offset   int64       // byte in it
	Affected []format.ID // snapshots that cannot be used, or not wholly
	Err      error       // a *CorruptError, or why the file could not be read
}

// Verify reads everything that a manifest needs and returns what is damaged.
// The error is about the scrub itself, such as a cancelled context. progress,
// which may be nil, is told how many bytes are done of how many. Another process
// may have the store: a snapshot that it deletes or compacts meanwhile is not
// damaged for that.
func (s *Store) Verify(ctx context.Context, progress func(done, total int64)) ([]Problem, error) {
	v := &verifier{store: s, progress: progress}
	manifests, errs := s.Manifests()
	for _, err := range errs {
		var c *CorruptError
		if !errors.As(err, &c) {
			return nil, fmt.Errorf("verify: %w", err)
		}
		v.problem([]format.ID{c.Image}, c.File, err)
	}
	if err := v.compactions(manifests); err != nil {
		return nil, fmt.Errorf("verify: %w", err)
	}
	for len(manifests) > 0 {
		err := v.scrub(ctx, manifests)
		if err == nil {
			manifests, err = v.changed(manifests)
		}
		if err != nil {
			return nil, fmt.Errorf("verify: %w", err)
		}
	}
	return v.problems, nil
}

// scrub reads everything that the manifests need.
func (v *verifier) scrub(ctx context.Context, manifests []Manifest) error {
	v.images, v.builds = map[format.ID]*checkedImage{}, map[format.BuildRef][]format.ID{}
	for i := range manifests {
		if err := ctx.Err(); err != nil {
			return err
		}
		v.manifest(&manifests[i])
	}
	for ref := range v.builds {
		v.total += int64(ref.Blocks) * blockSize
	}
	for ref, affected := range v.builds {
		if err := v.build(ctx, ref, affected); err != nil {
			return err
		}
	}
	return nil
}

// changed forgets what was wrong with manifests that have been deleted or
// replaced since they were read, and returns the new ones: what the old ones
// named may have gone for that reason.
func (v *verifier) changed(manifests []Manifest) ([]Manifest, error) {
	var again []Manifest
	for i := range manifests {
		id := manifests[i].ID
		affects := func(p Problem) bool { return slices.Contains(p.Affected, id) }
		if !slices.ContainsFunc(v.problems, affects) {
			continue
		}
		now, err := v.store.Manifest(id)
		var damaged *CorruptError
		switch {
		case err == nil && !reflect.DeepEqual(now, manifests[i]):
			again = append(again, now)
		case errors.Is(err, ErrNotFound):
		case err == nil, errors.As(err, &damaged):
			continue
		default:
			return nil, err
		}
		v.problems = slices.DeleteFunc(v.problems, func(p Problem) bool { return affects(p) && len(p.Affected) == 1 })
		for j := range v.problems {
			p := &v.problems[j]
			p.Affected = slices.DeleteFunc(p.Affected, func(a format.ID) bool { return a == id })
		}
	}
	return again, nil
}

type verifier struct {
	store       *Store
	progress    func(done, total int64)
	done, total int64
	images      map[format.ID]*checkedImage
	builds      map[format.BuildRef][]format.ID // and the snapshots that need them
	problems    []Problem
}

// checkedImage keeps the result of reading a header for other manifests.
type checkedImage struct {
	header *format.Header
	digest string
	err    error
}

// problem records damage; an error that knows its place overrules file.
func (v *verifier) problem(affected []format.ID, file string, err error) {
	p := Problem{File: file, Affected: slices.Clone(affected), Err: err}
	var c *CorruptError
	if errors.As(err, &c) {
		p.File, p.Offset = c.File, c.Offset
	}
	v.problems = append(v.problems, p)
}

func (v *verifier) manifest(m *Manifest) {
	s := v.store
	if m.State.SHA256 != "" {
		if err := s.checkState(m); err != nil {
			v.problem([]format.ID{m.ID}, s.statePath(m.ID), err)
		}
	}
	for _, ref := range m.images() {
		c := v.image(ref.ID)
		err := c.err
		if err == nil && (c.digest != ref.HeaderSHA256 || c.header.Size != ref.Size) {
			err = &CorruptError{Image: ref.ID, File: s.headerPath(ref.ID), Reason: "it is not the header that the manifest names"}
		}
		if err != nil {
			v.problem([]format.ID{m.ID}, s.headerPath(ref.ID), err)
			continue
		}
		for _, b := range c.header.Builds {
			if !slices.Contains(v.builds[b], m.ID) {
				v.builds[b] = append(v.builds[b], m.ID)
			}
		}
	}
}

// compactions reads the plans beside the images. What a compacted image itself
// still has is not looked at: it is kept only for who has it open, who verifies
// what it reads, or waits for GC.
func (v *verifier) compactions(manifests []Manifest) error {
	s := v.store
	ids, err := s.list(s.imagesDir())
	if err != nil {
		return err
	}
	for _, id := range ids {
		if _, err := s.readCompaction(id); err != nil {
			v.problem(naming(manifests, id), s.compactionPath(id), err)
		}
	}
	return nil
}

// naming returns the snapshots that name an image.
func naming(manifests []Manifest, image format.ID) []format.ID {
	var ids []format.ID
	for _, m := range manifests {
		if m.Memory.ID == image || m.Disk.ID == image {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

func (v *verifier) image(id format.ID) *checkedImage {
	c := v.images[id]
	if c == nil {
		h, b, err := v.store.readHeader(id)
		c = &checkedImage{header: h, digest: digestOf(b), err: err}
		v.images[id] = c
	}
	return c
}

// build reads every block of a build. Blocks after a bad one are read too:
// the report is to be complete.
func (v *verifier) build(ctx context.Context, ref format.BuildRef, affected []format.ID) error {
	// Opened apart from the shared ones: the table is read again, too.
	b := &build{ref: ref, name: v.store.dataPath(ref.ID)}
	if err := b.load(v.store.fs); err != nil {
		v.problem(affected, b.name, err)
		v.advance(int64(ref.Blocks) * blockSize)
		return nil
	}
	defer b.file.Close()
	const step = 256 // blocks
	buf := make([]byte, step*blockSize)
	for at := uint64(0); at < ref.Blocks; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(step, ref.Blocks-at)
		good, err := b.read(buf[:n*blockSize], at)
		if err != nil {
			v.problem(affected, b.name, err)
			n = uint64(good)/blockSize + 1
		}
		v.advance(int64(n) * blockSize)
		at += n
	}
	return nil
}

func (v *verifier) advance(n int64) {
	v.done += n
	if v.progress != nil {
		v.progress(v.done, v.total)
	}
}
