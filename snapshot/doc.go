// Package snapshot is a store of images in generations: the memory and disks
// of paused virtual machines, or anything else that is a range of 4 KiB blocks
// of which each generation changes a part. It is a stand-alone library; it
// knows no virtual machine, reads no environment and logs only to
// Options.Logger.
//
// An [Image] is immutable and complete: its header maps every block to the
// build that holds it, or to zeros, so that reading generation 1,000 costs
// what reading generation 1 costs. A [Writer] makes an image from a parent by
// writing what changed. A [Txn] joins a memory image, a disk image and a state
// file into a snapshot by one atomic step, the renaming of its manifest.
//
//	w, err := store.NewImage(size, parent)
//	defer w.Abort()                  // does nothing once committed
//	err = w.WriteAt(pages, off)      // what changed, whole blocks
//	id, err := w.Finish(ctx)         // durable, not yet reachable
//	txn, err := store.Begin()
//	defer txn.Abort()                // does nothing once committed
//	err = txn.Commit(ctx, snapshot.Manifest{Memory: snapshot.ImageRef{ID: id}, …})
//
// # On disk
//
//	<dir>/lock                              the writing process holds its lock
//	<dir>/images/<id>/data                  the blocks that this generation added
//	<dir>/images/<id>/header                the map of the whole image
//	<dir>/images/<id>/compaction            the plan for it, if there is one
//	<dir>/snapshots/<id>/manifest.json      the commit point
//	<dir>/snapshots/<id>/state              device state, absent for a base
//
// A data file holds B blocks of 4,096 bytes, then their CRC32C values (4 bytes
// each, little-endian, in the same order), then a trailer:
//
//	offset  bytes  what
//	0       8      magic "WRENNDAT"
//	8       4      version, 1
//	12      4      block size, 4096
//	16      8      B
//	24      16     id of the build
//	40      32     SHA-256 over the checksum table
//	72      4      CRC32C over bytes 0…71
//
// # Invariants
//
//  1. A manifest is visible only after everything that it names is durable:
//     data → fsync → header → fsync → directories → state → fsync →
//     manifest.tmp → fsync → directories → rename → fsync of the directory.
//  2. What a committed manifest needs is never changed, and not removed before
//     the removal of the manifest is durable.
//  3. No byte of a block leaves the store unless its checksum fits; the
//     checksums fit the digest in the header, the header its own checksum and
//     the digest in the manifest, the manifest its own digest.
//  4. What an Abort or a crash leaves behind is found by GC, which removes only
//     what no manifest, no root, no open image and no unfinished writer needs,
//     and nothing at all when a manifest or header cannot be read.
//  5. A compaction changes where an image's blocks lie, never what they hold. It
//     follows a stored plan, which may be carried out from any point again; the
//     old image stays whole until nobody needs it, and until the manifests that
//     name the new one instead are durable.
//  6. A zero block written over data becomes zero; over zero it changes nothing.
//
// # Copies
//
// [Store.Export] holds a snapshot's files for copying them elsewhere, and
// [Store.Import] brings a snapshot here from another store, under the same IDs;
// each file arrives as a .tmp, is verified, synced and renamed, the manifest
// last. Package remote does both for object stores.
//
// # Concurrency
//
// Any number of processes may read a store. One at a time may write; the first
// changing call takes the lock and keeps it until Close. All methods are safe
// for concurrent use, but those of one Txn. In particular:
//
//   - An [Image] is read by any number of goroutines at once; only Close waits
//     for nobody, so nobody may be reading then. Handles on the same image share
//     its map and its files.
//   - One [Writer] makes one image. Several goroutines may give it blocks, each
//     block once. Any number of writers, with the same parent or not, may be at
//     work at a time.
//   - [Store.GC], [Store.Delete], [Store.Verify], [Store.Inspect] and
//     [Store.Compact] run beside all of that. GC spares what this process has
//     open or is making. Of other processes it knows nothing: who reads an image
//     that no manifest names gives its ID to GC as a root, and keeps the files
//     open that it reads from.
//   - [Store.Compact] disturbs no reader of the old image, in this process or
//     another: its files stay until nothing needs them.
//
// # Using it with another machine monitor
//
// This package stores; it stops no machine and finds no dirty page. For memory,
// package uffd restores a machine from an [Image] page by page and finds what
// it has written since. For disks, package block has the copy-on-write layer
// over an Image, and package nbd serves it. The examples here and there show
// how their results become the next generation. docs/engine.md has a picture.
package snapshot
