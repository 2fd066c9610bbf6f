package snapshot_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

const (
	blockSize = format.BlockSize
	size      = 64 * blockSize
)

// openExample opens a new store in a directory that remove takes away.
func openExample() (store *snapshot.Store, dir string, remove func()) {
	dir, err := os.MkdirTemp("", "example")
	check(err)
	store, err = snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{})
	check(err)
	return store, dir, func() {
		check(store.Close())
		check(os.RemoveAll(dir))
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// blocks returns n blocks filled with a byte.
func blocks(n int, fill byte) []byte { return bytes.Repeat([]byte{fill}, n*blockSize) }

// commit makes an image, a change of parent or of zeros, and a snapshot that
// names it. This is what a pause does once the machine stands still.
func commit(ctx context.Context, store *snapshot.Store, parent *snapshot.Image, name string, change func(*snapshot.Writer) error) (snapshot.Manifest, error) {
	w, err := store.NewImage(size, parent)
	if err != nil {
		return snapshot.Manifest{}, err
	}
	defer w.Abort() // does nothing once committed
	if err := change(w); err != nil {
		return snapshot.Manifest{}, err
	}
	id, err := w.Finish(ctx) // durable, but nothing names it yet
	if err != nil {
		return snapshot.Manifest{}, err
	}
	txn, err := store.Begin()
	if err != nil {
		return snapshot.Manifest{}, err
	}
	defer txn.Abort()
	state, err := txn.StateFile() // of the devices; optional
	if err != nil {
		return snapshot.Manifest{}, err
	}
	if _, err := state.Write([]byte("registers")); err != nil {
		return snapshot.Manifest{}, err
	}
	m := snapshot.Manifest{Kind: snapshot.KindSnapshot, Name: name, Memory: snapshot.ImageRef{ID: id}}
	if err := txn.Commit(ctx, m); err != nil { // all of it, or nothing
		return snapshot.Manifest{}, err
	}
	return store.Manifest(txn.ID())
}

// A store is made, an image written and named, the store opened again as after
// a restart, a change of the image added, both verified; then the first one is
// deleted, and what the second one does not need is freed.
func Example() {
	ctx := context.Background()
	store, dir, remove := openExample()
	first, err := commit(ctx, store, nil, "first", func(w *snapshot.Writer) error {
		return w.WriteAt(blocks(4, 'a'), 0)
	})
	check(err)
	check(store.Close())

	// Another process, later.
	store, err = snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{})
	check(err)
	defer remove()
	defer store.Close()
	parent, err := store.OpenImage(first.Memory.ID)
	check(err)
	second, err := commit(ctx, store, parent, "second", func(w *snapshot.Writer) error {
		if err := w.WriteAt(blocks(1, 'b'), 1*blockSize); err != nil {
			return err
		}
		return w.Zero(2*blockSize, blockSize) // zeros now, where the parent has data
	})
	check(err)
	check(parent.Close())

	img, err := store.OpenImage(second.Memory.ID)
	check(err)
	p := make([]byte, 5*blockSize)
	_, err = img.ReadAt(p, 0)
	check(err)
	for i := range 5 {
		kind, _ := img.Span(int64(i) * blockSize)
		fmt.Printf("block %d: %q, %v\n", i, p[i*blockSize], kind)
	}
	check(img.Close())

	problems, err := store.Verify(ctx, nil)
	check(err)
	fmt.Println("damaged:", len(problems))

	check(store.Delete(ctx, first.ID))
	dry, err := store.GC(ctx, nil, true) // only tells
	check(err)
	freed, err := store.GC(ctx, nil, false)
	check(err)
	fmt.Println("freed headers:", len(freed.Headers), "images:", len(freed.Images), "as foretold:", freed.Bytes == dry.Bytes)
	// Output:
	// block 0: 'a', data
	// block 1: 'b', data
	// block 2: '\x00', zero
	// block 3: 'a', data
	// block 4: '\x00', zero
	// damaged: 0
	// freed headers: 1 images: 0 as foretold: true
}

// What a running disk has written into its overlay becomes the next generation
// of the disk's image.
func ExampleWriter_overlay() {
	ctx := context.Background()
	store, dir, remove := openExample()
	defer remove()
	base, err := commit(ctx, store, nil, "base", func(w *snapshot.Writer) error { return w.WriteAt(blocks(8, 'a'), 0) })
	check(err)
	img, err := store.OpenImage(base.Memory.ID)
	check(err)
	defer img.Close()

	disk, err := block.OpenOverlay(storage.OS{}, filepath.Join(dir, "disk"), img)
	check(err)
	defer disk.Close()
	_, err = disk.WriteAt([]byte("written by the guest"), 3*blockSize+100)
	check(err)
	check(disk.Zero(5*blockSize, blockSize)) // TRIM
	check(disk.Flush())

	next, err := commit(ctx, store, img, "next", func(w *snapshot.Writer) error {
		var failed error
		p := make([]byte, 1<<20)
		disk.Dirty(func(off, n int64, kind format.Kind) bool {
			if kind == format.Zero {
				failed = w.Zero(off, n)
				return failed == nil
			}
			for end := off + n; off < end && failed == nil; {
				b := p[:min(int64(len(p)), end-off)]
				if _, failed = disk.ReadAt(b, off); failed == nil {
					failed = w.WriteAt(b, off)
				}
				off += int64(len(b))
			}
			return failed == nil
		})
		return failed
	})
	check(err)
	in, err := store.Inspect(ctx, next.ID, 8)
	check(err)
	fmt.Println("generation", in.Images[0].Generation, "reads from", len(in.Images[0].Builds), "builds")
	for _, b := range in.Images[0].Builds {
		fmt.Printf("generation %d: %d blocks of %d\n", b.Generation, b.UsedBytes/blockSize, b.StoredBytes/blockSize)
	}
	// Output:
	// generation 1 reads from 2 builds
	// generation 0: 6 blocks of 8
	// generation 1: 1 blocks of 1
}

// After many generations an image reads from many builds. Compact copies what
// is needed so that it does not; whoever reads the old image goes on.
func ExampleStore_Compact() {
	ctx := context.Background()
	store, dir, remove := openExample()
	defer remove()
	check(store.Close())
	store, err := snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{Compaction: snapshot.CompactionPolicy{MaxBuilds: 4}})
	check(err)
	defer store.Close()
	var img *snapshot.Image
	var last snapshot.Manifest
	for g := range 10 {
		last, err = commit(ctx, store, img, fmt.Sprint("generation-", g), func(w *snapshot.Writer) error {
			return w.WriteAt(blocks(1, byte('a'+g)), int64(g)*blockSize)
		})
		check(err)
		if img != nil {
			check(img.Close())
		}
		img, err = store.OpenImage(last.Memory.ID)
		check(err)
	}
	before := len(img.Header().Builds)
	r, err := store.Compact(ctx, img.ID())
	check(err)
	old := make([]byte, size)
	_, err = img.ReadAt(old, 0) // the old one is as good as ever
	check(err)
	check(img.Close())

	last, err = store.Manifest(last.ID) // names the new one
	check(err)
	img, err = store.OpenImage(last.Memory.ID)
	check(err)
	defer img.Close()
	now := make([]byte, size)
	_, err = img.ReadAt(now, 0)
	check(err)
	fmt.Println("builds:", before, "then", len(img.Header().Builds))
	fmt.Println("switched snapshots:", len(r.Switched), "content the same:", bytes.Equal(old, now))
	// Output:
	// builds: 10 then 2
	// switched snapshots: 1 content the same: true
}
