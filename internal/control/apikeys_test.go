package control_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

func TestEnsureAPIKey(t *testing.T) {
	t.Parallel()
	f := setup(t)
	path := filepath.Join(t.TempDir(), "api-key")
	if err := control.EnsureAPIKey(t.Context(), f.store, path); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", fi.Mode(), err)
	}
	b, _ := os.ReadFile(path)
	key := strings.TrimSpace(string(b))
	if _, err := f.Authenticate(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	rows, _ := f.store.ListAPIKeys(t.Context())
	if len(rows) != 1 || strings.Contains(rows[0].Hash, key[4:]) || rows[0].Prefix != key[:8] {
		t.Fatalf("%+v", rows)
	}
	// Again: the same key. With a new database: still the same key.
	g := setup(t)
	for _, db := range []*fixture{f, g} {
		if err := control.EnsureAPIKey(t.Context(), db.store, path); err != nil {
			t.Fatal(err)
		}
		if _, err := db.Authenticate(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []string{"", "wrn_", key + "0", strings.ToUpper(key), "wrn_" + strings.Repeat("0", 40), "e2b_" + key[4:]} {
		_, err := f.Authenticate(t.Context(), bad)
		code(t, err, control.CodeUnauthorized)
	}
	if err := os.WriteFile(path, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := control.EnsureAPIKey(t.Context(), f.store, path); err == nil {
		t.Error("a file without a key was taken")
	}
}
