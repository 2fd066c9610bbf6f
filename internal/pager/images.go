package pager

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// images owns the memory images that are open in RAM.
type images struct {
	store  *snapshot.Store
	limit  int64
	wholes wholes

	mu   sync.Mutex
	byID map[format.ID]*image
	// warm lists images without a user, the longest unused first.
	warm []*image
	uses uint64
	// readAhead is called for an image that has just become shared and is
	// cold.
	readAhead func(*image) *ahead
}

// image is one memory image and its shared pages.
type image struct {
	id     format.ID
	source *snapshot.Image
	shared *uffd.Shared // nil as long as only VMs in copy mode use it
	whole  *whole       // nil as long as nobody asked for it
	users  int
	keep   bool
	since  uint64 // when it was last taken into use, as a count of uses
	ahead  *ahead // of the cold start; nil if shared is
}

// inRAM tells whether the image itself has pages in RAM.
func (i *image) inRAM() bool {
	return i.shared != nil || i.whole != nil && !i.whole.failed()
}

func (i *image) resident() (n int64) {
	if i.shared != nil {
		n = i.shared.Resident()
	}
	if i.whole != nil {
		n += i.whole.resident()
	}
	return n
}

// sharedName is the memfd's name, by which a new pager finds it in the VMM.
func sharedName(id format.ID) string { return "wrenn-" + id.String() }

type acquireOptions struct {
	keep  bool
	share bool
	// adopt, if not nil, yields the memfd that a VM still holds from the time
	// of a pager that is gone.
	adopt func() (*os.File, error)
}

// acquire returns the image with one more user.
func (im *images) acquire(id format.ID, o acquireOptions) (*image, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	i := im.byID[id]
	if i == nil {
		src, err := im.store.OpenImage(id)
		if err != nil {
			return nil, fmt.Errorf("open memory image %s: %w", id, err)
		}
		i = &image{id: id, source: src}
	}
	if o.share && i.shared == nil {
		shared, err := openShared(id, i.source, o.adopt)
		if err != nil {
			err = fmt.Errorf("share memory image %s: %w", id, err)
			if i.users == 0 {
				err = errors.Join(err, i.source.Close())
			}
			return nil, err
		}
		i.shared = shared
		if o.adopt == nil {
			i.ahead = im.readAhead(i)
		}
	}
	im.byID[id] = i
	if i.users == 0 {
		im.unwarm(i)
	}
	i.users++
	im.uses++
	i.since = im.uses
	i.keep = i.keep || o.keep
	return i, nil
}

func openShared(id format.ID, src *snapshot.Image, adopt func() (*os.File, error)) (*uffd.Shared, error) {
	if adopt == nil {
		return uffd.NewShared(sharedName(id), src)
	}
	f, err := adopt()
	if err != nil {
		return nil, err
	}
	return uffd.AdoptShared(sharedName(id), f, src)
}

// release gives up one use.
func (im *images) release(i *image) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	i.users--
	if i.users > 0 {
		return nil
	}
	if !i.keep || !i.inRAM() {
		return im.drop(i)
	}
	im.warm = append(im.warm, i)
	var total int64
	for _, w := range im.warm {
		total += w.resident()
	}
	var errs []error
	for total > im.limit && len(im.warm) > 0 {
		oldest := im.warm[0]
		total -= oldest.resident()
		im.warm = im.warm[1:]
		errs = append(errs, im.drop(oldest))
	}
	return errors.Join(errs...)
}

// forget drops a warm image at once, and one in use when its last user goes.
func (im *images) forget(id format.ID) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	i := im.byID[id]
	if i == nil {
		return nil
	}
	i.keep = false
	if i.users > 0 {
		return nil
	}
	im.unwarm(i)
	return im.drop(i)
}

func (im *images) unwarm(i *image) {
	for n, w := range im.warm {
		if w == i {
			im.warm = append(im.warm[:n], im.warm[n+1:]...)
			return
		}
	}
}

func (im *images) drop(i *image) error {
	delete(im.byID, i.id)
	var errs []error
	if i.whole != nil {
		i.whole.cancel()
		<-i.whole.done
		errs = append(errs, im.wholes.unlink(i.whole.path))
	}
	if i.ahead != nil {
		i.ahead.stop()
	}
	if i.shared != nil {
		errs = append(errs, i.shared.Close())
	}
	return errors.Join(append(errs, i.source.Close())...)
}

// dropWarm drops all images without a user.
func (im *images) dropWarm() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	var errs []error
	for _, i := range im.warm {
		errs = append(errs, im.drop(i))
	}
	im.warm = nil
	return errors.Join(errs...)
}

// residentOf is the RAM of one image, which has a user.
func (im *images) residentOf(i *image) int64 {
	im.mu.Lock()
	defer im.mu.Unlock()
	return i.resident()
}

// takeUpWholes finds the files of open images that the pager before this one
// made, and returns their names. Who began by copying pages does not map the
// file, but the next clone may, and the last one has it removed.
func (im *images) takeUpWholes() map[string]bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	names := map[string]bool{}
	if im.wholes.dir == "" {
		return names
	}
	for id, i := range im.byID {
		if i.whole == nil {
			if w, err := im.wholes.adopt(i); err == nil {
				i.whole = w
			}
		}
		if i.whole != nil {
			names[id.String()] = true
		}
	}
	return names
}

// resident is the RAM of all images.
func (im *images) resident() (n int64) {
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, i := range im.byID {
		n += i.resident()
	}
	return n
}

// stopReading ends all reading ahead, and the making of whole images.
func (im *images) stopReading() {
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, i := range im.byID {
		if i.ahead != nil {
			i.ahead.stop()
		}
		if i.whole != nil {
			i.whole.cancel()
			<-i.whole.done
		}
	}
}
