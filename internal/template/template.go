package template

import (
	"context"
	"errors"
	"log/slog"
)

// DefaultDiskSize is the size of the root disk where Options names none: 8 GiB.
const DefaultDiskSize = 8 << 30

// Options say what to build and where.
type Options struct {
	// Dir receives the finished template as Dir/<digest>. Required.
	Dir string
	// Cache holds the packages stage between builds. Required; on the same
	// machine, may be inside Dir's parent but not be Dir.
	Cache string
	// EnvdPath is the static guest agent binary. Required.
	EnvdPath string
	// SourceDateEpoch is the time, in seconds since 1970, that everything made
	// by the build carries. 0 means DefaultSourceDateEpoch.
	SourceDateEpoch int64
	// DiskSizeBytes is the size of the (sparse) disk. 0 means DefaultDiskSize.
	DiskSizeBytes int64
	// Sources replaces the host's own Debian mirrors: the text of an apt
	// sources file, one-line or deb822. Empty: from the host's configuration
	// where it is a Debian, else deb.debian.org.
	Sources string
	// Refresh builds the packages stage again although it is cached, to get
	// what the mirror offers now.
	Refresh bool
	// Progress, when set, is told how far the build is. It is called from one
	// goroutine at a time. total is 0 where it is not known; units differ by
	// step (bytes for copies, steps elsewhere).
	Progress func(step string, done, total int64)
	// Logger receives what the build does. nil discards it.
	Logger *slog.Logger
}

// Result describes a finished template. The paths lie in Options.Dir and stay
// valid until the caller removes the directory.
type Result struct {
	Digest        string // of the inputs, 64 hex digits; names the directory
	Rootfs        string // raw sparse ext4 image
	RootfsSize    int64  // bytes, apparent
	Kernel        string // bzImage
	KernelVersion string // as uname -r prints it
	KernelDigest  string // SHA-256 of Kernel, 64 hex digits
	Initrd        string // newc cpio, not compressed
	Cached        bool   // nothing had to be built
}

// Build makes the base template, or finds it in the cache. It is safe to call
// from several processes at once: one builds, the others wait and find it.
func Build(ctx context.Context, o Options) (Result, error) {
	return Result{}, errors.New("not implemented")
}
