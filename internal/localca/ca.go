// Package localca makes certificate authorities that are one machine's own. Open
// is for people who have no certificate for their domain: whoever trusts the
// authority's certificate can use TLS with it and what is below it. OpenEgress is
// for the guests whose requests to some names the host completes.
// Imported by cmd/wrenn and internal/egress; it imports nothing of this module.
//
// Invariants:
//
//  1. An authority's key is on disk with mode 0600 and nowhere else. One of Open
//     may sign for the given domain alone (a name constraint).
//  2. A certificate is renewed before it is over, without a restart.
package localca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	caLife = 10 * 365 * 24 * time.Hour
	// Clients refuse certificates that are valid for more than 398 days.
	leafLife  = 90 * 24 * time.Hour
	renewLeft = 30 * 24 * time.Hour

	certName = "ca.pem"
	keyName  = "ca-key.pem"
)

// Authority signs certificates for one domain.
type Authority struct {
	// Path is the file of the authority's certificate.
	Path   string
	domain string
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	now    func() time.Time

	mu    sync.Mutex
	leafs map[string]*tls.Certificate
}

// maxLeafs bounds the certificates that are kept: guests choose the names below
// a wildcard.
const maxLeafs = 1000

// Open reads the authority of a directory, or makes it. One that was made for
// another domain, or is over, is an error that says what to remove.
func Open(dir, domain string, now func() time.Time) (*Authority, error) {
	a, err := open(dir, domain, "Wrenn Sandbox local authority for "+domain, now)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(a.cert.PermittedDNSDomains, domain) || now().After(a.cert.NotAfter) {
		return nil, fmt.Errorf("the certificate authority %s is for %v until %s, not for %s; remove the directory %s to have a new one made, which clients must trust anew",
			a.Path, a.cert.PermittedDNSDomains, a.cert.NotAfter.Format(time.DateOnly), domain, dir)
	}
	return a, nil
}

// OpenEgress reads the authority of a directory, or makes it, that may sign for
// any name: guests trust it, and nobody else should.
func OpenEgress(dir string, now func() time.Time) (*Authority, error) {
	a, err := open(dir, "", "Wrenn Sandbox, requests with the host's headers", now)
	if err != nil {
		return nil, err
	}
	if now().After(a.cert.NotAfter) {
		return nil, fmt.Errorf("the certificate authority %s ended at %s; remove the directory %s to have a new one made, which sandboxes trust at their next start",
			a.Path, a.cert.NotAfter.Format(time.DateOnly), dir)
	}
	return a, nil
}

func open(dir, domain, name string, now func() time.Time) (*Authority, error) {
	a := &Authority{Path: filepath.Join(dir, certName), domain: domain, now: now, leafs: map[string]*tls.Certificate{}}
	err := a.load(filepath.Join(dir, keyName))
	if errors.Is(err, fs.ErrNotExist) {
		err = a.make(dir, name)
	}
	return a, err
}

// PEM is the authority's certificate.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a *Authority) load(keyPath string) error {
	certPEM, err := os.ReadFile(a.Path)
	if err != nil {
		return fmt.Errorf("read the certificate authority: %w", err)
	}
	keyPEM, err := os.ReadFile(keyPath)
	if err != nil {
		return fmt.Errorf("read the certificate authority's key: %w", err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return fmt.Errorf("read the certificate authority %s: %w", a.Path, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return fmt.Errorf("%s is no certificate authority of ours", a.Path)
	}
	a.cert, a.key = pair.Leaf, key
	return nil
}

func (a *Authority) make(dir, name string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	t := template(a.now(), caLife)
	t.Subject = pkix.Name{CommonName: name}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	if a.domain != "" {
		t.PermittedDNSDomains, t.PermittedDNSDomainsCritical = []string{a.domain}, true
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return fmt.Errorf("make the certificate authority: %w", err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode the certificate authority's key: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the certificate authority's directory: %w", err)
	}
	// The key first: a certificate without one would be taken for damage.
	if err := write(filepath.Join(dir, keyName), "EC PRIVATE KEY", keyDER, 0o600); err != nil {
		return err
	}
	if err := write(a.Path, "CERTIFICATE", der, 0o644); err != nil {
		return err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return fmt.Errorf("read the certificate authority back: %w", err)
	}
	a.key = key
	return nil
}

func template(now time.Time, life time.Duration) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return &x509.Certificate{SerialNumber: serial, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(life)}
}

func write(path, kind string, der []byte, mode fs.FileMode) error {
	tmp := path + ".tmp"
	b := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(tmp, b, mode); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// GetCertificate is for tls.Config: a certificate for the domain and every name
// one level below it.
func (a *Authority) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return a.Certificate("*."+a.domain, a.domain)
}

// Certificate is one for a name, and others. It is made when it is first asked
// for, and anew before it is over.
func (a *Authority) Certificate(name string, others ...string) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if leaf := a.leafs[name]; leaf != nil && leaf.Leaf.NotAfter.Sub(a.now()) > renewLeft {
		return leaf, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	t := template(a.now(), leafLife)
	t.DNSNames = append([]string{name}, others...)
	if len(name) <= maxCommonName {
		t.Subject = pkix.Name{CommonName: name}
	}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read the certificate back: %w", err)
	}
	if len(a.leafs) >= maxLeafs {
		clear(a.leafs)
	}
	a.leafs[name] = &tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key, Leaf: leaf}
	return a.leafs[name], nil
}

// maxCommonName is what X.509 lets a common name have.
const maxCommonName = 64
