package guest

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
)

func TestSignatures(t *testing.T) {
	a := confirmed(t)
	writeFile(t, filepath.Join(a.home, "f"), "text")
	// The SDKs' own way, spelled out.
	sign := func(text string) string {
		sum := sha256.Sum256([]byte(text))
		return "v1_" + strings.TrimRight(base64.StdEncoding.EncodeToString(sum[:]), "=")
	}
	soon, past := fmt.Sprint(a.now.Unix()+60), fmt.Sprint(a.now.Unix()-1)
	query := func(kv ...string) string {
		q := url.Values{}
		for i := 0; i < len(kv); i += 2 {
			q.Set(kv[i], kv[i+1])
		}
		return "/files?" + q.Encode()
	}
	const expired = `{"code":401,"message":"signature is already expired"}`
	for name, tc := range map[string]struct {
		url    string
		status int
		text   string
	}{
		"good":            {query("path", "f", "signature", sign("f:read::"+testToken)), 200, "text"},
		"with user":       {query("path", "f", "username", "user", "signature", sign("f:read:user:"+testToken)), 200, "text"},
		"in time":         {query("path", "f", "signature", sign("f:read::"+testToken+":"+soon), "signature_expiration", soon), 200, "text"},
		"expired":         {query("path", "f", "signature", sign("f:read::"+testToken+":"+past), "signature_expiration", past), 401, expired},
		"expiry forged":   {query("path", "f", "signature", sign("f:read::"+testToken+":"+past), "signature_expiration", soon), 401, "invalid signature"},
		"expiry dropped":  {query("path", "f", "signature", sign("f:read::"+testToken+":"+past)), 401, "invalid signature"},
		"expiry no digit": {query("path", "f", "signature", sign("f:read::"+testToken+":x"), "signature_expiration", "x"), 401, "expiration"},
		"other path":      {query("path", "/etc/passwd", "signature", sign("f:read::"+testToken)), 401, "invalid signature"},
		"other user":      {query("path", "f", "username", "root", "signature", sign("f:read::"+testToken)), 401, "invalid signature"},
		"for writing":     {query("path", "f", "signature", sign("f:write::"+testToken)), 401, "invalid signature"},
		"other token":     {query("path", "f", "signature", sign("f:read::wrong")), 401, "invalid signature"},
		"none":            {query("path", "f"), 401, "unauthorized access"},
	} {
		status, text := a.do(t, "GET", tc.url, nil, "Accept-Encoding", "identity")
		if status != tc.status || !strings.Contains(text, tc.text) {
			t.Errorf("%s: %d %s", name, status, text)
		}
	}
	status, text := a.do(t, "POST", query("path", "new", "signature", sign("new:write::"+testToken)), strings.NewReader("via signature"), "Content-Type", "application/octet-stream")
	if status != http.StatusOK {
		t.Errorf("upload: %d %s", status, text)
	}
	status, _ = a.do(t, "POST", query("path", "new", "signature", sign("new:read::"+testToken)), strings.NewReader("x"), "Content-Type", "application/octet-stream")
	if status != http.StatusUnauthorized {
		t.Errorf("upload with a signature for reading: %d", status)
	}
	// A signature opens files and nothing else; a wrong token is not saved by it.
	if status, _ := a.do(t, "GET", "/metrics?"+strings.TrimPrefix(query("path", "f", "signature", sign("f:read::"+testToken)), "/files?"), nil); status != 401 {
		t.Errorf("metrics by signature: %d", status)
	}
	if status, _ := a.do(t, "GET", query("path", "f", "signature", sign("f:read::"+testToken)), nil, tokenHeader, "wrong"); status != 401 {
		t.Errorf("with a wrong token: %d", status)
	}
}
