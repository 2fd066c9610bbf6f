package httpapi_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
)

// TestBadInput: each gets its code, and a message that names the field.
func TestBadInput(t *testing.T) {
	t.Parallel()
	s := setup(t)
	sb := s.create(t, m{})
	p := "/v1/sandboxes/" + sb.ID
	s.want(t, "POST", "/v1/snapshots", m{"sandbox_id": sb.ID, "name": "taken"}, 201)
	many := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `,"k%d":"v"`, i)
		}
		return "{" + b.String()[1:] + "}"
	}
	const none = "/v1/sandboxes/nosuchsandbox"
	for _, c := range []struct {
		method, path, body string
		status             int
		code, names        string
	}{
		// Bodies that are not what they should be.
		{"POST", "/v1/sandboxes", ``, 400, "invalid_request", "body:"},
		{"POST", "/v1/sandboxes", `null`, 400, "invalid_request", "body:"},
		{"POST", "/v1/sandboxes", `[]`, 400, "invalid_request", "body:"},
		{"POST", "/v1/sandboxes", `{"template":`, 400, "invalid_request", "body:"},
		{"POST", "/v1/sandboxes", `{} {}`, 400, "invalid_request", "body:"},
		{"POST", "/v1/sandboxes", `{"vcpu":1}`, 400, "invalid_request", "vcpu:"},
		{"POST", "/v1/sandboxes", `{"VCPUs":1}`, 400, "invalid_request", "VCPUs:"},
		{"POST", "/v1/sandboxes", `{"a\n\u0000":1}`, 400, "invalid_request", `"a\n\x00":`},
		{"POST", "/v1/sandboxes", `{"metadata":{"a":"` + strings.Repeat("x", 1<<20) + `"}}`, 413, "too_large", "body:"},
		{"POST", "/v1/sandboxes", `{"vcpus":null}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"metadata":{"a":null}}`, 400, "invalid_request", "metadata:"},
		// Values.
		{"POST", "/v1/sandboxes", `{"vcpus":0}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"vcpus":33}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"vcpus":-1}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"vcpus":1.5}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"vcpus":"1"}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"vcpus":1e99}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"memory_mb":127}`, 400, "invalid_request", "memory_mb:"},
		{"POST", "/v1/sandboxes", `{"memory_mb":65537}`, 400, "invalid_request", "memory_mb:"},
		{"POST", "/v1/sandboxes", `{"timeout_sec":-1}`, 400, "invalid_request", "timeout_sec:"},
		{"POST", "/v1/sandboxes", `{"timeout_sec":2592001}`, 400, "invalid_request", "timeout_sec:"},
		{"POST", "/v1/sandboxes", `{"auto_pause":1}`, 400, "invalid_request", "auto_pause:"},
		{"POST", "/v1/sandboxes", `{"template":"../x"}`, 400, "invalid_request", "template:"},
		{"POST", "/v1/sandboxes", `{"template":5}`, 400, "invalid_request", "template:"},
		{"POST", "/v1/sandboxes", `{"template":"nosuch"}`, 404, "not_found", "template:"},
		{"POST", "/v1/sandboxes", `{"template":"taken","vcpus":2}`, 400, "invalid_request", "vcpus:"},
		{"POST", "/v1/sandboxes", `{"template":"taken","memory_mb":128}`, 400, "invalid_request", "memory_mb:"},
		{"POST", "/v1/sandboxes", `{"metadata":{"":"x"}}`, 400, "invalid_request", "metadata:"},
		{"POST", "/v1/sandboxes", `{"metadata":{"a":1}}`, 400, "invalid_request", "metadata"},
		{"POST", "/v1/sandboxes", `{"metadata":{"a":"\u0000"}}`, 400, "invalid_request", "metadata:"},
		{"POST", "/v1/sandboxes", `{"metadata":` + many(65) + `}`, 400, "invalid_request", "metadata:"},
		{"POST", "/v1/sandboxes", `{"envs":{"A=B":"x"}}`, 400, "invalid_request", "envs:"},
		{"POST", "/v1/sandboxes", `{"envs":{"A":"\u0000"}}`, 400, "invalid_request", "envs:"},
		{"POST", "/v1/sandboxes", `{"envs":` + many(257) + `}`, 400, "invalid_request", "envs:"},
		// IDs, names, queries.
		{"GET", "/v1/sandboxes/UPPER", ``, 400, "invalid_request", "id:"},
		{"GET", "/v1/sandboxes/a%2Fb", ``, 400, "invalid_request", "id:"},
		{"GET", "/v1/sandboxes/" + strings.Repeat("a", 33), ``, 400, "invalid_request", "id:"},
		{"DELETE", "/v1/sandboxes/", ``, 404, "not_found", "path"},
		{"GET", "/v1/sandboxes?status=runing", ``, 400, "invalid_request", "status:"},
		{"GET", "/v1/sandboxes?status=", ``, 400, "invalid_request", "status:"},
		{"GET", "/v1/sandboxes?limit=0", ``, 400, "invalid_request", "limit:"},
		{"GET", "/v1/sandboxes?limit=1001", ``, 400, "invalid_request", "limit:"},
		{"GET", "/v1/sandboxes?limit=x", ``, 400, "invalid_request", "limit:"},
		{"GET", "/v1/sandboxes?limit=1&limit=2", ``, 400, "invalid_request", "limit:"},
		{"GET", "/v1/sandboxes?cursor=%21", ``, 400, "invalid_request", "cursor:"},
		{"GET", "/v1/sandboxes?cursor=eA", ``, 400, "invalid_request", "cursor:"},
		{"GET", "/v1/sandboxes?metadata.=x", ``, 400, "invalid_request", "metadata:"},
		{"GET", "/v1/sandboxes?stauts=x", ``, 400, "invalid_request", "stauts:"},
		{"GET", "/v1/sandboxes?status=%zz", ``, 400, "invalid_request", "query:"},
		{"GET", p + "?x=1", ``, 400, "invalid_request", "x:"},
		{"GET", "/v1/snapshots?type=x", ``, 400, "invalid_request", "type:"},
		{"GET", "/v1/snapshots?cursor=Li4", ``, 400, "invalid_request", "cursor:"},
		{"GET", "/v1/snapshots/-x", ``, 400, "invalid_request", "name:"},
		{"GET", "/v1/snapshots/nosuch", ``, 404, "not_found", "nosuch"},
		{"DELETE", "/v1/snapshots/nosuch", ``, 404, "not_found", "nosuch"},
		{"DELETE", "/v1/snapshots/base", ``, 409, "conflict", "name:"},
		{"POST", "/v1/snapshots", `{"name":"x"}`, 400, "invalid_request", "sandbox_id:"},
		{"POST", "/v1/snapshots", `{"sandbox_id":"` + sb.ID + `"}`, 400, "invalid_request", "name:"},
		{"POST", "/v1/snapshots", `{"sandbox_id":"` + sb.ID + `","name":"X"}`, 400, "invalid_request", "name:"},
		{"POST", "/v1/snapshots", `{"sandbox_id":"` + sb.ID + `","name":"taken"}`, 409, "conflict", "name:"},
		{"POST", "/v1/snapshots", `{"sandbox_id":"nosuch","name":"x"}`, 404, "not_found", "nosuch"},
		// Sandboxes that are not there.
		{"GET", none, ``, 404, "not_found", "nosuchsandbox"},
		{"DELETE", none, ``, 404, "not_found", "nosuchsandbox"},
		{"POST", none + "/pause", ``, 404, "not_found", "nosuchsandbox"},
		{"POST", none + "/resume", ``, 404, "not_found", "nosuchsandbox"},
		{"POST", none + "/timeout", `{"timeout_sec":1}`, 404, "not_found", "nosuchsandbox"},
		{"POST", none + "/fork", `{"count":1}`, 404, "not_found", "nosuchsandbox"},
		{"POST", none + "/exec", `{"cmd":"x"}`, 404, "not_found", "nosuchsandbox"},
		{"GET", none + "/exec/stream", ``, 404, "not_found", "nosuchsandbox"},
		{"GET", none + "/pty", ``, 404, "not_found", "nosuchsandbox"},
		{"GET", none + "/files?path=/x", ``, 404, "not_found", "nosuchsandbox"},
		{"GET", none + "/metrics", ``, 404, "not_found", "nosuchsandbox"},
		// States.
		{"POST", p + "/resume", ``, 409, "invalid_state", "paused"},
		{"POST", p + "/pause", `{"x":1}`, 400, "invalid_request", "x:"},
		{"POST", p + "/timeout", `{}`, 400, "invalid_request", "timeout_sec:"},
		{"POST", p + "/timeout", `{"timeout_sec":-5}`, 400, "invalid_request", "timeout_sec:"},
		{"POST", p + "/fork", `{}`, 400, "invalid_request", "count:"},
		{"POST", p + "/fork", `{"count":0}`, 400, "invalid_request", "count:"},
		{"POST", p + "/fork", `{"count":65}`, 400, "invalid_request", "count:"},
		// Commands.
		{"POST", p + "/exec", `{}`, 400, "invalid_request", "cmd:"},
		{"POST", p + "/exec", `{"cmd":"a\u0000"}`, 400, "invalid_request", "cmd:"},
		{"POST", p + "/exec", `{"cmd":"a","args":"b"}`, 400, "invalid_request", "args:"},
		{"POST", p + "/exec", `{"cmd":"a","args":["\u0000"]}`, 400, "invalid_request", "args:"},
		{"POST", p + "/exec", `{"cmd":"a","user":"a b"}`, 400, "invalid_request", "user:"},
		{"POST", p + "/exec", `{"cmd":"a","timeout_sec":-1}`, 400, "invalid_request", "timeout_sec:"},
		{"POST", p + "/exec", `{"cmd":"a","timeout_sec":86401}`, 400, "invalid_request", "timeout_sec:"},
		{"POST", p + "/exec", `{"cmd":"a","cwd":"` + strings.Repeat("x", 4097) + `"}`, 400, "invalid_request", "cwd:"},
		{"POST", p + "/exec", `{"cmd":"a","encoding":"latin1"}`, 400, "invalid_request", "encoding:"},
		{"POST", p + "/exec", `{"cmd":"a","stdin":"!","encoding":"base64"}`, 400, "invalid_request", "stdin:"},
		{"GET", p + "/exec/stream", ``, 400, "invalid_request", "Upgrade:"},
		// Files.
		{"GET", p + "/files", ``, 400, "invalid_request", "path:"},
		{"GET", p + "/files?path=", ``, 400, "invalid_request", "path:"},
		{"GET", p + "/files?path=a%00b", ``, 400, "invalid_request", "path:"},
		{"GET", p + "/files?path=%ff", ``, 400, "invalid_request", "path:"},
		{"GET", p + "/files?path=" + strings.Repeat("x", 4097), ``, 400, "invalid_request", "path:"},
		{"GET", p + "/files?path=/x&user=A", ``, 400, "invalid_request", "user:"},
		{"GET", p + "/files?path=/nosuch", ``, 404, "not_found", "/nosuch"},
		{"PUT", p + "/files?path=/x&mode=999", ``, 400, "invalid_request", "mode:"},
		{"PUT", p + "/files?path=/x&mode=10000", ``, 400, "invalid_request", "mode:"},
		{"GET", p + "/files/list?path=/&depth=0", ``, 400, "invalid_request", "depth:"},
		{"GET", p + "/files/list?path=/&depth=33", ``, 400, "invalid_request", "depth:"},
		{"POST", p + "/files/mkdir", ``, 400, "invalid_request", "path:"},
		// Paths and methods.
		{"GET", "/v1/nothing", ``, 404, "not_found", "path"},
		{"GET", "/nothing", ``, 404, "not_found", "path"},
		{"PATCH", p, ``, 405, "invalid_request", "method:"},
		{"FOO", "/healthz", ``, 405, "invalid_request", "method:"},
	} {
		var body any
		if c.body != "" || c.method == "POST" {
			body = c.body
		}
		a := s.call(t, c.method, c.path, body)
		what := fmt.Sprintf("%s %.80s %.80s", c.method, c.path, c.body)
		if a.status != c.status {
			t.Errorf("%s: %d %s; want %d", what, a.status, a.body, c.status)
			continue
		}
		code, message := a.code(t)
		if code != c.code || !strings.Contains(message, c.names) {
			t.Errorf("%s: %s %q; want %s naming %s", what, code, message, c.code, c.names)
		}
	}
	if n := len(s.host.IDs()); n != 1 {
		t.Errorf("bad requests left %d sandboxes", n-1)
	}
}

