package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// makeStore makes a state directory with a snapshot "warm<&" of two
// generations, and returns it.
func makeStore(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	store, err := snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	const size = 64 * format.BlockSize
	var parent *snapshot.Image
	for generation := range 2 {
		w, err := store.NewImage(size, parent)
		if err != nil {
			t.Fatal(err)
		}
		n := (8 - 4*generation) * format.BlockSize
		if err := w.WriteAt(bytes.Repeat([]byte{byte(generation + 1)}, n), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		txn, err := store.Begin()
		if err != nil {
			t.Fatal(err)
		}
		m := snapshot.Manifest{Kind: snapshot.KindPause, SandboxID: "abc", Generation: uint64(generation), Memory: snapshot.ImageRef{ID: w.ID()}}
		if generation == 1 {
			m.Kind, m.Name = snapshot.KindSnapshot, "warm<&"
		}
		if err := txn.Commit(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if parent, err = store.OpenImage(w.ID()); err != nil {
			t.Fatal(err)
		}
		defer parent.Close()
	}
	return dir
}

func TestSnapshotInspectShowsGenerations(t *testing.T) {
	dir := makeStore(t)
	svg := filepath.Join(t.TempDir(), "x.svg")
	r := wrenn(t, "snapshot", "inspect", "warm<&", "--dir", dir, "--svg", svg)
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	for _, want := range []string{"warm<&", "GENERATION", "2 builds", "2 mappings", strings.Repeat(".", 56)} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("%q is not in\n%s", want, r.stdout)
		}
	}
	picture := r.stdout[strings.LastIndex(strings.TrimSpace(r.stdout), "\n")+1:]
	if first, second := picture[0], picture[4]; first == second || first == '.' || second == '.' {
		t.Errorf("the picture is %q: four blocks of each generation, then zeros", picture)
	}
	b, err := os.ReadFile(svg)
	if err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(bytes.NewReader(b))
	rects := 0
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("the picture is no XML: %v", err)
		}
		if s, ok := tok.(xml.StartElement); ok && s.Name.Local == "rect" {
			rects++
		}
	}
	if rects != 1+64+2 { // ground, a cell for each block, the key
		t.Errorf("%d rectangles", rects)
	}
}

func TestSnapshotInspectPrintsJSON(t *testing.T) {
	r := wrenn(t, "snapshot", "inspect", "abc", "--json", "--dir", makeStore(t))
	var in snapshot.Inspection
	if err := json.Unmarshal([]byte(r.stdout), &in); err != nil || r.code != 0 {
		t.Fatalf("exit code %d, %v: %s%s", r.code, err, r.stdout, r.stderr)
	}
	if len(in.Images) != 1 || in.Images[0].DataBytes != 8*format.BlockSize || in.Manifest.SandboxID != "abc" {
		t.Errorf("%+v", in)
	}
}

func TestSnapshotInspectNamesWhatIsMissing(t *testing.T) {
	r := wrenn(t, "snapshot", "inspect", "cold", "--dir", makeStore(t))
	if r.code == 0 || !strings.Contains(r.stderr, `"cold"`) || !strings.Contains(r.stderr, "store usage") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	empty := t.TempDir()
	if r := wrenn(t, "snapshot", "inspect", "cold", "--dir", empty); r.code == 0 || !strings.Contains(r.stderr, empty) {
		t.Errorf("without a store: exit code %d: %s", r.code, r.stderr)
	}
}

// What a snapshot is said to keep alone and with others are the files of the
// store: each of them is counted in one column or the other.
func TestStoreUsageIsWhatTheFilesTake(t *testing.T) {
	dir := makeStore(t)
	r := wrenn(t, "store", "usage", "--dir", dir, "--json")
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	var out struct {
		Usage []usageRow `json:"usage"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &out); err != nil || len(out.Usage) != 2 {
		t.Fatalf("%d rows (%v) of\n%s", len(out.Usage), err, r.stdout)
	}
	var files int64
	err := filepath.WalkDir(filepath.Join(dir, "store"), func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			files += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	a, b := out.Usage[0], out.Usage[1]
	if a.SharedBytes != b.SharedBytes || a.SharedBytes < 8*format.BlockSize || a.OwnBytes+b.OwnBytes+a.SharedBytes != files {
		t.Fatalf("own %d and %d, shared %d and %d bytes; the files have %d", a.OwnBytes, b.OwnBytes, a.SharedBytes, b.SharedBytes, files)
	}
}
