package httpapi_test

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

type wsConn struct {
	*websocket.Conn
	t *testing.T
}

func (s *server) dial(t *testing.T, path string) wsConn {
	t.Helper()
	c, _, err := websocket.Dial(t.Context(), s.URL+path, &websocket.DialOptions{HTTPHeader: http.Header{"X-API-Key": {s.key}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.CloseNow() })
	return wsConn{c, t}
}

func (c wsConn) send(text string) {
	c.t.Helper()
	if err := c.Write(c.t.Context(), websocket.MessageText, []byte(text)); err != nil {
		c.t.Fatal(err)
	}
}

// recv reads one message and checks it against the document.
func (c wsConn) recv() string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	_, b, err := c.Read(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	doc, err := loadDocument()
	if err != nil {
		c.t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		c.t.Fatal(err)
	}
	if err := doc.Components.Schemas["StreamOutput"].Value.VisitJSON(v); err != nil {
		c.t.Errorf("%s: %v", b, err)
	}
	return string(b)
}

func (c wsConn) want(messages ...string) {
	c.t.Helper()
	for _, m := range messages {
		if got := c.recv(); got != m {
			c.t.Fatalf("message %s; want %s", got, m)
		}
	}
}

// closed reads the end of the connection.
func (c wsConn) closed(want websocket.StatusCode) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	_, b, err := c.Read(ctx)
	if got := websocket.CloseStatus(err); got != want {
		c.t.Fatalf("closed with %v (%v, message %s); want %v", got, err, b, want)
	}
}

func TestExecStream(t *testing.T) {
	t.Parallel()
	s := setup(t)
	p := "/v1/sandboxes/" + s.create(t, m{}).ID + "/exec/stream"

	c := s.dial(t, p)
	c.send(`{"type":"start","cmd":"exit","args":["0"]}`)
	c.want(`{"type":"start","pid":42}`, `{"type":"exit","exit_code":0}`)
	c.closed(websocket.StatusNormalClosure)

	c = s.dial(t, p)
	c.send(`{"type":"start","cmd":"fail","args":["oh"]}`)
	c.want(`{"type":"start","pid":42}`, `{"type":"stderr","data":"oh"}`, `{"type":"exit","exit_code":1}`)

	c = s.dial(t, p)
	c.send(`{"type":"start","cmd":"cat"}`)
	c.want(`{"type":"start","pid":42}`)
	c.send(`{"type":"stdin","data":"é"}`)
	c.want(`{"type":"stdout","data":"é"}`)
	c.send(`{"type":"stdin","data":"/w==","encoding":"base64"}`)
	c.want(`{"type":"stdout","data":"/w==","encoding":"base64"}`)
	c.send(`{"type":"stdin","data":"x","eof":true}`)
	c.want(`{"type":"stdout","data":"x"}`, `{"type":"exit","exit_code":0}`)

	c = s.dial(t, p)
	c.send(`{"type":"start","cmd":"cat"}`)
	c.send(`{"type":"close_stdin"}`)
	c.want(`{"type":"start","pid":42}`, `{"type":"exit","exit_code":0}`)

	c = s.dial(t, p)
	c.send(`{"type":"start","cmd":"sleep"}`)
	c.send(`{"type":"stop"}`)
	c.want(`{"type":"start","pid":42}`, `{"type":"exit","exit_code":143,"reason":"signal: terminated"}`)
}

func TestPTY(t *testing.T) {
	t.Parallel()
	s := setup(t)
	id := s.create(t, m{}).ID
	c := s.dial(t, "/v1/sandboxes/"+id+"/pty")
	c.send(`{"type":"start","cols":100,"rows":30}`)
	c.want(`{"type":"start","pid":42}`)
	c.send(`{"type":"input","data":"ls\r"}`)
	c.want(`{"type":"output","data":"ls\r"}`)
	c.send(`{"type":"resize","cols":120,"rows":40}`)
	c.want(`{"type":"output","data":"120x40"}`)
	c.send(`{"type":"stdin","data":"x"}`)
	c.want(`{"type":"output","data":"x"}`)
	// Hanging up ends the shell: the sandbox is not active any more.
	_ = c.CloseNow()
	s.settles(t, id)
}

// settles waits until no command runs in the sandbox: last_active_at stands.
func (s *server) settles(t *testing.T, id string) sandbox {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var before sandbox
	for range 1000 {
		var now sandbox
		s.want(t, "GET", "/v1/sandboxes/"+id, nil, 200).decode(t, &now)
		if now.LastActiveAt == before.LastActiveAt {
			return now
		}
		before = now
		<-tick.C
	}
	t.Fatal("a command still runs")
	return sandbox{}
}

// TestClientLeavesStream: the command goes on, and last_active_at moves when it
// has ended.
func TestClientLeavesStream(t *testing.T) {
	t.Parallel()
	s := setup(t)
	sb := s.create(t, m{})
	c := s.dial(t, "/v1/sandboxes/"+sb.ID+"/exec/stream")
	c.send(`{"type":"start","cmd":"cat"}`)
	c.want(`{"type":"start","pid":42}`)
	_ = c.CloseNow()
	// The pause is what ends the command; nothing else is active then.
	s.want(t, "POST", "/v1/sandboxes/"+sb.ID+"/pause", nil, 200)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		var now sandbox
		s.want(t, "GET", "/v1/sandboxes/"+sb.ID, nil, 200).decode(t, &now)
		if now.LastActiveAt > sb.LastActiveAt {
			return
		}
		<-tick.C
	}
	t.Errorf("last_active_at stayed at %s", sb.LastActiveAt)
}

