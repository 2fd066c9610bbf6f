package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// readBundle unpacks a bundle.
func readBundle(t *testing.T, name string) map[string]string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out[strings.TrimPrefix(h.Name, "wrenn-doctor/")] = string(text)
	}
}

// writeFiles makes files below a directory.
func writeFiles(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBundleHoldsWhatHelpsAndNoSecret(t *testing.T) {
	notes, err := json.Marshal(map[string]any{"template": "base", "metadata": map[string]string{"k": "metasecret1"}})
	if err != nil {
		t.Fatal(err)
	}
	journal, err := json.Marshal(map[string]any{
		"version": 1, "id": "box", "template": "base", "state": "error", "error": "the guest said envsecret1, twice",
		"envs": map[string]string{"A": "envsecret1", "B": "x"}, "annotations": notes, "access_token": "tokensecret1",
		"egress":     map[string]any{"headers": map[string]any{"a.example": map[string]string{"X-Key": "headersecret1"}}},
		"machine_id": "machinesecret1", "something_new": "newsecret1", "run": map[string]any{"slot": 7, "life": "lifesecret1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	// Of a sandbox whose journal is gone; its pause keeps it.
	kept, err := json.Marshal(map[string]any{"access_token": "losttokensecret1", "envs": map[string]string{"A": "lostenvsecret1"}})
	if err != nil {
		t.Fatal(err)
	}
	pause, err := json.Marshal(map[string]any{"manifest": map[string]any{"kind": "pause", "generation": 7, "annotations": kept}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{
		"api-key": "wrn_keysecret1\n", "wrenn.db": "dbsecret1", "sandboxes/box/journal.json": string(journal),
		"sandboxes/box/console.log": "consolesecret1", "sandboxes/box/qemu.log": "qemu says tokensecret1 and headersecret1",
		"sandboxes/torn/journal.json":     `{"access_token": "tornsecret1`,
		"store/snapshots/s/manifest.json": `{"version":1,"manifest":{"id":"s","kind":"pause","annotations":"annosecret1","vmm":{"kind":"qemu"}}}`,
		"store/snapshots/p/manifest.json": string(pause),
		"store/images/i/data":             "datasecret1",
		"run/pager.log":                   strings.Repeat("old\n", bundleLog) + "the last line, with wrn_keysecret1, losttokensecret1 and lostenvsecret1\n",
	})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-API-Key") != "" || r.URL.Path == "/readyz" {
			http.Error(w, "no", http.StatusTeapot)
		}
		io.WriteString(w, "answer of "+r.URL.Path)
	}))
	defer srv.Close()
	name := filepath.Join(t.TempDir(), "bundle.tar.gz")
	if err := writeBundle(t.Context(), name, dir, srv.URL, []finding{{"user", "ok", "root", ""}}); err != nil {
		t.Fatal(err)
	}
	b := readBundle(t, name)
	for entry, has := range map[string]string{
		"about.json": version(), "findings.json": `"root"`, "journals/box.json": `"slot": 7`, "manifests/s.json": `"qemu"`, "manifests/p.json": `"generation": 7`,
		"logs/run-pager.log": "the last line", "logs/sandboxes-box-qemu.log": "qemu says", "files.txt": "store/images/i/data",
		"metrics.txt": "answer of /metrics", "healthz.json": "answer of /healthz", "host/proc-meminfo": "MemTotal",
		"missing.txt": "sandboxes/torn/journal.json",
	} {
		if !strings.Contains(b[entry], has) {
			t.Errorf("%s has no %q: %.300s", entry, has, b[entry])
		}
	}
	if !strings.Contains(b["journals/box.json"], "the guest said [removed], twice") {
		t.Errorf("the error is gone: %s", b["journals/box.json"])
	}
	if n := len(b["logs/run-pager.log"]); n > bundleLog {
		t.Errorf("the log has %d bytes", n)
	}
	for entry, text := range b {
		if i := strings.Index(text, "secret1"); i >= 0 {
			t.Errorf("%s holds a secret: %q", entry, text[max(0, i-40):i+7])
		}
	}
	if err := writeBundle(t.Context(), name, dir, srv.URL, nil); err == nil || !strings.Contains(err.Error(), "another name") {
		t.Errorf("over an old bundle: %v", err)
	}
}

func TestOnlyKnownFlagsAreShown(t *testing.T) {
	got := safeFlags([]string{"--dir", "/d", "--database", "postgres://u:pw@h/db", "-v", "--listen=127.0.0.1:0", "--future=x", "--tls-key", "/k"})
	want := []string{"--dir=/d", "--database=[removed]", "-v", "--listen=127.0.0.1:0", "--future=[removed]", "--tls-key=[removed]"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("flags %v, want %v", got, want)
	}
}
