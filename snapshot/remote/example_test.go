package remote_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/remote"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// A snapshot is made on one host, published, read where it is, and imported on
// another host. A bucket in place of the directory is s3.New.
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	// One host has a snapshot of a disk of 1 MiB with one block of data.
	host1, err := snapshot.Open(filepath.Join(dir, "host1"), snapshot.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer host1.Close()
	id, err := makeSnapshot(ctx, host1)
	if err != nil {
		log.Fatal(err)
	}

	// The object store, with what makes a far one usable.
	files, err := storage.NewFiles(storage.OS{}, filepath.Join(dir, "objects"))
	if err != nil {
		log.Fatal(err)
	}
	objects, err := storage.NewStack(files, storage.StackOptions{
		Cache: storage.CacheOptions{Dir: filepath.Join(dir, "cache"), MaxBytes: 1 << 30, Cacheable: remote.Immutable},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer objects.Close()

	sent, err := remote.Publish(ctx, host1, id, objects, remote.PublishOptions{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("published %d files\n", sent.Sent)

	// Read one block from there: nothing else is fetched but maps.
	there, err := remote.Open(ctx, objects)
	if err != nil {
		log.Fatal(err)
	}
	m, err := there.Manifest(id)
	if err != nil {
		log.Fatal(err)
	}
	disk, err := there.OpenImage(m.Disk.ID)
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	p := make([]byte, 5)
	if _, err := disk.ReadAt(p, 3*format.BlockSize); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("block 3 begins with %q\n", p)

	// Another host takes all of it.
	host2, err := snapshot.Open(filepath.Join(dir, "host2"), snapshot.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer host2.Close()
	if err := remote.Import(ctx, objects, id, host2); err != nil {
		log.Fatal(err)
	}
	problems, err := host2.Verify(ctx, nil)
	fmt.Printf("imported, %d problems, %v\n", len(problems), err)
	// Output:
	// published 2 files
	// block 3 begins with "hello"
	// imported, 0 problems, <nil>
}

func makeSnapshot(ctx context.Context, s *snapshot.Store) (format.ID, error) {
	w, err := s.NewImage(1<<20, nil)
	if err != nil {
		return format.ID{}, err
	}
	defer w.Abort()
	block := make([]byte, format.BlockSize)
	copy(block, "hello")
	if err := w.WriteAt(block, 3*format.BlockSize); err != nil {
		return format.ID{}, err
	}
	image, err := w.Finish(ctx)
	if err != nil {
		return format.ID{}, err
	}
	txn, err := s.Begin()
	if err != nil {
		return format.ID{}, err
	}
	defer txn.Abort()
	return txn.ID(), txn.Commit(ctx, snapshot.Manifest{Kind: snapshot.KindBase, Name: "hello", Disk: snapshot.ImageRef{ID: image}})
}
