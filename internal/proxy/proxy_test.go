package proxy_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coder/websocket"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/proxy"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

// world is a proxy whose sandboxes are all one guest.
type world struct {
	*httptest.Server
	svc   *control.Service
	host  *controltest.Host
	guest *httptest.Server
	// dialled has every connection that was asked for.
	dialled chan string
}

func setup(t *testing.T, guest http.HandlerFunc) *world {
	t.Helper()
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	w := &world{host: controltest.NewHost(), guest: httptest.NewServer(guest), dialled: make(chan string, 1000)}
	t.Cleanup(w.guest.Close)
	w.host.OnDial(func(id string, port int) (net.Conn, error) {
		w.dialled <- fmt.Sprintf("%s:%d", id, port)
		if port == 81 {
			return nil, &control.Error{Code: control.CodeInvalidState, Message: "closed", Err: control.ErrPortClosed}
		}
		return net.Dial("tcp", w.guest.Listener.Addr().String())
	})
	w.svc = control.New(control.Options{Store: db, Host: w.host, Logger: log})
	if _, err := w.svc.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := proxy.New(proxy.Options{Service: w.svc, Logger: log})
	t.Cleanup(p.Close)
	w.Server = httptest.NewServer(p.Handler(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(http.StatusTeapot) // the API's own handler
	})))
	t.Cleanup(w.Close)
	return w
}

func (w *world) create(t *testing.T, o control.SandboxOptions) string {
	t.Helper()
	sb, err := w.svc.Create(t.Context(), control.CreateParams{TimeoutSec: 600, Options: o})
	if err != nil {
		t.Fatal(err)
	}
	return sb.ID
}

func echo(rw http.ResponseWriter, r *http.Request) {
	_ = json.NewEncoder(rw).Encode(map[string]any{"host": r.Host, "path": r.URL.RequestURI(), "header": r.Header, "method": r.Method})
}

// do sends a request; headers are given as Name: value.
func (w *world) do(t *testing.T, method, path string, headers ...string) (int, http.Header, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, w.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		if k == "Host" {
			req.Host = v
			continue
		}
		req.Header.Add(k, v)
	}
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(b)
}

func TestWhereARequestGoes(t *testing.T) {
	w := setup(t, echo)
	id := w.create(t, control.SandboxOptions{})
	for _, c := range []struct {
		path string
		h    []string
		want string // the connection, or "" for the API
		code int
	}{
		{"/x", []string{"E2b-Sandbox-Id: " + id}, id + ":49983", 200},
		{"/x", []string{"E2b-Sandbox-Id: " + id, "E2b-Sandbox-Port: 3000"}, id + ":3000", 200},
		{"/x", []string{"E2b-Sandbox-Id: " + id + "-client", "E2b-Sandbox-Port: 3001"}, id + ":3001", 200},
		{"/x", []string{"Host: 3002-" + id + ".wrenn.test:8000"}, id + ":3002", 200},
		{"/x", []string{"Host: 3003-" + strings.ToUpper(id) + ".wrenn.test"}, id + ":3003", 200},
		// The host decides where the two differ.
		{"/x", []string{"Host: 3004-" + id + ".wrenn.test", "E2b-Sandbox-Id: other", "E2b-Sandbox-Port: 1"}, id + ":3004", 200},
		{"/v1/sandboxes", nil, "", 418},
		{"/files", []string{"Host: wrenn.test"}, "", 418},
		{"/x", []string{"E2b-Sandbox-Id: ../etc"}, "", 400},
		{"/x", []string{"E2b-Sandbox-Id: " + id, "E2b-Sandbox-Port: 0"}, "", 400},
		{"/x", []string{"E2b-Sandbox-Id: " + id, "E2b-Sandbox-Port: 22@evil"}, "", 400},
		{"/x", []string{"Host: 99999-" + id + ".wrenn.test"}, "", 400},
		{"/x", []string{"E2b-Sandbox-Id: nobody"}, "", 502},
	} {
		code, _, body := w.do(t, "GET", c.path, c.h...)
		if code != c.code {
			t.Errorf("%s %v: %d %s, want %d", c.path, c.h, code, body, c.code)
		}
		got := ""
		select {
		case got = <-w.dialled:
		default:
		}
		if got != c.want {
			t.Errorf("%s %v: went to %q, want %q", c.path, c.h, got, c.want)
		}
	}
}

