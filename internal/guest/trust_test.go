package guest

import (
	"encoding/pem"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
)

// The host's certificate is trusted once, beside those that were there, and
// programs with a list of their own are told where it is.
func TestTrust(t *testing.T) {
	dir := t.TempDir()
	bundle, file := filepath.Join(dir, "ssl/certs.crt"), filepath.Join(dir, "local/wrenn.crt")
	a := confirmed(t, func(o *Options) { o.TrustBundle, o.TrustFile = bundle, file })
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("the certificate")}))
	post := func(cert string) (int, string) {
		return a.do(t, "POST", "/trust", strings.NewReader(string(mustJSON(t, map[string]string{"certificate": cert}))), tokenHeader, testToken)
	}
	if err := os.MkdirAll(filepath.Dir(bundle), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, bundle, "others")
	env := func() string {
		return runAll(t, a.processes(), connect.NewRequest(sh("env"))).stdout
	}
	if strings.Contains(env(), "CERT") {
		t.Error("programs are told of certificates that nobody trusts")
	}
	for range 2 {
		if status, body := post(cert); status != http.StatusNoContent {
			t.Fatalf("%d %s", status, body)
		}
	}
	if b, err := os.ReadFile(bundle); err != nil || string(b) != "others\n"+cert {
		t.Errorf("the bundle: %q, %v", b, err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != cert {
		t.Errorf("the file: %q, %v", b, err)
	}
	for _, want := range []string{"NODE_EXTRA_CA_CERTS=" + file, "SSL_CERT_FILE=" + bundle, "REQUESTS_CA_BUNDLE=" + bundle} {
		if got := env(); !strings.Contains(got, want+"\n") {
			t.Errorf("%s is not in %s", want, got)
		}
	}
	// What is there already needs no room on the disk.
	if err := os.Chmod(filepath.Dir(bundle), 0o555); err != nil {
		t.Fatal(err)
	}
	if status, body := post(cert); status != http.StatusNoContent {
		t.Errorf("again: %d %s", status, body)
	}
	for _, bad := range []string{"", "none", cert + cert, strings.ReplaceAll(cert, "CERTIFICATE", "PRIVATE KEY")} {
		if status, _ := post(bad); status != http.StatusBadRequest {
			t.Errorf("%.40q: %d", bad, status)
		}
	}
	if status, _ := a.do(t, "POST", "/trust", strings.NewReader("{}")); status != http.StatusUnauthorized {
		t.Errorf("without a token: %d", status)
	}
	// A guest that put something else there harms nobody but itself.
	if err := os.Remove(bundle); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", bundle); err != nil {
		t.Fatal(err)
	}
	if status, body := post(cert); status != http.StatusInternalServerError {
		t.Errorf("a device in the bundle's place: %d %s", status, body)
	}
}
