//go:build linux

// Package uffd serves the page faults of running virtual machines, so that a
// restored VM starts at once and its clones share memory.
//
// A Shared is one memory image's pages in RAM: a memfd that is all holes at
// first. A VMM maps it as guest memory. Inject then makes the running VMM
// replace that mapping by a private one with a userfaultfd on it; from then on
// a page the guest reads comes from the memfd, a page it writes is its own,
// and a page that the memfd does not hold yet raises an event. A Server
// answers the events of many VMs: it reads the page's cluster from the Source,
// puts it into the memfd, where all clones find it, and wakes the guest.
// ScanDirty and ReadMemory are the way back: the pages that a VM owns.
//
// It may be imported by the process that serves pages and by the engine. It
// stands on x/sys and on the meaning of blocks in snapshot/format, on Linux;
// Inject is for amd64 only and says so at run time elsewhere.
//
// Invariants:
//
//  1. A guest never sees zeros that its image does not hold. A page that
//     cannot be had kills the VM first and is reported then.
//  2. A page appears in the memfd with its whole content at once (UFFDIO_COPY
//     into a mapping of ours). A write into the file would not do: between
//     allocation and copy the kernel shows the page as zeros if the source
//     happens to be unmapped, by migration for example.
//  3. The memfd itself tells which pages are there. No state of ours decides
//     it, so filling is idempotent, across workers and restarts.
//  4. What the memfd holds is the image. Pages that a VMM made by touching the
//     file before it was attached are found and taken out again, see
//     Shared.expel.
//  5. The VMM keeps a descriptor of its userfaultfd, so that the death of the
//     server leaves guests waiting, not reading zeros.
//  6. Serving a fault starts no goroutine, allocates nothing and pins no
//     thread. The goroutine that reads an attachment's events serves a fault
//     itself where pages come quickly, and leaves it to workers where they do
//     not, so that a page on a slow store holds up nobody who needs another.
//  7. In copy mode a page that was removed from a VM's memory is zeros from
//     then on; no page of the image comes back to its place, and no death of
//     the server forgets it, see PageMap.
//  8. A VMM that hands its userfaultfd over decides about its own memory only:
//     what it says is bounded and checked, its lies end in its own death.
//
// Copy mode is for a VMM that has memory of its own and hands its userfaultfd
// over on a unix socket, as Firecracker does: Peer.Accept makes an Attachment
// of another kind, on the same Server and Source, whose pages are copied
// straight into the VM. What it copies is each VM's own.
package uffd

import (
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

const (
	pageSize = format.BlockSize
	// maxZeroRun is how much of a run of zeros one fault maps.
	maxZeroRun = 2 << 20
	// DefaultClusterSize is how much of the image one fault brings in.
	DefaultClusterSize = 64 << 10
	maxClusterSize     = 2 << 20
)

// Source is a memory image. It is block.Source: ReadAt gives verified bytes or
// an error, Span tells whether the block at a block-aligned offset is data or
// zeros and for how many bytes that stays so. Both are called concurrently.
type Source interface {
	Size() int64
	ReadAt(p []byte, off int64) (int, error)
	Span(off int64) (kind format.Kind, n int64)
}

var (
	// ErrGone means that the process has ended.
	ErrGone = errors.New("process is gone")
	// ErrPoisoned means that a VMM wrote to the shared image before it was
	// attached. The image has been cleaned; the VMM must not be used.
	ErrPoisoned = errors.New("shared image was written to by a process before it was attached")
)

// readFull reads len(p) bytes of the image or fails.
func readFull(src Source, p []byte, off int64) error {
	n, err := src.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = errors.New("short read")
	}
	return fmt.Errorf("read %d bytes of the image at %d: %w", len(p), off, err)
}

// span is Source.Span with its answer bounded to [off, end) and whole pages,
// so that no Source can make a caller loop or leave the image.
func span(src Source, off, end int64) (format.Kind, int64, error) {
	kind, n := src.Span(off)
	if n < pageSize || n%pageSize != 0 {
		return 0, 0, fmt.Errorf("image gives a run of %d bytes at %d", n, off)
	}
	if kind != format.Zero && kind != format.Data {
		return 0, 0, fmt.Errorf("image gives block kind %d at %d", kind, off)
	}
	return kind, min(n, end-off), nil
}
