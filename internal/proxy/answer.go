package proxy

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
)

// problem is an answer of the proxy's own.
type problem struct {
	SandboxID string `json:"sandboxId"`
	Message   string `json:"message"`
	Code      int    `json:"code"`
	Port      int    `json:"port,omitempty"`
}

func answer(w http.ResponseWriter, p problem) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(p.Code)
	var b bytes.Buffer
	_ = json.NewEncoder(&b).Encode(p) // strings and numbers
	_, _ = w.Write(b.Bytes())
}

// narrowCookies keeps a sandbox's cookies to its own host: below one domain are
// the pages of all sandboxes, and the API.
func narrowCookies(r *http.Response) error {
	for i, c := range r.Header["Set-Cookie"] {
		parts := strings.Split(c, ";")
		kept := []string{strings.TrimSpace(parts[0])}
		for _, p := range parts[1:] {
			name, _, _ := strings.Cut(p, "=")
			if !strings.EqualFold(strings.TrimSpace(name), "domain") {
				kept = append(kept, strings.TrimSpace(p))
			}
		}
		r.Header["Set-Cookie"][i] = strings.Join(kept, "; ")
	}
	return nil
}
