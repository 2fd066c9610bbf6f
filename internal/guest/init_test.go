package guest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	fspb "git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

var allSteps = []string{"clock", "entropy", "hostname", "machine_id", "generation", "connections"}

func TestInit(t *testing.T) {
	a := newAgent(t)
	body := a.initBody(map[string]any{
		"fork": true, "hostname": "sb1", "machine_id": strings.Repeat("ab", 16),
		"envs": map[string]string{"A": "1"}, "default_user": "other", "default_workdir": "/",
		"time_unix_nano": strconv.FormatInt(a.now.Add(time.Hour).UnixNano(), 10),
	})
	status, text := a.init(t, body)
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	var res InitResponse
	if err := json.Unmarshal([]byte(text), &res); err != nil {
		t.Fatal(err)
	}
	if res.Generation != "gen-1" || res.EnvdVersion != "0.6.13" || res.BootID != "boot-1" || !slices.Equal(res.Steps, allSteps) {
		t.Errorf("answer %s", text)
	}
	want := []string{"clock " + body["time_unix_nano"].(string), "entropy 64", "hostname sb1",
		"machine_id " + strings.Repeat("ab", 16), "generation gen-1", "connections 49983"}
	if got := a.sys.take(); !slices.Equal(got, want) {
		t.Errorf("done: %q, want %q", got, want)
	}
	r := runAll(t, a.processes(), connect.NewRequest(sh("echo $A $USER $(pwd)")))
	if r.stdout != "1 other /\n" {
		t.Errorf("%q %v", r.stdout, r.err)
	}
	if _, envs := a.do(t, "GET", "/envs", nil, tokenHeader, testToken); envs != "{\"A\":\"1\"}\n" {
		t.Errorf("envs: %s", envs)
	}
}

// The same confirmation again, as after a lost answer, changes nothing that
// runs; a new generation does.
func TestInitAgain(t *testing.T) {
	a := confirmed(t)
	s, pid := started(t, t.Context(), a.processes(), sh("read x; echo still here"))
	if status, text := a.init(t, a.initBody(nil)); status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	// Neither the clock, which is right, nor connections.
	if got := a.sys.take(); !slices.Equal(got, []string{"entropy 64", "generation gen-1"}) {
		t.Errorf("done: %q", got)
	}
	in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("\n")}}
	if _, err := a.processes().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
		t.Fatal(err)
	}
	r := &run{}
	for s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if r.stdout != "still here\n" || s.Err() != nil {
		t.Errorf("%q %v", r.stdout, s.Err())
	}
}

func TestNewGenerationCutsConnections(t *testing.T) {
	a := confirmed(t)
	s, pid := started(t, t.Context(), a.processes(), sh("read x; echo $x"))
	const token2 = "another-token-4567890"
	if status, text := a.init(t, a.initBody(map[string]any{"generation": "gen-2", "access_token": token2})); status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	if s.Receive() || s.Err() == nil {
		t.Fatalf("the old stream goes on or ended in order: %v %v", s.Msg(), s.Err())
	}
	_, err := a.processes().List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	wantCode(t, err, connect.CodeUnauthenticated, "access token")
	c := a.processesAs(withToken{token: token2})
	list, err := c.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil || len(list.Msg.GetProcesses()) != 1 || list.Msg.GetProcesses()[0].GetPid() != pid {
		t.Fatalf("%v %v", list, err)
	}
}

func TestInitStepFails(t *testing.T) {
	a := confirmed(t)
	for _, step := range allSteps {
		body := a.initBody(map[string]any{"generation": "next-" + step, "hostname": "h", "machine_id": strings.Repeat("0", 32),
			"time_unix_nano": strconv.FormatInt(a.now.Add(time.Minute).UnixNano(), 10)})
		a.sys.setFail(step, os.ErrPermission)
		status, text := a.init(t, body)
		if status != http.StatusInternalServerError || !strings.Contains(text, "step "+step+": permission denied") {
			t.Errorf("%s: %d %s", step, status, text)
		}
		// Half a new life serves nothing, not even with the old token.
		_, err := a.processes().List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
		wantCode(t, err, connect.CodeUnavailable, "not been confirmed")
		if _, err := os.Stat(a.stateFile()); !os.IsNotExist(err) {
			t.Errorf("%s: the state file: %v", step, err)
		}
		// The same again, the cause being gone, is whole.
		a.sys.setFail("", nil)
		a.sys.take()
		if status, text := a.init(t, body); status != http.StatusOK {
			t.Errorf("%s, again: %d %s", step, status, text)
		}
		if got := a.sys.take(); len(got) != len(allSteps) {
			t.Errorf("%s, again: did %q", step, got)
		}
		if _, err := a.processes().List(t.Context(), connect.NewRequest(&pb.ListRequest{})); err != nil {
			t.Errorf("%s, again: %v", step, err)
		}
	}
}

