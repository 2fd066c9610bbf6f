package guest

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"

	"connectrpc.com/connect"
)

const (
	// TrustFile is the host's certificate by itself, where update-ca-certificates
	// finds it, too.
	TrustFile = "/usr/local/share/ca-certificates/wrenn-egress.crt"
	// TrustBundle is what programs trust.
	TrustBundle = "/etc/ssl/certs/ca-certificates.crt"

	maxBundle = 16 << 20
)

// handleTrust makes the guest's programs trust a certificate of the host.
func (s *Server) handleTrust(w http.ResponseWriter, r *http.Request) {
	var req struct {
		Certificate string `json:"certificate"`
	}
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxJSONBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		writeError(w, invalidf("body: %v", err))
		return
	}
	block, rest := pem.Decode([]byte(req.Certificate))
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		writeError(w, invalidf("certificate: must be one certificate in PEM"))
		return
	}
	s.trustMu.Lock()
	defer s.trustMu.Unlock()
	if err := s.trust(pem.EncodeToMemory(block)); err != nil {
		writeError(w, connect.NewError(connect.CodeInternal, err))
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// trust writes the certificate where it is not yet: to a guest that is resumed
// it is nothing new, and its disk may be full.
func (s *Server) trust(cert []byte) error {
	bundle := s.opt.TrustBundle
	if target, err := filepath.EvalSymlinks(bundle); err == nil {
		bundle = target
	}
	have, err := readRegular(bundle)
	if err != nil {
		return fmt.Errorf("read the trusted certificates: %w", err)
	}
	if !bytes.Contains(have, cert) {
		if len(have) > 0 && have[len(have)-1] != '\n' {
			have = append(have, '\n')
		}
		if err := writeShared(bundle, append(have, cert...)); err != nil {
			return fmt.Errorf("write the trusted certificates: %w", err)
		}
	}
	if have, err := readRegular(s.opt.TrustFile); err == nil && bytes.Equal(have, cert) {
		return nil
	}
	if err := writeShared(s.opt.TrustFile, cert); err != nil {
		return fmt.Errorf("write the host's certificate: %w", err)
	}
	return nil
}

// readRegular reads a file; one that is not there is empty. Of a FIFO or a
// device in its place the read would not end.
func readRegular(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular() || fi.Size() > maxBundle:
		return nil, fmt.Errorf("%s is no file of at most %d bytes", path, maxBundle)
	}
	return os.ReadFile(path)
}

func writeShared(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return replaceFile(path, data, 0o644)
}

// trustEnvs are for programs that do not look at the system's certificates: they
// are told to. A guest that does not trust the host's has none.
func (s *Server) trustEnvs() map[string]string {
	if fi, err := os.Stat(s.opt.TrustFile); err != nil || !fi.Mode().IsRegular() {
		return nil
	}
	return map[string]string{
		"NODE_EXTRA_CA_CERTS": s.opt.TrustFile,
		"REQUESTS_CA_BUNDLE":  s.opt.TrustBundle,
		"SSL_CERT_FILE":       s.opt.TrustBundle,
	}
}
