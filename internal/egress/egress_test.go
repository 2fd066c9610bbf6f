package egress

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/internal/localca"
)

// lines is a log that many write.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

const secret = "Bearer s3cr3t-value"

// world is an internet of two servers, and a guest whose connections are taken.
type world struct {
	t      *testing.T
	ca     *localca.Authority
	handle hostnet.WebHandler
	log    lines

	mu     sync.Mutex
	seen   []string // "host path header" of each request that arrived somewhere
	dialed []netip.AddrPort
	names  map[string]netip.Addr // what the host finds
	hosts  map[netip.AddrPort]string
}

var (
	realAddr = netip.MustParseAddr("203.0.113.10") // of api.example
	evilAddr = netip.MustParseAddr("203.0.113.66") // the attacker's
)

// newWorld starts servers: api.example at realAddr with a certificate for it,
// and an attacker's at evilAddr with one for evil.example.
func newWorld(t *testing.T, rules Rules) *world {
	t.Helper()
	w := &world{t: t, names: map[string]netip.Addr{"api.example": realAddr, "a.below.example": realAddr, "evil.example": evilAddr, "rebound.example": evilAddr},
		hosts: map[netip.AddrPort]string{}}
	if err := rules.Check(hostnet.ValidName); err != nil {
		t.Fatal(err)
	}
	internet, err := localca.OpenEgress(t.TempDir(), time.Now)
	must(t, err)
	w.ca, err = localca.OpenEgress(t.TempDir(), time.Now)
	must(t, err)
	for addr, names := range map[netip.Addr][]string{realAddr: {"api.example", "a.below.example"}, evilAddr: {"evil.example"}} {
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { w.arrived(addr, rw, r) })
		plain := httptest.NewServer(h)
		t.Cleanup(plain.Close)
		secure := httptest.NewUnstartedServer(h)
		cert, err := internet.Certificate(names[0], names[1:]...)
		must(t, err)
		secure.TLS = &tls.Config{Certificates: []tls.Certificate{*cert}}
		secure.EnableHTTP2 = true
		secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
		secure.StartTLS()
		t.Cleanup(secure.Close)
		w.hosts[netip.AddrPortFrom(addr, 80)] = plain.Listener.Addr().String()
		w.hosts[netip.AddrPortFrom(addr, 443)] = secure.Listener.Addr().String()
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(internet.PEM())
	w.handle = New(Options{Rules: rules, Authority: w.ca, Roots: roots,
		Logger: slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))}).Open(w)
	t.Cleanup(func() {
		w.handle.Close()
		if strings.Contains(w.log.String(), "s3cr3t") {
			t.Errorf("the log has a secret: %s", w.log.String())
		}
	})
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) arrived(addr netip.Addr, rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	w.seen = append(w.seen, fmt.Sprintf("%s %s %s%s %s %q", addr, r.Proto, r.Host, r.URL.RequestURI(), r.Method, r.Header["Authorization"]))
	w.mu.Unlock()
	if r.Header.Get("Upgrade") != "" {
		c, rw, err := rw.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(c, rw)
		return
	}
	b, _ := io.ReadAll(r.Body)
	fmt.Fprintf(rw, "hello %s", b)
}

// Lookup implements hostnet.Way.
func (w *world) Lookup(_ context.Context, name string) ([]netip.Addr, error) {
	if name == "private.example" {
		return nil, nil
	}
	a, ok := w.names[name]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: name, Server: "10.1.2.3:53", IsNotFound: true}
	}
	return []netip.Addr{a}, nil
}

// Dial implements hostnet.Way.
func (w *world) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	w.mu.Lock()
	w.dialed = append(w.dialed, to)
	w.mu.Unlock()
	at, ok := w.hosts[to]
	if !ok {
		return nil, errors.New("unreachable")
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", at)
}