func TestPauseEndsStreamWithError(t *testing.T) {
	t.Parallel()
	s := setup(t)
	id := s.create(t, m{}).ID
	c := s.dial(t, "/v1/sandboxes/"+id+"/exec/stream")
	c.send(`{"type":"start","cmd":"cat"}`)
	c.want(`{"type":"start","pid":42}`)
	s.want(t, "POST", "/v1/sandboxes/"+id+"/pause", nil, 200)
	if got := c.recv(); !strings.Contains(got, `"error"`) || !strings.Contains(got, "did not stay running") {
		t.Errorf("message %s", got)
	}
	c.closed(websocket.StatusPolicyViolation)
	// Before the upgrade it is an answer like any other.
	for _, path := range []string{"/exec/stream", "/pty"} {
		if code, _ := s.want(t, "GET", "/v1/sandboxes/"+id+path, nil, 409).code(t); code != "invalid_state" {
			t.Errorf("code %s", code)
		}
	}
}

func TestARunningCommandIsPickedUpAgain(t *testing.T) {
	t.Parallel()
	s := setup(t)
	c := s.dial(t, "/v1/sandboxes/"+s.create(t, m{}).ID+"/exec/stream")
	c.send(`{"type":"attach","pid":42}`)
	c.want(`{"type":"start","pid":42}`)
	c.send(`{"type":"stdin","data":"still here","eof":true}`)
	c.want(`{"type":"stdout","data":"still here"}`, `{"type":"exit","exit_code":0}`)
	c.closed(websocket.StatusNormalClosure)
}

func TestWrongMessages(t *testing.T) {
	t.Parallel()
	s := setup(t)
	id := s.create(t, m{}).ID
	for _, c := range []struct {
		path, first, names string
	}{
		{"/exec/stream", `{"type":"stdin","data":"x"}`, "type: the first message"},
		{"/exec/stream", `nonsense`, "type: the first message"},
		{"/exec/stream", `{"type":"start"}`, "cmd:"},
		{"/exec/stream", `{"type":"attach"}`, "pid:"},
		{"/exec/stream", `{"type":"attach","pid":-1}`, "pid:"},
		{"/exec/stream", `{"type":"attach","pid":42,"cmd":"x"}`, "cmd:"},
		{"/exec/stream", `{"type":"attach","pid":7}`, "no process 7"},
		{"/pty", `{"type":"attach","pid":42}`, "type: the first message"},
		{"/exec/stream", `{"type":"start","cmd":"x","cols":1}`, "cols:"},
		{"/exec/stream", `{"type":"start","cmd":"x","foo":1}`, "foo:"},
		{"/exec/stream", `{"type":"start","cmd":"x","user":"A B"}`, "user:"},
		{"/exec/stream", `{"type":"start","cmd":5}`, "cmd:"},
		{"/pty", `{"type":"start","cols":0}`, "cols:"},
		{"/pty", `{"type":"start","cols":-1}`, "cols:"},
		{"/pty", `{"type":"start","rows":70000}`, "rows:"},
	} {
		ws := s.dial(t, "/v1/sandboxes/"+id+c.path)
		ws.send(c.first)
		var e struct{ Type, Data string }
		if err := json.Unmarshal([]byte(ws.recv()), &e); err != nil || e.Type != "error" || !strings.Contains(e.Data, c.names) {
			t.Errorf("%s: %+v, %v; want an error naming %s", c.first, e, err, c.names)
		}
		ws.closed(websocket.StatusPolicyViolation)
	}
	for _, c := range []struct{ path, second, names string }{
		{"/exec/stream", `{"type":"resize","cols":1,"rows":1}`, "type: resize"},
		{"/exec/stream", `{"type":"input","data":"x"}`, "type: input"},
		{"/exec/stream", `[]`, "message:"},
		{"/exec/stream", `{"type":"stdin","data":"!","encoding":"base64"}`, "data:"},
		{"/pty", `{"type":"resize","cols":0,"rows":1}`, "cols:"},
	} {
		ws := s.dial(t, "/v1/sandboxes/"+id+c.path)
		ws.send(`{"type":"start","cmd":"cat"}`)
		ws.want(`{"type":"start","pid":42}`)
		ws.send(c.second)
		var e struct{ Type, Data string }
		if err := json.Unmarshal([]byte(ws.recv()), &e); err != nil || e.Type != "error" || !strings.Contains(e.Data, c.names) {
			t.Errorf("%s: %+v, %v; want an error naming %s", c.second, e, err, c.names)
		}
	}
	ws := s.dial(t, "/v1/sandboxes/"+id+"/exec/stream")
	ws.send(`{"type":"start","cmd":"` + strings.Repeat("x", 1<<20) + `"}`)
	ws.closed(websocket.StatusMessageTooBig)
	s.want(t, "DELETE", "/v1/sandboxes/"+id, nil, 204)
}
