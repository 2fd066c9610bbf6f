package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// makeGarbage leaves an image that nothing names in the store of a state
// directory, as a crash does, and returns its ID.
func makeGarbage(t *testing.T, dir string) format.ID {
	t.Helper()
	store, err := snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	w, err := store.NewImage(4*format.BlockSize, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteAt([]byte(strings.Repeat("x", format.BlockSize)), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w.ID() // neither committed nor aborted
}

func gcJSON(t *testing.T, args ...string) client.Garbage {
	t.Helper()
	r := wrenn(t, append([]string{"store", "gc", "--json"}, args...)...)
	var g client.Garbage
	if err := json.Unmarshal([]byte(r.stdout), &g); err != nil || r.code != 0 {
		t.Fatalf("exit code %d, %v: %s%s", r.code, err, r.stdout, r.stderr)
	}
	return g
}

func TestStoreGCTellsFirstAndFreesThen(t *testing.T) {
	dir := makeStore(t)
	if err := os.Mkdir(filepath.Join(dir, "sandboxes"), 0o700); err != nil {
		t.Fatal(err)
	}
	id := makeGarbage(t, dir)
	for range 2 { // telling changes nothing
		r := wrenn(t, "store", "gc", "--dry-run", "--dir", dir)
		if r.code != 0 || !strings.Contains(r.stdout, id.String()) || !strings.Contains(r.stdout, "in 1 things would be freed") {
			t.Fatalf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
		}
	}
	dry := gcJSON(t, "--dir", dir)
	if len(dry.Items) != 1 || dry.Items[0].Kind != "image" || dry.Bytes < format.BlockSize || !dry.DryRun {
		t.Fatalf("dry run: %+v", dry)
	}
	if freed := gcJSON(t, "--yes", "--dir", dir); freed.DryRun || freed.Bytes != dry.Bytes {
		t.Fatalf("freed %+v, the dry run told %+v", freed, dry)
	}
	if left := gcJSON(t, "--dir", dir); len(left.Items) != 0 {
		t.Fatalf("left: %+v", left)
	}
	if r := wrenn(t, "store", "gc", "--yes", "--dry-run", "--dir", dir); r.code != 2 {
		t.Fatalf("both flags: exit code %d: %s", r.code, r.stderr)
	}
}

// What a server has under way looks like garbage from outside.
func TestStoreGCAsksTheServerThatHasTheDirectory(t *testing.T) {
	host := startRealAPI(t)
	dir := os.Getenv("WRENN_DIR")
	if err := os.Mkdir(filepath.Join(dir, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := lockState(dir) // as the server does
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	host.SetGarbage(control.GarbageItem{Kind: "header", ID: "aa", Bytes: 7}, control.GarbageItem{Kind: "file", ID: "bb", Bytes: 2})
	if g := gcJSON(t); len(g.Items) != 2 || g.Bytes != 9 || !g.DryRun || g.Items[0].ID != "aa" {
		t.Fatalf("dry run: %+v", g)
	}
	if g := gcJSON(t, "--yes"); g.Bytes != 9 || g.DryRun {
		t.Fatalf("freed %+v", g)
	}
	if g := gcJSON(t); len(g.Items) != 0 {
		t.Fatalf("left: %+v", g)
	}
	// The server at WRENN_URL may be another one's.
	if err := os.WriteFile(filepath.Join(dir, "api-key"), []byte("wrn_"+strings.Repeat("0", 40)), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := wrenn(t, "store", "gc"); r.code != 5 || !strings.Contains(r.stderr, "WRENN_URL") {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
}