// connect is a guest's connection to an address.
func (w *world) connect(to netip.Addr, port uint16) net.Conn {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(w.t, err)
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	must(w.t, err)
	theirs, err := l.Accept()
	must(w.t, err)
	go w.handle.Handle(theirs, netip.AddrPortFrom(to, port))
	w.t.Cleanup(func() { c.Close() })
	return c
}

// client is a guest's, that goes to an address whatever the name says.
func (w *world) client(to netip.Addr, http2 bool) *http.Client {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.ca.PEM())
	tr := &http.Transport{ForceAttemptHTTP2: http2, TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			port := uint16(80)
			if strings.HasSuffix(addr, ":443") {
				port = 443
			}
			return w.connect(to, port), nil
		}}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func (w *world) last() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.seen) == 0 {
		return ""
	}
	return w.seen[len(w.seen)-1]
}

var apiRules = Rules{"api.example": {"Authorization": secret}, "*.below.example": {"authorization": secret},
	"plain.below.example": {}, "rebound.example": {"Authorization": secret}, "private.example": {"Authorization": secret}, "nowhere.example": {"Authorization": secret}}

func body(t *testing.T, r *http.Response, err error) (int, string) {
	t.Helper()
	must(t, err)
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	must(t, err)
	return r.StatusCode, string(b)
}

// A guest's own header is replaced; all else of its request arrives as it was.
func TestHeadersAreSet(t *testing.T) {
	w := newWorld(t, apiRules)
	for _, http2 := range []bool{false, true} {
		for _, scheme := range []string{"https", "http"} {
			for _, host := range []string{"api.example", "a.below.example"} {
				req, err := http.NewRequest("POST", scheme+"://"+host+"/p%2Fq?a=1;b&c=%zz", strings.NewReader("body"))
				must(t, err)
				req.Header["Authorization"] = []string{"mine", "and mine"}
				req.Header.Set("X-Forwarded-For", "1.2.3.4")
				// It may not have our header taken away either.
				req.Header.Set("Connection", "Authorization")
				if http2 {
					req.Header.Del("Connection")
				}
				res, err := w.client(realAddr, http2).Do(req)
				if status, text := body(t, res, err); status != 200 || text != "hello body" {
					t.Fatalf("%s %s: %d %q", scheme, host, status, text)
				}
				proto := "HTTP/1.1"
				if scheme == "https" {
					proto = "HTTP/2.0"
				}
				want := fmt.Sprintf("%s %s %s/p%%2Fq?a=1;b&c=%%zz POST [%q]", realAddr, proto, host, secret)
				if w.last() != want {
					t.Errorf("arrived: %s\nwant:    %s", w.last(), want)
				}
			}
		}
	}
}

