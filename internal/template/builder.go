package template

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// builder is one call of Build.
type builder struct {
	o          Options
	log        *slog.Logger
	mmdebstrap string
	ext4       ext4Tools
	etc        string // the host's /etc
	now        func() time.Time
	space      int64 // what the packages stage wants free, in bytes
}

func newBuilder(o Options) (*builder, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	return &builder{o: o, log: o.Logger, etc: "/etc", now: time.Now, space: packagesSpace}, nil
}

// findTools is not part of newBuilder: a cached template needs no tools.
func (b *builder) findTools() error {
	if runtime.GOARCH != architecture {
		return fmt.Errorf("this machine is %s; base templates are built on %s only", runtime.GOARCH, architecture)
	}
	if os.Geteuid() != 0 {
		return errors.New("building needs root: files of a root file system belong to root")
	}
	for _, t := range []struct {
		name string
		path *string
	}{
		{"mmdebstrap", &b.mmdebstrap},
		{"mke2fs", &b.ext4.mke2fs}, {"debugfs", &b.ext4.debugfs}, {"e2fsck", &b.ext4.e2fsck},
	} {
		if *t.path != "" {
			continue
		}
		var err error
		if *t.path, err = findTool(t.name); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) progress(step string, done, total int64) {
	if b.o.Progress != nil {
		b.o.Progress(step, done, total)
	}
}

func (b *builder) build(ctx context.Context) (Result, error) {
	envd, err := fileDigest(b.o.EnvdPath)
	if err != nil {
		return Result{}, fmt.Errorf("reading the guest agent (build it first): %w", err)
	}
	if r, err := b.cached(envd); err == nil && !b.o.Refresh {
		return r, nil
	}
	if err := b.findTools(); err != nil {
		return Result{}, err
	}
	lock, unlock, err := b.lock(ctx)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	// Whoever had the lock may have built just this.
	if r, err := b.cached(envd); err == nil && !b.o.Refresh {
		return r, nil
	}
	for _, dir := range []string{b.o.Dir, b.o.Cache} {
		if err := sweep(dir); err != nil {
			return Result{}, err
		}
	}
	started := b.now()
	stage, m, err := b.packagesStage(ctx, lock)
	if err != nil {
		return Result{}, err
	}
	if err := b.templateStage(ctx, stage, m, envd); err != nil {
		return Result{}, explain(err)
	}
	r, err := b.cached(envd)
	if err != nil {
		return Result{}, fmt.Errorf("reading back what was built: %w", err)
	}
	r.Cached = false
	b.log.Info("built the base template", "digest", r.Digest, "kernel", r.KernelVersion, "took", b.now().Sub(started))
	return r, nil
}

// lock takes the locks of both directories, always in the same order. The
// cache's is the one that a packages stage hands to its children.
func (b *builder) lock(ctx context.Context) (cache *os.File, unlock func(), err error) {
	waiting := func() {
		b.log.Info("waiting for another build to end", "dir", b.o.Dir)
		b.progress("waiting for another build", 0, 0)
	}
	dir, err := lockDir(ctx, b.o.Dir, waiting)
	if err != nil {
		return nil, nil, err
	}
	if sameFile(b.o.Dir, b.o.Cache) {
		return dir, func() { dir.Close() }, nil
	}
	cache, err = lockDir(ctx, b.o.Cache, waiting)
	if err != nil {
		return nil, nil, errors.Join(err, dir.Close())
	}
	return cache, func() { cache.Close(); dir.Close() }, nil
}

func sameFile(a, b string) bool {
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// templateDigest is the name of the template made of a packages stage and envd.
func templateDigest(packages meta, envd [32]byte) (string, error) {
	return digestOf(templateInputs{
		Builder: builderVersion, Packages: packages.Digest, Resolved: packages.Resolved,
		Envd: hex.EncodeToString(envd[:]),
	})
}

// cached finds a finished template without building or locking anything.
func (b *builder) cached(envd [32]byte) (Result, error) {
	key, err := b.o.packagesKey()
	if err != nil {
		return Result{}, err
	}
	packages, err := readMeta(filepath.Join(b.o.Cache, "packages-"+key), key)
	if err != nil {
		return Result{}, err
	}
	digest, err := templateDigest(packages, envd)
	if err != nil {
		return Result{}, err
	}
	dir := filepath.Join(b.o.Dir, digest)
	m, err := readMeta(dir, digest)
	if err != nil {
		return Result{}, err
	}
	return Result{
		Digest:        digest,
		Rootfs:        filepath.Join(dir, rootfsName),
		RootfsSize:    m.Files[rootfsName].Size,
		Kernel:        filepath.Join(dir, kernelName),
		KernelVersion: m.KernelVersion,
		KernelDigest:  m.Files[kernelName].SHA256,
		Initrd:        filepath.Join(dir, initrdName),
		Cached:        true,
	}, nil
}

// templateStage makes Dir/<digest> of the packages stage and envd.
func (b *builder) templateStage(ctx context.Context, stage string, packages meta, envd [32]byte) error {
	digest, err := templateDigest(packages, envd)
	if err != nil {
		return err
	}
	need, err := usedBytes(filepath.Join(stage, rootfsName))
	if err != nil {
		return fmt.Errorf("measuring the packages: %w", err)
	}
	if err := checkSpace(b.o.Dir, need+256<<20); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(b.o.Dir, tmpPrefix)
	if err != nil {
		return fmt.Errorf("making a directory to build in: %w", err)
	}
	defer b.cleanUp(tmp)
	started := b.now().Unix()
	work, done := filepath.Join(tmp, "work"), filepath.Join(tmp, "done")
	for _, d := range []string{work, done} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("making a directory to build in: %w", err)
		}
	}
	// From here on the binary is our copy: the caller's may be rebuilt meanwhile.
	agent := filepath.Join(work, envdName)
	if err := copyFile(b.o.EnvdPath, agent, 0o755); err != nil {
		return fmt.Errorf("copying envd: %w", err)
	}
	if got, err := fileDigest(agent); err != nil || got != envd {
		return fmt.Errorf("%s changed while it was being used: %w", b.o.EnvdPath, errors.Join(err, errors.New("build again")))
	}
	b.progress("copying the disk image", 0, 0)
	image := filepath.Join(done, rootfsName)
	err = cloneSparse(ctx, filepath.Join(stage, rootfsName), image, func(d, t int64) {
		b.progress("copying the disk image", d, t)
	})
	if err != nil {
		return err
	}
	b.progress("adding envd", 0, 0)
	err = b.ext4.addEnvd(ctx, image, work, envd, b.o.SourceDateEpoch, started)
	if err != nil {
		return err
	}
	b.progress("packing the initramfs", 0, 0)
	if err := writeInitrd(filepath.Join(done, initrdName), agent, filepath.Join(stage, modulesDir), b.o.SourceDateEpoch); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(stage, kernelName), filepath.Join(done, kernelName), 0o600); err != nil {
		return fmt.Errorf("copying the kernel: %w", err)
	}
	m := meta{
		Digest: digest, Packages: packages.Digest, Resolved: packages.Resolved,
		Envd: hex.EncodeToString(envd[:]), KernelVersion: packages.KernelVersion,
	}
	err = errors.Join(m.add(done, rootfsName, false), m.add(done, initrdName, true), m.add(done, kernelName, true))
	if err != nil {
		return fmt.Errorf("describing the template: %w", err)
	}
	if err := m.write(done); err != nil {
		return err
	}
	b.progress("syncing", 0, 0)
	return publish(done, filepath.Join(b.o.Dir, digest))
}

// cleanUp removes a build's directory; what it cannot remove, the next build
// sweeps.
func (b *builder) cleanUp(dir string) {
	if err := removeTree(dir); err != nil {
		b.log.Warn("removing a build directory", "dir", dir, "error", err)
	}
}

func copyFile(src, dst string, mode os.FileMode) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}