func TestWhatTheGuestSees(t *testing.T) {
	w := setup(t, echo)
	id := w.create(t, control.SandboxOptions{PrivatePorts: true, TrafficToken: "secret", HostMask: "localhost:${PORT}"})
	_, _, body := w.do(t, "GET", "/a%2Fb/?q=1;2&r=%20", "E2b-Sandbox-Id: "+id, "E2b-Sandbox-Port: 3000",
		"E2b-Traffic-Access-Token: secret", "X-Forwarded-For: 1.2.3.4", "X-Real-Ip: 1.2.3.4", "Forwarded: for=1.2.3.4", "Connection: X-Forwarded-For")
	var got struct {
		Host, Path string
		Header     http.Header
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err, body)
	}
	if got.Host != "localhost:3000" || got.Path != "/a%2Fb/?q=1;2&r=%20" {
		t.Errorf("host and path: %+v", got)
	}
	if strings.Contains(body, "secret") {
		t.Error("the guest sees what opens its port")
	}
	if f := got.Header.Get("X-Forwarded-For"); f != "127.0.0.1" {
		t.Errorf("X-Forwarded-For %q: the client's own, or none", f)
	}
	if strings.Contains(body, "1.2.3.4") {
		t.Errorf("a forged address came through: %s", body)
	}
}