func TestInitUnsupportedConnections(t *testing.T) {
	a := newAgent(t)
	a.sys.setFail("connections", errUnsupportedForTest)
	status, text := a.init(t, a.initBody(nil))
	if status != http.StatusOK || !strings.Contains(text, `"notes":["connections:`) {
		t.Errorf("%d %s", status, text)
	}
}

func TestInitRefusals(t *testing.T) {
	a := newAgent(t)
	long := func(n int) string { return strings.Repeat("a", n) }
	for field, values := range map[string][]any{
		"generation":      {"", "a b", "../x", long(129), 7},
		"access_token":    {"", "short", "has spaces in its body", long(513)},
		"time_unix_nano":  {"", "now", "1", "99999999999999999999"},
		"entropy":         {"", "*", "AAAA", long(8 << 10)},
		"machine_id":      {"xyz", strings.Repeat("A", 32)},
		"hostname":        {"a b", long(300), "-x"},
		"default_user":    {"a:b", long(40)},
		"default_workdir": {"\x00", long(5000)},
		"envs":            {map[string]string{"": "x"}, map[string]string{"A=": "x"}, map[string]string{"A": "\x00"}},
		"unknown":         {"x"},
	} {
		for _, v := range values {
			status, text := a.init(t, a.initBody(map[string]any{field: v}))
			if status != http.StatusBadRequest || !strings.Contains(text, field) {
				t.Errorf("%s=%.40v: %d %s", field, v, status, text)
			}
		}
	}
	for _, body := range []string{"", "{", "[]", `"x"`, long(100)} {
		if status, text := a.do(t, "POST", "/init", strings.NewReader(body)); status != http.StatusBadRequest {
			t.Errorf("body %q: %d %s", body, status, text)
		}
	}
	if got := a.sys.take(); len(got) != 0 {
		t.Errorf("something was done: %q", got)
	}
}

func TestClockTolerance(t *testing.T) {
	a := confirmed(t)
	for ahead, step := range map[time.Duration]bool{
		0: false, clockAhead: false, clockAhead + 1: true, -time.Millisecond: true, time.Hour: true,
	} {
		if err := a.stepClock(a.now.Add(-ahead)); err != nil {
			t.Fatal(err)
		}
		if got := len(a.sys.take()) == 1; got != step {
			t.Errorf("ahead by %v: stepped %v", ahead, got)
		}
	}
}

func TestBeforeInit(t *testing.T) {
	a := newAgent(t)
	if status, _ := a.do(t, "GET", "/health", nil); status != http.StatusNoContent {
		t.Errorf("health: %d", status)
	}
	for _, path := range []string{"GET /metrics", "GET /envs", "POST /sync", "GET /files?path=/etc/passwd", "POST /files?path=/x", "GET /"} {
		method, p, _ := strings.Cut(path, " ")
		status, text := a.do(t, method, p, nil, tokenHeader, testToken)
		if status != http.StatusServiceUnavailable || !strings.Contains(text, `"code":503`) {
			t.Errorf("%s: %d %s", path, status, text)
		}
	}
	_, err := a.processes().List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	wantCode(t, err, connect.CodeUnavailable, "not been confirmed")
}

func TestToken(t *testing.T) {
	a := confirmed(t)
	for _, token := range []string{"", "wrong", testToken + "x"} {
		for _, path := range []string{"GET /metrics", "GET /envs", "POST /sync", "GET /files?path=/etc/passwd", "POST /files?path=/x", "GET /nothing"} {
			method, p, _ := strings.Cut(path, " ")
			status, text := a.do(t, method, p, nil, tokenHeader, token)
			if status != http.StatusUnauthorized || !strings.Contains(text, `"code":401`) {
				t.Errorf("%s with %q: %d %s", path, token, status, text)
			}
		}
		codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
			w := withToken{token: token}
			_, err := a.filesystemAs(w, opts...).Stat(t.Context(), connect.NewRequest(&fspb.StatRequest{Path: "/"}))
			wantCode(t, err, connect.CodeUnauthenticated, "access token")
			r := runAll(t, a.processesAs(w, opts...), connect.NewRequest(sh("exit 0")))
			wantCode(t, r.err, connect.CodeUnauthenticated, "access token")
		})
	}
}

