package proxy_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// raw is a guest whose program writes what it likes; it hears the request's
// path.
func raw(t *testing.T, say func(path string, c net.Conn)) *world {
	t.Helper()
	return setup(t, func(rw http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		say(r.URL.Path, c)
	})
}

// lines sends lines to the proxy and gives its answer's status.
func (w *world) lines(t *testing.T, request string) int {
	t.Helper()
	c, err := net.Dial("tcp", w.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

// What would leave the proxy blind to what is said afterwards does not get
// through to the guest agent, and CONNECT to nobody.
func TestNoTunnels(t *testing.T) {
	w := setup(t, echo)
	id := w.create(t, control.SandboxOptions{})
	for _, upgrade := range []string{"h2c", "websocket", "TLS/1.0"} {
		code, _, body := w.do(t, "GET", "/health", "E2b-Sandbox-Id: "+id, "Connection: Upgrade, HTTP2-Settings", "Upgrade: "+upgrade, "HTTP2-Settings: AAMAAABkAAQAAP__")
		if code != http.StatusBadRequest {
			t.Errorf("an upgrade to %s on the guest agent's port: %d %s", upgrade, code, body)
		}
	}
	for _, head := range []string{
		"CONNECT 3000-" + id + ".wrenn.test:443 HTTP/1.1\r\nHost: 3000-" + id + ".wrenn.test:443\r\n\r\n",
		"CONNECT 192.0.2.1:25 HTTP/1.1\r\nHost: 192.0.2.1:25\r\nE2b-Sandbox-Id: " + id + "\r\nE2b-Sandbox-Port: 3000\r\n\r\n",
	} {
		if code := w.lines(t, head); code != http.StatusMethodNotAllowed {
			t.Errorf("%q: %d", head, code)
		}
	}
	if len(w.dialled) != 0 {
		t.Errorf("a connection was made: %s", <-w.dialled)
	}
}

// A signature that cannot be one is refused before a token is touched, and what
// would be hashed for every sandbox is bounded.
func TestStrangersCostLittle(t *testing.T) {
	w := setup(t, echo)
	w.create(t, control.SandboxOptions{})
	before := w.host.Calls("access")
	whole := "v1_" + strings.Repeat("A", 43)
	for _, q := range []string{"signature=x", "signature=v1_", "signature=" + whole + "A", "signature=v2_" + whole[3:], "path=x&signature=" + whole[:45] + "%0a"} {
		if code, _, _ := w.do(t, "GET", "/files?"+q); code != http.StatusUnauthorized {
			t.Errorf("%s: %d", q, code)
		}
	}
	if n := w.host.Calls("access") - before; n != 0 {
		t.Errorf("%d tokens were asked for", n)
	}
	// Its signature would be right.
	path := strings.Repeat("x", 9<<10)
	q := "/files?path=" + path + "&signature=" + strings.ReplaceAll(signature(path, "read", "", "token", ""), "+", "%2B")
	if code, _, _ := w.do(t, "GET", q); code != http.StatusUnauthorized {
		t.Errorf("a path of 9 KiB: %d", code)
	}
	if len(w.dialled) != 0 {
		t.Errorf("a connection was made: %s", <-w.dialled)
	}
}

// A guest's program that does not keep to HTTP gets its client an error, and
// the proxy neither hangs nor reads without end.
func TestProgramsThatDoNotKeepToHTTP(t *testing.T) {
	never := make(chan struct{})
	defer close(never)
	w := raw(t, func(path string, c net.Conn) {
		say := func(s string) bool { _, err := io.WriteString(c, s); return err == nil }
		switch path {
		case "/upgrade":
			say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: evil\r\n\r\nhello")
		case "/endless-header":
			say("HTTP/1.1 200 OK\r\nX: ")
			for say(strings.Repeat("x", 1<<16)) {
			}
		case "/endless-line":
			for say(strings.Repeat("x", 1<<16)) {
			}
		case "/many-headers":
			say("HTTP/1.1 200 OK\r\n")
			for i := 0; say(fmt.Sprintf("X-%d: 1\r\n", i)); i++ {
			}
		case "/two-lengths":
			say("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx")
		case "/old":
			say("<html>")
		case "/split":
			say("HTTP/1.1 200 OK\r\nX-A: b\rSet-Cookie: evil=1\r\n\r\n")
		case "/silent":
			<-never
		}
	})
	id := w.create(t, control.SandboxOptions{})
	port := []string{"E2b-Sandbox-Id: " + id, "E2b-Sandbox-Port: 3000"}
	for _, path := range []string{"/upgrade", "/endless-header", "/endless-line", "/many-headers", "/two-lengths", "/old", "/closed"} {
		if code, h, body := w.do(t, "GET", path, port...); code != http.StatusBadGateway || h.Get("X") != "" {
			t.Errorf("%s: %d %v %.100s", path, code, h, body)
		}
	}
	if _, h, _ := w.do(t, "GET", "/split", port...); h.Get("Set-Cookie") != "" {
		t.Errorf("a header was split: %v", h)
	}
	// A client that gives up frees what its request held.
	req, err := http.NewRequestWithContext(t.Context(), "GET", w.URL+"/silent", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("E2b-Sandbox-Id", id)
	req.Header.Set("E2b-Sandbox-Port", "3000")
	if _, err := (&http.Client{Timeout: 100 * time.Millisecond}).Do(req); err == nil {
		t.Error("a guest that says nothing was answered for")
	}
	if code, _, _ := w.do(t, "GET", "/closed", port...); code != http.StatusBadGateway {
		t.Errorf("after it: %d", code)
	}
}

// A page of one sandbox sets no cookies for its neighbours.
func TestCookiesStayWithTheirHost(t *testing.T) {
	w := setup(t, func(rw http.ResponseWriter, r *http.Request) {
		for _, c := range []string{"a=1; Domain=wrenn.test; Path=/x; HttpOnly", "b=2; domain=.wrenn.test", "c=3 ; Path=/;DOMAIN = wrenn.test", "d=domain=x"} {
			rw.Header().Add("Set-Cookie", c)
		}
	})
	id := w.create(t, control.SandboxOptions{})
	_, h, _ := w.do(t, "GET", "/", "Host: 3000-"+id+".wrenn.test")
	want := []string{"a=1; Path=/x; HttpOnly", "b=2", "c=3; Path=/", "d=domain=x"}
	if got := h.Values("Set-Cookie"); strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("%q, want %q", got, want)
	}
}
