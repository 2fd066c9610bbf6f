package httpapi_test

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

// BenchmarkAPI is what the control plane itself costs: a host that answers at
// once, SQLite with its synced writes, no sockets.
func BenchmarkAPI(b *testing.B) {
	db, err := store.Open(b.Context(), filepath.Join(b.TempDir(), "wrenn.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	svc := control.New(control.Options{Store: db, Host: controltest.NewHost()})
	key, row := control.NewAPIKey("bench")
	if err := db.CreateAPIKey(b.Context(), row); err != nil {
		b.Fatal(err)
	}
	h := httpapi.New(httpapi.Options{Service: svc})
	sb, err := svc.Create(b.Context(), control.CreateParams{})
	if err != nil {
		b.Fatal(err)
	}
	path := "/v1/sandboxes/" + sb.ID
	call := func(b *testing.B, method, path, body string, want int) {
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		r.Header.Set("X-API-Key", key)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			b.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
		}
	}
	b.Run("get", func(b *testing.B) {
		for b.Loop() {
			call(b, http.MethodGet, path, "", 200)
		}
	})
	b.Run("exec", func(b *testing.B) {
		for b.Loop() {
			call(b, http.MethodPost, path+"/exec", `{"cmd":"echo"}`, 200)
		}
	})
	b.Run("pause+resume", func(b *testing.B) {
		for b.Loop() {
			call(b, http.MethodPost, path+"/pause", "", 200)
			call(b, http.MethodPost, path+"/resume", "", 200)
		}
	})
}