func TestTheHostsOwnCallsAreNotForwarded(t *testing.T) {
	w := setup(t, echo)
	id := w.create(t, control.SandboxOptions{})
	for _, path := range []string{"/init", "/sync", "/trust", "//trust", "/Trust/", "//init", "/Init", "/init/", "/%69nit", "/x/../init", "/./init"} {
		if code, _, body := w.do(t, "POST", path, "E2b-Sandbox-Id: "+id); code != http.StatusNotFound {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	if len(w.dialled) != 0 {
		t.Error("one reached the guest")
	}
	// A port of the guest's own may have such a path.
	if code, _, _ := w.do(t, "POST", "/init", "E2b-Sandbox-Id: "+id, "E2b-Sandbox-Port: 3000"); code != 200 {
		t.Errorf("/init of a port: %d", code)
	}
}

func TestSandboxesThatAreNotThereAnswer502(t *testing.T) {
	w := setup(t, echo)
	id := w.create(t, control.SandboxOptions{})
	code, _, body := w.do(t, "GET", "/", "E2b-Sandbox-Id: "+id, "E2b-Sandbox-Port: 81")
	if code != 502 || !strings.Contains(body, "port is not open") || !strings.Contains(body, `"port":81`) {
		t.Errorf("a closed port: %d %s", code, body)
	}
	if _, err := w.svc.Pause(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`{"sandboxId":%q,"message":"The sandbox was not found","code":502}`+"\n", id)
	for _, path := range []string{"/health", "/process.Process/Start", "/files?path=x"} {
		if code, _, body := w.do(t, "GET", path, "E2b-Sandbox-Id: "+id); code != 502 || body != want {
			t.Errorf("%s of a paused sandbox: %d %s", path, code, body)
		}
	}
	if w.host.Calls("resume") != 0 {
		t.Error("it was woken")
	}
}

func TestAStrangerDoesNotWakeAPrivateSandbox(t *testing.T) {
	w := setup(t, echo)
	id := w.create(t, control.SandboxOptions{AutoResume: true, PrivatePorts: true, TrafficToken: "secret"})
	if _, err := w.svc.Pause(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{"", "wrong"} {
		code, _, _ := w.do(t, "GET", "/", "E2b-Sandbox-Id: "+id, "E2b-Sandbox-Port: 3000", "E2b-Traffic-Access-Token: "+token)
		if code != http.StatusForbidden || w.host.Calls("resume") != 0 {
			t.Errorf("token %q: %d, %d resumes", token, code, w.host.Calls("resume"))
		}
	}
	if code, _, body := w.do(t, "GET", "/", "E2b-Sandbox-Id: "+id, "E2b-Sandbox-Port: 3000", "E2b-Traffic-Access-Token: secret"); code != 200 {
		t.Errorf("with the token: %d %s", code, body)
	}
}

func signature(path, op, user, token, exp string) string {
	s := path + ":" + op + ":" + user + ":" + token
	if exp != "" {
		s += ":" + exp
	}
	sum := sha256.Sum256([]byte(s))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

func TestASignedURLFindsItsSandbox(t *testing.T) {
	w := setup(t, echo)
	w.create(t, control.SandboxOptions{})
	id := w.create(t, control.SandboxOptions{})
	w.create(t, control.SandboxOptions{})
	q := url.Values{"path": {"a b/ü"}, "username": {"root"}, "signature_expiration": {"99"}}
	q.Set("signature", signature("a b/ü", "read", "root", controltest.Token(id), "99"))
	if code, _, body := w.do(t, "GET", "/files?"+q.Encode()); code != 200 || <-w.dialled != id+":49983" {
		t.Errorf("read: %d %s", code, body)
	}
	for name, change := range map[string]func(url.Values){
		"path":   func(q url.Values) { q.Set("path", "/etc/shadow") },
		"user":   func(q url.Values) { q.Set("username", "user") },
		"expiry": func(q url.Values) { q.Set("signature_expiration", "100") },
		"none":   func(q url.Values) { q.Set("signature", "v1_") },
	} {
		bad, _ := url.ParseQuery(q.Encode())
		change(bad)
		if code, _, body := w.do(t, "GET", "/files?"+bad.Encode()); code != 401 {
			t.Errorf("%s changed: %d %s", name, code, body)
		}
	}
	if code, _, _ := w.do(t, "POST", "/files?"+q.Encode()); code != 401 {
		t.Errorf("a read's signature writes: %d", code)
	}
}

func TestAHostileAnswerLeadsNowhere(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the proxy went elsewhere") }))
	defer elsewhere.Close()
	w := setup(t, func(rw http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/redirect":
			rw.Header().Set("Alt-Svc", `h2="`+elsewhere.Listener.Addr().String()+`"`)
			http.Redirect(rw, r, elsewhere.URL, http.StatusFound)
		case "/headers":
			for i := range 600 {
				rw.Header().Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", 1000))
			}
		case "/garbage":
			c, b, _ := http.NewResponseController(rw).Hijack()
			_, _ = b.WriteString("HTTP/1.1 banana\r\n\r\n")
			_ = b.Flush()
			_ = c.Close()
		}
	})
	id := w.create(t, control.SandboxOptions{})
	code, h, _ := w.do(t, "GET", "/redirect", "E2b-Sandbox-Id: "+id)
	if code != http.StatusFound || h.Get("Location") != elsewhere.URL {
		t.Errorf("a redirect is the client's to follow: %d %v", code, h)
	}
	for _, path := range []string{"/headers", "/garbage"} {
		if code, _, body := w.do(t, "GET", path, "E2b-Sandbox-Id: "+id); code != 502 {
			t.Errorf("%s: %d %.200s", path, code, body)
		}
	}
	// A request line that names another server is a request for it, not there.
	c, err := net.Dial("tcp", w.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET http://%s/redirect HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: %s\r\nConnection: close\r\n\r\n", elsewhere.Listener.Addr(), id)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	for len(w.dialled) > 0 {
		if got := <-w.dialled; got != id+":49983" {
			t.Errorf("the proxy connected to %s", got)
		}
	}
}

func TestTwoLengthsAreRefused(t *testing.T) {
	w := setup(t, echo)
	id := w.create(t, control.SandboxOptions{})
	for name, lengths := range map[string]string{
		"two lengths":        "Content-Length: 4\r\nContent-Length: 40\r\n",
		"length and chunks":  "Content-Length: 4\r\nTransfer-Encoding: chunked, identity\r\n",
		"a coding of no use": "Transfer-Encoding: xchunked\r\n",
	} {
		c, err := net.Dial("tcp", w.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "POST /x HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: %s\r\n%s\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n", id, lengths)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(name, err)
		}
		if resp.StatusCode != 400 && resp.StatusCode != 501 {
			t.Errorf("%s: %s", name, resp.Status)
		}
		resp.Body.Close()
		c.Close()
	}
	if len(w.dialled) != 0 {
		t.Error("one reached the guest")
	}
}

func TestAStreamThatBreaksIsResetAndTheSandboxIsGoneByThen(t *testing.T) {
	streaming := make(chan net.Conn, 1)
	w := setup(t, func(rw http.ResponseWriter, r *http.Request) {
		c, b, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		_, _ = b.WriteString("HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
		_ = b.Flush()
		streaming <- c
	})
	id := w.create(t, control.SandboxOptions{})
	req, _ := http.NewRequestWithContext(t.Context(), "POST", w.URL+"/process.Process/Start", nil)
	req.Header.Set("E2b-Sandbox-Id", id)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
		t.Fatal("the stream's first part was held back: ", err)
	}
	if err := w.svc.Delete(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	(<-streaming).Close()
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the stream ended in order: %v", err)
	}
	if code, _, _ := w.do(t, "GET", "/health", "E2b-Sandbox-Id: "+id); code != 502 {
		t.Errorf("/health: %d", code)
	}
}

// A port of httpsPorts is spoken to over TLS, whoever certified it; others are
// not, and the guest agent's never is.
func TestPortsThatSpeakTLS(t *testing.T) {
	w := setup(t, echo)
	secure := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			if c, err := websocket.Accept(rw, r, nil); err == nil {
				_ = c.Write(r.Context(), websocket.MessageText, []byte("hi"))
				c.CloseNow()
			}
			return
		}
		fmt.Fprintf(rw, "%s over TLS", r.Host)
	}))
	t.Cleanup(secure.Close)
	w.host.OnDial(func(_ string, port int) (net.Conn, error) {
		if port == 8443 {
			return net.Dial("tcp", secure.Listener.Addr().String())
		}
		return net.Dial("tcp", w.guest.Listener.Addr().String())
	})
	id := w.create(t, control.SandboxOptions{HTTPSPorts: []int{8443}})
	if code, _, body := w.do(t, "GET", "/", "Host: 8443-"+id+".x"); code != 200 || body != "8443-"+id+".x over TLS" {
		t.Errorf("%d %s", code, body)
	}
	if code, _, body := w.do(t, "GET", "/", "Host: 8080-"+id+".x"); code != 200 || !strings.Contains(body, `"path":"/"`) {
		t.Errorf("a plain port: %d %s", code, body)
	}
	c, _, err := websocket.Dial(t.Context(), w.URL, &websocket.DialOptions{
		HTTPHeader: http.Header{"E2b-Sandbox-Id": {id}, "E2b-Sandbox-Port": {"8443"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	if _, b, err := c.Read(t.Context()); err != nil || string(b) != "hi" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestWebSocketsPass(t *testing.T) {
	w := setup(t, func(rw http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(rw, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		kind, b, err := c.Read(r.Context())
		if err == nil {
			_ = c.Write(r.Context(), kind, append(b, '!'))
		}
	})
	id := w.create(t, control.SandboxOptions{})
	c, _, err := websocket.Dial(t.Context(), w.URL, &websocket.DialOptions{
		HTTPHeader: http.Header{"E2b-Sandbox-Id": {id}, "E2b-Sandbox-Port": {"3000"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	if err := c.Write(context.Background(), websocket.MessageText, []byte("hi")); err != nil {
		t.Fatal(err)
	}
	if _, b, err := c.Read(t.Context()); err != nil || string(b) != "hi!" {
		t.Errorf("%q, %v", b, err)
	}
}