func TestAuthentication(t *testing.T) {
	t.Parallel()
	s := setup(t)
	for _, c := range []struct {
		header, value string
		status        int
	}{
		{"X-None", "", 401},
		{"X-API-Key", "wrn_0000000000000000000000000000000000000000", 401},
		{"X-API-Key", "x", 401},
		{"X-API-Key", s.key, 200},
		{"Authorization", "Bearer " + s.key, 200},
		{"Authorization", "bearer  " + s.key, 200},
		{"Authorization", "Basic " + s.key, 401},
		{"Authorization", s.key, 401},
	} {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", s.URL+"/v1/sandboxes", nil)
		req.Header.Set(c.header, c.value)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if res.StatusCode != c.status {
			t.Errorf("%s %s: %d; want %d", c.header, c.value, res.StatusCode, c.status)
		}
		if c.status == 401 {
			var e struct{ Error struct{ Code string } }
			if json.Unmarshal(b, &e) != nil || e.Error.Code != "unauthorized" || res.Header.Get("WWW-Authenticate") == "" {
				t.Errorf("%s: %s", c.header, b)
			}
		}
	}
}

func TestInternalErrorsAreWithheld(t *testing.T) {
	t.Parallel()
	s := setup(t)
	p := "/v1/sandboxes/" + s.create(t, m{}).ID
	s.host.Fail("exec", errors.New("secret detail"))
	a := s.want(t, "POST", p+"/exec", m{"cmd": "x"}, 500)
	if code, message := a.code(t); code != "internal_error" || strings.Contains(message, "secret") {
		t.Errorf("%s %s", code, message)
	}
	if a.header.Get("X-Request-Id") == "" {
		t.Error("no X-Request-Id")
	}
	s.host.Fail("pause", controltest.Err("host_unavailable", "the disk is full"))
	a = s.want(t, "POST", p+"/pause", nil, 503)
	if _, message := a.code(t); message != "the disk is full" || a.header.Get("Retry-After") == "" {
		t.Errorf("%s, Retry-After %q", message, a.header.Get("Retry-After"))
	}
	s.host.SetDown(true)
	s.want(t, "GET", "/healthz", nil, 503)
}

