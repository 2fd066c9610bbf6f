package storage_test

import (
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/storagetest"
)

func newFiles(t *testing.T, fsys storage.FS, dir string) *storage.Files {
	t.Helper()
	f, err := storage.NewFiles(fsys, dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestObjectsConform(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) storage.Objects{
		"memory":             func(t *testing.T) storage.Objects { return storagetest.NewMemory() },
		"files":              func(t *testing.T) storage.Objects { return newFiles(t, nil, t.TempDir()+"/objects") },
		"files in a test fs": func(t *testing.T) storage.Objects { return newFiles(t, snaptest.NewFS(), "/objects") },
		"faulty":             func(t *testing.T) storage.Objects { return storagetest.NewFaulty(storagetest.NewMemory()) },
		"all decorators":     func(t *testing.T) storage.Objects { return newStack(t, storagetest.NewMemory(), 64<<10) },
		"small cache":        func(t *testing.T) storage.Objects { return newStack(t, newFiles(t, nil, t.TempDir()), 2000) },
	} {
		t.Run(name, func(t *testing.T) { storagetest.RunObjects(t, open) })
	}
}

// newStack returns the decorators over o with a cache that holds next to
// nothing, so that it evicts all the time.
func newStack(t *testing.T, o storage.Objects, cache int64) storage.Objects {
	t.Helper()
	s, err := storage.NewStack(o, storage.StackOptions{
		Cache: storage.CacheOptions{
			Dir: t.TempDir() + "/cache", MaxBytes: cache, ChunkSize: 16 << 10,
			// The suite changes this one while it is being read.
			Cacheable: func(key string) bool { return key != "dir/k" },
		},
		Limit: storage.LimitOptions{Concurrent: 3},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}
