package nested

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// Base puts the built base template into the tree, below dir, as WRENN_CACHE
// wants it. It is taken from the cache of this host, or built into it.
func Base(t testing.TB, tree, dir string) {
	t.Helper()
	cache := os.Getenv("WRENN_CACHE")
	if cache == "" {
		cache = filepath.Join(harness.DevDir(), "cache")
	}
	bases, stages := filepath.Join(cache, "templates", "base"), filepath.Join(cache, "cache")
	r, err := template.Build(t.Context(), template.Options{
		Dir: bases, Cache: stages, EnvdPath: filepath.Join(harness.Bin(), "envd"),
	})
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(tree, dir)
	copyTree(t, filepath.Join(to, "templates", "base", r.Digest), filepath.Dir(r.Rootfs))
	found, _ := filepath.Glob(filepath.Join(stages, "packages-*"))
	for _, stage := range found {
		copyStage(t, filepath.Join(to, "cache", filepath.Base(stage)), stage)
	}
}

// copyStage copies a stage of the builds without its disk, which nobody reads
// while the template made of it is there: a hole of the same size.
func copyStage(t testing.TB, to, from string) {
	t.Helper()
	var meta struct {
		Files map[string]struct{ Size int64 }
	}
	b, err := os.ReadFile(filepath.Join(from, "meta.json"))
	if err == nil {
		err = json.Unmarshal(b, &meta)
	}
	if err != nil {
		t.Fatal(err)
	}
	copyTo(t, filepath.Join(to, "meta.json"), filepath.Join(from, "meta.json"))
	for name, f := range meta.Files {
		if filepath.Base(name) != "rootfs.ext4" {
			copyTo(t, filepath.Join(to, name), filepath.Join(from, name))
			continue
		}
		path := filepath.Join(to, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, f.Size); err != nil {
			t.Fatal(err)
		}
	}
}

func copyTree(t testing.TB, to, from string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "", "cp", "-r", "--sparse=always", "--reflink=auto", from, to)
}

func copyTo(t testing.TB, to, from string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "", "cp", "--sparse=always", "--reflink=auto", from, to)
}
