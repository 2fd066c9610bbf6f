package template

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
)

// Prune removes every template in o.Dir and every packages stage in o.Cache but
// those that Build(ctx, o) would find, and what killed builds left. It returns
// the bytes that were freed on disk. If Build would find nothing, it removes
// nothing: an old template is better than none. Paths of earlier Results are not
// valid afterwards.
func Prune(ctx context.Context, o Options) (freed int64, err error) {
	b, err := newBuilder(o)
	if err != nil {
		return 0, fmt.Errorf("pruning templates: %w", err)
	}
	freed, err = b.prune(ctx)
	if err != nil {
		return freed, fmt.Errorf("pruning templates: %w", err)
	}
	return freed, nil
}

// Names of finished directories of either stage.
var (
	templateDir = regexp.MustCompile(`^[0-9a-f]{64}$`)
	packagesDir = regexp.MustCompile(`^packages-[0-9a-f]{64}$`)
)

func (b *builder) prune(ctx context.Context) (freed int64, err error) {
	_, unlock, err := b.lock(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	envd, err := fileDigest(b.o.EnvdPath)
	if err != nil {
		return 0, fmt.Errorf("reading the guest agent: %w", err)
	}
	current, err := b.cached(envd)
	if err != nil {
		return 0, fmt.Errorf("nothing is built that could be kept: %w", err)
	}
	key, err := b.o.packagesKey()
	if err != nil {
		return 0, err
	}
	for _, d := range []struct {
		dir  string
		name *regexp.Regexp
		keep string
	}{
		{b.o.Dir, templateDir, current.Digest},
		{b.o.Cache, packagesDir, "packages-" + key},
	} {
		if err := sweep(d.dir); err != nil {
			return freed, err
		}
		entries, err := os.ReadDir(d.dir)
		if err != nil {
			return freed, fmt.Errorf("reading %s: %w", d.dir, err)
		}
		for _, e := range entries {
			if e.Name() == d.keep || !e.IsDir() || !d.name.MatchString(e.Name()) {
				continue
			}
			path := filepath.Join(d.dir, e.Name())
			n := treeBytes(path)
			if err := os.RemoveAll(path); err != nil {
				return freed, fmt.Errorf("removing %s: %w", path, err)
			}
			b.log.Info("removed an old stage", "path", path, "bytes", n)
			freed += n
		}
	}
	return freed, nil
}

// treeBytes is what a directory occupies on disk, as far as it can be read.
func treeBytes(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := e.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				n += st.Blocks * 512
			}
		}
		return nil
	})
	return n
}
