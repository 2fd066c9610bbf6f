package snapshot

import (
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Usage is what one snapshot keeps in the store: bytes of files, as GC counts
// them.
type Usage struct {
	Manifest Manifest
	Own      int64 // freed when this snapshot alone is deleted
	Shared   int64 // needed by other snapshots, too
}

// Usage tells what each snapshot keeps, and what all of them keep together:
// bytes that several share are in the total once.
func (s *Store) Usage() (usage []Usage, total int64, err error) {
	manifests, errs := s.Manifests()
	if err := errors.Join(errs...); err != nil {
		return nil, 0, err
	}
	u := usageCount{store: s, files: map[usedFile]*useOfFile{}}
	for i, m := range manifests {
		own, _, err := s.sizes(s.snapshotDir(m.ID), "manifest.json", "state")
		if err != nil {
			return nil, 0, fmt.Errorf("usage of snapshot %s: %w", m.ID, err)
		}
		total += own
		usage = append(usage, Usage{Manifest: m, Own: own})
		for _, id := range []format.ID{m.Memory.ID, m.Disk.ID} {
			if err := u.image(id, i); err != nil {
				return nil, 0, fmt.Errorf("usage of snapshot %s: %w", m.ID, err)
			}
		}
	}
	for _, f := range u.files {
		total += f.size
		for i := range f.users {
			if len(f.users) == 1 {
				usage[i].Own += f.size
			} else {
				usage[i].Shared += f.size
			}
		}
	}
	return usage, total, nil
}

// usageCount counts who uses which files of images.
type usageCount struct {
	store *Store
	files map[usedFile]*useOfFile
}

// usedFile is the data of an image, or what else there is of it: its data may
// be needed when nobody needs the image any more.
type usedFile struct {
	image format.ID
	data  bool
}

type useOfFile struct {
	size  int64
	users map[int]struct{}
}

// image counts what a user needs of an image.
func (u *usageCount) image(id format.ID, user int) error {
	if id.IsZero() {
		return nil
	}
	h, _, err := u.store.readHeader(id)
	if err != nil {
		return err
	}
	if err := u.file(usedFile{image: id}, user, "header", compactionName); err != nil {
		return err
	}
	if err := u.file(usedFile{id, true}, user, "data"); err != nil {
		return err
	}
	for _, b := range h.Builds {
		if err := u.file(usedFile{b.ID, true}, user, "data"); err != nil {
			return err
		}
	}
	return nil
}

func (u *usageCount) file(f usedFile, user int, names ...string) error {
	use := u.files[f]
	if use == nil {
		size, _, err := u.store.sizes(u.store.imageDir(f.image), names...)
		if err != nil {
			return err
		}
		use = &useOfFile{size: size, users: map[int]struct{}{}}
		u.files[f] = use
	}
	use.users[user] = struct{}{}
	return nil
}
