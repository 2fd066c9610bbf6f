package template

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
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
// from several processes at once: one builds, the others wait and find it. A
// build that fails or is cancelled leaves nothing that a later one uses; errors
// name the remedy where there is a usual one.
func Build(ctx context.Context, o Options) (Result, error) {
	b, err := newBuilder(o)
	if err != nil {
		return Result{}, fmt.Errorf("base template: %w", err)
	}
	r, err := b.build(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("base template: %w", err)
	}
	return r, nil
}

func (o *Options) setDefaults() error {
	if o.SourceDateEpoch == 0 {
		o.SourceDateEpoch = DefaultSourceDateEpoch
	}
	if o.DiskSizeBytes == 0 {
		o.DiskSizeBytes = DefaultDiskSize
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Dir == "" || o.Cache == "" || o.EnvdPath == "":
		return errors.New("Dir, Cache and EnvdPath must be given")
	case o.SourceDateEpoch < 0 || o.SourceDateEpoch > math.MaxInt32:
		return fmt.Errorf("SourceDateEpoch is %d, want 1 to %d", o.SourceDateEpoch, math.MaxInt32)
	case o.DiskSizeBytes < minDisk || o.DiskSizeBytes > maxDisk || o.DiskSizeBytes%blockSize != 0:
		return fmt.Errorf("DiskSizeBytes is %d, want a multiple of %d from %d to %d",
			o.DiskSizeBytes, blockSize, int64(minDisk), int64(maxDisk))
	}
	for _, p := range []*string{&o.Dir, &o.Cache, &o.EnvdPath} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	return nil
}
