package sdk

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/localca"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// internet is a network of public addresses (of RFC 5737) behind a link of this
// host, with web servers in it.
type internet struct {
	// api has api.rules.test and its certificate, evil another one.
	api, evil string
	// roots is the file of the authority that certified them.
	roots string
}

// inet makes it. Each request is answered with the host, and the digest of the
// key, that it came with: "api.rules.test 9f86d0…", or "-" without one.
func inet(t *testing.T) internet {
	t.Helper()
	base := netip.MustParseAddr("203.0.113.0").As4()
	base[3] = byte(os.Getpid() % 31 * 8)
	at := func(n byte) string { a := base; a[3] += n; return netip.AddrFrom4(a).String() }
	in := internet{api: at(2), evil: at(3)}
	listeners, err := behind(fmt.Sprintf("wi%d", os.Getpid()%100000), at(1), []string{in.api, in.evil}, 80, 443)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := localca.OpenEgress(t.TempDir(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	in.roots = ca.Path
	for addr, l := range listeners {
		name := "evil.rules.test"
		if host, _, _ := net.SplitHostPort(addr); host == in.api {
			name = "api.rules.test"
		}
		cert, err := ca.Certificate(name)
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: whoAmI(name), TLSConfig: &tls.Config{Certificates: []tls.Certificate{*cert}}}
		t.Cleanup(func() { srv.Close() })
		if _, port, _ := net.SplitHostPort(addr); port == "443" {
			go srv.ServeTLS(l, "", "")
		} else {
			go srv.Serve(l)
		}
	}
	return in
}

func whoAmI(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen := "-"
		if key := r.Header.Get("X-Api-Key"); key != "" {
			sum := sha256.Sum256([]byte(key))
			seen = hex.EncodeToString(sum[:])
		}
		fmt.Fprintf(w, "%s %s %s\n", name, seen, r.Proto)
	})
}

// behind listens on the ports of addresses in a new network namespace at the
// other end of a link, by "address:port". All of it ends with this process, or
// when the listeners are closed.
func behind(link, gateway string, addrs []string, ports ...int) (map[string]net.Listener, error) {
	out := map[string]net.Listener{}
	done := make(chan error)
	home, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	defer home.Close()
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make a network namespace: %w", err)
			}
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "eth0"
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: link, PeerNamespace: netlink.NsFd(int(home.Fd()))}); err != nil {
				return fmt.Errorf("make a link: %w", err)
			}
			for _, a := range addrs {
				if err := give("eth0", a); err != nil {
					return err
				}
			}
			for _, a := range addrs {
				for _, p := range ports {
					at := fmt.Sprintf("%s:%d", a, p)
					l, err := net.Listen("tcp4", at)
					if err != nil {
						return err
					}
					out[at] = l
				}
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		return nil, err
	}
	return out, give(link, gateway)
}

// give gives a link an address of the /29, and sets it up.
func give(link, addr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find %s: %w", link, err)
	}
	a, err := netlink.ParseAddr(addr + "/29")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		return fmt.Errorf("give %s the address %s: %w", link, addr, err)
	}
	return netlink.LinkSetUp(l)
}

// TestNetworkRules: requests to named hosts get the headers of the rules, over
// HTTPS and HTTP, and the guest never has them. The server finds the hosts'
// names in a table of its own and trusts their authority.
func TestNetworkRules(t *testing.T) {
	in := inet(t)
	dir := t.TempDir()
	hosts := filepath.Join(dir, "hosts")
	table := fmt.Sprintf("127.0.0.1 localhost\n%s api.rules.test\n%s rebound.rules.test\n10.0.0.1 inner.rules.test\n", in.api, in.evil)
	if err := os.WriteFile(hosts, []byte(table), 0o644); err != nil {
		t.Fatal(err)
	}
	s := ownServer(t, func(o *options) {
		o.Env = []string{"SSL_CERT_FILE=" + in.roots}
		// Its own /etc/hosts; what it mounts for its network is all the host's.
		o.Wrap = []string{"unshare", "--mount", "--propagation", "unchanged", "/bin/sh", "-c",
			`mount --make-private / && mount --bind "$0" /etc/hosts && exec "$@"`, hosts}
	})
	script(t, append(modeAOf(t, s), "API_ADDR="+in.api, "EVIL_ADDR="+in.evil), sdk.Python(), "py/rules.py")
	t.Run("over a kill of the server", func(t *testing.T) { rulesOutliveAKill(t, s, in) })
}

// rulesOutliveAKill: the server that takes a guest over sets its headers as the
// one before did, and opens nothing; what the rules give one guest no other has.
func rulesOutliveAKill(t *testing.T, s *harness.Server, in internet) {
	const key = "kept-over-a-kill"
	with := createByREST(t, s, `{"templateID":"base","timeout":900,"network":{"allowOut":["*.rules.test"],"denyOut":["0.0.0.0/0"],
		"rules":{"*.rules.test":[{"transform":{"headers":{"X-Api-Key":"`+key+`"}}}]}}}`)
	without := createByREST(t, s, `{"templateID":"base","timeout":900}`)
	sum := sha256.Sum256([]byte(key))
	seen := hex.EncodeToString(sum[:])
	check := func(when string) {
		t.Helper()
		for _, c := range []struct{ id, url, want string }{
			{with, "https://api.rules.test/", "api.rules.test " + seen + " HTTP/2.0"},
			{with, "http://api.rules.test/", "api.rules.test " + seen + " HTTP/1.1"},
			{without, "http://" + in.api + "/", "api.rules.test - HTTP/1.1"},
		} {
			if got, err := s.Sh(t.Context(), c.id, "curl -sS --max-time 60 "+c.url); err != nil || got != c.want {
				t.Errorf("%s: %s gives %q, %v; want %q", when, c.url, got, err, c.want)
			}
		}
		if got, err := s.Sh(t.Context(), with, "curl -sS --max-time 2 http://"+in.evil+"/"); err == nil {
			t.Errorf("%s: what the rules close answers %q", when, got)
		}
	}
	check("before")
	s.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := s.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	check("after a kill")
	for _, id := range []string{with, without} {
		if err := s.DeleteSandbox(ctx, id); err != nil {
			t.Error(err)
		}
	}
}

// createByREST makes a sandbox by a body of the E2B surface.
func createByREST(t *testing.T, s *harness.Server, body string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+"/e2b/sandboxes", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(s.Dir, "api-key"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", strings.TrimSpace(string(key)))
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var made struct{ SandboxID string }
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusCreated || json.Unmarshal(text, &made) != nil || made.SandboxID == "" {
		t.Fatalf("create: %s: %s (%v)", resp.Status, text, err)
	}
	return made.SandboxID
}