// TestBodyCutShort sends less than it promised.
func TestBodyCutShort(t *testing.T) {
	t.Parallel()
	s := setup(t)
	p := "/v1/sandboxes/" + s.create(t, m{}).ID
	s.want(t, "PUT", p+"/files?path=/f", []byte("whole"), 200)
	for _, c := range []struct{ method, path string }{
		{"POST", "/v1/sandboxes"}, {"POST", p + "/exec"}, {"PUT", p + "/files?path=/f"},
	} {
		conn, err := net.Dial("tcp", s.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: 100\r\n\r\n{}", c.method, c.path, s.key)
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		_ = conn.Close()
		if res.StatusCode != 400 || !strings.Contains(string(b), "body: ended before") {
			t.Errorf("%s %s: %d %s", c.method, c.path, res.StatusCode, b)
		}
	}
	if a := s.want(t, "GET", p+"/files?path=/f", nil, 200); string(a.body) != "whole" {
		t.Errorf("the file is %q now", a.body)
	}
	if n := len(s.host.IDs()); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
}

// TestRandomJSONIsNoServerError throws generated bodies at every call that
// takes one. The seed is in the output.
func TestRandomJSONIsNoServerError(t *testing.T) {
	t.Parallel()
	s := setup(t)
	sb := s.create(t, m{})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	keys := []string{"template", "vcpus", "memory_mb", "timeout_sec", "auto_pause", "metadata", "envs", "cmd", "args", "cwd",
		"user", "stdin", "encoding", "sandbox_id", "name", "count", "type", "", "\x00", "é"}
	var value func(depth int) any
	value = func(depth int) any {
		switch n := r.IntN(11); {
		case n < 2 && depth < 3:
			o := m{}
			for range r.IntN(4) {
				o[keys[r.IntN(len(keys))]] = value(depth + 1)
			}
			return o
		case n < 3 && depth < 3:
			l := []any{}
			for range r.IntN(3) {
				l = append(l, value(depth+1))
			}
			return l
		case n < 5:
			return []any{-1, 0, 1, 1 << 40, 1e300, 0.5}[r.IntN(6)]
		case n < 9:
			return []string{"", "base", "a", sb.ID, "\x00", "\xff", "echo", "../..", strings.Repeat("x", 5000), "base64"}[r.IntN(10)]
		case n < 10:
			return r.IntN(2) == 0
		}
		return nil
	}
	paths := []string{"/v1/sandboxes", "/v1/sandboxes/" + sb.ID + "/exec", "/v1/sandboxes/" + sb.ID + "/timeout",
		"/v1/sandboxes/" + sb.ID + "/pause", "/v1/sandboxes/" + sb.ID + "/resume", "/v1/sandboxes/" + sb.ID + "/fork", "/v1/snapshots"}
	for range 250 {
		o := m{}
		for range r.IntN(5) {
			o[keys[r.IntN(len(keys))]] = value(0)
		}
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if r.IntN(5) == 0 && len(b) > 2 {
			b = b[:r.IntN(len(b))]
		}
		path := paths[r.IntN(len(paths))]
		if a := s.call(t, "POST", path, string(b)); a.status >= 500 {
			t.Fatalf("POST %s %q: %d %s", path, b, a.status, a.body)
		}
	}
}