// A guest that connects with its own address, under a name with a rule, gets the
// headers neither there nor anywhere: the name's own host gets the request, and
// one that cannot prove the name gets nothing.
func TestHeadersGoToTheNamesHostAlone(t *testing.T) {
	w := newWorld(t, apiRules)
	for _, scheme := range []string{"http", "https"} {
		res, err := w.client(evilAddr, false).Get(scheme + "://api.example/stolen")
		body(t, res, err)
		if got := w.last(); !strings.HasPrefix(got, realAddr.String()) {
			t.Errorf("%s: arrived at %s", scheme, got)
		}
	}
	// A name server that lies leads to a host without the certificate.
	res, err := w.client(realAddr, false).Get("https://rebound.example/")
	if status, text := body(t, res, err); status != http.StatusBadGateway || !strings.Contains(text, "certificate") {
		t.Errorf("%d %s", status, text)
	}
	// What is found at private addresses alone is not reached, nor told.
	for host, want := range map[string]string{"private.example": "no public address", "nowhere.example": "cannot be reached"} {
		res, err := w.client(realAddr, false).Get("http://" + host + "/")
		if status, text := body(t, res, err); status != http.StatusBadGateway || !strings.Contains(text, want) || strings.Contains(text, "10.1.2.3") {
			t.Errorf("%s: %d %s", host, status, text)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.seen {
		if strings.HasPrefix(s, evilAddr.String()) && strings.Contains(s, "s3cr3t") {
			t.Errorf("the attacker has it: %s", s)
		}
	}
}

// One connection is for one name: requests for another on it, by HTTP/1.1's Host
// or HTTP/2's authority, are refused, also where the other has rules of its own.
func TestAConnectionIsForOneName(t *testing.T) {
	w := newWorld(t, apiRules)
	for _, http2 := range []bool{false, true} {
		for _, host := range []string{"evil.example", "a.below.example"} {
			req, err := http.NewRequest("GET", "https://api.example/", nil)
			must(t, err)
			req.Host = host
			res, err := w.client(realAddr, http2).Do(req)
			if status, _ := body(t, res, err); status != http.StatusMisdirectedRequest {
				t.Errorf("%s: %d", host, status)
			}
		}
	}
	for _, method := range []string{"TRACE", "CONNECT"} {
		c := w.connect(realAddr, 80)
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: api.example\r\n\r\n%s / HTTP/1.1\r\nHost: api.example\r\n\r\n", method)
		in := bufio.NewReader(c)
		for _, want := range []int{200, 405} {
			res, err := http.ReadResponse(in, nil)
			if method == "CONNECT" && want == 405 && err == nil && res.StatusCode == 400 {
				break // its target is none
			}
			if status, text := body(t, res, err); status != want {
				t.Errorf("%s: %d %s, want %d", method, status, text, want)
			}
		}
	}
	if got := w.last(); strings.Contains(got, "TRACE") || strings.Contains(got, "CONNECT") {
		t.Error(got)
	}
}

// What no rule is about goes where the guest meant it to, as it is.
func TestOtherConnectionsArePassedOn(t *testing.T) {
	w := newWorld(t, apiRules)
	res, err := w.client(evilAddr, false).Get("http://other.example/x")
	body(t, res, err)
	if want := evilAddr.String() + ` HTTP/1.1 other.example/x GET []`; w.last() != want {
		t.Errorf("arrived: %s", w.last())
	}
	// The host's own certificate arrives.
	c := tls.Client(w.connect(evilAddr, 443), &tls.Config{ServerName: "evil.example", InsecureSkipVerify: true})
	must(t, c.Handshake())
	if name := c.ConnectionState().PeerCertificates[0].DNSNames[0]; name != "evil.example" {
		t.Errorf("the certificate is for %s", name)
	}
	// An exact name without headers is an exception from a wildcard.
	if got := apiRules.find("plain.below.example"); len(got) != 0 {
		t.Errorf("%v", got)
	}
	// Who waits for the server to speak, or says no HTTP, is passed on.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	go func() {
		for {
			s, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(s, "220 welcome")
			line, _ := bufio.NewReader(s).ReadString('\n')
			fmt.Fprint(s, "you said ", line)
			s.Close()
		}
	}()
	w.hosts[netip.AddrPortFrom(evilAddr, 80)] = l.Addr().String()
	raw := w.connect(evilAddr, 80)
	fmt.Fprint(raw, "hello\n")
	must(t, raw.(*net.TCPConn).CloseWrite())
	text, err := io.ReadAll(raw)
	if err != nil || string(text) != "220 welcome\nyou said hello\n" {
		t.Errorf("%q, %v", text, err)
	}
}

func TestWebSocketsPass(t *testing.T) {
	w := newWorld(t, apiRules)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.ca.PEM())
	c := tls.Client(w.connect(realAddr, 443), &tls.Config{ServerName: "api.example", RootCAs: roots})
	fmt.Fprint(c, "GET /ws HTTP/1.1\r\nHost: api.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	must(t, err)
	if res.StatusCode != 101 || !strings.Contains(w.last(), "s3cr3t") {
		t.Fatalf("%s; arrived: %s", res.Status, w.last())
	}
	fmt.Fprint(c, "ping\n")
	if line, err := in.ReadString('\n'); err != nil || line != "ping\n" {
		t.Errorf("%q, %v", line, err)
	}
	// New rules end what goes on under the old ones.
	w.handle.Close()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := in.ReadByte(); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the rules ended: %v", err)
	}
}

