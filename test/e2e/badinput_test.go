package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// badRequest is a request that must be refused.
type badRequest struct {
	method, path, body string
	status             int
	code               string
	names              string // what the message must name
}

func TestBadInputIsRefusedByName(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	sleeper := spawn(t, s)
	pause(t, s, sleeper.ID)
	live, asleep := "/v1/sandboxes/"+sb.ID, "/v1/sandboxes/"+sleeper.ID
	const boxes, snaps = "/v1/sandboxes", "/v1/snapshots"
	bad := func(method, path, body, names string) badRequest {
		return badRequest{method, path, body, 400, "invalid_request", names}
	}
	for _, c := range []badRequest{
		bad("POST", boxes, `{`, "body"),
		bad("POST", boxes, ``, "body"),
		bad("POST", boxes, `[]`, "body"),
		bad("POST", boxes, `{} {}`, "body"),
		bad("POST", boxes, "\xff\xfe", "body"),
		bad("POST", boxes, `{"surprise":1}`, "surprise"),
		bad("POST", boxes, `{"Template":"base"}`, "Template"),
		bad("POST", boxes, `{"template":7}`, "template"),
		bad("POST", boxes, `{"template":"../../etc"}`, "template"),
		bad("POST", boxes, `{"template":null}`, "template"),
		{"POST", boxes, `{"template":"no-such"}`, 404, "not_found", "template"},
		bad("POST", boxes, `{"vcpus":0}`, "vcpus"),
		bad("POST", boxes, `{"vcpus":-1}`, "vcpus"),
		bad("POST", boxes, `{"vcpus":1000}`, "vcpus"),
		bad("POST", boxes, `{"vcpus":1.5}`, "vcpus"),
		bad("POST", boxes, `{"vcpus":99999999999999999999}`, "vcpus"),
		bad("POST", boxes, `{"memory_mb":1}`, "memory_mb"),
		bad("POST", boxes, `{"memory_mb":"512"}`, "memory_mb"),
		bad("POST", boxes, `{"timeout_sec":-5}`, "timeout_sec"),
		bad("POST", boxes, `{"auto_pause":"yes"}`, "auto_pause"),
		bad("POST", boxes, `{"metadata":{"a":1}}`, "metadata"),
		bad("POST", boxes, `{"metadata":{"":"x"}}`, "metadata"),
		bad("POST", boxes, `{"envs":{"A=B":"x"}}`, "envs"),
		bad("GET", boxes+"?status=asleep", "", "status"),
		bad("GET", boxes+"?limit=0", "", "limit"),
		bad("GET", boxes+"?limit=many", "", "limit"),
		bad("GET", boxes+"?cursor=%25", "", "cursor"),
		bad("GET", boxes+"?surprise=1", "", "surprise"),
		{"GET", boxes + "/nosuchsandbox", "", 404, "not_found", "nosuchsandbox"},
		bad("GET", boxes+"/UPPER", "", "id"),
		bad("GET", boxes+"/a%2f..%2fb", "", "id"),
		bad("DELETE", boxes+"/"+strings.Repeat("a", 100), "", "id"),
		{"POST", asleep + "/pause", "", 409, "invalid_state", "paused"},
		{"POST", live + "/resume", "", 409, "invalid_state", "running"},
		{"POST", asleep + "/exec", `{"cmd":"true"}`, 409, "invalid_state", "paused"},
		{"GET", asleep + "/files?path=/etc/passwd", "", 409, "invalid_state", "paused"},
		{"GET", asleep + "/metrics", "", 409, "invalid_state", "paused"},
		bad("POST", live+"/pause", `{"now":true}`, "now"),
		bad("POST", live+"/timeout", `{}`, "timeout_sec"),
		bad("POST", live+"/timeout", `{"timeout_sec":-1}`, "timeout_sec"),
		bad("POST", live+"/fork", `{}`, "count"),
		bad("POST", live+"/fork", `{"count":0}`, "count"),
		bad("POST", live+"/fork", `{"count":1000000}`, "count"),
		bad("POST", live+"/exec", `{}`, "cmd"),
		bad("POST", live+"/exec", `{"cmd":""}`, "cmd"),
		bad("POST", live+"/exec", `{"cmd":"a\u0000b"}`, "cmd"),
		bad("POST", live+"/exec", `{"cmd":"true","args":"x"}`, "args"),
		bad("POST", live+"/exec", `{"cmd":"true","timeout_sec":-1}`, "timeout_sec"),
		bad("POST", live+"/exec", `{"cmd":"true","user":"no such"}`, "user"),
		bad("POST", live+"/exec", `{"cmd":"true","user":"nobodyknows"}`, "nobodyknows"),
		bad("POST", live+"/exec", `{"cmd":"true","stdin":"*","encoding":"base64"}`, "stdin"),
		bad("GET", live+"/files", "", "path"),
		bad("GET", live+"/files?path=", "", "path"),
		bad("GET", live+"/files?path=a%00b", "", "path"),
		bad("GET", live+"/files?path=/etc", "", "path"),
		{"GET", live + "/files?path=/no/such/file", "", 404, "not_found", "/no/such/file"},
		{"DELETE", live + "/files?path=/no/such/file", "", 404, "not_found", "/no/such/file"},
		bad("PUT", live+"/files?path=/etc", "x", "/etc"),
		bad("PUT", live+"/files?path=/tmp/x&mode=9", "x", "mode"),
		bad("PUT", live+"/files?path=/proc/self/mem/x", "x", "/proc/self/mem"),
		bad("GET", live+"/files/list?path=/&depth=0", "", "depth"),
		bad("POST", snaps, `{"name":"x"}`, "sandbox_id"),
		bad("POST", snaps, `{"sandbox_id":"`+sb.ID+`"}`, "name"),
		bad("POST", snaps, `{"sandbox_id":"`+sb.ID+`","name":"../x"}`, "name"),
		bad("POST", snaps, `{"sandbox_id":"`+sb.ID+`","name":"`+strings.Repeat("n", 64)+`"}`, "name"),
		{"POST", snaps, `{"sandbox_id":"nosuchsandbox","name":"x"}`, 404, "not_found", "nosuchsandbox"},
		{"POST", snaps, `{"sandbox_id":"` + sb.ID + `","name":"warm"}`, 409, "conflict", "warm"},
		{"POST", snaps, `{"sandbox_id":"` + sb.ID + `","name":"base"}`, 409, "conflict", "base"},
		{"GET", snaps + "/nosuchname", "", 404, "not_found", "nosuchname"},
		{"DELETE", snaps + "/nosuchname", "", 404, "not_found", "nosuchname"},
		{"DELETE", snaps + "/base", "", 409, "conflict", "base"},
		bad("GET", snaps+"?type=odd", "", "type"),
		{"POST", boxes, `{"metadata":{"a":"` + strings.Repeat("x", 2<<20) + `"}}`, 413, "too_large", "body"},
		{"GET", "/v1/nosuchpath", "", 404, "not_found", ""},
		{"PATCH", boxes, "{}", 405, "", ""},
	} {
		c.check(t, s)
	}
	if err := s.Health(t.Context()); err != nil {
		t.Errorf("the server afterwards: %v", err)
	}
	if out := sh(t, s, sb.ID, "echo well"); out != "well" {
		t.Errorf("the sandbox afterwards: %q", out)
	}
}