func TestGatewayOnly(t *testing.T) {
	a := newAgent(t, func(o *Options) { o.Gateway = netip.MustParseAddr(Gateway) })
	try := func(path, remote string, headers ...string) int {
		r := httptest.NewRequest("POST", path, bytes.NewReader(mustJSON(t, a.initBody(nil))))
		r.RemoteAddr = remote
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		w := httptest.NewRecorder()
		a.Handler().ServeHTTP(w, r)
		return w.Code
	}
	for _, remote := range []string{"127.0.0.1:1", "172.30.0.2:1", "[::1]:5", "", "nonsense"} {
		if got := try("/init", remote); got != http.StatusForbidden {
			t.Errorf("init from %q: %d", remote, got)
		}
		if got := try("/trust", remote, tokenHeader, testToken); got != http.StatusForbidden {
			t.Errorf("POST /trust from %s: %d", remote, got)
		}
		if got := try("/sync", remote, tokenHeader, testToken); got != http.StatusForbidden {
			t.Errorf("sync from %q: %d", remote, got)
		}
	}
	if got := try("/init", Gateway+":1", "E2b-Sandbox-Id", "x"); got != http.StatusForbidden {
		t.Errorf("forwarded init: %d", got)
	}
	if got := try("/init", "[::ffff:"+Gateway+"]:1"); got != http.StatusOK {
		t.Errorf("init: %d", got)
	}
	if got := try("/sync", Gateway+":1", tokenHeader, testToken); got != http.StatusNoContent {
		t.Errorf("sync: %d", got)
	}
	if got := a.sys.take(); got[len(got)-1] != "sync " {
		t.Errorf("done: %q", got)
	}
}

// An agent that was restarted goes on with the token; one of another boot does
// not.
func TestStateIsTakenOver(t *testing.T) {
	a := confirmed(t)
	fi, err := os.Stat(a.stateFile())
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", fi, err)
	}
	again, err := New(a.opt)
	if err != nil || again.identity().Token != testToken {
		t.Errorf("%+v %v", again.identity(), err)
	}
	a.sys.boot = "boot-2"
	again, err = New(a.opt)
	if err != nil || again.ident.Load() != nil {
		t.Errorf("after a reboot: %+v %v", again.identity(), err)
	}
	writeFile(t, a.stateFile(), "{garbage")
	again, err = New(a.opt)
	if err != nil || again.ident.Load() != nil {
		t.Errorf("with a broken file: %+v %v", again.identity(), err)
	}
}

// The one step whose real form is harmless here.
func TestWriteGeneration(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	sys := NewSystem(dir)
	for _, g := range []string{"one", "two", "two"} {
		if err := sys.WriteGeneration(g); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "generation"))
		if err != nil || string(b) != g+"\n" {
			t.Errorf("%q %v", b, err)
		}
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
	if id, err := sys.BootID(); err != nil || len(id) != 36 {
		t.Errorf("boot id %q %v", id, err)
	}
}

func TestMetrics(t *testing.T) {
	a := confirmed(t)
	for range 2 {
		status, text := a.do(t, "GET", "/metrics", nil, tokenHeader, testToken)
		var m metrics
		if err := json.Unmarshal([]byte(text), &m); err != nil || status != http.StatusOK {
			t.Fatalf("%d %s %v", status, text, err)
		}
		if m.Timestamp != a.now.Unix() || m.CPUCount < 1 || m.CPUUsedPct < 0 || m.CPUUsedPct > 100 ||
			m.MemTotal == 0 || m.MemUsed > m.MemTotal || m.DiskTotal == 0 || m.DiskUsed > m.DiskTotal {
			t.Errorf("%+v", m)
		}
	}
}

// A client that sends a request line and no more does not hold others up, and
// what is no HTTP at all is refused.
func TestGarbage(t *testing.T) {
	a := confirmed(t)
	conn := a.dial(t)
	if _, err := conn.Write([]byte("\x00\x01\x02 garbage\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(conn).ReadString('\n')
	if !strings.HasPrefix(line, "HTTP/1.1 400") {
		t.Errorf("answer %q", line)
	}
	// A stream whose first frame is cut, and one that claims 4 GiB.
	for _, body := range []string{"\x00\x00\x00\x00\x10{", "\x00\xff\xff\xff\xff", "\x00\x00\x00\x00\x02[]", "\x07\x00\x00\x00\x00"} {
		status, text := a.do(t, "POST", "/process.Process/Start", strings.NewReader(body),
			"Content-Type", "application/connect+json", tokenHeader, testToken)
		if status != http.StatusOK || !strings.Contains(text, `"error"`) {
			t.Errorf("%q: %d %s", body, status, text)
		}
	}
	if status, _ := a.do(t, "GET", "/health", nil); status != http.StatusNoContent {
		t.Errorf("health: %d", status)
	}
}
