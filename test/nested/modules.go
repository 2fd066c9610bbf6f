package nested

import (
	"bytes"
	"debug/elf"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// moduleFiles returns the files of the modules below tree and of all that they
// need, in the order in which they can be loaded. Names that the kernel has
// built in are left out.
func moduleFiles(t testing.TB, tree string, names []string) []string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok && err == nil {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	seen := map[string]bool{}
	var visit func(string)
	visit = func(name string) {
		name = strings.ReplaceAll(name, "-", "_")
		path := files[name]
		if seen[name] || path == "" {
			return
		}
		seen[name] = true
		for _, need := range modinfo(t, path, "depends") {
			visit(need)
		}
		for _, soft := range modinfo(t, path, "softdep") { // "pre: a b"
			for _, need := range strings.Fields(strings.TrimPrefix(soft, "pre:")) {
				visit(need)
			}
		}
		order = append(order, path)
	}
	for _, n := range names {
		if files[strings.ReplaceAll(n, "-", "_")] == "" {
			t.Fatalf("the kernel has no module %s", n)
		}
		visit(n)
	}
	return order
}

// modinfo reads a comma-separated field of a module.
func modinfo(t testing.TB, path, key string) []string {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil
	}
	b, err := s.Data()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range bytes.Split(b, []byte{0}) {
		if v, ok := strings.CutPrefix(string(e), key+"="); ok && v != "" {
			return strings.Split(v, ",")
		}
	}
	return nil
}