// A guest that asks for much and reads nothing is refused beyond a bound, and
// what was begun ends with the rules.
func TestRequestsOfAGuestAreBounded(t *testing.T) {
	w := newWorld(t, apiRules)
	begun := make(chan struct{}, 2*maxRequests)
	release := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		begun <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(slow.Close)
	defer close(release)
	w.hosts[netip.AddrPortFrom(realAddr, 80)] = slow.Listener.Addr().String()
	ask := func() net.Conn {
		c := w.connect(realAddr, 80)
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: api.example\r\n\r\n")
		return c
	}
	for range maxRequests {
		ask()
	}
	for range maxRequests {
		select {
		case <-begun:
		case <-time.After(time.Minute):
			t.Fatal("not all requests arrive")
		}
	}
	res, err := http.ReadResponse(bufio.NewReader(ask()), nil)
	if err != nil || res.StatusCode != http.StatusTooManyRequests {
		t.Errorf("one too many: %+v, %v", res, err)
	}
}

func TestRulesAreChecked(t *testing.T) {
	many := Rules{}
	for i := range maxHosts + 1 {
		many[fmt.Sprintf("h%d.example", i)] = nil
	}
	for name, c := range map[string]struct {
		r    Rules
		want string
	}{
		"a good one":   {apiRules, ""},
		"no host":      {Rules{"*": nil}, "host name"},
		"an address":   {Rules{"192.0.2.1": nil}, "host name"},
		"many hosts":   {many, "hosts"},
		"no header":    {Rules{"a.example": {"a b": "x"}}, "name of a header"},
		"delivery":     {Rules{"a.example": {"transfer-encoding": "chunked"}}, "delivered"},
		"another host": {Rules{"a.example": {"host": "b.example"}}, "delivered"},
		"two lines":    {Rules{"a.example": {"X": "s3cr3t\r\nY: z"}}, "characters"},
		"too much":     {Rules{"a.example": {"X": strings.Repeat("s3cr3t", maxBytes)}}, "bytes"},
	} {
		err := c.r.Check(hostnet.ValidName)
		if (c.want == "") != (err == nil) || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "s3cr3t")) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTheMostExactRuleDecides(t *testing.T) {
	r := Rules{"a.b.example": {"X": "exact"}, "*.b.example": {"X": "near"}, "*.example": {"X": "far"}}
	for host, want := range map[string]string{"a.b.example": "exact", "c.b.example": "near", "d.c.b.example": "near", "b.example": "far",
		"x.example": "far", "example": "", "notexample": "", "": "", "a.b.example.org": ""} {
		if got := r.find(host)["X"]; got != want {
			t.Errorf("%s: %q, want %q", host, got, want)
		}
	}
	if !maps.Equal(r.find("a.b.example"), map[string]string{"X": "exact"}) {
		t.Error("rules are merged")
	}
}

// FuzzPeek: whatever a guest sends first arrives as it was.
func FuzzPeek(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: A.example:80\r\n\r\nrest"))
	f.Add([]byte{22, 3, 1, 0, 5, 1, 0, 0, 1, 0})
	f.Add([]byte("\x16\x03\x01\x00\x00"))
	f.Fuzz(func(t *testing.T, first []byte) {
		ours, theirs := net.Pipe()
		go func() { theirs.Write(first); theirs.Close() }()
		c, host, _ := peek(ours)
		if host != strings.ToLower(host) {
			t.Errorf("%q", host)
		}
		got, _ := io.ReadAll(c)
		if string(got) != string(first) {
			t.Errorf("%q became %q", first, got)
		}
	})
}
