package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// A bit that has changed on the disk is told with its file, its place and every
// snapshot that it harms, in both forms, and by the exit code.
func TestStoreVerifyNamesTheDamage(t *testing.T) {
	dir := makeStore(t)
	if r := wrenn(t, "store", "verify", "--dir", dir); r.code != 0 || !strings.Contains(r.stdout, "everything is as it was written") {
		t.Fatalf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	file, harmed := sharedData(t, dir)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	// In a block that the second generation has of the first.
	b[5*format.BlockSize+17] ^= 4
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r := wrenn(t, "store", "verify", "--dir", dir)
	place := fmt.Sprintf("%s, byte %d:", file, 5*format.BlockSize)
	if r.code != exitError || !strings.Contains(r.stdout, place) || !strings.Contains(r.stderr, "damaged in 1 place") {
		t.Fatalf("exit code %d, want %q: %s%s", r.code, place, r.stdout, r.stderr)
	}
	r = wrenn(t, "store", "verify", "--dir", dir, "--json")
	var out struct {
		Problems []struct {
			File     string
			Offset   int64
			Affected []format.ID
			Error    string
		}
	}
	if err := json.Unmarshal([]byte(r.stdout), &out); err != nil || r.code != exitError || len(out.Problems) != 1 {
		t.Fatalf("exit code %d, %v: %s", r.code, err, r.stdout)
	}
	p := out.Problems[0]
	if p.File != file || p.Offset != 5*format.BlockSize || p.Error == "" || len(p.Affected) != len(harmed) {
		t.Fatalf("%+v, want %s", p, place)
	}
	for _, id := range harmed {
		if !slices.Contains(p.Affected, id) {
			t.Errorf("snapshot %s is harmed, told are %v", id, p.Affected)
		}
	}
}

// sharedData gives the data of the first generation, and all snapshots.
func sharedData(t *testing.T, dir string) (file string, all []format.ID) {
	t.Helper()
	s, err := snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ms, errs := s.Manifests()
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	for _, m := range ms {
		all = append(all, m.ID)
		if m.Generation == 0 {
			file = filepath.Join(dir, "store", "images", m.Memory.ID.String(), "data")
		}
	}
	return file, all
}
