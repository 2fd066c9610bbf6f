package localca

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func clock() (func() time.Time, *time.Time) {
	now := time.Now()
	return func() time.Time { return now }, &now
}

func verify(t *testing.T, a *Authority, leaf *tls.Certificate, name string) error {
	t.Helper()
	pem, err := os.ReadFile(a.Path)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		t.Fatal("the authority's file is no certificate")
	}
	_, err = leaf.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: pool, CurrentTime: a.now()})
	return err
}

func TestClientsThatTrustTheAuthorityTrustTheDomainAlone(t *testing.T) {
	now, _ := clock()
	a, err := Open(filepath.Join(t.TempDir(), "ca"), "wrenn.test", now)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"wrenn.test", "api.wrenn.test", "49983-abc.wrenn.test"} {
		if err := verify(t, a, leaf, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if verify(t, a, leaf, "bank.example") == nil {
		t.Error("it is good for a foreign name")
	}
	// What the authority signs for another name is worth nothing.
	a.domain = "bank.example"
	clear(a.leafs)
	foreign, err := a.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if verify(t, a, foreign, "bank.example") == nil {
		t.Error("the authority can sign for a foreign name")
	}
}

func TestTheAuthorityIsFoundAgainAndItsKeyIsClosed(t *testing.T) {
	now, _ := clock()
	dir := filepath.Join(t.TempDir(), "ca")
	a, err := Open(dir, "wrenn.test", now)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Open(dir, "wrenn.test", now)
	if err != nil {
		t.Fatal(err)
	}
	if !a.cert.Equal(b.cert) {
		t.Error("a second opening made another authority")
	}
	st, err := os.Stat(filepath.Join(dir, keyName))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v", st.Mode(), err)
	}
	if _, err := Open(dir, "other.test", now); err == nil || !strings.Contains(err.Error(), "other.test") {
		t.Errorf("another domain: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, certName), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, "wrenn.test", now); err == nil {
		t.Error("a damaged authority was taken")
	}
}

func TestACertificateIsRenewedBeforeItIsOver(t *testing.T) {
	now, at := clock()
	a, err := Open(filepath.Join(t.TempDir(), "ca"), "wrenn.test", now)
	if err != nil {
		t.Fatal(err)
	}
	first, err := a.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := a.GetCertificate(nil); again != first {
		t.Error("each connection gets a new certificate")
	}
	*at = at.Add(leafLife - renewLeft + time.Hour)
	second, err := a.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if second == first {
		t.Error("it was not renewed")
	}
	if err := verify(t, a, second, "api.wrenn.test"); err != nil {
		t.Error(err)
	}
	*at = at.Add(caLife)
	if _, err := Open(filepath.Dir(a.Path), "wrenn.test", now); err == nil {
		t.Error("an authority that is over was taken")
	}
}