func (c badRequest) check(t *testing.T, s *harness.Server) {
	t.Helper()
	status, answer := raw(t, s, c.method, c.path, c.body)
	shown := fmt.Sprintf("%s %.120s %.120s", c.method, c.path, c.body)
	if status != c.status {
		t.Errorf("%s: %d %s, want %d", shown, status, answer, c.status)
		return
	}
	if c.code == "" {
		return
	}
	var body struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal([]byte(answer), &body); err != nil || body.Error.Code != c.code {
		t.Errorf("%s: %s, want the code %s", shown, answer, c.code)
	}
	if !strings.Contains(body.Error.Message, c.names) || body.Error.Message == "" {
		t.Errorf("%s: %q does not name %q", shown, body.Error.Message, c.names)
	}
}

func TestNobodyGetsInWithoutAKey(t *testing.T) {
	s := server(t)
	for _, key := range []string{"", "wrn_wrong", "wrn_" + strings.Repeat("0", 40)} {
		c, err := client.New(client.Options{BaseURL: s.URL, APIKey: key})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.CreateSandbox(t.Context(), client.CreateSandboxRequest{}); !client.IsUnauthorized(err) {
			t.Errorf("create with the key %q: %v, want unauthorized", key, err)
		}
	}
}

func TestATruncatedUploadLeavesTheFileAsItWas(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	sh(t, s, sb.ID, "mkdir /home/user/up && echo old > /home/user/up/f")
	for _, name := range []string{"f", "new"} {
		c, err := net.DialTimeout("tcp", strings.TrimPrefix(s.URL, "http://"), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "PUT /v1/sandboxes/%s/files?path=/home/user/up/%s HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: 4000000\r\n\r\n", sb.ID, name, apiKey(t, s))
		c.Write(make([]byte, 1_000_000))
		// Half-closed: the rest never comes, and the answer can still be read.
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(time.Minute))
		line, _ := bufio.NewReader(c).ReadString('\n')
		if line != "" && !strings.Contains(line, " 400 ") {
			t.Errorf("the answer to a truncated upload: %q", line)
		}
		c.Close()
	}
	if !harness.Eventually(time.Minute, func() bool {
		return sh(t, s, sb.ID, "ls -A /home/user/up; cat /home/user/up/f") == "f\nold"
	}) {
		t.Errorf("the directory holds %q", sh(t, s, sb.ID, "ls -lA /home/user/up"))
	}
}
