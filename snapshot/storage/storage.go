// Package storage has the two seams under the snapshot engine.
//
// [FS] is the file system: the few operations that the engine needs, with their
// durability spelled out, so that tests can record them, fail them, and lose
// what was not synced (see snapshot/snaptest).
//
// [Objects] is a store of whole objects under keys, for snapshots that are kept
// or shared elsewhere (see snapshot/remote): in a directory ([Files]), in an S3
// bucket (snapshot/storage/s3), in memory for tests (snapshot/storage/storagetest).
// What makes a far store usable is put around any of them by [NewStack]:
// [Timeout], [Limit], [Retry] and [Cache], and snapshot/storage/zstd where the
// objects are to be compressed.
//
// The package is a leaf of the engine; it imports only the standard library.
//
// # Files
//
// What a power failure may lose, and the engine therefore assumes lost:
//
//   - bytes written to a file since its last successful Sync;
//   - names created, renamed or removed since the last successful SyncDir of
//     their directory.
//
// The death of the process alone (kill -9) loses neither.
package storage

import "io"

// FS is a file system. Names are slash-separated paths in the form that the
// implementation defines; the engine only joins them. Implementations are safe
// for concurrent use. Errors match fs.ErrNotExist and fs.ErrExist where these
// apply, and wrap the operating system's error otherwise.
type FS interface {
	// Create makes a new file for reading and writing, with mode 0600. A name
	// that exists is an error.
	Create(name string) (File, error)
	// Open opens a file for reading.
	Open(name string) (File, error)
	// OpenRW opens an existing file for reading and writing.
	OpenRW(name string) (File, error)
	// Mkdir makes a directory with mode 0700 in one that exists.
	Mkdir(name string) error
	// Rename moves a file over another one, atomically, in one directory.
	Rename(from, to string) error
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// ReadDir returns the names in a directory, sorted.
	ReadDir(name string) ([]string, error)
	// SyncDir makes the names in a directory durable.
	SyncDir(name string) error
	// BootID names the run of the operating system whose caches hold what was
	// written but not synced. While it is the same, nothing written is lost.
	BootID() (string, error)
}

// File is an open file. Methods are safe for concurrent use, except Write,
// which moves a position.
type File interface {
	io.ReaderAt
	io.WriterAt
	// Write appends after the last Write on this handle.
	io.Writer
	io.Closer

	// Name returns the name that the file was opened under.
	Name() string
	// Size returns the length in bytes.
	Size() (int64, error)
	// Truncate sets the length; what it adds is a hole.
	Truncate(size int64) error
	// PunchHole makes n bytes at off read as zeros and gives their storage
	// back; the length stays.
	PunchHole(off, n int64) error
	// Sync makes the content durable. After an error nothing is known about
	// what is on the disk, and a later success does not change that.
	Sync() error
	// Lock takes the exclusive lock of the file, which ends with Close or with
	// the process. ErrLocked when another handle has it.
	Lock() error
}
