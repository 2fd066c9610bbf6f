package archtest

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A promise is held by a test that exists: every name of a test, benchmark,
// fuzz target or example in these documents is one.
func TestDocumentsNameTestsThatExist(t *testing.T) {
	known := testNames(t, "../..")
	for _, doc := range []string{"SPECIFICATION.md", "docs/engine.md"} {
		b, err := os.ReadFile(filepath.Join("../..", doc))
		if err != nil {
			t.Fatal(err)
		}
		names := regexp.MustCompile("`((?:Test|Benchmark|Fuzz|Example)[A-Z][A-Za-z0-9_]*)(…?)[/`]").FindAllStringSubmatch(string(b), -1)
		if len(names) < 20 {
			t.Errorf("%s names %d tests; is the form of it another now?", doc, len(names))
		}
		for _, n := range names {
			if n[2] == "" && !known[n[1]] {
				t.Errorf("%s names %s, which does not exist", doc, n[1])
			}
			if n[2] != "" && !slices.ContainsFunc(slices.Collect(maps.Keys(known)), func(k string) bool { return strings.HasPrefix(k, n[1]) }) {
				t.Errorf("%s names tests that begin with %s; there are none", doc, n[1])
			}
		}
	}
}

// The same of the checks that test/sdk's scripts make.
func TestTheSpecificationNamesChecksThatExist(t *testing.T) {
	spec, err := os.ReadFile("../../SPECIFICATION.md")
	if err != nil {
		t.Fatal(err)
	}
	var scripts []byte
	for _, pattern := range []string{"../../test/sdk/py/*.py", "../../test/sdk/js/*.mjs"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			scripts = append(scripts, b...)
		}
	}
	found := 0
	for _, cell := range regexp.MustCompile("test/sdk(?:,? `[A-Za-z_0-9]+`)+").FindAllString(string(spec), -1) {
		for _, n := range regexp.MustCompile("`([a-z_0-9]+)`").FindAllStringSubmatch(cell, -1) {
			found++
			if !regexp.MustCompile(`(?m)^(?:async )?def ` + n[1] + `\(`).Match(scripts) {
				t.Errorf("SPECIFICATION.md names the check %s, which does not exist", n[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("SPECIFICATION.md names %d checks; is the form of it another now?", found)
	}
}

// testNames finds the functions that go test runs, in all files, whatever
// system they are for.
func testNames(t *testing.T, root string) map[string]bool {
	t.Helper()
	decl := regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz|Example)\w*)\(`)
	out := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range decl.FindAllSubmatch(b, -1) {
			out[string(m[1])] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
